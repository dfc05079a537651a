"""An artifact's weights on the GPU, once: for our kernels and for onnxruntime."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from alloc_moe.runtime.artifact.tensors import Initializer
from alloc_moe.runtime.cuda.device import Device

# Tells onnxruntime of memory that isn't its own: of y = Identity(x), the output is bound to it.
_HOLDER = bytes.fromhex(
    "080a12003a2b0a100a017812017922084964656e746974791201675a090a017812040a02080162090a017912040a0208"
    "0142040a001015"
)
_LEAST_BYTES = 1 << 12  # smaller ones may be wanted on the CPU


class Weights:
    """Initializers by name, copied to the GPU.

    Args:
        device: The GPU.
        initializers: Those that a step program names.
    """

    def __init__(self, device: Device, initializers: Mapping[str, Initializer]) -> None:
        self._initializers = initializers
        self._addresses: dict[str, int] = {}
        self._values: list[onnxruntime.OrtValue] = []  # onnxruntime doesn't keep them alive
        for name, initializer in initializers.items():
            address = device.allocate(initializer.values.nbytes)
            device.upload(address, initializer.values)
            self._addresses[name] = address

    def address(self, name: str) -> int:
        """Return where an initializer is."""
        return self._addresses[name]

    def floats(self, name: str) -> NDArray[np.float32]:
        """Return an initializer of a few numbers, in the host's memory."""
        return self._initializers[name].floats()

    def share(self, options: onnxruntime.SessionOptions, names: Iterable[str]) -> None:
        """Have a session use this memory instead of copies of its own, where it wants it there.

        Args:
            options: The session's.
            names: Of weights that are no integers nor their scales: onnxruntime rearranges those.
        """
        holder = onnxruntime.InferenceSession(_HOLDER, providers=["CPUExecutionProvider"])
        for name in names:
            initializer = self._initializers[name]
            if initializer.values.nbytes < _LEAST_BYTES:
                continue
            binding = holder.io_binding()
            binding.bind_output(
                "y", "cuda", 0, initializer.element_type, initializer.shape, self._addresses[name]
            )
            (value,) = binding.get_outputs()
            options.add_initializer(name, value)
            self._values.append(value)
