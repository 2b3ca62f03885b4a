"""The emitted kernels on CUDA tensors: the C loader by ctypes, nothing else between PyTorch and the driver.

    kernels = Kernels(folder)
    layer = kernels.bind(gate_up, down, torch.bfloat16)     # two Arenas on the device
    out = kernels.forward(layer, x, top_k_index, top_k_weights, stream)

The loader is built from mq_loader.c by `cc`, once for a user and a checkpoint's constants (MOEPRESS_LOADER names a built one instead). Calls
are asynchronous on the stream that they are given, and may be captured in a CUDA graph.
"""

import ctypes
import functools
import hashlib
import json
import os
import pathlib
import subprocess
import tempfile
import warnings

import torch

TYPES = {torch.bfloat16: 0, torch.float16: 1}


class Projection(ctypes.Structure):
    """`mq_projection` of mq_moe.h."""

    _fields_ = [
        ("arena", ctypes.c_void_p),
        ("arena_bytes", ctypes.c_uint64),
        ("host_table", ctypes.c_void_p),
        ("device_table", ctypes.c_void_p),
        ("entries", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    ]


def built(folder):
    """The loader as a shared library."""
    if named := os.environ.get("MOEPRESS_LOADER"):
        return named
    sources = [folder / name for name in ("mq_loader.c", "mq_moe.h", "mq_constants.h")]
    key = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "moepress_kernels" / key
    library = cache / "mq_loader.so"
    if not library.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as part:
            made = pathlib.Path(part) / library.name
            command = ["cc", "-O2", "-std=c11", "-D_GNU_SOURCE", "-fPIC", "-shared", str(sources[0]), "-ldl", "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            made.rename(library)
    return str(library)


class Kernels:
    """An opened folder of emitted kernels, on the device whose context is current."""

    def __init__(self, folder):
        folder = pathlib.Path(folder)
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.lib = ctypes.CDLL(built(folder))
        pointer, i32, i64, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
        self.lib.mq_last_error.restype = ctypes.c_char_p
        self.lib.mq_workspace_bytes.restype, self.lib.mq_workspace_bytes.argtypes = size, [i32, i32, i32]
        self.lib.mq_open.argtypes = [ctypes.c_char_p, pointer]
        self.lib.mq_layer_bind.argtypes = [pointer, pointer, pointer, pointer, i32, pointer]
        self.lib.mq_layer_free.argtypes = [pointer]
        self.lib.mq_moe_forward.argtypes = [pointer, pointer, i64, pointer, i32, pointer, i32, pointer, i64, i32, pointer, size, pointer]
        self.model = ctypes.c_void_p()
        self.call("mq_open", str(folder).encode(), ctypes.byref(self.model))

    def call(self, name, *arguments):
        if getattr(self.lib, name)(*arguments):
            raise RuntimeError(f"{name}: {self.lib.mq_last_error().decode()}")

    def bind(self, gate_up, down, dtype):
        """A layer of two `Arena`s, checked by the loader."""
        return Layer(self, gate_up, down, dtype)

    def forward(self, layer, x, index, weights, stream):
        """What the layer's experts say to x [tokens, hidden]; index and weights are [tokens, top_k]."""
        tokens, top_k = index.shape
        if x.dtype != layer.dtype or x.shape != (tokens, self.manifest["hidden"]) or weights.shape != index.shape:
            raise ValueError(f"x {x.dtype} {tuple(x.shape)}, index {tuple(index.shape)}, weights {tuple(weights.shape)} for kernels of {self.manifest['hidden']}")
        if x.stride(1) != 1 or x.stride(0) % 2 or x.data_ptr() % 4:
            x = x.contiguous()
        index, weights = index.contiguous(), weights.to(torch.float32).contiguous()
        if index.dtype not in (torch.int32, torch.int64):
            index = index.long()
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        size = self.lib.mq_workspace_bytes(tokens, top_k, layer.entries)
        space = torch.empty(size + 255, dtype=torch.uint8, device=x.device)
        self.call(
            "mq_moe_forward", layer.handle, x.data_ptr(), x.stride(0), index.data_ptr(), 8 * index.element_size(), weights.data_ptr(), top_k,
            out.data_ptr(), out.stride(0), tokens, -(-space.data_ptr() // 256) * 256, size, stream,
        )  # fmt: skip
        return out


class Layer:
    """A bound layer; holds what the loader points to."""

    def __init__(self, kernels, gate_up, down, dtype):
        self.kernels, self.dtype, self.handle = kernels, dtype, ctypes.c_void_p()
        self.held, parts = [], []
        for arena in (gate_up, down):
            table = arena.table.flatten()
            host = table.cpu().contiguous()
            self.held += [arena.arena, table, host]
            parts.append(Projection(arena.arena.data_ptr(), arena.arena.numel(), host.data_ptr(), table.data_ptr(), table.numel() // 32, 0))
        self.entries = parts[0].entries
        kernels.call("mq_layer_bind", kernels.model, ctypes.byref(parts[0]), ctypes.byref(parts[1]), None, TYPES[dtype], ctypes.byref(self.handle))

    def __del__(self):
        if self.handle:
            self.kernels.lib.mq_layer_free(self.handle)


@functools.cache
def opened(find, device):
    """The kernels of the folder that `find` gives on a device, or `None`, with a warning that says why."""
    try:
        with torch.cuda.device(device):
            return Kernels(find())
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        warnings.warn(f"moepress_kernels computes in PyTorch, not with its kernels: {said}", stacklevel=2)
        return None


def objection(arenas, act, x):
    """Why the kernels have no form for this call; `None` if they have."""
    if set(arenas) != {"gate_up", "down"}:
        return "gate and up lie in arenas of their own"
    if x.dtype not in TYPES:
        return f"activations are {x.dtype}; the kernels have bfloat16 and float16"
    name = getattr(act, "__name__", type(act).__name__)
    return None if name in ("silu", "SiLU", "SiLUActivation") else f"the activation is {name}; the kernels have silu"


@functools.cache
def told(why):
    warnings.warn(f"moepress_kernels computes in PyTorch, not with its kernels: {why}", stacklevel=3)


def experts_forward(find, arenas, act, x, index, weights):
    """What the experts say, by the kernels; `None`, with a warning the first time, where PyTorch has to."""
    if why := objection(arenas, act, x):
        return told(why)
    kernels = opened(find, x.device)
    if kernels is None:
        return None
    gate_up = arenas["gate_up"]
    layer = getattr(gate_up, "_bound", None)
    where = (kernels, x.dtype, gate_up.arena.data_ptr(), arenas["down"].arena.data_ptr())
    if layer is None or layer[0] != where:
        layer = gate_up._bound = (where, kernels.bind(gate_up, arenas["down"], x.dtype))
    with torch.cuda.device(x.device):
        return kernels.forward(layer[1], x, index, weights, torch.cuda.current_stream().cuda_stream)
