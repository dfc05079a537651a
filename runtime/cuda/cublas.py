"""Dense products of many rows by cuBLAS, which onnxruntime brings along."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

from alloc_moe.runtime.errors import DeviceError

_NAMES = ("cublas64_13.dll",) if sys.platform == "win32" else ("libcublas.so.13", "libcublas.so")
_TYPES = {"float16": 2, "bfloat16": 14, "float32": 0}  # cudaDataType
_FLOAT_COMPUTE, _TRANSPOSED, _PLAIN, _DEFAULT = 68, 1, 0, -1


@dataclass(frozen=True)
class Gemm:
    """out[rows, n] = x[rows, k] . weight[n, k]^T, plus what is there with ``add``.

    Rows of x are ``pitch`` elements apart; with ``floats`` the result is float32.
    """

    out: int
    x: int
    weight: int
    rows: int
    n: int
    k: int
    pitch: int
    add: bool = False
    floats: bool = False


class Cublas:
    """A handle of cuBLAS on a stream.

    Raises:
        DeviceError: The library isn't there.
    """

    def __init__(self, stream: int) -> None:
        self._library = _load()
        self._handle = ctypes.c_void_p()
        self._check(self._library.cublasCreate_v2(ctypes.byref(self._handle)))
        self._check(self._library.cublasSetStream_v2(self._handle, ctypes.c_void_p(stream)))

    def run(self, gemm: Gemm, *, dtype: str) -> None:
        """Add a product to the stream."""
        one, beta = ctypes.c_float(1.0), ctypes.c_float(1.0 if gemm.add else 0.0)
        kind = _TYPES[dtype]
        # Column by column, our rows are cuBLAS's columns.
        self._check(
            self._library.cublasGemmEx(
                self._handle,
                *(_TRANSPOSED, _PLAIN, gemm.n, gemm.rows, gemm.k, ctypes.byref(one)),
                *(ctypes.c_void_p(gemm.weight), kind, gemm.k),
                *(ctypes.c_void_p(gemm.x), kind, gemm.pitch, ctypes.byref(beta)),
                *(ctypes.c_void_p(gemm.out), _TYPES["float32"] if gemm.floats else kind, gemm.n),
                *(_FLOAT_COMPUTE, _DEFAULT),
            )
        )

    def _check(self, status: int) -> None:
        if status:
            raise DeviceError(f"cuBLAS failed with status {status}.")


def _load() -> ctypes.CDLL:
    for name in _NAMES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise DeviceError("cuBLAS can't be loaded (pip install 'alloc-moe[cuda]')")
