"""Text -> the sizes of each layer's experts for its tokens: what tokens give, and the fit to it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from alloc_moe.compiler.errors import TokenSizesError
from alloc_moe.compiler.model.layer_progress import expected_time, forward_gflop
from alloc_moe.compiler.model.replay import DecoderStack
from alloc_moe.compiler.sensitivity.corrected import Reduced
from alloc_moe.compiler.sensitivity.fisher import FisherRun
from alloc_moe.compiler.sensitivity.kept import make_keep
from alloc_moe.compiler.sensitivity.layerwise import StreamedRun
from alloc_moe.compiler.sensitivity.sums import LayerSums
from alloc_moe.compiler.sensitivity.token_sizes import regression
from alloc_moe.compiler.sensitivity.token_sizes.regression import Seen, fit
from alloc_moe.compiler.workspace.processes import Processes
from alloc_moe.compiler.workspace.results import digest_of
from alloc_moe.compiler.workspace.states import LayerStates
from alloc_moe.runtime.artifact.token_sizes import TokenSizes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from alloc_moe.compiler.calibration.windows import CalibrationSet
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.sensitivity.layerwise import Batch
    from alloc_moe.runtime.console import Console

_MOST_TOKENS = 1 << 16  # that are fitted to, and a quarter as many held out
_LEAST_TOKENS = 128
_TOKENS_PER_BATCH = 4096
_HELD_OUT = 8  # without further text, one of so many tokens tells when to stop
_FITTING = "Fitting token sizes"
_FISHER = 4  # forward passes that a layer's gradients cost, the one before them included
_ALONE = Processes()

FURTHER = 4
"""How much further text they are fitted to, in calibration tokens: they are more numbers."""
TOKEN_STATES = "token-sizes"
"""The name of the folder of states, beside that of results."""
METHOD = (FURTHER, _MOST_TOKENS, _TOKENS_PER_BATCH, _HELD_OUT, *regression.METHOD)
"""What a fit depends on besides model, text and sizes."""


def fit_token_sizes(
    moe: MoeModel,
    calibration: CalibrationSet,
    sizes: Sequence[Sequence[float]],
    console: Console,
) -> tuple[TokenSizes, ...]:
    """Return what tokens multiply the sizes of each MoE layer's experts by.

    Args:
        moe: The model; where its layers are read as they run, each is fitted as they pass.
        calibration: The text, of which further windows are taken too; its seed is that of all
            random choices.
        sizes: Of each layer's experts [experts], in nats.
        console: Where progress is told.

    Raises:
        TokenSizesError: There is too little text, or some are beyond float16.
    """
    ids, held_out = _text(calibration)
    batches = torch.split(ids, max(1, _TOKENS_PER_BATCH // calibration.sequence_length))
    fitting = _Fitting(moe, sizes, ids, held_out, calibration.seed)
    if all(fitting.is_kept(layer) for layer in range(len(moe.layers))):
        return fitting.all_fitted()
    reduced = Reduced(make_keep(moe, batches, "none", _ALONE))
    run = FisherRun(moe, reduced, seed=calibration.seed, observe=fitting.observe)
    firsts = itertools.accumulate((len(batch) for batch in batches), initial=0)
    numbered = list(zip(firsts, batches, strict=False))
    with torch.inference_mode(mode=False), torch.no_grad():
        if moe.offloading is None:
            _see_all(moe, run, numbered, fitting, console)
        else:
            _see_layer_by_layer(moe, run, numbered, fitting, console)
    return fitting.all_fitted()


def _see_all(
    moe: MoeModel,
    run: FisherRun,
    batches: Sequence[Batch],
    fitting: _Fitting,
    console: Console,
) -> None:
    steps = len(batches) + len(moe.layers)
    with console.progress(_FITTING, steps, unit="steps") as progress:
        for first, ids in batches:
            run.add(ids, first, [LayerSums.of(layer) for layer in moe.layers])
            progress.advance()
        for layer in range(len(moe.layers)):
            fitting.fit(layer)
            progress.advance()


def _see_layer_by_layer(
    moe: MoeModel,
    run: FisherRun,
    batches: Sequence[Batch],
    fitting: _Fitting,
    console: Console,
) -> None:
    """Fit each layer when all gradients have passed it; after a kill the next layer goes on."""
    tokens = sum(ids.numel() for _, ids in batches)
    gflop = _FISHER * forward_gflop(moe, tokens) + sum(
        regression.fit_gflop(tokens, moe.config.get_text_config().hidden_size, layer.num_experts)
        for layer in moe.layers
    )
    needed = expected_time(moe, passes=2, gflop=gflop)
    console.note(f"{_FITTING} will take {needed}")
    at = {layer.decoder_layer: index for index, layer in enumerate(moe.layers)}
    states = LayerStates(moe.results.beside(TOKEN_STATES), {"of": fitting.identity}, _ALONE)
    steps = 2 * len(DecoderStack(moe.model, moe.layers[0])) - moe.layers[0].decoder_layer
    with states.held(), console.progress(_FITTING, steps, unit="layers") as progress:
        found = states.progress()
        if found is not None and found.stage == "backward":
            passed = [index for layer, index in at.items() if layer >= found.layer]
            if not all(fitting.is_kept(index) for index in passed):
                states.start_over()
        streamed = StreamedRun(
            moe,
            batches,
            states,
            _ALONE,
            lambda layers: progress.advance(round(layers)),
            lambda: [LayerSums.of(layer) for layer in moe.layers],
        )
        streamed.fisher(run, lambda layer: fitting.fit(at[layer]) if layer in at else None)
        states.delete()


def _text(calibration: CalibrationSet) -> tuple[torch.Tensor, int]:
    """Return windows to see, and how many tokens at their end are held out."""
    # What every layer sees is kept until all are fitted, so memory bounds the text.
    most = max(1, _MOST_TOKENS // calibration.sequence_length)
    ids = torch.from_numpy(calibration.ids[:most])
    if calibration.further is not None:
        further = torch.from_numpy(calibration.further[: FURTHER * len(calibration.ids)])
        held_out = ids[: max(1, most // FURTHER)].numel()
        ids = torch.cat([further[:most], ids[: max(1, most // FURTHER)]])
    else:
        held_out = ids.numel() // _HELD_OUT
    if ids.numel() < _LEAST_TOKENS:
        raise TokenSizesError(
            f"are fitted to {_LEAST_TOKENS} tokens of calibration text at least, and there are "
            f"{ids.numel()}"
        )
    return ids, held_out


class _Fitting:
    """Sees what layers' tokens give, and fits their sizes, which an interrupted compile keeps."""

    def __init__(
        self,
        moe: MoeModel,
        sizes: Sequence[Sequence[float]],
        ids: torch.Tensor,
        held_out: int,
        seed: int,
    ) -> None:
        self._sizes, self._held_out, self._seed = sizes, held_out, seed
        self._results = moe.results
        self._seen: dict[int, Seen] = {}
        self._fits: dict[int, list[torch.Tensor]] = {}
        self._inputs = ["token sizes", METHOD, moe.fingerprint, ids, held_out, seed, *sizes]
        self.identity = digest_of(self._inputs)
        """Of all that they are fitted to."""

    def observe(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, squares: torch.Tensor
    ) -> None:
        """See a layer's tokens, as `Observe` gives them."""
        self._seen.setdefault(layer, Seen()).add(hidden, ids, squares)

    def fit(self, layer: int) -> None:
        """Fit a layer's to all that was seen of it, which is forgotten."""
        generator = torch.Generator().manual_seed(self._seed)
        sizes = torch.tensor(self._sizes[layer])
        found = list(fit(self._seen.pop(layer), sizes, self._held_out, generator))
        self._fits[layer] = found
        self._results.keep([*self._inputs, layer], found)

    def is_kept(self, layer: int) -> bool:
        """Whether an earlier run fitted a layer's."""
        return self._results.find([*self._inputs, layer]) is not None

    def all_fitted(self) -> tuple[TokenSizes, ...]:
        """Return each layer's.

        Raises:
            TokenSizesError: Some are beyond float16.
        """
        return tuple(self._fitted(layer) for layer in range(len(self._sizes)))

    def _fitted(self, layer: int) -> TokenSizes:
        found = self._fits.get(layer) or self._results.find([*self._inputs, layer])
        assert found is not None
        weights, bias, spread = found
        try:
            return TokenSizes.of(weights.numpy(), bias.numpy())
        except ValueError as error:
            raise TokenSizesError(
                "are stored in float16, which doesn't hold those of this model: what enters its "
                f"experts varies by {float(spread):.2g} only"
            ) from error
