"""How fast this machine reads memory in a stream: the limit of decode, which reads weights once.

    python examples/benchmarks/speed/bandwidth.py --threads 2

Several ways to read arrays far larger than the caches are tried, each shared by as many threads as
decode uses; the fastest counts, since what a program reached is a lower bound of what is there.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import click
import numpy as np
from numpy.typing import NDArray

_BYTES = 1 << 30


class Reader:
    """Arrays in memory, and ways to read all of them once."""

    def __init__(self, threads: int, *, size: int = _BYTES) -> None:
        piece = size // threads // 64 * 64
        self.threads = threads
        self.size = piece * threads
        whole = np.ones(self.size // 4, np.float32)
        self._whole = whole
        self._pieces = np.split(whole, threads)
        self._pool = ThreadPoolExecutor(threads)
        memchr = ctypes.CDLL(None).memchr
        memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
        memchr.restype = ctypes.c_void_p
        self.ways: dict[str, Callable[[], object]] = {
            "numpy dot": self._shared(lambda piece: np.dot(piece, piece)),
            "numpy max": self._shared(np.max),
            "libc memchr": self._shared(lambda part: memchr(part.ctypes.data, 255, part.nbytes)),
        }
        if importlib.util.find_spec("torch"):
            self.ways |= self._torch_ways()

    def measure(self, repeats: int = 5) -> dict[str, float]:
        """Return the bytes per second of each way: the best of some repeats, in turns."""
        seconds: dict[str, float] = {}
        for _ in range(repeats):
            for name, read in self.ways.items():
                start = time.perf_counter()
                read()
                took = time.perf_counter() - start
                seconds[name] = min(took, seconds.get(name, took))
        return {name: self.size / took for name, took in seconds.items()}

    def _shared(self, read: Callable[[NDArray[np.float32]], object]) -> Callable[[], object]:
        return lambda: list(self._pool.map(read, self._pieces))

    def _torch_ways(self) -> Mapping[str, Callable[[], object]]:
        import torch

        torch.set_num_threads(self.threads)
        values = torch.from_numpy(self._whole)
        return {
            "torch sum": values.sum,
            "torch max": values.max,
            "torch dot": functools.partial(torch.dot, values, values),
            "torch int32 max": values.view(torch.int32).max,
        }


@click.command()
@click.option("--threads", default=os.cpu_count(), show_default=True)
@click.option("--repeats", default=20, show_default=True)
def main(threads: int, repeats: int) -> None:
    """Print what each way reaches, and the best."""
    found = Reader(threads).measure(repeats)
    for name, speed in found.items():
        print(f"{name:16} {speed / 1e9:5.1f} GB/s")
    best = max(found, key=found.__getitem__)
    print(f"Streaming read bandwidth, {threads} threads: {found[best] / 1e9:.1f} GB/s ({best})")


if __name__ == "__main__":
    main()
