"""transformers loads pruned, repaired and merged checkpoints of every family whole and computes what `moepress eval` computes."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import EXACT, distance
from safetensors.torch import load_file, save_file

PARITY = Path(__file__).resolve().parent.parent / "parity"
FOUR = transformers.__version__.startswith("4.")
NAMES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "deepseek_v2_group", "deepseek_v3_mtp"]
"""One of each family that transformers has, with groups and a multi-token-prediction layer among them."""
WRONG_IN_FOUR = {"deepseek_v2_group"}
"""4.57.3 leaves mscale out of DeepSeek-V2's softmax scale."""
GROUPED = {"deepseek_v2_group", "deepseek_v3_mtp"}
"""Their groups of experts cannot be merged across."""

RECIPE = """
schema = 1
model = "{model}"
out = "{out}"

[calibrate]
corpus = ["{text}/a.txt", "{text}/b.txt"]
samples = 4
tokens = 48

{reduction}

[quantize.rtn]

[allocate]
bits = 4
group = 8
exclude = {exclude}

[export.compressed_tensors]
[export.dense]
"""
REDUCTIONS = {
    "pruned": '[prune.easy_ep]\nkeep = 0.5\nmtp = "drop"',
    "repaired": '[prune.reap]\nkeep = 0.5\nmtp = "drop"\n[repair.removal]\nsteps = 20\ntokens = 128',
    "merged": '[merge.weighted_mean]\nkeep = 0.5\nmtp = "drop"',
}
CASES = [(name, how) for name in NAMES for how in REDUCTIONS if not (how == "merged" and name in GROUPED)]


def readable(name: str, folder: Path) -> Path:
    """A copy of a tiny checkpoint with a tokenizer of a word a token, and two texts beside it."""
    model = folder / "model"
    shutil.copytree(PARITY / name, model)
    config = json.loads((model / "config.json").read_text())
    if config.get("n_group"):  # Groups that are still large enough with half of their experts.
        config |= {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
        (model / "config.json").write_text(json.dumps(config))
        # 4.57.3 gives the groups left out a score of 0, the original −∞: with biases above 0 both choose alike.
        tensors = load_file(model / "model.safetensors")
        tensors |= {name: bias.abs() for name, bias in tensors.items() if name.endswith("e_score_correction_bias")}
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    size = config["vocab_size"]
    words = {"type": "WordLevel", "vocab": {f"t{i}": i for i in range(size)}, "unk_token": "t0"}
    nothing = dict.fromkeys(["normalizer", "post_processor", "decoder", "truncation", "padding"])
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": words} | nothing
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    for seed, text in enumerate(["a.txt", "b.txt"]):
        draw = random.Random(seed)
        (folder / text).write_text(" ".join(f"t{draw.randrange(3, size)}" for _ in range(400)))
    return model


@pytest.mark.parametrize(("name", "how"), [case for case in CASES if not (FOUR and case[0] in WRONG_IN_FOUR)])
def test_fewer_experts(name, how, moepress, ours, theirs, tmp_path):
    model, out, recipe = readable(name, tmp_path), tmp_path / "out", tmp_path / "recipe.toml"
    config = json.loads((model / "config.json").read_text())
    exclude = ["*.q_b_proj"] if config.get("q_lora_rank") else []
    recipe.write_text(RECIPE.format(model=model, out=out, text=tmp_path, reduction=REDUCTIONS[how], exclude=json.dumps(exclude)))
    moepress("run", recipe, "--quiet")
    ids = torch.randint(3, config["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(1))

    counts = [key for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config]
    left = json.loads((out / "config.json").read_text())
    assert counts and all(left[key] * 2 == config[key] for key in counts)
    dense = distance(ours(out / "dense", ids)["logits"], theirs(out / "dense", ids))
    options = [] if FOUR else ["--round-experts", "bf16"]
    packed = distance(ours(out, ids, *options)["logits"], theirs(out, ids))
    print(f"{name}, {how}: dense {dense:.1e}, packed {packed:.1e}")
    assert dense <= EXACT
    assert packed <= EXACT
