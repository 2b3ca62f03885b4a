"""What the interop tests share: the program, its output, a reader of its dumps."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ROWS, TOKENS = 2, 64
"""Tokens that are compared, drawn from the whole vocabulary."""

HUB = os.environ.get("KERNELS_HUB")
"""Where Hugging Face's library `kernels` lies, for a path of its own."""

EXACT = 1e-4
"""Two float32 implementations that sum in different orders."""
ROUNDED = 5e-3
"""transformers 5 dequantizes packed experts in bf16: a relative error of 1.4e-3 a matrix at 4 bits."""


@pytest.fixture(scope="session")
def moepress():
    """Runs the program with some arguments; fails with what it says."""

    def run(*arguments) -> None:
        done = subprocess.run([os.environ["MOEPRESS"], *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    return run


@pytest.fixture(scope="session")
def quickstart() -> Path:
    """The output directory of the quick start."""
    return Path(os.environ["MOEPRESS_OUT"])


@pytest.fixture
def ours(moepress, tmp_path):
    """What `moepress eval --dump` writes of a checkpoint: `logits` `[rows, tokens, vocab]`, and what the layers did."""

    def dumped(folder: Path, ids: torch.Tensor, *options) -> dict[str, torch.Tensor]:
        tokens, dump = tmp_path / "ids.json", tmp_path / "dump.safetensors"
        tokens.write_text(json.dumps(ids.tolist()))
        moepress("eval", folder, "--tokens", tokens, "--dump", dump, *options)
        return load_file(dump)

    return dumped


@pytest.fixture
def theirs():
    """Logits of a checkpoint by transformers in float32; fails if a key is missing, unexpected (other than of the layers
    that begin with `beyond`, which transformers does not have) or of another shape."""

    def logits(folder: Path, ids: torch.Tensor, beyond: str | None = None) -> torch.Tensor:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
        if beyond:
            info["unexpected_keys"] = [key for key in info["unexpected_keys"] if not key.startswith(beyond)]
        wrong = {what: sorted(map(str, keys)) for what, keys in info.items() if keys}
        assert not wrong, f"transformers {transformers.__version__}: {wrong}"
        # Whatever dtype is asked for, transformers 5.17 leaves packed experts (and a router that it renames) in bf16, and its
        # grouped product then rounds activations to bf16 as well: logits move by 2e-3, and Mixtral's router stops with an error.
        for parameter in model.parameters():
            if parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()
        with torch.no_grad():
            return model.eval()(ids, use_cache=False).logits

    return logits


@pytest.fixture
def ids(quickstart) -> torch.Tensor:
    """Token ids for the quick start's model, the same every time."""
    vocabulary = json.loads((quickstart / "config.json").read_text())["vocab_size"]
    return torch.randint(0, vocabulary, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """`‖a − b‖ / ‖b‖`; NaN counts as far."""
    d = float((a.double() - b.double()).norm() / b.double().norm())
    return d if d == d else float("inf")
