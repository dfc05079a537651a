"""The artifact's contract between compiler and runtime: file names, metadata, the plan's JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from alloc_moe.runtime.artifact.shapes import (
    ShapeError,
    anything,
    load_json,
    mapping,
    number,
    one_of,
    optional,
    record,
    rows,
    string,
    whole,
)
from alloc_moe.runtime.artifact.token_sizes import TokenSizes
from alloc_moe.runtime.errors import ArtifactError

FORMAT = 1
PLAN_KEY = "alloc_moe.plan"
"""Key of the plan in the ONNX model's metadata."""
GENERATION_KEY = "alloc_moe.generation"
"""Key of ``{"eos_token_id", "context_length"}`` in the metadata, for a graph that stands alone."""
SHARED_CACHE_KEY = "alloc_moe.shared_cache"
"""Key in the metadata of a graph that appends to its cache in place: inputs and outputs of the
cache may be the same buffers, with room for more than the past. The value is the cache's type."""
LATENT_CACHE_KEY = "alloc_moe.latent_cache"
"""Key in the metadata of a graph that attends to all columns of its shared cache, and hides those
that aren't written: the buffers must have room for the call's tokens, and hold finite numbers. The
value is the cache's type."""
PADDING_KEY = "alloc_moe.padding"
"""Key in the metadata of a graph whose rows begin with their tokens, padding after: ``right``. The
attention mask [batch, columns] of a row is ones, then zeros, as wide as the longest row; it ends in
a 2 in place of the last 1 where the call's token of that row is padding, one column after it."""
STEP_KEY = "alloc_moe.step"
"""Key in the metadata of how one decode step is computed, as a list of fused launches."""
NO_STEP_KEY = "alloc_moe.no_step"
"""Key in the metadata of why there is no such list, as the end of a sentence."""
DATA_KEY = "alloc_moe.data"
"""Key of the digests of the data files in the metadata, see `digest`."""
TOKENIZER_KEY = "alloc_moe.tokenizer"
"""Key in the metadata of what identifies the tokenizer: ``sha256`` of its serialisation,
``files``, those of files that hold it, and its ``bos_token`` and ``eos_token``."""
TOKENIZER_JSON_KEY = "alloc_moe.tokenizer_json"
"""Key of the tokenizer itself in the metadata of a graph that stands alone."""
PROGRAM_KEY = "alloc_moe.program"
"""Key in the metadata of an artifact of torch of what it takes: ``vocabulary``, whether there is a
``dial``, the cache's ``dtype`` and for each of its tensors the ``sizes``, null for those of batch
and past, and the ``past_axis``."""
PLAN_FILE = "allocation.json"
"""Name of the plan's file in a bundle folder."""
CHECKPOINT_PLAN_FILE = "alloc_plan.json"
"""Name of the plan's file in a checkpoint that was written under a plan, for transformers."""
CHECKPOINT_SHIFTS_FILE = "alloc_plan.safetensors"
"""Name of the file beside it with what corrections add and the model has no weights for:
``EXPERTS_MODULE.shift`` [experts, hidden]."""
MODEL_FILE = "model.onnx"
"""Name of the graph's file in a bundle folder."""
PRICE_INPUT = "alloc_moe.price"
"""Name of the overridable input that sets the price of an activation: float32, no dimensions."""
LOGITS_TO_KEEP_INPUT = "alloc_moe.logits_to_keep"
"""Name of the overridable input that says of how many last positions there are logits: int64 [1],
0 for all."""
ROUTER_PROBS = "alloc_moe.router_probs.{layer}"
"""Name of the value [rows, experts] before a layer's MoE op: log weights, DROPPED if not run."""
ROUTER_WEIGHTS = "alloc_moe.router_weights.{layer}"
"""Name of the value [tokens, experts] before a layer's QMoE op: weights, 0 if not run."""
DROPPED = -1e4
"""What stands in the router probabilities for an expert that is not executed."""
Redistribution = Literal["none", "batch", "sequence", "threshold", "price", "top-p", "ratio"]
"""What a plan's redistribution can be."""
_OPTIONAL = ("price", "overlap", "dial", "cap", "correction", "cost", "quantization", "target")


@dataclass(frozen=True)
class PlannedLayer:
    """What the plan gives one MoE layer.

    ``k`` is the mean number of routed experts per token, ``k_original`` the number as trained. It
    is whole where the redistribution executes it exactly; where candidates are kept by their score
    it is the mean over the calibration tokens. ``threshold`` is the least score kept, where each
    layer has its own; ``sizes[e]``, for ``price``, multiplies the weight of expert e in its score.
    ``token_sizes``, if any, multiplies these by what each token's hidden state says. ``bits`` are
    those of the experts' weights, where the plan chose them.
    """

    name: str
    experts: int
    k_original: int
    k: float
    threshold: float | None = None
    sizes: tuple[float, ...] | None = None
    token_sizes: TokenSizes | None = None
    bits: int | None = None


@dataclass(frozen=True)
class Budget:
    """``requested`` is what the user said, the others are activations per token over all layers."""

    requested: float | int
    activations: float
    original: int


@dataclass(frozen=True)
class DialPoint:
    """At ``price``, ``activations`` per token over all layers: a mean over calibration tokens."""

    activations: float
    price: float


@dataclass(frozen=True)
class AllocationPlan:
    """How many experts each layer activates per token, and how tokens share them.

    The invariant: ``sum(layer.k) == budget.activations <= budget asked for``. ``price`` is the
    least score kept in all layers, for the redistribution of that name; ``dial`` lists other prices
    by falling activations. ``overlap`` says how far what experts add points the same way, 0 to 1:
    with size times weight s, the score of a candidate is sqrt(s (s + 2 overlap t)), t being the
    sum of s over the candidates ranked after it. ``cap`` limits every call to that multiple of each
    layer's k.
    ``correction`` says how the experts' weights were changed to make up for dropped experts.
    ``cost``, where the budget was one of bytes or milliseconds, holds ``limit``, ``planned`` and
    ``original`` in its ``unit``, for a decode step of ``batch`` tokens. ``quantization``, where
    weights are stored in few bits, holds the ``dtype`` and per MoE layer the ``expert_bits``.
    ``target``, where ``bytes`` or a ``loss`` were ``asked`` for instead of a budget, holds the
    ``most`` there may be of them; ``bytes`` of weights that a token reads under the plan, as
    ``bytes_predicted`` before it was made, and ``bytes_original`` of the full model; ``added_loss``
    in nats per calibration token, and as ``added_loss_predicted``.
    """

    source: str
    budget: Budget
    redistribution: str
    weights: str
    layers: tuple[PlannedLayer, ...]
    price: float | None = None
    dial: tuple[DialPoint, ...] = ()
    cap: float | None = None
    correction: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cost: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    overlap: float | None = None
    quantization: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sensitivity: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    target: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    verify: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def tokens_compete(self) -> bool:
        """Whether the tokens of a call compete for experts across its sequences."""
        return self.redistribution == "batch" or self.cap is not None

    @property
    def takes_price(self) -> bool:
        """Whether calls may have another price of an activation than the plan's."""
        return self.redistribution == "price" and self.cap is None

    def to_json(self) -> str:
        """Return the plan as one JSON object, keys in a fixed order; what is unset is left out."""
        data = dataclasses.asdict(self)
        data["layers"] = [_without_unset(layer) for layer in data["layers"]]
        optional = _without_unset({key: data.pop(key) for key in _OPTIONAL})
        return json.dumps({"format": FORMAT, **data, **optional}, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> AllocationPlan:
        """Read back what `to_json` wrote; unknown keys are ignored.

        Raises:
            ArtifactError: The text is no plan, or its format is newer than this version's.
        """
        try:
            raw = load_json(text)
            version = _FORMAT(raw, "")["format"]
            if version != FORMAT:
                raise ArtifactError(
                    f"The plan has format {version}, this version reads {FORMAT}. "
                    "Update alloc-moe, or compile the model again."
                )
            data = _PLAN(raw, "")
            return cls(
                **{
                    **data,
                    "budget": _budget(data["budget"]),
                    "layers": tuple(
                        _layer(layer, f"layers[{index}]")
                        for index, layer in enumerate(data["layers"])
                    ),
                    "dial": tuple(DialPoint(**point) for point in data.get("dial", ())),
                }
            )
        except ShapeError as error:
            raise ArtifactError(
                f"The allocation plan can't be read: {error}. "
                "Copy the artifact again, or compile the model again."
            ) from error


_MOST_TEXT = 64 << 20  # what a whole plan may have
_MOST = 1 << 20  # experts, layers times experts per token, and more of either than any model has
_FORMAT = record({"format": whole()})
_PLAN = record(
    {
        "source": string(),
        "budget": record(
            {
                "requested": number(0),
                "activations": number(0, _MOST),
                "original": whole(1, _MOST),
            }
        ),
        "redistribution": one_of(*get_args(Redistribution)),
        "weights": one_of("keep", "renorm"),
        "layers": rows(
            record(
                {
                    "name": string(),
                    "experts": whole(1, _MOST),
                    "k_original": whole(1, _MOST),
                    "k": number(0, _MOST),
                },
                {
                    "threshold": optional(number()),
                    "sizes": optional(rows(number(0), most=_MOST)),
                    "token_sizes": optional(
                        record(
                            {
                                "hidden": whole(1, _MOST),
                                "values": string(_MOST_TEXT),
                            }
                        )
                    ),
                    "bits": optional(whole(1, 64)),
                },
            ),
            least=1,
        ),
    },
    {
        "price": optional(number(0)),
        "overlap": optional(number(-1, 1)),
        "dial": rows(record({"activations": number(0, _MOST), "price": number(0)})),
        "cap": optional(number(1)),
        "correction": mapping(anything),
        "cost": mapping(anything),
        "quantization": mapping(anything),
        "sensitivity": mapping(anything),
        "target": mapping(anything),
        "verify": mapping(anything),
        "versions": mapping(string()),
    },
)


def _budget(data: Mapping[str, Any]) -> Budget:
    budget = Budget(**data)
    if budget.activations > budget.original:
        raise ShapeError(
            f"budget.activations is {budget.activations}, above the original {budget.original}"
        )
    return budget


def _layer(data: Mapping[str, Any], where: str) -> PlannedLayer:
    given = data.get("token_sizes")
    layer = PlannedLayer(**{**data, "token_sizes": given and TokenSizes(**given)})
    if not layer.k <= layer.k_original <= layer.experts:
        raise ShapeError(
            f"{where} gives k {layer.k} of {layer.k_original}, with {layer.experts} experts; "
            "neither can be more than the next"
        )
    if layer.sizes is not None and len(layer.sizes) != layer.experts:
        raise ShapeError(f"{where}.sizes has {len(layer.sizes)} items for {layer.experts} experts")
    if layer.token_sizes is not None and not layer.token_sizes.fits(layer.experts):
        raise ShapeError(f"{where}.token_sizes doesn't hold what {layer.experts} experts need")
    return layer


def _without_unset(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value not in (None, (), {})}
