"""Compiles an emitted .cu for every architecture by NVRTC, without a GPU. Any word of the compiler is an error.

    compile.py FILE.cu [--lib LIBNVRTC] [--archs sm_80,sm_90a] [--keep]

Prints one line an architecture: bytes of the cubin and the seconds it took. `--lib` may be left out where the wheel
nvidia-cuda-nvrtc-cu12 is installed. With `--keep` they go beside the file, where the loader looks for them: `cubin/`, `ptx/` (compute_80) and,
named with its hash, into `compiled` of manifest.json.
"""

import argparse
import ctypes
import hashlib
import json
import pathlib
import sys
import time

ARCHS = "sm_80,sm_86,sm_89,sm_90a,sm_100a,sm_120"


def library(path):
    if path:
        return path
    import nvidia.cuda_nvrtc as wheel

    return str(next(pathlib.Path(next(iter(wheel.__path__)), "lib").glob("libnvrtc.so.*")))


def compile_for(nvrtc, source, arch, kind="cubin"):
    program = ctypes.c_void_p()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"mq_moe.cu", 0, None, None):
        raise SystemExit("nvrtcCreateProgram failed")
    options = [b"-arch=" + arch.encode(), b"--std=c++17", b"-default-device"]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    if failed or log.value.strip():
        raise SystemExit(f"{arch}: {log.value.decode()}")
    get = (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN) if kind == "cubin" else (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    get[0](program, ctypes.byref(size))
    image = ctypes.create_string_buffer(size.value)
    get[1](program, image)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return image.raw


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--lib")
    parser.add_argument("--archs", default=ARCHS)
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    nvrtc = ctypes.CDLL(library(args.lib))
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    source, kept = args.file.read_bytes(), []

    def keep(path, arch, image):
        at = args.file.parent / path
        at.parent.mkdir(exist_ok=True)
        at.write_bytes(image)
        kept.append({"arch": arch, "file": path, "sha256": hashlib.sha256(image).hexdigest(), "nvrtc": f"{major.value}.{minor.value}"})

    for arch in args.archs.split(","):
        start = time.process_time()
        cubin = compile_for(nvrtc, source, arch)
        print(f"{arch}: {len(cubin)} bytes, {time.process_time() - start:.1f} s")
        if args.keep:
            keep(f"cubin/mq_moe.{arch}.cubin", arch, cubin)
    if args.keep:
        keep("ptx/mq_moe.compute_80.ptx", "compute_80", compile_for(nvrtc, source, "compute_80", "ptx").rstrip(b"\0"))
        manifest = args.file.parent / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"compiled": kept, "not_compiled": None}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
