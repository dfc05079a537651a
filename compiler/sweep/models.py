"""The model of a sweep in the types that its weights are stored in: one at a time in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alloc_moe.compiler.export.normalize import export_model
from alloc_moe.compiler.planning.goals.traffic import WeightsRead, weights_read
from alloc_moe.compiler.records import TargetOptions
from alloc_moe.compiler.rounding.formats import BITS, choose_storage
from alloc_moe.compiler.rounding.stage import round_model
from alloc_moe.compiler.rounding.weights import weight_reader, with_float_experts

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from alloc_moe.compiler.calibration.windows import CalibrationSet
    from alloc_moe.compiler.model.checkpoint import Checkpoint
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.records import DType, Planned, Rounding
    from alloc_moe.compiler.rounding.formats import Storage
    from alloc_moe.runtime.console import Console


@dataclass(frozen=True)
class WeightType:
    """What weights are stored in, and how they are rounded to it.

    With ``mixed_bits`` a plan chooses the bits of experts; all else is stored as ``dtype``.
    """

    dtype: DType = "float32"
    rounding: Rounding = "nearest"
    mixed_bits: bool = False

    @property
    def goes_by_text(self) -> bool:
        """Whether stored values depend on the calibration text."""
        return self.rounding == "gptq"

    @property
    def name(self) -> str:
        """Return what files of it are named by, such as ``int4-gptq-mixed``."""
        return "-".join((self.dtype, self.rounding, *(["mixed"] * self.mixed_bits)))

    def storage(self, checkpoint: Checkpoint) -> Storage:
        """Return what of a model is stored how."""
        return choose_storage(checkpoint, TargetOptions(self.dtype, mixed_bits=self.mixed_bits))

    def reading(self, checkpoint: Checkpoint, *, token_sizes: bool = False) -> WeightsRead:
        """Return what a token reads of a model, with the maps of token sizes or without."""
        storage = self.storage(checkpoint)
        return weights_read(
            checkpoint,
            dtype=storage.dtype,
            quantization=storage.chosen,
            formats=storage.formats,
            token_sizes=token_sizes,
        )


FLOAT32 = WeightType()


class StoredModel:
    """A model with weights of one type, and its graph, exported when it is first asked for."""

    def __init__(
        self, moe: MoeModel, weights: WeightType, text: CalibrationSet, console: Console
    ) -> None:
        self.weights = weights
        storage = weights.storage(moe.checkpoint)
        self.formats = storage.formats
        self.moe = round_model(
            moe, storage.chosen, weights.rounding, text, console, widths=storage.formats
        )
        self._console = console
        self._graph: ir.Model | None = None
        self._reads = weight_reader(self.moe)

    def graph(self, planned_moe: MoeModel) -> ir.Model:
        """Return the graph of the model, or of the same with the bits that a plan chose.

        Its weights are read when it is saved: before it is asked for again.
        """
        self._reads = weight_reader(planned_moe)
        if self._graph is None:
            self._console.note("Exporting the graph")
            self._graph = export_model(planned_moe, dtype=self.weights.dtype, read=self._read)
        return self._graph

    def _read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Read a weight of the plan whose graph was asked for last."""
        return self._reads(name, dtype)

    def take_back(self, planned_moe: MoeModel) -> None:
        """Let experts whose bits a plan chose be floats again, for the next plan."""
        if self.formats and planned_moe.quantization and planned_moe.quantization.experts:
            self.moe = with_float_experts(planned_moe)

    def widths(self, planned_moe: MoeModel) -> list[int]:
        """Return which of its formats each layer's experts have."""
        if not self.formats:
            return [0] * len(planned_moe.layers)
        assert planned_moe.quantization is not None
        pairs = zip(self.formats, planned_moe.quantization.experts, strict=True)
        return [list(forms).index(form) for forms, form in pairs]

    def bytes_read(
        self, planned_moe: MoeModel, planned: Planned, per_layer: tuple[float, ...]
    ) -> float:
        """Return what a token reads in decode that runs so many experts of each layer."""
        mapped = any(layer.token_sizes is not None for layer in planned.plan.layers)
        reading = self.weights.reading(planned_moe.checkpoint, token_sizes=mapped)
        widths = self.widths(planned_moe)
        return reading.counted(planned.plan, planned.corrections, widths, per_layer)


class Models:
    """Gives the model in any type; the last one stays in memory, others are made again."""

    def __init__(self, first: MoeModel, load: Callable[[], MoeModel], console: Console) -> None:
        self._unrounded: MoeModel | None = first
        self._load, self._console = load, console
        self._last: tuple[tuple[WeightType, int | None], StoredModel] | None = None

    def of(self, weights: WeightType, text: CalibrationSet) -> StoredModel:
        """Return the model in a type, rounded by a text where rounding goes by text."""
        key = (weights, text.seed if weights.goes_by_text else None)
        if self._last is None or self._last[0] != key:
            self._last = None  # its memory is free before another is loaded
            moe = self._unrounded or self._load()
            self._unrounded = moe if weights.dtype not in BITS else None  # rounded in place
            self._last = key, StoredModel(moe, weights, text, self._console)
        return self._last[1]
