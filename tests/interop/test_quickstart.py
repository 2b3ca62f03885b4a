"""transformers loads both exports of the quick start whole and computes what `moepress eval` computes."""

import json

import torch
import transformers
from conftest import EXACT, ROUNDED, distance

FOUR = transformers.__version__.startswith("4.")


def test_the_dense_export(quickstart, ids, ours, theirs):
    folder = quickstart / "dense"
    assert distance(ours(folder, ids)["logits"], theirs(folder, ids)) <= EXACT


def test_the_packed_export(quickstart, ids, ours, theirs):
    reference = theirs(quickstart, ids)
    exact, rounded = ours(quickstart, ids), ours(quickstart, ids, "--round-experts", "bf16")
    assert distance((exact if FOUR else rounded)["logits"], reference) <= EXACT
    # Without the rounding that transformers 5 does, over the tokens whose experts it leaves as they are: elsewhere logits jump.
    same = torch.ones(ids.numel(), dtype=torch.bool)
    for name in [name for name in exact if name.endswith("topk_index")]:
        same &= (exact[name].sort(-1).values == rounded[name].sort(-1).values).all(-1)
    assert same.float().mean() > 0.95
    assert distance(exact["logits"].flatten(0, 1)[same], reference.flatten(0, 1)[same]) <= ROUNDED


def test_the_packed_export_says_what_it_is(quickstart):
    config = json.loads((quickstart / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"], config["quantization_status"]) == ("compressed-tensors", "pack-quantized", "compressed")


def test_the_tokenizer_came_along(quickstart):
    text = "Grüße: 3 + 4 = 7\n"
    for folder in (quickstart, quickstart / "dense"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
