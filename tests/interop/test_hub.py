"""The project of Hugging Face's `kernels` that `moepress emit` writes: its `build.toml` read by that library, its package loaded by it."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import tomllib

import pytest
import transformers
from conftest import HUB
from test_native import MODEL, exported

pytestmark = [
    pytest.mark.skipif(HUB is None, reason="KERNELS_HUB does not name a folder with the library kernels"),
    pytest.mark.skipif(transformers.__version__.startswith("4."), reason="once is enough"),
]


@pytest.fixture(scope="module")
def emitted(moepress, tmp_path_factory):
    return exported(moepress, tmp_path_factory.mktemp("hub"), MODEL, bits="mixed", group=128, grid="half") / "kernels"


def python(script: str, *arguments, path: str) -> list:
    """What a script prints as JSON under the same interpreter, with this path for its imports."""
    run = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return json.loads(subprocess.run(run, check=True, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}).stdout)


def test_the_library_reads_build_toml(emitted, tmp_path):
    script = """
        import json, sys
        from kernels._rust import Build
        print(json.dumps(sorted(str(backend) for backend in Build.open(sys.argv[1]).general.backends)))
    """
    assert python(script, emitted / "hf", path=HUB) == ["cpu", "cuda"]
    # It is strict: a key that it does not know is an error.
    text = (emitted / "hf/build.toml").read_text()
    (tmp_path / "build.toml").write_text(text.replace("pyext", "pyexts"))
    with pytest.raises(subprocess.CalledProcessError):
        python(script, tmp_path, path=HUB)
    general = tomllib.loads(text)["general"]
    assert general["version"] == 1 and (emitted / "hf/torch-ext" / general["name"].replace("-", "_") / "__init__.py").is_file()


def test_the_library_loads_the_package(emitted, tmp_path):
    # As kernel-builder leaves it: the package, a name for its operators, metadata.
    variant = tmp_path / "build/torch-cpu"
    shutil.copytree(emitted / "hf/torch-ext/moepress_kernels", variant)
    (variant / "_ops.py").write_text("import torch\nops = torch.ops.moepress_kernels_0\n")
    metadata = {"name": "moepress-kernels", "id": "_moepress_kernels_cpu_0", "version": 1, "license": "Apache-2.0", "python-depends": [], "backend": {"type": "cpu"}}
    (variant / "metadata.json").write_text(json.dumps(metadata))
    script = """
        import json, pathlib, sys
        from kernels import get_local_kernel
        kernel = get_local_kernel(pathlib.Path(sys.argv[1]), backend="cpu")
        print(json.dumps([kernel.self_test(), str(kernel.kernels_folder())]))
    """
    widths, folder = python(script, tmp_path, path=HUB)
    assert widths == json.loads((emitted / "manifest.json").read_text())["widths"]
    assert folder == str(variant / "kernels")
    # A golden tile of which one bit has changed is not believed.
    golden = variant / "kernels/tests/golden.json"
    text = golden.read_text()
    at = text.index('"arena":"') + len('"arena":"')
    golden.write_text(text[:at] + format(int(text[at], 16) ^ 1, "x") + text[at + 1 :])
    with pytest.raises(subprocess.CalledProcessError):
        python(script, tmp_path, path=HUB)


def test_the_projects_own_tests_pass(emitted):
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(emitted / "hf/tests")]
    path = os.pathsep.join([str(emitted / "hf/torch-ext"), os.environ.get("PYTHONPATH", "")])
    subprocess.run(run, check=True, env=os.environ | {"PYTHONPATH": path})
