"""What the compiler made of the kernels, read in their machine code, without a GPU.

    lint.py --lib LIBNVRTC --nvdisasm NVDISASM [--write]

Compiles each width and kind of zero on its own for sm_80 and sm_90a in the shape of Qwen3-30B-A3B (groups of 128, scales in bf16) and
disassembles it. Fails on local memory (LDL, STL), on loads of codes that are not 16 bytes wide (8 bytes for 1, 3 and 5 bits), and where the
loop over the codes or the cubin has grown by more than 5% over `sass.json`: instructions a weight, a lane having 64 weights a tile, the
group's end and the loads of activations counted; bytes of a cubin of kernels for 8 and for 32 tokens in both types. Fewer by 5% fails as
well, so that the file is kept true; `--write` writes it anew.
"""

import argparse
import ctypes
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "python"))
import compile as nvrtc_compile

BASELINE = HERE / "sass.json"
WIDTHS, ARCHS, KERNELS = (1, 2, 3, 4, 5, 6, 8), ("sm_80", "sm_90a"), ("mq_w13_bf16_1", "mq_w13_f16_1", "mq_w2_bf16_1", "mq_w13_bf16_4")
GRIDS = {"sym": 0, "half": 0x80, "asym": 0x20}
CONSTANTS = """#define MQ_HIDDEN 2048
#define MQ_INNER 768
#define MQ_HIDDEN_LD 2048
#define MQ_INNER_LD 768
#define MQ_EXPERTS 128
#define MQ_MAX_EXPERTS 128
#define MQ_TOP_K 8
#define MQ_FORMS(X) X({form})
#define MQ_FORMS_13(X) X({form})
#define MQ_FORMS_2(X) X({form})
#define MQ_BLOCKS(X) X(1) X(4)
#define MQ_RESIDENT(NB) (NB == 1 ? 6 : NB == 2 ? 4 : 3)
"""


def kernels_of(text):
    """For each kernel its lines: labels `.L_x_1:` and instructions, in order."""
    found, current = {}, None
    for line in text.splitlines():
        if section := re.match(r"\.text\.(\w+):", line):
            current = found.setdefault(section[1], [])
        elif current is not None and (label := re.match(r"(\.L_\w+):", line)):
            current.append(label[0])
        elif current is not None and (instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line)):
            current.append(instruction[1])
    return found


def loop(lines):
    """The smallest loop with a load of codes in it: from a label to a branch back to it."""
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    loads = [i for i, line in enumerate(lines) if codes_load(line)]
    best = None
    for i, line in enumerate(lines):
        branch = re.search(r"\bBRA\b.*?(\.L_\w+)", line)
        start = labels.get(branch[1]) if branch else None
        if start is not None and any(start < load < i for load in loads) and (best is None or i - start < best[1] - best[0]):
            best = (start, i)
    if best is None:
        raise SystemExit("no loop around the loads of codes: the disassembly is of another form than this reads")
    return lines[best[0] : best[1] + 1]


def codes_load(line):
    """Only codes are read past L1."""
    return re.search(r"\bLDG\.\S*\bNA\b", line)


def read(lines, bits):
    """What is wrong with a kernel, and its instructions a weight."""
    width = ".64." if bits % 2 else ".128."
    wrong = [f"not {width} bits wide: {line}" for line in lines if codes_load(line) and width not in line]
    body = loop(lines)
    loads, wanted = sum(bool(codes_load(line)) for line in body), 2 * bits // (2 if bits % 2 else 4)
    if loads == 0 or loads % wanted:
        wrong.append(f"{loads} loads of codes a turn, {wanted} hold a lane's")
    instructions = sum(not line.endswith(":") for line in body)
    return wrong, instructions / (64 * max(loads // wanted, 1))


def disassembled(nvdisasm, cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # It says of ELF files by CUDA 12 that they are of an older kind.
        return subprocess.run([nvdisasm, "-c", file.name], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib", required=True)
    parser.add_argument("--nvdisasm", required=True, type=pathlib.Path)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    os.chmod(args.nvdisasm, 0o755)
    nvrtc = ctypes.CDLL(args.lib)
    parts = "\n".join((HERE / name).read_text() for name in ("mq_device.cuh", "mq_dequant.cuh", "mq_moe.cu"))
    baseline = {} if args.write else json.loads(BASELINE.read_text())
    wrong, measured = [], {}
    for arch in ARCHS:
        for bits, grid in ((bits, grid) for bits in WIDTHS for grid in GRIDS if (bits, grid) != (1, "sym")):
            what = f"{bits} bits, {grid}"
            cubin = nvrtc_compile.compile_for(nvrtc, (CONSTANTS.format(form=f"{bits}, 7, {GRIDS[grid]:#x}") + parts).encode(), arch)
            kernels = kernels_of(disassembled(args.nvdisasm, cubin))
            for name, lines in kernels.items():
                wrong += [f"{arch}, {what}, {name}: local memory: {line}" for line in lines if re.search(r"\b(LDL|STL)\b", line)][:1]
            row = {"bytes": len(cubin)}
            for name in KERNELS:
                said, instructions = read(kernels[name], bits)
                wrong += [f"{arch}, {what}, {name}: {problem}" for problem in said]
                row[name] = round(instructions, 3)
            measured.setdefault(arch, {})[what] = row
            stored = baseline.get(arch, {}).get(what, {})
            if not args.write:
                wrong += [f"{arch}, {what}, {name}: {n}, sass.json says {stored.get(name)}" for name, n in row.items() if abs(n / stored.get(name, 1) - 1) > 0.05]
            print(f"{arch}, {what}: {row}", flush=True)
    if wrong:
        raise SystemExit("\n".join(wrong))
    if args.write:
        BASELINE.write_text(json.dumps(measured, indent=1) + "\n")
    print(f"{sum(map(len, measured.values()))} builds: no local memory, loads of codes as wide as they should be, instructions and bytes within 5%")


if __name__ == "__main__":
    main()
