"""The plain data types that the compiler's stages hand on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from alloc_moe.compiler.errors import ProfileError
from alloc_moe.runtime.artifact.plan import Redistribution as Redistribution
from alloc_moe.runtime.artifact.shapes import (
    ShapeError,
    measured,
    optional,
    parse_json,
    record,
    rows,
    string,
    whole,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from alloc_moe.passes.blockwise import BlockFormat
    from alloc_moe.runtime.artifact.plan import AllocationPlan

Allocation = Literal["sensitivity", "uniform"]
Metric = Literal["kl", "ppl-suffix", "output", "fisher", "data-free"]
Weights = Literal["keep", "renorm"]
CorrectionMode = Literal["none", "gain", "affine"]
CostKind = Literal["activations", "bytes", "latency"]
DType = Literal["float32", "float16", "bfloat16", "int8", "int4"]
CacheType = Literal["float32", "int8"]
Rounding = Literal["nearest", "gptq"]
Device = Literal["cpu", "cuda"]
PricePer = Literal["call", "sequence"]
Form = Literal["onnx", "torchscript", "export", "checkpoint"]
OffloadMode = Literal["auto", "never", "always"]

SIZED: tuple[Metric, ...] = ("fisher", "output")
"""Metrics that measure the sizes of experts, which ``price`` goes by."""

SCORED: tuple[Redistribution, ...] = ("price", "threshold", "top-p", "ratio")
"""Redistributions that compare scores with a threshold: they hold a budget in the mean only."""

COMMON: tuple[Redistribution, ...] = ("price", "top-p", "ratio")
"""Those of them with one threshold for all layers, which divides a budget among layers itself."""


@dataclass(frozen=True)
class CalibrationOptions:
    """The text that is measured on: ``text`` is a file or a dataset, None the default one."""

    text: str | None = None
    tokens: int = 8192
    seed: int = 0


@dataclass(frozen=True)
class PlanOptions:
    """How a budget is spent.

    ``overlaps`` are tried for ``price``; that of the least divergence stays. ``refine`` plans are
    measured whole, for ``refine_seconds`` at most.
    """

    redistribution: Redistribution = "price"
    weights: Weights = "keep"
    correction: CorrectionMode = "affine"
    allocation: Allocation = "sensitivity"
    cost: CostKind = "activations"
    cost_batch: int = 1
    cap: float | None = None
    dial: bool = True
    overlaps: tuple[float, ...] = (0.0, 0.5)
    refine: int = 0
    refine_seconds: float = 600.0


@dataclass(frozen=True)
class TargetOptions:
    """What the artifact is made of, and where it will run.

    ``form`` is what kind of files it is; None is what the output's name says.
    """

    dtype: DType = "float32"
    block: int = 128
    mixed_bits: bool = False
    cache: CacheType = "float32"
    device: Device = "cpu"
    rounding: Rounding = "nearest"
    price_per: PricePer = "call"
    form: Form | None = None


@dataclass(frozen=True)
class Goal:
    """What a plan shall reach at most: ``bytes`` that a token reads, or added ``loss`` in nats."""

    kind: Literal["bytes", "loss"]
    most: float


@dataclass(frozen=True)
class CompileOptions:
    """What the user asked `alloc-compile` for; paths and text as typed.

    With a ``goal`` the budget is found; until then it is that of the full model.
    """

    model: str
    output: str
    budget: str
    goal: Goal | None = None
    calibration: CalibrationOptions = CalibrationOptions()
    sensitivity: Metric = "fisher"
    profile: Path | None = None
    plan: PlanOptions = PlanOptions()
    token_sizes: bool | None = None  # None: wherever they can be
    target: TargetOptions = TargetOptions()
    offload: OffloadMode = "auto"
    trust_remote_code: bool = False
    force: bool = False


@dataclass(frozen=True)
class ProfileOptions:
    """What the user asked `alloc-profile` for; without a ``path`` the profile isn't saved."""

    model: str
    path: Path | None = None
    calibration: CalibrationOptions = CalibrationOptions()
    sensitivity: Metric = "fisher"
    redistribution: Redistribution = "price"
    correction: CorrectionMode = "affine"
    dtype: DType = "float32"
    block: int = 128
    rounding: Rounding = "nearest"
    offload: OffloadMode = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer of a model.

    ``name`` is the module path of its block (``model.layers.3.mlp``); the experts module is at
    ``experts_name``; ``decoder_layer`` is the index of the decoder layer that holds it.
    """

    name: str
    experts_name: str
    decoder_layer: int
    num_experts: int
    experts_per_token: int


@dataclass(frozen=True)
class Quantization:
    """How an artifact stores its weights.

    ``weights`` has a format by parameter name for linear layers and embeddings, ``experts`` one per
    MoE layer, none while they are not chosen; ``activations`` is the type of everything else.
    ``rounding`` says how the stored values are chosen. ``marks`` tell a model so rounded from
    others of the same checkpoint.
    """

    dtype: str
    activations: str
    weights: Mapping[str, BlockFormat]
    experts: tuple[BlockFormat, ...]
    marks: tuple[str, ...] = ()
    rounding: Rounding = "nearest"

    def to_plan(self) -> dict[str, Any]:
        """Return the plan's ``quantization`` entry; rounding to the nearest is not named."""
        rounding = {} if self.rounding == "nearest" else {"rounding": self.rounding}
        return {
            "dtype": self.dtype,
            "activations": self.activations,
            "expert_bits": [form.bits for form in self.experts],
            "expert_block": [form.block for form in self.experts],
            "blocks": sorted({form.block for form in self.weights.values()}),
            **rounding,
        }


@dataclass(frozen=True)
class Planned:
    """A plan, and what its experts are changed by per MoE layer."""

    plan: AllocationPlan
    corrections: tuple[Correction | None, ...]


@dataclass(frozen=True)
class Verification:
    """How far artifact and reference are apart.

    ``kl`` is the mean over tokens of KL(reference || artifact) in nats, ``tokens`` their number. Of
    a quantised artifact ``max_abs_logit_error`` is that against PyTorch with the same rounded
    weights, activations unrounded in both; ``kl`` is that of the artifact as it is against PyTorch
    in float32 under the same plan.
    """

    max_abs_logit_error: float
    kl: float
    tokens: int

    def to_plan(self) -> dict[str, Any]:
        """Return the plan's ``verify`` entry."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Compiled:
    """What a compile made: the artifact's path, its plan, its profile if one was needed."""

    path: Path
    plan: AllocationPlan
    profile: Path | None
    verification: Verification


@dataclass(frozen=True)
class PartialSums:
    """Sums over the first `windows` calibration windows, of a measurement that was interrupted."""

    windows: int
    loss: float
    layers: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, eq=False)
class Correction:
    """How the experts of one MoE layer are changed to make up for those that are dropped.

    Expert e gives ``scale * f_e(x) + bias[e]`` instead of f_e(x): both fold into its ``down``
    projection and that one's bias, so nothing is added to what runs.
    """

    scale: NDArray[np.float32]  # [hidden]
    bias: NDArray[np.float32] | None  # [experts, hidden]


@dataclass(frozen=True)
class SensitivityProfile:
    """What fewer experts cost each layer.

    ``costs[l][k - 1]`` is the cost of k experts in MoE layer l; it need not fall with k. A row is
    None until that layer was measured. The first six fields say what was measured: a profile
    whose fields differ from those asked for is refused, and so is one of another redistribution or
    correction.

    ``expert_sizes[l][e]`` is how much expert e of MoE layer l adds, before the router's weight: for
    ``fisher`` in nats, for ``output`` the norm (root mean squares over the tokens that have e among
    their candidates). None where the metric gives none.

    ``redistribution`` says which of a token's candidates ran at a mean of k: its first k (none),
    the largest weights of its window (sequence, which is also what batch means for one window), or
    the weights above a threshold of the layer (threshold). ``correction`` says how the layer's
    output was corrected at that k.

    ``bits``, if any, are widths of the experts' weights. A row then has the costs of all k in the
    first of them, against all experts in floats, then those of all k in the next.
    """

    metric: Metric
    model_fingerprint: str
    calibration_sha256: str
    tokens: int
    sequence_length: int
    seed: int
    layer_names: tuple[str, ...]
    experts_per_token: tuple[int, ...]
    costs: tuple[tuple[float, ...] | None, ...]
    baseline_loss: float
    seconds: float
    redistribution: Redistribution = "none"
    correction: CorrectionMode = "none"
    expert_sizes: tuple[tuple[float, ...] | None, ...] = ()
    partial: PartialSums | None = None
    bits: tuple[int, ...] = ()

    @property
    def widths(self) -> int:
        """How many costs a k has: one per width of weights."""
        return max(1, len(self.bits))

    @property
    def complete(self) -> bool:
        """Whether every layer was measured."""
        return all(row is not None for row in self.costs)

    def to_json(self) -> str:
        """Return the profile as one JSON object."""
        return json.dumps({"format": 1, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, *, path: Path) -> SensitivityProfile:
        """Read back what `to_json` wrote.

        Raises:
            ProfileError: The text is no profile.
        """
        try:
            data: dict[str, Any] = parse_json(text, _PROFILE)
        except ShapeError as error:
            raise ProfileError(
                f"{path} is no sensitivity profile ({error}). Give another file, or delete it."
            ) from error
        data.pop("format")
        # Files of earlier versions have no sizes of experts.
        data.setdefault("expert_sizes", (None,) * len(data["costs"]))
        if partial := data.pop("partial", None):
            data["partial"] = PartialSums(**partial)
        return cls(**data)


_MOST = 1 << 20  # experts, and more than any layer has
_ROW = rows(measured, most=_MOST)
_PROFILE = record(
    {
        "format": whole(),
        "metric": string(),
        "model_fingerprint": string(),
        "calibration_sha256": string(),
        "tokens": whole(0),
        "sequence_length": whole(0),
        "seed": whole(),
        "layer_names": rows(string()),
        "experts_per_token": rows(whole(1, _MOST)),
        "costs": rows(optional(_ROW)),
        "baseline_loss": measured,
        "seconds": measured,
    },
    {
        "redistribution": string(),
        "correction": string(),
        "expert_sizes": rows(optional(_ROW)),
        "partial": optional(record({"windows": whole(0), "loss": measured, "layers": rows(_ROW)})),
        "bits": rows(whole(1, 64)),
    },
)
