"""The plain data types that the compiler's stages hand on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from alloc_moe.compiler.errors import ProfileError
from alloc_moe.compiler.saved_passes import SavedPasses

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from alloc_moe.compiler.checkpoint import CheckpointReader
    from alloc_moe.compiler.offload import Offloading
    from alloc_moe.compiler.quantization import Quantization

Allocation = Literal["sensitivity", "uniform"]
Metric = Literal["kl", "ppl-suffix", "output", "fisher", "data-free"]
Redistribution = Literal["none", "batch", "sequence", "threshold", "price", "top-p", "ratio"]
Weights = Literal["keep", "renorm"]
CorrectionMode = Literal["none", "gain", "affine"]
CostKind = Literal["activations", "bytes", "latency"]
DType = Literal["float32", "float16", "bfloat16", "int8", "int4"]
CacheType = Literal["float32", "int8"]
Device = Literal["cpu", "cuda"]
OffloadMode = Literal["auto", "never", "always"]


@dataclass(frozen=True)
class CompileOptions:
    """What the user asked `alloc-compile` for; paths and text as typed."""

    model: str
    output: str
    budget: str
    calibration: str | None = None
    tokens: int = 8192
    seed: int = 0
    allocation: Allocation = "sensitivity"
    sensitivity: Metric = "fisher"
    profile: Path | None = None
    cost: CostKind = "activations"
    cost_batch: int = 1
    redistribution: Redistribution = "price"
    weights: Weights = "keep"
    correction: CorrectionMode = "affine"
    cap: float | None = None
    mixed_bits: bool = False
    refine: int = 0
    refine_seconds: float = 600.0
    dtype: DType = "float32"
    block: int = 128
    cache: CacheType = "float32"
    device: Device = "cpu"
    force: bool = False
    trust_remote_code: bool = False
    offload: OffloadMode = "auto"


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
class MoeModel:
    """A loaded checkpoint.

    ``model`` is in eval mode, float32 on the CPU; ``skeleton`` is the same without weights;
    ``reader`` reads single weights from the files in ``folder``. With ``offloading`` the weights of
    ``model``'s decoder layers are in memory only while these run. With a ``quantization``, the
    weights of ``model`` are rounded as it says, those of ``reader`` are not. ``passes`` keeps what
    passes over a text found, and the rounded weights of offloaded layers.
    """

    source: str
    folder: Path
    fingerprint: str
    config: PreTrainedConfig
    model: PreTrainedModel
    skeleton: PreTrainedModel
    reader: CheckpointReader
    tokenizer: PreTrainedTokenizerBase
    layers: tuple[MoeLayer, ...]
    quantization: Quantization | None = None
    offloading: Offloading | None = None
    passes: SavedPasses = field(default_factory=SavedPasses)

    @property
    def checkpoint_fingerprint(self) -> str:
        """That of the weights as they are stored, whatever they are rounded to."""
        return self.fingerprint.partition(":")[0]


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
    def from_json(cls, text: str, *, path: Path) -> SensitivityProfile:
        """Read back what `to_json` wrote.

        Raises:
            ProfileError: The text is no profile.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            data.pop("format")
            for name in ("layer_names", "experts_per_token"):
                data[name] = tuple(data[name])
            data["costs"] = _rows(data["costs"])
            # Files of earlier versions have none of these three, nor a correction.
            data["bits"] = tuple(data.get("bits", ()))
            data["expert_sizes"] = _rows(data.get("expert_sizes", [None] * len(data["costs"])))
            if partial := data.pop("partial", None):
                partial["layers"] = _rows(partial["layers"])
                data["partial"] = PartialSums(**partial)
            return cls(**data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProfileError(
                f"{path} is no sensitivity profile ({error!r}). Give another file, or delete it."
            ) from error


def _rows(rows: Sequence[Sequence[float] | None]) -> tuple[Any, ...]:
    return tuple(None if row is None else tuple(row) for row in rows)
