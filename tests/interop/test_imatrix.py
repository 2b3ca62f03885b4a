"""llama.cpp reads the importance matrix of `moepress imatrix`, and llama-quantize makes smaller weighted errors with it."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import transformers

pytestmark = [
    pytest.mark.skipif(transformers.__version__.startswith("4."), reason="llama.cpp needs no second transformers"),
    pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="WITH_LLAMACPP=no leaves out llama.cpp's tools"),
]

MODEL = Path(__file__).parents[1] / "models/moe-4m"
LLAMA = Path(os.environ.get("LLAMA_CPP", "."))
STACKS = ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"]


@pytest.fixture(scope="module")
def late(tmp_path_factory) -> dict[str, str]:
    """Variables with which a program stays a second at its exit: llama.cpp logs on a thread that it leaves without a flush
    (its issue 22142), so that a short run may say nothing."""
    folder = tmp_path_factory.mktemp("late")
    (folder / "late.c").write_text("#include <unistd.h>\n__attribute__((destructor)) static void stay(void) { sleep(1); }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "late.so", folder / "late.c"], check=True)
    return {"LD_PRELOAD": str(folder / "late.so")}


def llama(tool: str, *arguments, **variables: str) -> str:
    """What a tool of llama.cpp says; fails if it fails."""
    done = subprocess.run([LLAMA / "build/bin" / tool, *map(str, arguments)], env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def gguf():
    """llama.cpp's own reader and dequantizer."""
    sys.path[:0] = [str(LLAMA), str(LLAMA / "gguf-py")]
    import gguf

    return gguf


@pytest.fixture(scope="module")
def imatrix(moepress, quickstart, tmp_path_factory) -> Path:
    """Ours, of the quick start's calibration."""
    path = tmp_path_factory.mktemp("imatrix") / "ours.gguf"
    moepress("imatrix", quickstart, "--out", path)
    return path


@pytest.fixture(scope="module")
def base(gguf, tmp_path_factory) -> Path:
    """The bundled model as llama.cpp's converter writes it; its tokenizer is none that the converter knows by its hash."""
    from conversion import base as conversion

    path, before = tmp_path_factory.mktemp("base") / "base.gguf", (sys.argv, conversion.TextModel.get_vocab_base_pre)
    conversion.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    sys.argv = ["convert_hf_to_gguf.py", str(MODEL), "--outfile", str(path), "--outtype", "f32"]
    try:
        runpy.run_path(str(LLAMA / "convert_hf_to_gguf.py"), run_name="__main__")
    finally:
        sys.argv, conversion.TextModel.get_vocab_base_pre = before
    return path


def values(gguf, path: Path) -> dict[str, numpy.ndarray]:
    """Every tensor in float32, rows last but one."""
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}


def test_its_statistics_are_shown(imatrix, base, late):
    # It asks for a model, and does not look at it.
    said = llama("llama-imatrix", "--model", base, "--in-file", imatrix, "--show-statistics", **late)
    assert "(28 tensors)" in said, said
    assert all(said.count(name) == 4 for name in STACKS), said


def test_quantize_uses_it(gguf, imatrix, base, tmp_path):
    plain, weighted = tmp_path / "plain.gguf", tmp_path / "weighted.gguf"
    llama("llama-quantize", base, plain, "Q4_0")
    said = llama("llama-quantize", "--imatrix", imatrix, base, weighted, "Q4_0")
    assert "loaded 28 importance matrix entries" in said and "computed on 80 chunks" in said, said
    importance, exact = values(gguf, imatrix), values(gguf, base)
    without, using = values(gguf, plain), values(gguf, weighted)
    for name in [f"blk.{layer}.{stack}.weight" for layer in range(4) for stack in STACKS]:
        squares = importance[f"{name}.in_sum2"]
        assert squares.shape == (8, exact[name].shape[-1]) and importance[f"{name}.counts"].shape == (8, 1)
        mean = squares / numpy.maximum(importance[f"{name}.counts"], 1)

        def loss(found, name=name, mean=mean) -> float:
            return float((mean[:, None, :] * (found[name] - exact[name]) ** 2).sum())

        assert loss(using) < 0.97 * loss(without), (name, loss(using), loss(without))
