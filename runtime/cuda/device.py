"""One GPU through the driver's API: memory, kernels, a stream, graphs."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alloc_moe.runtime.cuda.bindings import call, driver
from alloc_moe.runtime.cuda.compiling import compile_kernels
from alloc_moe.runtime.cuda.cublas import Cublas, Gemm
from alloc_moe.runtime.cuda.records import Launch
from alloc_moe.runtime.errors import DeviceError


class Device:
    """The GPU that onnxruntime uses, in the same context, with a stream of our own."""

    def __init__(self, ordinal: int = 0) -> None:
        call(driver.cuInit(0))
        self._device = call(driver.cuDeviceGet(ordinal))
        self._context = call(driver.cuDevicePrimaryCtxRetain(self._device))
        self.make_current()
        self.stream = call(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self._functions: dict[str, Any] = {}
        self._overlaps = self.capability >= (9, 0)
        self._memory: list[int] = []
        self._host_memory: list[int] = []
        self._graphs: list[Any] = []
        held = (self._graphs, self._memory, self._host_memory)
        end = weakref.finalize(self, _release, self._context, *held)
        end.atexit = False  # the driver does it then
        self._pinned: dict[str, NDArray[np.uint8]] = {}
        self._cublas: Cublas | None = None

    def make_current(self) -> None:
        """Use this GPU in the calling thread."""
        call(driver.cuCtxSetCurrent(self._context))

    @property
    def capability(self) -> tuple[int, int]:
        """Such as (9, 0)."""
        kind = driver.CUdevice_attribute
        major = self._attribute(kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
        return major, self._attribute(kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)

    @property
    def multiprocessors(self) -> int:
        """How many it has."""
        return self._attribute(driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)

    @property
    def most_shared(self) -> int:
        """The bytes of shared memory that a block can ask for."""
        kind = driver.CUdevice_attribute
        return self._attribute(kind.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)

    def _attribute(self, attribute: Any) -> int:
        return int(call(driver.cuDeviceGetAttribute(attribute, self._device)))

    def allocate(self, size: int, *, zero: bool = False) -> int:
        """Return the address of `size` bytes, kept as long as this object is."""
        address = int(call(driver.cuMemAlloc(max(size, 16))))
        self._memory.append(address)
        if zero:
            # On our stream, which waits for no other.
            call(driver.cuMemsetD8Async(address, 0, max(size, 16), self.stream))
        return address

    def free(self, address: int) -> None:
        """Give memory of `allocate` back."""
        self._memory.remove(address)
        call(driver.cuMemFree(address))

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """Return host memory that the GPU copies from and to without a detour."""
        address = int(call(driver.cuMemAllocHost(max(size, 16))))
        self._host_memory.append(address)
        host = (ctypes.c_uint8 * size).from_address(address)
        return np.ctypeslib.as_array(host)

    def pinned_once(self, name: str, size: int) -> NDArray[np.uint8]:
        """Return pinned memory by a name, made anew only where more is wanted."""
        if name not in self._pinned or self._pinned[name].nbytes < size:
            self._pinned[name] = self.pinned(size)
        return self._pinned[name]

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copy an array to the device, and wait for it."""
        data = np.ascontiguousarray(array)
        # A copy that names no stream may still be under way when kernels on ours begin.
        call(driver.cuMemcpyHtoDAsync(address, data.ctypes.data, data.nbytes, self.stream))
        self.wait()

    def load(self, kernels: Sequence[str], *, dtype: str) -> None:
        """Compile kernels, or read them from disk."""
        wanted = sorted(set(kernels) - set(self._functions))
        if not wanted:
            return
        cubin, names = compile_kernels(wanted, dtype=dtype, capability=self.capability)
        module = call(driver.cuModuleLoadData(cubin))
        for kernel in wanted:
            self._functions[kernel] = call(
                driver.cuModuleGetFunction(module, names[kernel].encode())
            )

    def check(self, launches: Sequence[Launch]) -> None:
        """Let kernels have the shared memory that they need.

        Raises:
            DeviceError: This GPU has less.
        """
        kind = driver.CUfunction_attribute
        for launch in launches:
            function = self._functions[launch.kernel]
            static = call(
                driver.cuFuncGetAttribute(kind.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function)
            )
            if static + launch.shared > self.most_shared:
                raise DeviceError(
                    f"The kernel {launch.kernel} needs {static + launch.shared} bytes of shared "
                    f"memory; a block of this GPU has {self.most_shared}."
                )
            most = kind.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            call(driver.cuFuncSetAttribute(function, most, launch.shared))

    def launch(self, launch: Launch, *, overlap: bool = True) -> None:
        """Add a kernel to the stream.

        Args:
            launch: The kernel.
            overlap: Let it begin before the one before it has ended: it waits by itself.
        """
        function = self._functions[launch.kernel]
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.threads, 1, 1
        config.sharedMemBytes, config.hStream = launch.shared, self.stream
        if overlap and self._overlaps:
            attribute = driver.CUlaunchAttribute()
            ids = driver.CUlaunchAttributeID
            attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        values = tuple(argument.value or 0 for argument in launch.arguments)
        types = tuple(type(argument) for argument in launch.arguments)
        call(driver.cuLaunchKernelEx(config, function, (values, types), 0))

    def multiply(self, gemm: Gemm, *, dtype: str) -> None:
        """Add a product of many rows to the stream."""
        if self._cublas is None:
            self._cublas = Cublas(int(self.stream))
        self._cublas.run(gemm, dtype=dtype)

    def copy(self, to: int, source: int, size: int) -> None:
        """Add a copy on the device to the stream."""
        call(driver.cuMemcpyDtoDAsync(to, source, size, self.stream))

    def capture(self, work: Callable[[], None]) -> Any:
        """Return an executable graph of what `work` adds to the stream."""
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        call(driver.cuStreamBeginCapture(self.stream, mode))
        try:
            work()
        finally:
            graph = call(driver.cuStreamEndCapture(self.stream))
        executable = call(driver.cuGraphInstantiate(graph, 0))
        call(driver.cuGraphDestroy(graph))
        self._graphs.append(executable)
        return executable

    def replay(self, graph: Any) -> None:
        """Add a captured graph to the stream."""
        call(driver.cuGraphLaunch(graph, self.stream))

    def destroy(self, graph: Any) -> None:
        """Forget a captured graph."""
        self._graphs.remove(graph)
        call(driver.cuGraphExecDestroy(graph))

    def copy_in(self, address: int, host: NDArray[np.uint8], size: int) -> None:
        """Add a copy from pinned memory to the stream."""
        call(driver.cuMemcpyHtoDAsync(address, host.ctypes.data, size, self.stream))

    def copy_out(self, host: NDArray[np.uint8], address: int, size: int) -> None:
        """Add a copy to pinned memory to the stream."""
        call(driver.cuMemcpyDtoHAsync(host.ctypes.data, address, size, self.stream))

    def wait(self) -> None:
        """Wait until the stream is done."""
        call(driver.cuStreamSynchronize(self.stream))


def _release(context: Any, graphs: list[Any], memory: list[int], host_memory: list[int]) -> None:
    """Give back what a device had made; what fails has been given back with the context."""
    driver.cuCtxSetCurrent(context)
    for held, give_back in (
        (graphs, driver.cuGraphExecDestroy),
        (memory, driver.cuMemFree),
        (host_memory, driver.cuMemFreeHost),
    ):
        while held:
            give_back(held.pop())
