"""The Python package that `moepress emit` writes loads a native checkpoint into transformers, its experts packed, and computes what
`moepress eval` computes from the same codes."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import transformers
from conftest import EXACT, distance

MODEL = Path(__file__).parents[1] / "models" / "moe-4m"

RECIPE = """
schema = 1
model = "{model}"
out = "{out}"
[quantize.rtn]
[allocate]
bits = {bits}
group = 128
grid = "half"
[export.native]
"""


@pytest.fixture(scope="module", params=[1, 3, 6])
def native(request, moepress, tmp_path_factory):
    out = tmp_path_factory.mktemp(f"native{request.param}")
    recipe = out / "recipe.toml"
    recipe.write_text(RECIPE.format(model=MODEL, out=out / "out", bits=request.param))
    moepress("run", recipe)
    moepress("emit", out / "out")
    return out / "out"


@pytest.fixture
def package(native):
    sys.path.insert(0, str(native / "kernels/python"))
    sys.modules.pop("moepress_kernels", None)
    import moepress_kernels

    yield moepress_kernels
    sys.path.pop(0)


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="experts are modules of their own before transformers 5")
def test_logits_are_those_of_the_program(native, package, ids, ours):
    logits = package.load(native)(ids).logits
    assert distance(ours(native, ids)["logits"], logits) <= EXACT


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
