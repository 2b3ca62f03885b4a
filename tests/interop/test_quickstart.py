"""transformers loads both exports of the quick start whole and computes what `moepress eval` computes."""

import json

import transformers
from conftest import EXACT, ROUNDED, distance

FOUR = transformers.__version__.startswith("4.")


def test_the_dense_export(quickstart, ids, ours, theirs):
    folder = quickstart / "dense"
    assert distance(ours(folder, ids), theirs(folder, ids)) <= EXACT


def test_the_packed_export(quickstart, ids, ours, theirs):
    reference = theirs(quickstart, ids)
    exact = distance(ours(quickstart, ids), reference)
    rounded = distance(ours(quickstart, ids, "--round-experts", "bf16"), reference)
    print(f"packed {exact:.1e}, packed and rounded {rounded:.1e}")
    assert exact <= ROUNDED
    assert (exact if FOUR else rounded) <= EXACT


def test_the_packed_export_says_what_it_is(quickstart):
    config = json.loads((quickstart / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"], config["quantization_status"]) == ("compressed-tensors", "pack-quantized", "compressed")


def test_the_tokenizer_came_along(quickstart):
    text = "Grüße: 3 + 4 = 7\n"
    for folder in (quickstart, quickstart / "dense"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
