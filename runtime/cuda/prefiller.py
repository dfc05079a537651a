"""A call of many tokens on the GPU, in pieces that fit its buffers."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alloc_moe.runtime.artifact.dial import Price
from alloc_moe.runtime.cuda.cublas import Gemm
from alloc_moe.runtime.cuda.device import Device
from alloc_moe.runtime.cuda.prefill import Work, plan_prefill
from alloc_moe.runtime.cuda.records import Copy, Launch, Places, Rows
from alloc_moe.runtime.cuda.stepper import CacheMemory, Stepper

_MOST_ROWS = 4096  # computed at once: their buffers take some 100 KiB a row


class Prefiller:
    """Runs a step program for more than one token per sequence.

    Args:
        device: The GPU.
        stepper: Has the program, its weights and constants.
    """

    def __init__(self, device: Device, stepper: Stepper) -> None:
        self._device, self._stepper = device, stepper
        self._buffers: dict[str, tuple[int, int]] = {}
        self._outgrown: list[int] = []
        self._checked: set[str] = set()

    def run(
        self,
        ids: NDArray[np.int64],
        counts: NDArray[np.integer],
        lengths: NDArray[np.integer],
        cache: CacheMemory,
        *,
        price: Price = None,
    ) -> NDArray[Any]:
        """Return the logits of each sequence's last token, and append keys and values.

        Args:
            ids: The tokens [batch, width], each row's own first.
            counts: How many are a row's own, one or more [batch].
            lengths: The positions that each sequence has had [batch].
            cache: With room for the tokens.
            price: Of an activation, in place of the one compiled in; one, or one per sequence.
        """
        self._device.make_current()
        batch, width = ids.shape
        self._stepper.set_prices(price, batch)
        piece = max(1, min(width, _MOST_ROWS // batch))
        logits: NDArray[Any] | None = None
        for start in range(0, width, piece):
            part = ids[:, start : start + piece]
            here = np.clip(counts - start, 0, part.shape[1])
            given = self._run(part, here, lengths + np.minimum(counts, start), cache)
            ended = (here > 0)[:, None]
            logits = given if logits is None else np.where(ended, given, logits)
        assert logits is not None
        return logits

    def _run(
        self,
        ids: NDArray[np.int64],
        counts: NDArray[np.integer],
        lengths: NDArray[np.integer],
        cache: CacheMemory,
    ) -> NDArray[Any]:
        batch, width = ids.shape
        rows = Rows(
            sequences=batch,
            width=width,
            ids=self._uploaded("rows.ids", ids.astype(np.int64)),
            lengths=self._uploaded("rows.lengths", lengths.astype(np.int32)),
            counts=self._uploaded("rows.counts", counts.astype(np.int32)),
            keys=dict(enumerate(cache.keys)),
            values=dict(enumerate(cache.values)),
            capacity=cache.capacity,
        )
        places = Places(
            weight=self._stepper.weight,
            buffer=self._buffer,
            zeros=lambda name, size: self._buffer(name, size, zero=True),
            router=self._stepper.router,
            transposed=self._stepper.transposed,
        )
        program, most_shared = self._stepper.program, self._device.most_shared
        plan = functools.partial(plan_prefill, program, places, rows, most_shared=most_shared)
        for item in plan():
            if isinstance(item, Launch) and item.kernel not in self._checked:
                self._load([each for each in plan() if isinstance(each, Launch)])
            self._do(item)
        size = batch * int(self._stepper.program["vocabulary"]) * 2
        host = self._device.pinned_once("rows.logits", size)
        self._device.copy_out(host, self._buffer("rows.logits", size), size)
        self._device.wait()
        while self._outgrown:
            self._device.free(self._outgrown.pop())
        return self._stepper.as_logits(host[:size], batch)

    def _do(self, item: Work) -> None:
        if isinstance(item, Launch):
            self._device.launch(item, overlap=False)
        elif isinstance(item, Gemm):
            self._device.multiply(item, dtype=self._stepper.program["dtype"])
        else:
            assert isinstance(item, Copy)
            self._device.copy(item.to, item.source, item.size)

    def _load(self, launches: list[Launch]) -> None:
        new = [launch for launch in launches if launch.kernel not in self._checked]
        if new:
            self._device.load(
                [launch.kernel for launch in new], dtype=self._stepper.program["dtype"]
            )
            self._device.check(new)
            self._checked.update(launch.kernel for launch in new)

    def _uploaded(self, name: str, array: NDArray[Any]) -> int:
        address = self._buffer(name, array.nbytes)
        self._device.upload(address, array)
        return address

    def _buffer(self, name: str, size: int, *, zero: bool = False) -> int:
        address, room = self._buffers.get(name, (0, 0))
        if room < size:
            if address:  # planned work may use it yet
                self._outgrown.append(address)
            room = 1 << math.ceil(math.log2(size))
            address = self._device.allocate(room, zero=zero)
            self._buffers[name] = (address, room)
        return address
