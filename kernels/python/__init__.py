"""Reads the MQT-1 layout in PyTorch, on any device, from the specification alone, and calls the emitted kernels on CUDA tensors.

    import moepress_kernels as mk        # transformers 5 then loads native checkpoints by from_pretrained
    model = mk.load("out/")              # the same in one call; routed experts stay packed
    mk.self_test("out/kernels")          # decodes the golden tiles; raises if one bit differs

Codes are unsigned, `w = (q - z) * s`, or `s * q + o` where offsets are stored. The bytes are described in the heading of
kernels/src/layout/mod.rs of moepress.
"""

import functools
import importlib.util
import json
import pathlib
import struct

import torch

from . import cuda

LAYOUT = "MQT-1"
NONE = 0xFFFFFFFF
GATE_UP, ZEROS, OFFSET, HALF = 0x10, 0x20, 0x40, 0x80
SCALES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def _places(bits):
    """For each code of a slab: word, bit and width of its first piece, and of its second (width 0: there is none). [16, 128, 6]."""
    places = torch.zeros(16, 128, 6, dtype=torch.int64)
    vector = 2 if bits % 2 else 4

    def address(lane, s):
        return s // vector * 32 * vector + lane * vector + s % vector

    for lane in range(32):
        g, t = lane >> 2, lane & 3
        for half in range(2):
            for i in range(32):
                j, r, e = i >> 3, (i >> 1) & 3, i & 1
                row, k, p = g + 8 * (r & 1), 64 * half + 16 * j + 8 * (r >> 1) + 2 * t + e, i >> 1
                if bits == 6 and p >= 12:
                    n = p - 12
                    first, second = (n, 12 + 16 * e, 4), (4 + n // 2, 12 + 2 * (n % 2) + 16 * e, 2)
                else:
                    fields = 16 // bits
                    first, second = (p // fields, bits * (p % fields) + 16 * e, bits), (0, 0, 0)
                if bits in (3, 5) and p == 15:
                    # One bit in each word; told apart by a negative width.
                    first, second = (0, 15 + 16 * e, -1), (0, 0, 0)
                places[row, k] = torch.tensor(
                    [address(lane, half * bits + first[0]), first[1], first[2], address(lane, half * bits + second[0]), second[1], second[2]]
                )
    return places


def _spread(bits):
    """Slab addresses of the words 0 .. bits - 1 of every lane and half: [32, 2, bits]."""
    vector = 2 if bits % 2 else 4
    s = torch.arange(2 * bits).view(1, 2, bits)
    lane = torch.arange(32).view(32, 1, 1)
    return s // vector * 32 * vector + lane * vector + s % vector


def codes_of(words, bits, n_tiles, k_tiles):
    """Codes [64 * n_tiles, 128 * k_tiles] of the words of a tensor."""
    words = words.to(torch.int64).view(n_tiles, k_tiles, 4, 64 * bits) & NONE
    place = _places(bits).to(words.device)
    flat = place.view(-1, 6)

    def piece(at, shift, width):
        return (words[..., at] >> shift) & ((1 << width.clamp(min=0)) - 1)

    codes = piece(flat[:, 0], flat[:, 1], flat[:, 2]) | piece(flat[:, 3], flat[:, 4], flat[:, 5]) << flat[:, 2].clamp(min=0)
    if bits in (3, 5):
        spread = _spread(bits).to(words.device)
        for lane in range(32):
            for half in range(2):
                for e in range(2):
                    row, k = (lane >> 2) + 8, 64 * half + 48 + 8 + 2 * (lane & 3) + e
                    own = words[..., spread[lane, half]] >> (15 + 16 * e) & 1
                    codes[..., row * 128 + k] = (own << torch.arange(bits, device=words.device)).sum(-1)
    codes = codes.view(n_tiles, k_tiles, 4, 16, 128)
    return codes.permute(0, 2, 3, 1, 4).reshape(64 * n_tiles, 128 * k_tiles)


class Entry:
    """One row of an expert table."""

    def __init__(self, raw):
        fields = struct.unpack("<4I2B3H2I", raw)
        self.offsets, self.perm = fields[:3], fields[3]
        self.bits, self.log2_gs, self.flags, self.n_tiles, self.k_tiles, self.expert, _ = fields[4:]
        if self.flags & ~0x6F0 or self.flags >> 9 & 3 == 3 or self.perm != NONE:
            raise ValueError(f"expert {self.expert}: flags {self.flags:#x} are newer than this reader")
        if self.bits not in (1, 2, 3, 4, 5, 6, 8):
            raise ValueError(f"expert {self.expert}: {self.bits} bits a code")


class Arena(torch.nn.Module):
    """An arena with its table, as buffers. `shape` is [out, in] of each matrix in it; `experts`, if known, how many the model has, `dropped`
    those of them that put out constants instead and lie in no arena."""

    def __init__(self, arena, table, shape, experts=None, dropped=()):
        super().__init__()
        self.register_buffer("arena", arena)
        self.register_buffer("table", table)
        self.shape, self.experts, self.dropped, self._entries = tuple(shape), experts, dropped, None

    @property
    def entries(self):
        """The table's rows by expert."""
        if self._entries is None:
            raw = bytes(self.table.cpu().flatten().tolist())
            self._entries = {e.expert: e for e in (Entry(raw[i : i + 32]) for i in range(0, len(raw), 32))}
        return self._entries

    def check(self, name):
        """Raises if the table leaves an expert out, points outside the arena, or is of another shape."""
        wanted = [e for e in range(1 if self.experts is None else self.experts) if e not in self.dropped]
        if sorted(self.entries) != wanted:
            raise ValueError(f"{name}: the table holds experts {sorted(self.entries)[:8]}, the model has {len(wanted)} beside those that are dropped")
        for e in self.entries.values():
            rows = self.shape[0] * (2 if e.flags & GATE_UP else 1)
            if (e.n_tiles, e.k_tiles) != (-(-rows // 64), -(-self.shape[1] // 128)):
                raise ValueError(f"{name}: expert {e.expert} has {e.n_tiles} by {e.k_tiles} tiles, {list(self.shape)} needs others")
            if 16 * e.offsets[0] + e.n_tiles * e.k_tiles * 1024 * e.bits > self.arena.numel():
                raise ValueError(f"{name}: the codes of expert {e.expert} do not lie in an arena of {self.arena.numel()} bytes")

    def _part(self, offset, count, dtype):
        size = torch.empty((), dtype=dtype).element_size()
        start = offset * 16
        if start + count * size > self.arena.numel():
            raise ValueError(f"{count * size} bytes at {start} do not lie in an arena of {self.arena.numel()}")
        return self.arena[start : start + count * size].clone().view(dtype)

    def weights(self, expert):
        """The matrices of one expert, [out, in] in f32: one, or gate and up."""
        e, (outputs, inputs) = self.entries[expert], self.shape
        rows, columns = 64 * e.n_tiles, 128 * e.k_tiles
        codes = codes_of(self._part(e.offsets[0], rows * columns * e.bits // 32, torch.int32), e.bits, e.n_tiles, e.k_tiles)
        groups = 1 if e.log2_gs == 0xFF else columns >> e.log2_gs
        scale_type = SCALES[e.flags >> 9 & 3]

        def by_row(values):
            return values.view(e.n_tiles, groups, 64).permute(0, 2, 1).reshape(rows, groups).to(torch.float32).repeat_interleave(columns // groups, 1)

        s, q = by_row(self._part(e.offsets[1], rows * groups, scale_type)), codes.to(torch.float32)
        if e.flags & OFFSET:
            o = by_row(self._part(e.offsets[2], rows * groups, scale_type))
            # One rounding, as a fused step has it.
            w = (s.double() * q.double() + o.double()).float()
        elif e.flags & ZEROS:
            if e.bits <= 4:
                z = self._part(e.offsets[2], rows * groups // 2, torch.uint8)
                z = torch.stack((z & 15, z >> 4), -1).flatten()
            else:
                z = self._part(e.offsets[2], rows * groups, torch.uint8)
            w = (q - by_row(z)) * s
        else:
            w = (q - ((2**e.bits - 1) / 2 if e.flags & HALF else 2 ** (e.bits - 1))) * s
        if e.flags & GATE_UP:
            w = w.view(rows // 16, 2, 8, columns)
            return [w[:, i].reshape(rows // 2, columns)[:outputs, :inputs] for i in range(2)]
        return [w[:outputs, :inputs]]


def experts_forward(arenas, act, hidden_states, top_k_index, top_k_weights, dropped=(), mean=None):
    """What routed experts say: `arenas` maps gate_up and down, or gate, up and down, to an `Arena`; the rest is as transformers 5 has it.

    On a CUDA device the kernels of the checkpoint do it, where they have a form for it: bf16 or f16, silu, gate and up together. Else an
    expert is decoded when a token asks for it, and forgotten. Experts in the list `dropped` put out their row of `mean` [dropped, hidden],
    or nothing without it; the router chooses them as before.
    """
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    top_k_index, top_k_weights = top_k_index.reshape(x.shape[0], -1), top_k_weights.reshape(x.shape[0], -1)
    if x.is_cuda:
        said = cuda.experts_forward(kernels_folder, arenas, act, x, top_k_index, top_k_weights)
        if said is not None:
            # What stands in no table adds nothing there.
            if dropped and mean is not None:
                given = top_k_index[:, :, None] == torch.tensor(dropped, device=x.device)
                said = said + (top_k_weights[:, :, None] * given).sum(1).to(x.dtype) @ mean.to(x.dtype)
            return said.view_as(hidden_states)
    out = torch.zeros_like(x)
    for expert in top_k_index.unique().tolist():
        token, slot = (top_k_index == expert).nonzero(as_tuple=True)
        if expert in dropped:
            if mean is not None:
                out.index_add_(0, token, mean[dropped.index(expert)].to(x.dtype) * top_k_weights[token, slot, None].to(x.dtype))
            continue
        both = arenas["gate_up"].weights(expert) if "gate_up" in arenas else [arenas[p].weights(expert)[0] for p in ("gate", "up")]
        gate, up, down = (w.to(x.dtype) for w in (*both, arenas["down"].weights(expert)[0]))
        rows = x[token]
        y = (act(rows @ gate.T) * (rows @ up.T)) @ down.T
        out.index_add_(0, token, y * top_k_weights[token, slot, None].to(x.dtype))
    return out.view_as(hidden_states)


def _stream(words, bits, length):
    """Codes [rows, length] of a dense stream [rows, words] of 32-bit words, lowest bit first."""
    at = torch.arange(length) * bits
    words = torch.cat([words.to(torch.int64) & NONE, torch.zeros_like(words[:, :1], dtype=torch.int64)], 1)
    return ((words[:, at // 32] | words[:, at // 32 + 1] << 32) >> (at % 32)) & ((1 << bits) - 1)


def decode_streams(parts):
    """The weight of a matrix that compressed-tensors packed, in f32: its tensors `packed`, `scale`, `shape` and perhaps `zero_point`."""
    rows, columns = parts["shape"].tolist()
    bits = next(b for b in range(1, 9) if parts["packed"].shape[1] == -(-columns * b // 32))
    q, s = _stream(parts["packed"], bits, columns).float(), parts["scale"].float()
    z = torch.full_like(s, 2 ** (bits - 1))
    if "zero_point" in parts:
        z = _stream(parts["zero_point"].T.contiguous(), bits, rows).T.float()
    spread = columns // s.shape[1]
    return (q - z.repeat_interleave(spread, 1)) * s.repeat_interleave(spread, 1)


def load(folder, dtype=torch.float32):
    """A transformers model of a native checkpoint, its routed experts packed, everything else in `dtype`."""
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("moepress_kernels.load wants transformers 5: pip install 'moepress-kernels[transformers]'")
    from transformers import AutoModelForCausalLM

    method = json.loads((pathlib.Path(folder) / "config.json").read_text()).get("quantization_config", {}).get("quant_method")
    if method != "moepress":
        raise ValueError(f"{folder}: quant_method {method!r}; this reads what `[export.native]` of moepress writes")
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    # Layers that predict several tokens ahead: transformers has none.
    beyond = tuple(f"model.layers.{model.config.num_hidden_layers + i}." for i in range(getattr(model.config, "num_nextn_predict_layers", 0) or 0))
    wrong = {what: sorted(key for key in map(str, keys) if not key.startswith(beyond))[:3] for what, keys in info.items()}
    if any(wrong.values()):
        raise ValueError(f"{folder}: {wrong}")
    return model


@functools.cache
def kernels_folder():
    """Where the kernels lie: inside this package, as on the Hub, or two folders above it, as `moepress emit` writes them."""
    here = pathlib.Path(__file__).parent
    for folder in (here / "kernels", here.parent.parent):
        if (folder / "manifest.json").is_file():
            return folder
    raise FileNotFoundError(f"no manifest.json in {here / 'kernels'} or {here.parent.parent}: the package was taken away from its kernels")


def self_test(folder=None):
    """Decodes the golden tiles that lie beside the kernels; raises if a sum differs. Gives the widths that were tried."""
    golden = json.loads((pathlib.Path(folder or kernels_folder()) / "tests/golden.json").read_text())
    k = torch.arange(128, dtype=torch.float64)
    x = k % 13 - 6 + k / 128
    for case in golden["cases"]:
        arena, table = (torch.tensor(list(bytes.fromhex(case[part])), dtype=torch.uint8) for part in ("arena", "table"))
        sums = Arena(arena, table, case["shape"]).weights(0)[0].double() @ x
        if not torch.equal(sums, torch.tensor(case["sums"], dtype=torch.float64)):
            raise AssertionError(f"{case['bits']} bits: a golden tile does not decode to its sums")
    return [case["bits"] for case in golden["cases"]]


if importlib.util.find_spec("transformers") is not None:
    from . import integration

    integration.register()
