"""Tensors in the memory of a device: made, copied, and looked at through numpy.

Those of a shared cache are held as what numpy has of their size: bfloat16 as float16, whose bits
mean something else. Bind them by address.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from alloc_moe.runtime.artifact.tensors import from_bfloat16

Device = Literal["cpu", "cuda"]

FLOAT, INT8, FLOAT16, BFLOAT16 = 1, 3, 10, 16
"""ONNX's numbers of element types."""

_HELD: dict[int, np.dtype[Any]] = {
    FLOAT: np.dtype(np.float32),
    INT8: np.dtype(np.int8),
    FLOAT16: np.dtype(np.float16),
    BFLOAT16: np.dtype(np.float16),
}


def new_array(shape: Sequence[int], element_type: int) -> NDArray[Any]:
    """Return an array of undefined values that can hold such elements."""
    return np.empty(shape, _HELD[element_type])


def new_tensor(shape: Sequence[int], element_type: int, device: Device) -> onnxruntime.OrtValue:
    """Return a tensor of undefined values in a device's memory."""
    return onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), element_type, device, 0)


def held_tensor(shape: Sequence[int], element_type: int, device: Device) -> onnxruntime.OrtValue:
    """Return a tensor of undefined values that can hold such elements."""
    held = FLOAT16 if element_type == BFLOAT16 else element_type
    return new_tensor(shape, held, device)


def to_device(array: NDArray[Any], device: Device) -> onnxruntime.OrtValue:
    """Return a tensor in a device's memory; in the host's it is the array's own memory."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0)


def tensor_of(array: NDArray[Any], element_type: int, device: Device) -> onnxruntime.OrtValue:
    """Return a tensor of such elements, copied from an array that holds them."""
    if element_type != BFLOAT16:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array.copy(), device, 0)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
        array.view(np.uint16).copy(), BFLOAT16
    )


def held_array(value: onnxruntime.OrtValue) -> NDArray[Any]:
    """Return a copy of a tensor in the host's memory, as an array that can hold its elements.

    Of bfloat16 on a GPU there is none: onnxruntime raises RuntimeError.
    """
    if value.element_type() != BFLOAT16 or value.device_name() != "cpu":
        array: NDArray[Any] = value.numpy().copy()
        return array
    return _halves(value).view(np.float16).copy()


def _halves(value: onnxruntime.OrtValue) -> NDArray[np.uint16]:
    """Return the bits of a tensor of bfloat16 in the host's memory, not copied."""
    shape = value.shape()
    bits = (ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr())
    return np.frombuffer(bits, np.uint16).reshape(shape)


def to_numpy(value: onnxruntime.OrtValue) -> NDArray[np.floating]:
    """Return a tensor in host memory as an array; bfloat16, which numpy lacks, as float32."""
    if value.element_type() != BFLOAT16:
        array: NDArray[np.floating] = value.numpy()
        return array
    return from_bfloat16(_halves(value))
