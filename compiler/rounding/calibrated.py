"""Model and text -> weights rounded by GPTQ, decoder layer by decoder layer.

What enters a product is measured on states that everything rounded before it leaves: the layers
before, and in the same layer what runs earlier. Inputs of an expert are the tokens that the router
sends it, each counted by the square of the router's weight, as its error is. So tokens that a
budget drops hardly count, and one rounding serves every plan. A share of the whole layer's tokens
is added, which seldom-used experts mostly go by. Rows of the head go by the tokens where the model
might say their words.

Embeddings, and a head tied to them, are rounded to the nearest.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from alloc_moe.compiler.errors import UnsupportedModelError
from alloc_moe.compiler.model.architectures import expert_weights
from alloc_moe.compiler.model.layer_progress import forward_gflop
from alloc_moe.compiler.model.layer_weights import resident
from alloc_moe.compiler.model.replay import find_decoder_layers
from alloc_moe.compiler.reference.experts import dense_weights
from alloc_moe.compiler.rounding import gptq
from alloc_moe.compiler.rounding.expert_sums import ExpertSums, Sums, restoring
from alloc_moe.compiler.rounding.gptq import multiplied, restore_products, round_products
from alloc_moe.compiler.rounding.inputs import LayerInputs
from alloc_moe.compiler.rounding.vocabulary import SaidTokens, row_groups
from alloc_moe.compiler.rounding.weights import (
    format_mark,
    kept_name,
    pack,
    round_in_place,
    round_weights,
    stored_formats,
)
from alloc_moe.compiler.workspace.results import NamedResults
from alloc_moe.runtime.console import Console

if TYPE_CHECKING:
    from alloc_moe.compiler.calibration.windows import CalibrationSet
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.records import Quantization
    from alloc_moe.passes.blockwise import BlockFormat

_GFLOP = 400  # of one pass over the text: 65,536 tokens of 3 million active parameters
_SUMS = 1 << 25  # elements of experts' sums that are in memory together: 128 MB


def calibrated(
    moe: MoeModel,
    quantization: Quantization,
    calibration: CalibrationSet,
    *,
    widths: Sequence[Sequence[BlockFormat]] = (),
    console: Console | None = None,
) -> MoeModel:
    """Return the model with weights rounded so that its products change least on a text.

    Its weights are changed in place; those of offloaded layers whenever they are read. Where the
    model keeps results, an interrupted rounding goes on at the decoder layer that it came to.

    Args:
        moe: The model, in float32.
        quantization: How weights are stored.
        calibration: The text, of which the further windows are taken too, as many as don't take
            hours.
        widths: Per MoE layer, formats to choose values of its experts for, all from the same sums.
            The experts themselves stay floats, which later layers are rounded behind, and the
            returned model's quantisation has no formats of experts.
        console: Where progress is told, matrix by matrix.

    Raises:
        UnsupportedModelError: The model gives no finite states.
        OutputError: What is kept can't be written.
    """
    ids = torch.from_numpy(calibration.all_ids[: _windows(moe, calibration)])
    text = f"{calibration.sha256}:{ids.numel()}:{calibration.sequence_length}"
    bits = "".join(f"-{form.bits}" for form in widths[0]) if widths else ""
    mark = f"{format_mark(quantization)}/gptq{bits}:{text}:{calibration.seed}"
    quantization = dataclasses.replace(quantization, marks=(mark,), rounding="gptq")
    moe = dataclasses.replace(moe, quantization=quantization)
    chosen = NamedResults(moe.results, ["chosen", moe.fingerprint])
    moe = dataclasses.replace(moe, chosen=chosen)
    with torch.inference_mode(mode=False), torch.no_grad():
        rounding = _Rounding(moe, chosen, widths, console or Console(quiet=True))
        rounding.run(LayerInputs(moe, ids))
        if widths:
            moe = dataclasses.replace(
                moe, quantization=dataclasses.replace(quantization, experts=())
            )
        round_weights(moe)
    return moe


def _windows(moe: MoeModel, calibration: CalibrationSet) -> int:
    """Return how many windows of a text to round on: those of the plan at least."""
    most = _GFLOP / forward_gflop(moe, calibration.sequence_length)
    return max(len(calibration.ids), int(most))


class _Rounding:
    """Rounds the weights of a model, and keeps what they became."""

    def __init__(
        self,
        moe: MoeModel,
        chosen: NamedResults,
        widths: Sequence[Sequence[BlockFormat]],
        console: Console,
    ) -> None:
        self._model, self._chosen, self._console = moe.model, chosen, console
        self._dtype = moe.quantization.dtype if moe.quantization else ""
        names = (layer.experts_name for layer in moe.layers)
        self._widths = dict(zip(names, widths, strict=True)) if widths else {}
        self._formats = stored_formats(moe)
        self._experts = {layer.experts_name: layer.num_experts for layer in moe.layers}
        self._layers = find_decoder_layers(moe.model, moe.layers[0])
        self._names = {id(module): name for name, module in moe.model.named_modules()}
        self._count: Callable[[int], None]

    def run(self, inputs: LayerInputs) -> None:
        """Round everything."""
        head = self._head()
        inside = f"{self._names[id(self._layers)]}."
        for name, parameter in self._model.named_parameters():
            if name in self._formats and not name.startswith((inside, f"{head}.")):
                round_in_place(parameter.detach(), *self._formats[name])
        inputs.resume()
        prefixes = [f"{self._names[id(layer)]}." for layer in self._layers]
        sizes = [self._matrices(prefix) for prefix in prefixes]
        done, what = sum(sizes[: inputs.layer]), f"Rounding weights to {self._dtype}"
        with self._console.progress(what, sum(sizes), unit="matrices", done=done) as progress:
            self._count = progress.advance
            while inputs.layer < len(self._layers):
                with resident(self._layers[inputs.layer]):
                    self._round_layer(prefixes[inputs.layer], inputs)
                    inputs.advance()
        if head is not None and self._find(f"{head}.weight") is None:
            self._round_head(head, inputs)

    def _matrices(self, prefix: str) -> int:
        """Return how many matrices are rounded of the weights whose names begin so."""
        modules = (name.rpartition(".")[0] for name in self._formats if name.startswith(prefix))
        return sum(
            self._experts.get(module, 1) * max(1, len(self._widths.get(module, ())))
            for module in modules
        )

    def _head(self) -> str | None:
        """Return the name of the head, if it has weights of its own and is stored in few bits."""
        head = self._model.get_output_embeddings()
        if head is None or head.weight is self._model.get_input_embeddings().weight:
            return None
        name = self._names[id(head)]
        return name if f"{name}.weight" in self._formats else None

    def _round_layer(self, prefix: str, inputs: LayerInputs) -> None:
        """Round all weights of a decoder layer, whose floats are in memory."""
        left = [name for name in self._formats if name.startswith(prefix)]
        groups = inputs.together(dict.fromkeys(name.rpartition(".")[0] for name in left))
        trained = inputs.as_trained([first for first, *_ in groups])
        for same in groups:
            floats, given = trained.pop(same[0]), inputs.entering(same[0])
            if same[0] in self._experts:
                hidden, ids, weights = map(torch.cat, zip(*given, strict=True))
                shares = dense_weights(ids, weights.square(), self._experts[same[0]])
                sums = ExpertSums(hidden, torch.cat(floats), shares)
                _check_finite(same[0], sums.common.hessian, sums.common.drift)
                if same[0] in self._widths:
                    self._round_widths(same[0], sums)
                else:
                    self._round_experts(same[0], sums)
            else:
                pairs = zip((first for first, *_ in given), floats, strict=True)
                self._round_linear(same, pairs)
            left = [name for name in left if name.rpartition(".")[0] not in same]
        for name in left:  # the model never runs them
            self._keep(name)
            self._count(self._matrices(name))

    def _round_linear(
        self, names: Sequence[str], given: Iterable[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """Round linear layers of one input, given now and as trained [..., columns]."""
        parts = (Sums.over(*(each.flatten(0, -2) for each in pair)) for pair in given)
        sums = functools.reduce(operator.add, parts)
        for name in names:
            weight = self._model.get_submodule(name).weight.detach()
            weight.copy_(self._restored(f"{name}.weight", weight[None], [sums])[0])
            self._keep(f"{name}.weight")

    def _round_head(self, head: str, inputs: LayerInputs) -> None:
        """Round the head, rows that might be said in the same places together."""
        name = f"{head}.weight"
        weight = self._model.get_parameter(name).detach()
        groups = row_groups(weight)
        tokens = SaidTokens.together(
            SaidTokens.of(*given, groups) for given in inputs.entering_head(head)
        )
        what, count = f"Rounding the head to {self._dtype}", int(groups.max()) + 1
        with self._console.progress(what, count, unit="groups of rows") as progress:
            self._count = progress.advance
            _check_finite(name, tokens.common.hessian, tokens.common.drift)
            moving = restoring(tokens.common)[None]
            for group, hessian in enumerate(tokens.hessians()):
                rows = (groups == group).nonzero()[:, 0]
                wanted = multiplied(weight[None, rows], moving)
                weight[rows] = self._round(name, wanted, hessian[None])[0]
        self._keep(name)

    def _round_widths(self, name: str, sums: ExpertSums) -> None:
        """Choose values of experts for each of their widths, and leave them floats."""
        module: Any = self._model.get_submodule(name)
        weights = [module.get_parameter(leaf).detach() for leaf in expert_weights(module)]
        floats = [weight.clone() for weight in weights]
        for form in self._widths[name]:
            for leaf in expert_weights(module):
                self._formats[f"{name}.{leaf}"] = form, bool(module.is_transposed)
            self._round_experts(name, sums)
            for weight, trained in zip(weights, floats, strict=True):
                weight.copy_(trained)

    def _round_experts(self, name: str, sums: ExpertSums) -> None:
        """Round experts, some at a time.

        Those of wide matrices aren't moved before: that takes a quarter of their time, for a
        divergence that is lower by a fiftieth.
        """
        module: Any = self._model.get_submodule(name)
        names = expert_weights(module)
        gate_up, down = (module.get_parameter(leaf).detach() for leaf in names)
        rows = [weight.mT if module.is_transposed else weight for weight in (gate_up, down)]
        columns = max(each.shape[2] for each in rows)
        for start in range(0, len(gate_up), step := max(1, _SUMS // columns**2)):
            part = slice(start, start + step)
            some = range(len(gate_up))[part]
            wanted, trained = rows[0][part], gate_up[part]
            if columns <= gptq.THOROUGH:
                trained = trained.clone()
                wanted = multiplied(wanted, sums.restoring.expand(len(some), -1, -1))
            hessians = torch.stack([sums.gate_up(expert) for expert in some])
            rows[0][part] = self._round(f"{name}.{names[0]}", wanted, hessians)
            if columns <= gptq.THOROUGH:
                of_down = [sums.down(module, *pair) for pair in zip(some, trained, strict=True)]
                rows[1][part] = self._restored(f"{name}.{names[1]}", rows[1][part], of_down)
            else:
                hessians = torch.stack([sums.down_hessian(module, expert) for expert in some])
                _check_finite(f"{name}.{names[1]}", hessians)
                rows[1][part] = self._round(f"{name}.{names[1]}", rows[1][part], hessians)
        for leaf in names:
            self._keep(f"{name}.{leaf}")

    def _restored(self, name: str, weights: torch.Tensor, each: Sequence[Sums]) -> torch.Tensor:
        """Return matrices [matrices, rows, columns] of the parameter `name`, moved and rounded."""
        sums = Sums.stacked(each)
        _check_finite(name, sums.hessian, sums.drift)
        wanted = restore_products(weights, sums.hessian, sums.drift)
        return self._round(name, wanted, sums.hessian)

    def _round(self, name: str, wanted: torch.Tensor, hessians: torch.Tensor) -> torch.Tensor:
        rounded = round_products(wanted, hessians, self._formats[name][0])
        # What isn't finite before makes the inputs of a later product so, which names the cause.
        if _finite(wanted) and not _finite(rounded):
            raise UnsupportedModelError(
                f"The values of {name} are too large or too small to be chosen on a text. Use "
                "--rounding nearest."
            )
        self._count(len(rounded))
        return rounded

    def _keep(self, name: str) -> None:
        """Keep a weight as the values and scales that it is stored as."""
        form, transposed = self._formats[name]
        weight = self._model.get_parameter(name).detach()
        self._chosen.keep(kept_name(name, form), pack(weight, form, transposed))

    def _find(self, name: str) -> list[torch.Tensor] | None:
        """Return what a weight became, if it was kept."""
        return self._chosen.find(kept_name(name, self._formats[name][0]))


def _finite(values: torch.Tensor) -> bool:
    """Whether all are; in one pass, which takes no memory."""
    laid_out = values if values.is_contiguous() else values.mT
    return all(math.isfinite(each) for each in laid_out.aminmax())


def _check_finite(name: str, *sums: torch.Tensor) -> None:
    """Raise UnsupportedModelError unless what the weights of a name are multiplied by is finite."""
    if not all(_finite(each) for each in sums):
        raise UnsupportedModelError(
            f"What {name} is multiplied by on the calibration text isn't finite: the model's "
            "weights are broken."
        )
