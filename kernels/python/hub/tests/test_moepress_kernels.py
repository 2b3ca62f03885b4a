"""Run by kernel-builder's `ci-test`, and by pytest where the package is on the path."""

import json

import moepress_kernels as mk
import pytest
import torch

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.mark.kernels_ci
def test_golden_tiles_decode_to_their_sums():
    manifest = json.loads((mk.kernels_folder() / "manifest.json").read_text())
    assert mk.self_test() == manifest["widths"]


@pytest.mark.kernels_ci
@pytest.mark.parametrize("device", DEVICES)
def test_every_device_decodes_the_same(device):
    golden = json.loads((mk.kernels_folder() / "tests/golden.json").read_text())
    for case in golden["cases"]:
        parts = (torch.tensor(list(bytes.fromhex(case[part])), dtype=torch.uint8) for part in ("arena", "table"))
        arena = mk.Arena(*parts, case["shape"])
        here = arena.weights(0)[0]
        there = arena.to(device).weights(0)[0]
        assert there.device.type == device and torch.equal(there.cpu(), here), case["bits"]
