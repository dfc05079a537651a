"""Model and formats -> the bytes of weights that one token reads in a decode step.

All parameters of the model as they are stored, values and scales, are read once, but for two: of
the embeddings one row, unless the head reads the whole of that very matrix; of the routed experts
those that run. A correction adds biases to experts. Caches and activations are no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alloc_moe.compiler.planning.costs import CostTable
from alloc_moe.compiler.planning.shapes import ExpertShape, expert_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from alloc_moe.compiler.model.checkpoint import Checkpoint
    from alloc_moe.compiler.records import Correction, Quantization
    from alloc_moe.passes.blockwise import BlockFormat
    from alloc_moe.runtime.artifact.plan import AllocationPlan

_FLOAT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class WeightsRead:
    """Bytes of weights: ``experts[l][w]`` of one routed expert of MoE layer l in its w-th width.

    ``shifts[l]`` is what a correction with a shift adds to one of them; ``others`` is everything
    that isn't routed experts, ``token_sizes`` what the plan adds: where all experts run, only
    for a ``dial``. ``dtype`` names the width of ``trained``, each layer's experts as trained.
    """

    dtype: str
    others: int
    experts: tuple[tuple[float, ...], ...]
    shifts: tuple[int, ...]
    experts_per_token: tuple[int, ...]
    trained: tuple[float, ...]
    token_sizes: int = 0
    dial: bool = True

    @property
    def always(self) -> int:
        """What is read whichever experts run."""
        return self.others + self.token_sizes

    @property
    def original(self) -> float:
        """What the full model reads, its experts in the width of ``dtype``."""
        return self.others + sum(self.trained)

    @property
    def most(self) -> float:
        """What the full model reads, its experts in their largest width."""
        pairs = zip(self.experts, self.experts_per_token, strict=True)
        experts = sum(most * max(widths) for widths, most in pairs)
        return self.others + self.token_sizes * self.dial + experts

    def costs(self, *, shifted: bool) -> CostTable:
        """Return the bytes of experts of every k in every width, with shifts or without."""
        prices = tuple(
            tuple(k * (nbytes + shift * shifted) for nbytes in widths for k in range(1, most + 1))
            for widths, shift, most in zip(
                self.experts, self.shifts, self.experts_per_token, strict=True
            )
        )
        return CostTable("bytes", "bytes", 1, self.dtype, prices, self.trained)

    def counted(
        self,
        plan: AllocationPlan,
        corrections: Sequence[Correction | None],
        widths: Sequence[int],
        per_layer: Sequence[float] | None = None,
    ) -> float:
        """Return what a token reads under a plan in the mean, each layer in the width given.

        That is by the plan's experts of each layer, or by `per_layer`, those that some text ran.
        """
        maps = any(layer.token_sizes for layer in plan.layers)
        total = float(self.others + self.token_sizes * maps)
        ran = per_layer or [layer.k for layer in plan.layers]
        for index, (experts, correction) in enumerate(zip(ran, corrections, strict=True)):
            shifted = correction is not None and correction.bias is not None
            nbytes = self.experts[index][widths[index]]
            total += experts * (nbytes + self.shifts[index] * shifted)
        return total


def weights_read(
    checkpoint: Checkpoint,
    *,
    dtype: str,
    quantization: Quantization | None = None,
    formats: Sequence[Sequence[BlockFormat]] = (),
    token_sizes: bool = False,
    dial: bool = True,
) -> WeightsRead:
    """Return what a token reads of a model.

    Args:
        checkpoint: Its weights are not read.
        dtype: Type of the artifact's weights.
        quantization: How they are stored if that is in 4 or 8 bits.
        formats: Per MoE layer what its experts may be stored in, if a plan chooses that.
        token_sizes: Whether each layer that chooses has a map of its tokens' sizes.
        dial: Whether an artifact that runs all experts can be told to run fewer.
    """
    floats = _FLOAT_BYTES[dtype if quantization is None else quantization.activations]
    shapes = expert_shapes(checkpoint)
    experts: list[tuple[float, ...]]
    if quantization is None:
        experts = [(_expert_bytes(shape, None, floats),) for shape in shapes]
        trained = [row[0] for row in experts]
    else:
        own = quantization.experts
        choices = formats or [(form,) for form in own]
        experts = [
            tuple(_expert_bytes(shape, form, floats) for form in forms)
            for shape, forms in zip(shapes, choices, strict=True)
        ]
        pairs = zip(shapes, own, strict=True)
        trained = [_expert_bytes(shape, form, floats) for shape, form in pairs]
    most = tuple(shape.experts_per_token for shape in shapes)
    return WeightsRead(
        dtype,
        _other_bytes(checkpoint, quantization, floats),
        tuple(experts),
        tuple(0 if shape.biased else shape.hidden * floats for shape in shapes),
        most,
        tuple(k * nbytes for k, nbytes in zip(most, trained, strict=True)),
        sum(_map_bytes(shape) for shape in shapes) if token_sizes else 0,
        dial,
    )


def _map_bytes(shape: ExpertShape) -> int:
    """Return the bytes of a layer's weights and biases of token sizes, which stay in float32."""
    if shape.experts_per_token == 1:  # the one that runs needs no score
        return 0
    return shape.experts * (shape.hidden + 1) * _FLOAT_BYTES["float32"]


def _stored(count: int, form: BlockFormat | None, floats: int) -> float:
    """Return the bytes of `count` weights: in floats, or as values and scales."""
    if form is None:
        return count * floats
    return count * form.bits / 8 + count // form.block * floats


def _expert_bytes(shape: ExpertShape, form: BlockFormat | None, floats: int) -> float:
    # Three matrices also without a gate: onnxruntime's operator then takes `up` twice.
    weights = _stored(3 * shape.hidden * shape.intermediate, form, floats)
    return weights + shape.biased * (2 * shape.intermediate + shape.hidden) * floats


def _other_bytes(checkpoint: Checkpoint, quantization: Quantization | None, floats: int) -> int:
    skeleton: PreTrainedModel = checkpoint.skeleton
    inside = tuple(f"{layer.experts_name}." for layer in checkpoint.layers)
    head = skeleton.get_output_embeddings()
    embeddings = skeleton.get_input_embeddings().weight
    total = 0.0
    for name, parameter in skeleton.named_parameters():
        if name.startswith(inside):
            continue
        form = None if quantization is None else quantization.weights.get(name)
        nbytes = _stored(parameter.numel(), form, floats)
        tied = head is not None and head.weight is parameter
        if parameter is not embeddings or tied:
            total += nbytes
        # In few bits the head has a matrix of its own, also if it is tied.
        if parameter is embeddings and not (tied and form is None):
            total += nbytes / len(parameter)
    return round(total)
