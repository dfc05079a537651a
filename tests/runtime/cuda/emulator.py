"""Runs kernel launches on the CPU: the same CUDA source, as C++, one thread after another."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alloc_moe.runtime.cuda.compiling import FOLDER, SOURCES, TYPES
from alloc_moe.runtime.cuda.cublas import Gemm
from alloc_moe.runtime.cuda.records import Launch

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
    """Compiles kernels, C++ expressions, and runs launches of them."""

    def __init__(self, kernels: Sequence[str], folder: Path, *, dtype: int) -> None:
        self._number = {kernel: number for number, kernel in enumerate(kernels)}
        source = _source(kernels)
        name = hashlib.sha256((source + str(dtype)).encode()).hexdigest()[:16]
        path, library = folder / f"{name}.cpp", folder / f"{name}.so"
        path.write_text(source)
        flags = ["-std=c++20", "-O2", "-march=native", "-shared", "-fPIC", "-w", f"-DTYPE={dtype}"]
        # The one takes a jump to another stack for an attack; by the other, libraries share fibers.
        flags += ["-U_FORTIFY_SOURCE", "-fno-gnu-unique"]
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


class EmulatedDevice:
    """What `alloc_moe.runtime.cuda.device.Device` is to a stepper, on the CPU."""

    capability = (9, 0)
    multiprocessors = 4
    most_shared = 232448

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._arrays: dict[int, NDArray[np.uint8]] = {}
        self._emulators: dict[str, Emulator] = {}
        self._pinned: dict[str, NDArray[np.uint8]] = {}
        self._work: list[Callable[[], None]] | None = None

    def make_current(self) -> None:
        """Nothing to do."""

    def allocate(self, size: int, *, zero: bool = False) -> int:
        """Return an aligned address; what isn't set to zero holds no numbers."""
        whole = np.full(size + 256, 0 if zero else 0xFF, np.uint8)
        offset = -whole.ctypes.data % 256
        array = whole[offset : offset + size]
        self._arrays[array.ctypes.data] = array
        return int(array.ctypes.data)

    def free(self, address: int) -> None:
        """Forget an array."""
        del self._arrays[address]

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """Return host memory."""
        return np.zeros(size, np.uint8)

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copy to an address of `allocate`."""
        ctypes.memmove(address, np.ascontiguousarray(array).ctypes.data, array.nbytes)

    def load(self, kernels: Sequence[str], *, dtype: str) -> None:
        """Compile kernels."""
        if new := sorted(set(kernels) - set(self._emulators)):
            emulator = Emulator(new, self._folder, dtype=TYPES[dtype])
            self._emulators.update(dict.fromkeys(new, emulator))

    def check(self, launches: Sequence[Launch]) -> None:
        """Nothing to do."""

    def launch(self, launch: Launch, *, overlap: bool = True) -> None:
        """Record a kernel."""
        self._record(lambda: self._emulators[launch.kernel].run(launch))

    def copy_in(self, address: int, host: NDArray[np.uint8], size: int) -> None:
        """Record a copy."""
        self._record(lambda: ctypes.memmove(address, host.ctypes.data, size))

    def copy_out(self, host: NDArray[np.uint8], address: int, size: int) -> None:
        """Record a copy."""
        self._record(lambda: ctypes.memmove(host.ctypes.data, address, size))

    def pinned_once(self, name: str, size: int) -> NDArray[np.uint8]:
        """Return host memory."""
        return self._pinned.setdefault(name, np.zeros(size, np.uint8))

    def multiply(self, gemm: Gemm, *, dtype: str) -> None:
        """Record a product of many rows."""
        self._record(lambda: _multiply(gemm, dtype))

    def copy(self, to: int, source: int, size: int) -> None:
        """Record a copy."""
        self._record(lambda: ctypes.memmove(to, source, size))

    def _record(self, work: Callable[[], object]) -> None:
        if self._work is None:
            work()
        else:
            self._work.append(work)

    def capture(self, work: Callable[[], None]) -> list[Callable[[], None]]:
        """Return what was recorded."""
        self._work = []
        work()
        recorded, self._work = self._work, None
        return recorded

    def replay(self, graph: list[Callable[[], None]]) -> None:
        """Run what was recorded."""
        for work in graph:
            work()

    def destroy(self, graph: list[Callable[[], None]]) -> None:
        """Nothing to do."""

    def wait(self) -> None:
        """Nothing to do."""


def _multiply(gemm: Gemm, dtype: str) -> None:
    assert dtype == "float16"

    def array(address: int, rows: int, columns: int, kind: type[np.generic]) -> NDArray[Any]:
        size = rows * columns * np.dtype(kind).itemsize
        data = (ctypes.c_uint8 * size).from_address(address)
        return np.frombuffer(data, kind).reshape(rows, columns)

    x = array(gemm.x, gemm.rows - 1, gemm.pitch, np.float16) if gemm.rows > 1 else None
    last = array(gemm.x + (gemm.rows - 1) * gemm.pitch * 2, 1, gemm.k, np.float16)
    rows = last if x is None else np.vstack([x[:, : gemm.k], last])
    weight = array(gemm.weight, gemm.n, gemm.k, np.float16).astype(np.float32)
    out = array(gemm.out, gemm.rows, gemm.n, np.float32 if gemm.floats else np.float16)
    result = rows.astype(np.float32) @ weight.T
    out[...] = result + out if gemm.add else result
