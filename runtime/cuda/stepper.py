"""A decode step on the GPU: captured once per batch and cache, then replayed."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alloc_moe.runtime.artifact.dial import Price
from alloc_moe.runtime.artifact.tensors import to_bfloat16
from alloc_moe.runtime.cuda.device import Device
from alloc_moe.runtime.cuda.launches import plan_launches
from alloc_moe.runtime.cuda.records import Launch, Memory, Operation, Program, Shape
from alloc_moe.runtime.cuda.routers import MOST_TOKENS, Router, router_of

_MOST_GRAPHS = 8  # kept at a time; a graph takes some 100 KiB
_ELEMENT = {"float16": 2, "bfloat16": 2, "float32": 4}


class _Inputs(ctypes.Structure):
    """What changes from step to step, in one copy."""

    _fields_ = (
        ("ids", ctypes.c_int64 * MOST_TOKENS),
        ("lengths", ctypes.c_int32 * MOST_TOKENS),
        ("real", ctypes.c_int32 * MOST_TOKENS),
        ("prices", ctypes.c_float * MOST_TOKENS),
    )


@dataclass(frozen=True)
class CacheMemory:
    """Where keys and values are: addresses by layer, each [batch, heads, capacity, size]."""

    keys: tuple[int, ...]
    values: tuple[int, ...]
    capacity: int


class Stepper:
    """Runs the step program of an artifact.

    Args:
        device: The GPU.
        program: The step program.
        weights: Gives the address of an initializer, as it is in the artifact.
        floats: Gives an initializer of a few numbers as float32.
    """

    def __init__(
        self,
        device: Device,
        program: Program,
        *,
        weights: Callable[[str], int],
        floats: Callable[[str], NDArray[np.float32]],
    ) -> None:
        self._device, self.program = device, program
        self.weight, self._floats = weights, floats
        self._element = _ELEMENT[program["dtype"]]
        self._buffers: dict[str, tuple[int, int]] = {}
        self._constants: dict[str, int] = {}
        self._graphs: OrderedDict[tuple[int, CacheMemory], Any] = OrderedDict()
        self._host = device.pinned(ctypes.sizeof(_Inputs))
        self._inputs = _Inputs.from_buffer(self._host.data)
        self._given = device.allocate(ctypes.sizeof(_Inputs), zero=True)
        self._row = int(program["vocabulary"]) * self._element
        self._logits = device.pinned(MOST_TOKENS * self._row)
        self._price = _compiled_price(program)
        self.replays = True
        """Whether steps are replayed, and not launched kernel by kernel, which gives the same."""

    @property
    def most_sequences(self) -> int:
        """The largest batch it takes."""
        return MOST_TOKENS

    def step(
        self,
        ids: NDArray[np.int64],
        lengths: NDArray[np.integer],
        real: NDArray[np.integer],
        cache: CacheMemory,
        *,
        price: Price = None,
    ) -> NDArray[Any]:
        """Return the logits of one new token per sequence, and append its key and value.

        Args:
            ids: The tokens [batch].
            lengths: The positions that each sequence has had [batch].
            real: 0 for padding, which keeps no expert [batch].
            cache: With room for one position more of each.
            price: Of an activation, in place of the one compiled in; one, or one per sequence.

        Returns:
            [batch, vocabulary] float16 or float32; bfloat16 as uint16.
        """
        batch = len(ids)
        self._device.make_current()
        graph = self._graph(batch, cache)
        self._inputs.ids[:batch] = ids.tolist()
        self._inputs.lengths[:batch] = lengths.tolist()
        self._inputs.real[:batch] = real.tolist()
        self._inputs.prices[:batch] = self._prices(price, batch).tolist()
        if self.replays:
            self._device.replay(graph)
        else:
            self._record(self._launches(batch, cache), batch)
        self._device.wait()
        return self.as_logits(self._logits[: batch * self._row], batch)

    def as_logits(self, data: NDArray[np.uint8], batch: int) -> NDArray[Any]:
        """Return a copy of bytes as logits [batch, vocabulary]; bfloat16 as uint16."""
        kind = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32}
        return data.view(kind[self.program["dtype"]]).reshape(batch, -1).copy()

    def set_prices(self, price: Price, batch: int) -> None:
        """Have routers compare with prices [batch], by default the one compiled in."""
        self._device.upload(self._given + _Inputs.prices.offset, self._prices(price, batch))

    def _prices(self, price: Price, batch: int) -> NDArray[np.float32]:
        return np.full(batch, self._price if price is None else price, np.float32)

    def _graph(self, batch: int, cache: CacheMemory) -> Any:
        key = (batch, cache)
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        launches = self._launches(batch, cache)
        self._device.load([launch.kernel for launch in launches], dtype=self.program["dtype"])
        self._device.check(launches)
        graph = self._device.capture(lambda: self._record(launches, batch))
        self._graphs[key] = graph
        while len(self._graphs) > _MOST_GRAPHS:
            self._device.destroy(self._graphs.popitem(last=False)[1])
        return graph

    def _record(self, launches: Sequence[Launch], batch: int) -> None:
        self._device.copy_in(self._given, self._host, ctypes.sizeof(_Inputs))
        for number, launch in enumerate(launches):
            # The first kernel follows a copy, which lets nothing begin early.
            self._device.launch(launch, overlap=number > 0)
        address, _ = self._buffers["logits"]
        self._device.copy_out(self._logits, address, batch * self._row)

    def _launches(self, batch: int, cache: CacheMemory) -> list[Launch]:
        memory = Memory(
            weight=self.weight,
            buffer=self._buffer,
            zeros=self._buffer,  # all are zeros at first, and kernels leave these so
            router=self.router,
            transposed=self.transposed,
            keys=dict(enumerate(cache.keys)),
            values=dict(enumerate(cache.values)),
            ids=self._given + _Inputs.ids.offset,
            lengths=self._given + _Inputs.lengths.offset,
            real=self._given + _Inputs.real.offset,
        )
        shape = Shape(batch, cache.capacity, self._device.multiprocessors, self._element)
        return plan_launches(self.program, memory, shape)

    def _buffer(self, name: str, size: int) -> int:
        address, room = self._buffers.get(name, (0, 0))
        if room < size:
            # Graphs that were captured go on with the smaller one, so it is kept.
            address = self._device.allocate(size, zero=True)
            self._buffers[name] = (address, size)
        return address

    def router(self, op: Operation) -> int:
        """Return the address of a route operation's constants."""
        name = f"router {op['out']} {op['weight']}"
        if name not in self._constants:
            prices = self._given + _Inputs.prices.offset
            router: Router = router_of(op, self._constant, self.transposed, prices)
            self._constants[name] = self._uploaded(np.frombuffer(bytes(router), np.uint8))
        return self._constants[name]

    def _constant(self, name: str) -> int:
        if name not in self._constants:
            self._constants[name] = self._uploaded(self._floats(name))
        return self._constants[name]

    def transposed(self, name: str, columns: int) -> int:
        """Return the address of an initializer of so many columns, transposed, in the own type."""
        key = f"transposed {columns} {name}"
        if key not in self._constants:
            matrix = np.ascontiguousarray(self._floats(name).reshape(-1, columns).T)
            self._constants[key] = self._uploaded(_as_stored(matrix, self.program["dtype"]))
        return self._constants[key]

    def _uploaded(self, array: NDArray[Any]) -> int:
        address = self._device.allocate(array.nbytes)
        self._device.upload(address, array)
        return address


def _as_stored(array: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Return numbers in a program's type; bfloat16 as uint16."""
    if dtype == "bfloat16":
        return to_bfloat16(array)
    return array.astype(np.float16 if dtype == "float16" else np.float32)


def _compiled_price(program: Mapping[str, Any]) -> float:
    """Return the threshold of the routers whose price can be set, 0 if there is none."""
    for op in program["ops"]:
        if op["op"] == "route" and op["keep"].get("dial"):
            return float(op["keep"]["threshold"])
    return 0.0
