"""Graph of an artifact -> loss, divergence and experts on the held-out text, in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from alloc_moe.compiler.package import output as package
from alloc_moe.compiler.workspace.files import explained, temporary_folder
from alloc_moe.runtime.execution.session import open_session
from alloc_moe.runtime.measure.evaluate import default_window, evaluate_artifact, windows

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from alloc_moe.compiler.records import MoeLayer
    from alloc_moe.compiler.sweep.held_out import HeldOut
    from alloc_moe.compiler.sweep.kept import Found
    from alloc_moe.runtime.console import Console
    from alloc_moe.runtime.execution.calls import Output

_CONTEXT = 64  # tokens that a window shares with the one before
CELL = ".cell-"
"""How the folders of artifacts that are run begin."""
FULL_LOGITS = "logits"
"""The file of the full model's."""
_ROWS = 64  # logits compared at a time, so that a large vocabulary needs little memory
_MOST_BYTES = 8 << 30  # of the full model's logits on disk


class HeldOutRuns:
    """Runs artifacts on the held-out text; `run_full` goes first.

    What the full model says is kept in a file meanwhile, to tell how far artifacts diverge from it.
    """

    def __init__(
        self,
        scored: HeldOut,
        layers: Sequence[MoeLayer],
        folder: Path,
        threads: int | None,
        console: Console,
    ) -> None:
        self._scored, self._layers, self._console = scored, layers, console
        self._folder, self._threads = folder, threads
        self._full = folder / FULL_LOGITS
        self._vocabulary = 0

    def run_full(self, model: ir.Model) -> Found:
        """Write and run the artifact of the full model, and keep its logits."""
        fits = True

        def keep(logits: NDArray[np.float32]) -> None:
            nonlocal fits
            self._vocabulary = logits.shape[-1]
            fits = len(self._scored.ids) * self._vocabulary * 4 <= _MOST_BYTES
            if fits:
                with (
                    explained("The full model's logits", self._full),
                    self._full.open("ab") as file,
                ):
                    file.write(np.ascontiguousarray(logits, np.float32).tobytes())

        found = self._run(model, keep)
        if not fits:
            self._vocabulary = 0
            self._console.note(
                f"Divergences are left out: the full model's logits take more than "
                f"{_MOST_BYTES >> 30} GiB. Give fewer --text-tokens"
            )
        return found

    def run(self, model: ir.Model) -> Found:
        """Write an artifact, run it, and delete it; the divergence is from the full model."""
        if not self._vocabulary:
            return {**self._run(model, lambda _: None), "divergence": None}
        shape = (len(self._scored.ids) - 1, self._vocabulary)
        full = np.memmap(self._full, np.float32, "r", shape=shape)
        total, done = 0.0, 0

        def compare(logits: NDArray[np.float32]) -> None:
            nonlocal total, done
            total += float(divergences(full[done : done + len(logits)], logits).sum())
            done += len(logits)

        found = self._run(model, compare)
        return {**found, "divergence": total / done}

    def _run(self, model: ir.Model, on_logits: Callable[[NDArray[np.float32]], None]) -> Found:
        with temporary_folder(self._folder, CELL) as folder:
            path = folder / "model.onnx"
            package.save_graph(model, path)
            session = open_session(
                path,
                ep="cpu",
                threads=self._threads,
                count_activations=True,
                stop_spinning=True,
            )
            histograms = [np.zeros(layer.experts_per_token + 1, np.int64) for layer in self._layers]
            window = default_window(session.context_length)
            stride = max(window - _CONTEXT, 1)
            parts = windows(len(self._scored.ids), window=window, stride=stride)

            def take(output: Output) -> None:
                assert output.rows is not None
                for histogram, rows in zip(histograms, output.rows, strict=True):
                    histogram += np.bincount(rows, minlength=len(histogram))
                part = next(parts)
                on_logits(output.logits[0, part.first_scored - part.start - 1 : -1])

            found = evaluate_artifact(
                session, self._scored.ids, window=window, stride=stride, on_output=take
            )
            del session  # its mapping of the weights, before the folder goes
        return {
            "loss": found.loss,
            "per_layer": list(found.activations_per_token or ()),
            "histogram": [(counts / counts.sum()).tolist() for counts in histograms],
        }


def divergences(
    full: NDArray[np.floating], logits: NDArray[np.floating]
) -> NDArray[np.float64]:  # [tokens]
    """Return KL(full || other) in nats of each token, from logits of both [tokens, vocabulary]."""
    found = np.empty(len(full))
    for start in range(0, len(full), _ROWS):
        rows = slice(start, start + _ROWS)
        expected = _log_softmax(full[rows])
        gap = expected - _log_softmax(logits[rows])
        found[rows] = (np.exp(expected) * gap).sum(axis=1)
    return found


def _log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
