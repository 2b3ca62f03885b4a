"""The Python package that `moepress emit` writes makes transformers load a native checkpoint, its experts packed, and compute what
`moepress eval` computes from the same codes."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import EXACT, distance
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

TESTS = Path(__file__).parents[1]
MODEL = TESTS / "models" / "moe-4m"
FIVE = pytest.mark.skipif(transformers.__version__.startswith("4."), reason="experts are modules of their own before transformers 5")
FAMILIES = ["deepseek_v2", "deepseek_v3_mtp", "mixtral", "olmoe", "phimoe", "qwen2_moe"]
"""Tiny checkpoints of tests/parity; moe-4m is of the family qwen3_moe."""

RECIPE = """
schema = 1
model = "{model}"
out = "{out}"
[quantize.rtn]
[allocate]
bits = {bits}
group = {group}
grid = "{grid}"
[export.native]
"""


def mix(plan: Path):
    """Every expert of each layer another width, grid and group: what no other format holds."""
    said = json.loads(plan.read_text())
    for name, tensor in said["tensors"].items():
        if ".experts." in name:
            expert, down = int(name.split(".experts.")[1].split(".")[0]), "down_proj" in name
            grid = ["half", "asym", "sym"][expert % 3] if (bits := [1, 2, 3, 4, 5, 6, 8][(expert + down) % 7]) > 1 else "half"
            tensor["quantize"] |= {"bits": bits, "grid": grid, "group": {"size": [32, 64, 128][expert % 3]}}
    plan.write_text(json.dumps(said))


def exported(moepress, work: Path, model: Path, **settings) -> Path:
    """A native output with its kernels; `bits = "mixed"` for all of them."""
    recipe, out = work / "recipe.toml", work / "out"
    mixed = settings["bits"] == "mixed"
    recipe.write_text(RECIPE.format(**settings | {"model": model, "out": out, "bits": 4 if mixed else settings["bits"]}))
    if mixed:
        moepress("plan", recipe)
        mix(out / "moepress/plan.json")
        moepress("apply", recipe)
    else:
        moepress("run", recipe)
    moepress("emit", out)
    return out


def drop(folder: Path, output: str):
    """Two experts of every layer, whose means a seed gives."""
    path = folder / "moepress/plan.json"
    said, means = json.loads(path.read_text()), {}
    for name in said["tensors"]:
        layer, _, rest = name.removeprefix("model.layers.").partition(".mlp.experts.")
        if rest.split(".")[0] in ("1", "6"):
            said["tensors"][name] = {"substitute": output}
            means[f"{layer}.{rest.split('.')[0]}"] = None
    path.write_text(json.dumps(said))
    hidden = json.loads((MODEL / "config.json").read_text())["hidden_size"]
    seed = torch.Generator().manual_seed(7)
    means = {name: torch.randn(hidden, generator=seed) * 0.3 for name in means}
    save_file(means, path.with_name("dropped.safetensors"), metadata={"moepress": "constants"})


@pytest.fixture(scope="module", params=[1, 3, "mixed"])
def native(request, moepress, tmp_path_factory):
    return exported(moepress, tmp_path_factory.mktemp(f"native{request.param}"), MODEL, bits=request.param, group=128, grid="half")


def imported(folder: Path):
    """The package beside a checkpoint, anew."""
    for name in [name for name in sys.modules if name.split(".")[0] == "moepress_kernels"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder / "kernels/python"))
    import moepress_kernels

    sys.path.pop(0)
    return moepress_kernels


@pytest.fixture
def package(native):
    return imported(native)


@FIVE
def test_logits_are_those_of_the_program(native, package, ids, ours, theirs):
    expected = ours(native, ids)["logits"]
    apart = distance(theirs(native, ids), expected)
    print(f"{apart:.1e}")
    assert apart <= EXACT
    assert distance(package.load(native)(ids).logits, expected) <= EXACT


@FIVE
@pytest.mark.parametrize("output", ["mean", "zero"])
def test_dropped_experts_put_out_what_the_program_says(output, moepress, ours, theirs, ids, tmp_path):
    folder = exported(moepress, tmp_path, MODEL, bits=4, group=128, grid="sym")
    whole = ours(folder, ids)["logits"]
    shutil.rmtree(folder)
    moepress("plan", tmp_path / "recipe.toml")
    drop(folder, output)
    moepress("apply", tmp_path / "recipe.toml")
    moepress("emit", folder)
    package = imported(folder)
    expected = ours(folder, ids)["logits"]
    assert distance(whole, expected) > 0.01, "dropping two experts of each layer shows"
    assert distance(theirs(folder, ids), expected) <= EXACT
    assert distance(package.load(folder)(ids).logits, expected) <= EXACT


@FIVE
@pytest.mark.parametrize("name", FAMILIES)
def test_other_families(name, moepress, ours, theirs, tmp_path):
    folder = exported(moepress, tmp_path, TESTS / "parity" / name, bits=5, group='"channel"', grid="sym")
    package = imported(folder)
    config = json.loads((folder / "config.json").read_text())
    ids = torch.randint(3, config["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(1))
    beyond = f"model.layers.{config['num_hidden_layers']}." if config.get("num_nextn_predict_layers") else None
    assert distance(theirs(folder, ids, beyond), ours(folder, ids)["logits"]) <= EXACT
    model = package.load(folder)
    assert not [name for name, _ in model.named_parameters() if ".experts." in name], "experts stay packed"


@pytest.mark.skipif(not transformers.__version__.startswith("4."), reason="transformers 5 does load it")
def test_an_older_transformers_is_refused(native, package):
    with pytest.raises(ImportError, match="needs 5.0 or later"):
        AutoModelForCausalLM.from_pretrained(native)


@FIVE
def test_what_does_not_fit_is_refused(native, package, tmp_path):
    def refused(change, match):
        folder = tmp_path / match.split()[0]
        shutil.copytree(native, folder, ignore=shutil.ignore_patterns("kernels", "moepress"))
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=match):
            AutoModelForCausalLM.from_pretrained(folder)

    refused(lambda c: c["quantization_config"].update(layout="MQT-2"), "layout 'MQT-2'")
    refused(lambda c: c.update(moe_intermediate_size=64), "Qwen3MoeExperts has experts of")
    refused(lambda c: c.update(architectures=["LlamaForCausalLM"], model_type="llama"), "LlamaForCausalLM has no such module")
    arenas = "model.layers.9.mlp.experts.down"
    refused(lambda c: c["quantization_config"]["arenas"].update({arenas: {"of": "experts", "shape": [1, 1]}}), "names this arena")


def test_a_flipped_bit_fails_the_self_test(native, package, tmp_path):
    folder = tmp_path / "kernels"
    shutil.copytree(native / "kernels", folder)
    assert package.self_test(folder)
    golden = json.loads((folder / "tests/golden.json").read_text())
    arena = bytearray.fromhex(golden["cases"][0]["arena"])
    arena[5] ^= 4
    golden["cases"][0]["arena"] = arena.hex()
    (folder / "tests/golden.json").write_text(json.dumps(golden))
    with pytest.raises(AssertionError, match="golden tile"):
        package.self_test(folder)
