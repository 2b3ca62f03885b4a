#!/usr/bin/env python3
"""Lets PyPI's CUDA build of torch be imported on a machine without the CUDA libraries.

    cpu_torch.py            under the Python that torch was installed into, with `pip install --no-deps torch`

The wheel's libraries are linked against libcudart, libcublas and so on, gigabytes that nothing here calls. For each of
those that is absent a small library of the same name is compiled into torch/lib, where the loader looks. It defines
the symbols that torch's libraries want of it, under the versions they ask for; called, they say "no device". Where torch
has no CUDA part (macOS, PyPI's Arm wheels) nothing is done. Needs a C compiler as `cc`.
"""

import importlib.util
import struct
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

SYSTEM = ("libc.so", "libm.so", "libdl.so", "librt.so", "libpthread.so", "libstdc++.so", "libgcc_s.so", "libgomp.so", "ld-linux")
CUDA_NAMES = ("cu", "__cu", "nccl", "nvrtc", "nvJitLink", "nvshmem")
"""How symbols without a version begin if they are CUDA's, not Python's or C++'s."""
NO_DEVICE = 100
"""cudaErrorNoDevice, and CUDA_ERROR_NO_DEVICE of the driver."""


class Library:
    """What the dynamic section of one 64-bit little-endian ELF file says."""

    def __init__(self, path: Path):
        self.bytes = path.read_bytes()
        assert self.bytes[:6] == b"\x7fELF\x02\x01", f"{path} is not a 64-bit little-endian ELF file"
        self.needed: list[str] = []
        self.defined: set[str] = set()
        self.wanted: set[tuple[str, str, str]] = set()
        """(library or "", version or "", symbol) of each symbol that has to come from elsewhere."""
        self._read()

    def _sections(self):
        start, = struct.unpack_from("<Q", self.bytes, 0x28)
        size, count = struct.unpack_from("<HH", self.bytes, 0x3A)
        for index in range(count):
            _, kind, _, _, offset, length, link, _ = struct.unpack_from("<IIQQQQII", self.bytes, start + index * size)
            yield kind, offset, length, link

    def _text(self, table: int, at: int) -> str:
        return self.bytes[table + at : self.bytes.index(b"\0", table + at)].decode()

    def _read(self) -> None:
        sections = list(self._sections())
        versions, indices = {}, 0
        for kind, offset, length, link in sections:
            strings = sections[link][1] if link < len(sections) else 0
            if kind == 6:  # SHT_DYNAMIC
                for at in range(offset, offset + length, 16):
                    tag, value = struct.unpack_from("<QQ", self.bytes, at)
                    if tag == 1:  # DT_NEEDED
                        self.needed.append(self._text(strings, value))
            elif kind == 0x6FFFFFFE:  # SHT_GNU_verneed
                versions = self._needed_versions(offset, strings)
            elif kind == 0x6FFFFFFF:  # SHT_GNU_versym
                indices = offset
        for kind, offset, length, link in sections:
            if kind == 11:  # SHT_DYNSYM
                self._symbols(offset, length // 24, sections[link][1], versions, indices)

    def _needed_versions(self, at: int, strings: int) -> dict[int, tuple[str, str]]:
        """Version index -> (library, version)."""
        found = {}
        while True:
            _, count, file, aux, following = struct.unpack_from("<HHIII", self.bytes, at)
            entry = at + aux
            for _ in range(count):
                _, _, index, name, step = struct.unpack_from("<IHHII", self.bytes, entry)
                found[index & 0x7FFF] = (self._text(strings, file), self._text(strings, name))
                entry += step
            if following == 0:
                return found
            at += following

    def _symbols(self, offset: int, count: int, strings: int, versions: dict, indices: int) -> None:
        for index in range(1, count):
            name, info, _, section = struct.unpack_from("<IBBH", self.bytes, offset + 24 * index)
            symbol = self._text(strings, name)
            if section != 0:
                self.defined.add(symbol)
            elif info >> 4 == 1:  # undefined and STB_GLOBAL: the loader insists on it
                version = struct.unpack_from("<H", self.bytes, indices + 2 * index)[0] & 0x7FFF if indices else 0
                library, version = versions.get(version, ("", ""))
                self.wanted.add((library, version, symbol))


def answer(symbol: str) -> str:
    """C text of one stand-in."""
    if symbol.endswith(("String", "Name")):
        return f'const char *{symbol}(void) {{ return "no CUDA on this machine"; }}'
    nothing = symbol.startswith("__") or symbol in ("cudaGetLastError", "cudaPeekAtLastError")
    return f"long {symbol}(void) {{ return {0 if nothing else NO_DEVICE}; }}"


def compile_stand_in(name: str, symbols: dict[str, set[str]], folder: Path) -> None:
    """One shared library that defines `symbols`, a set for each version ("" for none)."""
    with tempfile.TemporaryDirectory() as work:
        source, script = Path(work) / "stand_in.c", Path(work) / "versions"
        names = sorted(set().union(*symbols.values()))
        source.write_text("\n".join(map(answer, names)) + "\nint moepress_stand_in;\n")
        nodes = [f"{version} {{ global: {' '.join(f'{s};' for s in sorted(found))} }};" for version, found in sorted(symbols.items()) if version]
        script.write_text("\n".join(nodes))
        versions = [f"-Wl,--version-script={script}"] if nodes else []
        subprocess.run(["cc", "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{name}", *versions, "-o", folder / name, source], check=True)


def main() -> int:
    found = importlib.util.find_spec("torch")
    assert found and found.origin, "torch is not installed under this Python"
    package = Path(found.origin).parent
    folder = package / "lib"
    if not (folder / "libtorch_cuda.so").exists():
        return 0
    present = {file.name: Library(file) for file in sorted([*folder.glob("*.so*"), *package.glob("*.so")])}
    defined = set().union(*(library.defined for library in present.values()))
    absent = {name for library in present.values() for name in library.needed if name not in present and not name.startswith(SYSTEM)}
    symbols: dict[str, dict[str, set[str]]] = {name: defaultdict(set) for name in sorted(absent)}
    for library in present.values():
        for source, version, symbol in library.wanted:
            if source in symbols:
                symbols[source][version].add(symbol)
            elif not source and symbol not in defined and symbol.startswith(CUDA_NAMES):
                for stand_in in symbols.values():  # which library it belongs to is not said
                    stand_in[""].add(symbol)
    for name, versions in symbols.items():
        compile_stand_in(name, versions, folder)
    print(f"{len(symbols)} stand-ins for CUDA libraries in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
