"""The emitted kernels through the Python package and the C loader, as on a GPU, but for the driver: a libcuda.so.1 of the tests runs every
launch on the CPU (kernels/cuda/mq_host_driver.cpp)."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import transformers
from test_native import MODEL, exported

CUDA = Path(__file__).parents[2] / "kernels/cuda"
pytestmark = pytest.mark.skipif(transformers.__version__.startswith("4."), reason="once is enough")

SCRIPT = """
    import json, pathlib, sys
    import torch
    from safetensors.torch import load_file
    import moepress_kernels as mk

    out = pathlib.Path(sys.argv[1])
    tensors = {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}
    kernels = mk.cuda.Kernels(out / "kernels")
    m = kernels.manifest
    aligned = lambda t: (s := torch.empty(t.numel() + 256, dtype=t.dtype))[(a := -s.data_ptr() % 256) : a + t.numel()].copy_(t.flatten())
    shapes = {"gate_up": (m["inner"], m["hidden"]), "down": (m["hidden"], m["inner"])}
    arenas = {p: mk.Arena(aligned(tensors[(n := m["layers"][0][p]["tensor"]) + ".arena"]), tensors[n + ".table"], s) for p, s in shapes.items()}
    silu = torch.nn.SiLU()
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        layer = kernels.bind(arenas["gate_up"], arenas["down"], dtype)
        for tokens, whole in ((1, torch.int64), (9, torch.int32), (17, torch.int64)):
            x = torch.randn(tokens, m["hidden"] + 6, generator=g).to(dtype)[:, : m["hidden"]]
            index = torch.stack([torch.randperm(m["experts"], generator=g)[: m["top_k"]] for _ in range(tokens)]).to(whole)
            weights = torch.rand(tokens, m["top_k"], generator=g).double()
            said = kernels.forward(layer, x, index, weights, 0)
            meant = mk.experts_forward(arenas, silu, x.float(), index, weights.float())
            apart = float((said.float() - meant).norm() / meant.norm())
            assert said.dtype == dtype and apart <= 5e-3, (dtype, tokens, apart)
            assert torch.equal(said, kernels.forward(layer, x, index, weights, 0)), "the same bits twice"
            index[0] = -1
            assert not kernels.forward(layer, x, index, weights, 0)[0].any(), "a token whose experts are elsewhere"
    for wrong in (lambda: kernels.forward(layer, x.float(), index, weights, 0), lambda: kernels.forward(layer, x, index, weights[:1], 0)):
        try:
            wrong()
        except ValueError as error:
            assert "for kernels of" in str(error)
        else:
            raise AssertionError("taken")
    crooked = mk.Arena(tensors[m["layers"][0]["down"]["tensor"] + ".arena"][1:], arenas["down"].table, shapes["down"])
    try:
        kernels.bind(arenas["gate_up"], crooked, torch.bfloat16)
    except RuntimeError as error:
        assert "down" in str(error), error
    else:
        raise AssertionError("taken")
    assert mk.cuda.objection(arenas, torch.nn.GELU(), x) == "the activation is GELU; the kernels have silu"
    assert mk.cuda.objection(arenas, silu, x) is None
    print("done")
"""


def test_layers_are_those_of_the_reference(moepress, tmp_path):
    out = exported(moepress, tmp_path, MODEL, bits=3, group=128, grid="half")
    driver = tmp_path / "driver"
    driver.mkdir()
    for file in (out / "kernels/mq_moe.cu", CUDA / "mq_host.h", CUDA / "mq_host_driver.cpp"):
        shutil.copy(file, driver)
    subprocess.run(["g++", "-std=c++17", "-w", "-O1", "-shared", "-fPIC", "mq_host_driver.cpp", "-o", "libcuda.so.1"], cwd=driver, check=True)
    # The driver of the tests does not look at it.
    (out / "kernels/cubin").mkdir(exist_ok=True)
    (out / "kernels/cubin/mq_moe.sm_90a.cubin").write_bytes(b"no machine code")
    paths = {"LD_LIBRARY_PATH": str(driver), "PYTHONPATH": str(out / "kernels/python"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    run = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(out)]
    done = subprocess.run(run, capture_output=True, text=True, env=os.environ | paths, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
