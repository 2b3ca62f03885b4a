"""Compiles an emitted .cu for every architecture by NVRTC, without a GPU. Any word of the compiler is an error.

    nvrtc.py FILE.cu [--lib LIBNVRTC] [--archs sm_80,sm_90a] [--out DIR]

Prints one line an architecture: bytes of the cubin and the seconds it took. `--lib` may be left out where the wheel
nvidia-cuda-nvrtc-cu12 is installed. With `--out` the cubins are kept, and PTX of compute_80.
"""

import argparse
import ctypes
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
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    nvrtc = ctypes.CDLL(library(args.lib))
    source = args.file.read_bytes()
    for arch in args.archs.split(","):
        start = time.process_time()
        cubin = compile_for(nvrtc, source, arch)
        print(f"{arch}: {len(cubin)} bytes, {time.process_time() - start:.1f} s")
        if args.out:
            (args.out / f"mq_moe.{arch}.cubin").write_bytes(cubin)
    if args.out:
        (args.out / "mq_moe.compute_80.ptx").write_bytes(compile_for(nvrtc, source, "compute_80", "ptx"))


if __name__ == "__main__":
    sys.exit(main())
