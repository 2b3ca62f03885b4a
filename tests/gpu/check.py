"""Emitted kernels on a GPU, in one call: correctness first, then time. Needs torch with CUDA, cc, and a folder that `moepress emit` wrote.

    python tests/gpu/check.py OUT/kernels [--seed N] [--layers 20] [--tokens 1,4,16,64]

A layer is made of random words (every word is a valid code), so no checkpoint is read. Correctness: dequantized weights bit for bit with
the Python reader; whole layers against f64; the same bits from run to run; workspaces and outputs poisoned with NaN; what the loader has
to refuse. Time: one CUDA graph over `--layers` different layers, so that weights are cold, median of 50 replays, beside a bf16 loop of
torch over the experts that are chosen. Written without a GPU at hand: not yet run on one.
"""

import argparse
import ctypes
import json
import pathlib
import statistics
import struct
import subprocess
import sys
import tempfile

import torch


class Projection(ctypes.Structure):
    _fields_ = [
        ("arena", ctypes.c_void_p),
        ("arena_bytes", ctypes.c_uint64),
        ("host_table", ctypes.c_void_p),
        ("device_table", ctypes.c_void_p),
        ("entries", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    ]


def random_arena(shape, experts, forms, gate_up, generator):
    """Arena and table of random words in the forms (bits, log2 of the group, flags) that the kernels are compiled for; scales of about the
    size that keeps activations small."""
    rows = 2 * -(-shape[0] // 32) * 32 if gate_up else -(-shape[0] // 64) * 64
    columns, parts, table, end = -(-shape[1] // 128) * 128, [], [], 0
    order = sorted(range(experts), key=lambda e: (-forms[e % len(forms)][0], e))
    for expert in order:
        bits, log2, flags = forms[expert % len(forms)]
        words = torch.randint(0, 256, (rows * columns * bits // 8,), dtype=torch.uint8, generator=generator)
        groups, kind = rows * (1 if log2 == 255 else columns >> log2), (torch.bfloat16, torch.float16, torch.float32)[flags >> 9 & 3]
        scales = (torch.rand(groups, generator=generator) + 0.5) / (2**bits * shape[1] ** 0.5)
        parts_of, offsets = [words, scales.to(kind).view(torch.uint8)], []
        if flags & 0x20:
            parts_of.append(torch.randint(0, 256 if bits <= 4 else 2**bits, (groups // 2 if bits <= 4 else groups,), dtype=torch.uint8, generator=generator))
        elif flags & 0x40:
            parts_of.append((-scales * 2 ** (bits - 1)).to(kind).view(torch.uint8))
        for part in parts_of:
            offsets.append(end // 16)
            padding = -part.numel() % 256
            parts += [part, torch.zeros(padding, dtype=torch.uint8)]
            end += part.numel() + padding
        offsets += [0xFFFFFFFF] * (4 - len(offsets))
        table.append(struct.pack("<4I2B3H2I", *offsets, bits, log2, flags | (0x10 if gate_up else 0), rows // 64, columns // 128, expert, 0))
    return torch.cat(parts), torch.tensor(list(b"".join(table)), dtype=torch.uint8)


class Kernels:
    def __init__(self, folder):
        self.manifest = json.loads((folder / "manifest.json").read_text())
        built = pathlib.Path(tempfile.mkdtemp()) / "mq_loader.so"
        subprocess.run(["cc", "-O2", "-D_GNU_SOURCE", "-fPIC", "-shared", folder / "mq_loader.c", "-ldl", "-o", built], check=True)
        self.lib = ctypes.CDLL(str(built))
        self.lib.mq_last_error.restype = ctypes.c_char_p
        self.lib.mq_workspace_bytes.restype = ctypes.c_size_t
        self.model = ctypes.c_void_p()
        self.call("mq_open", str(folder).encode(), ctypes.byref(self.model))

    def call(self, name, *arguments):
        if getattr(self.lib, name)(*arguments):
            raise RuntimeError(f"{name}: {self.lib.mq_last_error().decode()}")

    def forward(self, layer, x, ids, weights):
        tokens, top_k = ids.shape
        size = self.lib.mq_workspace_bytes(tokens, top_k, self.manifest["experts"])
        if layer.workspace.numel() < size:
            layer.workspace = torch.full((size,), 255, dtype=torch.uint8, device="cuda")
        out = torch.full_like(x, float("nan"))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        pointer = [ctypes.c_void_p(t.data_ptr()) for t in (x, ids, weights, out, layer.workspace)]
        ld = ctypes.c_int64(x.stride(0))
        self.call("mq_moe_forward", layer.handle, pointer[0], ld, pointer[1], 64, pointer[2], top_k, pointer[3], ld, tokens, pointer[4],
                  ctypes.c_size_t(layer.workspace.numel()), stream)
        return out


class Layer:
    def __init__(self, kernels, mk, generator):
        m = kernels.manifest
        shapes = [(m["inner"], m["hidden"]), (m["hidden"], m["inner"])]
        made = [random_arena(shape, m["experts"], m["forms"]["down" if i else "gate_up"], i == 0, generator) for i, shape in enumerate(shapes)]
        self.held = [[t.cuda() for t in pair] + [pair[1]] for pair in made]
        self.parts = [Projection(a.data_ptr(), a.numel(), host.data_ptr(), t.data_ptr(), m["experts"], 0) for a, t, host in self.held]
        self.arenas = {name: mk.Arena(a, t, shape) for name, (a, t), shape in zip(("gate_up", "down"), made, shapes)}
        self.workspace, self.handle = torch.empty(0, dtype=torch.uint8, device="cuda"), ctypes.c_void_p()
        kernels.call("mq_layer_bind", kernels.model, ctypes.byref(self.parts[0]), ctypes.byref(self.parts[1]), None, 0, ctypes.byref(self.handle))


def routing(m, tokens, generator):
    ids = torch.stack([torch.randperm(m["experts"], generator=generator)[: m["top_k"]] for _ in range(tokens)])
    weights = torch.rand(tokens, m["top_k"], generator=generator)
    return ids.cuda(), (weights / weights.sum(1, keepdim=True)).cuda()


def correct(kernels, layer, generator):
    m = kernels.manifest
    for projection, name in enumerate(("gate_up", "down")):
        for expert in range(min(m["experts"], 2 * len(m["widths"]))):
            meant = torch.cat(layer.arenas[name].weights(expert)).to(torch.bfloat16)
            out = torch.full(meant.shape, float("nan"), dtype=torch.bfloat16, device="cuda")
            kernels.call("mq_dequant", layer.handle, projection, expert, ctypes.c_void_p(out.data_ptr()), 0, None)
            torch.cuda.synchronize()
            if not torch.equal(out.cpu(), meant):
                raise AssertionError(f"{name}, expert {expert}: dequantized weights differ")
    for tokens in (1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 257):
        x = torch.randn(tokens, m["hidden"], generator=generator).to(torch.bfloat16).cuda()
        ids, weights = routing(m, tokens, generator)
        out, again = kernels.forward(layer, x, ids, weights), kernels.forward(layer, x, ids, weights)
        meant = torch.zeros(tokens, m["hidden"], dtype=torch.float64)
        for token, slot in ((t, s) for t in range(tokens) for s in range(m["top_k"])):
            gate, up = (w.double() for w in layer.arenas["gate_up"].weights(int(ids[token, slot])))
            row = x[token].double().cpu()
            mid = (torch.nn.functional.silu(gate @ row) * (up @ row)).to(torch.bfloat16).double()
            meant[token] += float(weights[token, slot]) * (layer.arenas["down"].weights(int(ids[token, slot]))[0].double() @ mid)
            if tokens > 17 and token > 8:
                break
        rows = slice(0, 9 if tokens > 17 else tokens)
        apart = float((out.double().cpu()[rows] - meant[rows]).norm() / meant[rows].norm())
        if not apart <= 5e-3 or not torch.equal(out, again):
            raise AssertionError(f"{tokens} tokens: {apart:.2e} from f64, the same twice: {torch.equal(out, again)}")
        print(f"{tokens} tokens: {apart:.1e} from f64, the same bits twice")


def timed(calls):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    for _ in range(50):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times), min(times)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--tokens", default="1,4,16,64")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing was run")
        return 3
    sys.path.insert(0, str(args.folder / "python"))
    import moepress_kernels as mk

    mk.self_test(args.folder)
    generator = torch.Generator().manual_seed(args.seed)
    kernels = Kernels(args.folder)
    m = kernels.manifest
    print(torch.cuda.get_device_name(), {k: m[k] for k in ("hidden", "inner", "experts", "top_k", "widths")})
    correct(kernels, Layer(kernels, mk, generator), generator)
    layers = [Layer(kernels, mk, generator) for _ in range(args.layers)]
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    copy = 2 * source.numel() / timed([lambda: source.clone()])[0] / 1e3
    print(f"copy: {copy:.0f} GB/s")
    for tokens in map(int, args.tokens.split(",")):
        x = torch.randn(tokens, m["hidden"], generator=generator).to(torch.bfloat16).cuda()
        routes = [routing(m, tokens, generator) for _ in layers]
        for layer, route in zip(layers, routes):
            kernels.forward(layer, x, *route)
        middle, least = timed([lambda l=l, r=r: kernels.forward(l, x, *r) for l, r in zip(layers, routes)])
        used = sum(
            (arena.entries[int(e)].bits / 8 + 2 / 128) * arena.shape[0] * arena.shape[1] * (2 if name == "gate_up" else 1)
            for layer, (ids, _) in zip(layers, routes) for e in ids.unique() for name, arena in layer.arenas.items()
        ) / len(layers)
        print(f"{tokens} tokens: {middle:.1f} us a layer (least {least:.1f}), {used / middle / 1e3:.0f} GB/s, {used / middle / 10 / copy:.0f}% of a copy")
    return 0


if __name__ == "__main__":
    sys.exit(main())
