"""Runs kernel launches on the CPU: the same CUDA source, compiled as C++, one thread after another."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from alloc_moe.runtime.cuda.launches import Launch
from alloc_moe.runtime.cuda.sources import FOLDER, SOURCES

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")

_CALL = """
template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*(A*)arguments[I]...);
}
template <class... A>
void call(void (*kernel)(A...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<A...>());
}
"""


class Emulator:
    """Compiles the kernels of some launches, and runs them."""

    def __init__(self, launches: Sequence[Launch], folder: Path, *, dtype: int) -> None:
        kernels = sorted({launch.kernel for launch in launches})
        self._number = {kernel: number for number, kernel in enumerate(kernels)}
        source = _source(kernels)
        name = hashlib.sha256((source + str(dtype)).encode()).hexdigest()[:16]
        path, library = folder / f"{name}.cpp", folder / f"{name}.so"
        path.write_text(source)
        flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-w", f"-DTYPE={dtype}"]
        command = [str(COMPILER), *flags, f"-I{FOLDER}", f"-I{HERE}", "-o", str(library), str(path)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        self._run = ctypes.CDLL(str(library)).run

    def run(self, launch: Launch) -> None:
        """Run one launch to its end."""
        pointers = [ctypes.cast(ctypes.pointer(x), ctypes.c_void_p) for x in launch.arguments]
        array = (ctypes.c_void_p * len(pointers))(*pointers)
        grid = (ctypes.c_uint * 3)(*launch.grid)
        shared = ctypes.c_size_t(launch.shared)
        self._run(self._number[launch.kernel], grid, launch.threads, shared, array)


def _source(kernels: Sequence[str]) -> str:
    includes = "".join(f'#include "{name}"\n' for name in SOURCES)
    cases = "".join(
        f"    case {number}: emulated::launch(blocks, threads, bytes, "
        f"[=] {{ call({kernel}, arguments); }}); break;\n"
        for number, kernel in enumerate(kernels)
    )
    return (
        f'#include <utility>\n#include "emulation.hpp"\n{includes}{_CALL}'
        'extern "C" void run(int number, unsigned* grid, unsigned threads, size_t bytes,\n'
        "                    void** arguments) {\n"
        "  const emulated::Dim blocks = {grid[0], grid[1], grid[2]};\n"
        f"  switch (number) {{\n{cases}  }}\n}}\n"
    )
