"""What the compiler made of the kernels, read in their machine code, without a GPU.

    lint.py --lib LIBNVRTC --nvdisasm NVDISASM [--write]

Compiles each width on its own for sm_80 and sm_90a in the shape of Qwen3-30B-A3B and disassembles it. Fails on local memory (LDL, STL),
on loads of codes that are not 16 bytes wide (8 bytes for 1, 3 and 5 bits), and where the loop over the codes has grown by more than 5%
over `sass.json`: instructions a weight, a lane having 64 weights a turn, all of the group's end counted. Fewer by 5% fails as well, so
that the file is kept true; `--write` writes it anew.
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
WIDTHS, ARCHS, KERNELS = (1, 2, 3, 4, 5, 6, 8), ("sm_80", "sm_90a"), ("mq_w13_bf16_1", "mq_w13_f16_1", "mq_w2_bf16_1", "mq_w2_f16_1")
CONSTANTS = """#define MQ_HIDDEN 2048
#define MQ_INNER 768
#define MQ_INNER_LD 768
#define MQ_EXPERTS 128
#define MQ_MAX_EXPERTS 128
#define MQ_TOP_K 8
#define MQ_WIDTHS(X) X({bits})
#define MQ_WIDTH_LIST {bits}
#define MQ_BLOCKS(X) X(1)
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
    """The innermost loop around the first load of codes: a branch back to a label before it."""
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    load = next(i for i, line in enumerate(lines) if codes_load(line))
    best = None
    for i, line in enumerate(lines):
        branch = re.search(r"\bBRA\b.*?(\.L_\w+)", line)
        start = labels.get(branch[1]) if branch else None
        if start is not None and start < load < i and (best is None or i - start < best[1] - best[0]):
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
        for bits in WIDTHS:
            source = CONSTANTS.format(bits=bits) + parts
            kernels = kernels_of(disassembled(args.nvdisasm, nvrtc_compile.compile_for(nvrtc, source.encode(), arch)))
            for name, lines in kernels.items():
                wrong += [f"{arch}, {bits} bits, {name}: local memory: {line}" for line in lines if re.search(r"\b(LDL|STL)\b", line)][:1]
            row = measured.setdefault(arch, {}).setdefault(str(bits), {})
            for name in KERNELS:
                said, row[name] = read(kernels[name], bits)
                wrong += [f"{arch}, {bits} bits, {name}: {what}" for what in said]
                row[name] = round(row[name], 3)
                stored = baseline.get(arch, {}).get(str(bits), {}).get(name)
                if not args.write and (stored is None or abs(row[name] / stored - 1) > 0.05):
                    wrong.append(f"{arch}, {bits} bits, {name}: {row[name]} instructions a weight, sass.json says {stored}")
            print(f"{arch}, {bits} bits: {row}", flush=True)
    if wrong:
        raise SystemExit("\n".join(wrong))
    if args.write:
        BASELINE.write_text(json.dumps(measured, indent=1) + "\n")
    print(f"{len(ARCHS) * len(WIDTHS)} builds: no local memory, loads of codes as wide as they should be, instructions within 5%")


if __name__ == "__main__":
    main()
