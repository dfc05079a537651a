"""Ways to spend a budget, by name: what `alloc-sweep --plans` compares."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import get_args

from alloc_moe.compiler.choices import UNMEASURED
from alloc_moe.compiler.errors import SweepError
from alloc_moe.compiler.records import SCORED, CorrectionMode, Metric, Redistribution


@dataclass(frozen=True)
class Method:
    """A way to spend a budget.

    ``metric`` divides it among the layers, for ``price`` by expert sizes; None gives all layers the
    same. With ``apart`` sensitivities are measured without the redistribution and the correction
    that will run, as in the literature. With ``token_sizes`` each token has its own for ``price``.
    """

    name: str
    metric: Metric | None = None
    redistribution: Redistribution = "none"
    correction: CorrectionMode = "none"
    apart: bool = False
    token_sizes: bool = False

    @property
    def calibrated(self) -> bool:
        """Whether anything depends on the calibration text, and so on its seed."""
        scored = self.redistribution in SCORED
        return self.metric is not None or scored or self.correction != "none"


DEFAULT = Method(
    "price + token sizes + affine (default)", "fisher", "price", "affine", token_sizes=True
)
PRESETS = {
    "uniform": Method("uniform k"),
    "data-free": Method("data-free layers (LExI)", "data-free"),
    "top-p": Method("top-p", None, "top-p"),
    "ratio": Method("skipping by ratio (NAEE)", None, "ratio"),
    "kl": Method("Alloc-L, kl", "kl"),
    "ppl-suffix": Method("Alloc-L, ppl-suffix", "ppl-suffix"),
    "batch": Method("Alloc-T batch, uniform k", None, "batch"),
    "paper": Method("Alloc-L + Alloc-T (Alloc-MoE)", "ppl-suffix", "batch", apart=True),
    "threshold": Method("threshold, uniform k", None, "threshold"),
    "price": Method("price", "fisher", "price"),
    "price+affine": Method("price + affine", "fisher", "price", "affine"),
    "default": DEFAULT,
}
"""Methods with a name of their own; the first seven and ``paper`` are the published ones."""
_BY_PART = {
    "metric": get_args(Metric),
    "redistribution": get_args(Redistribution),
    "correction": get_args(CorrectionMode),
}
_ADDED = ("apart", "token-sizes")


def parse_method(text: str) -> Method:
    """Return the method that a name in `PRESETS` or a sum such as ``kl+batch+affine`` stands for.

    A sum has a metric or ``uniform``, a redistribution, a correction, or any of these; what is left
    out is uniform, none and none, but ``price`` goes by ``fisher``. ``apart`` may be added, and
    ``token-sizes`` to ``price`` by ``fisher``.

    Raises:
        SweepError: A part is no such name, or two parts say the same thing.
    """
    if text in PRESETS:
        return PRESETS[text]
    found: dict[str, str] = {}
    parts = text.split("+")
    for part in parts:
        if part in _ADDED:
            continue
        kinds = [kind for kind, names in _BY_PART.items() if part in names]
        kind = "metric" if part == "uniform" else kinds[0] if kinds else None
        if kind is None:
            raise SweepError(_unknown(part))
        if kind in found:
            raise SweepError(
                f"{text} has two parts, {found[kind]} and {part}, where one is possible."
            )
        found[kind] = part
    if found.get("redistribution") in UNMEASURED and found.get("metric", "uniform") != "uniform":
        raise SweepError(
            f"{text} has no use for {found['metric']}: {found['redistribution']} divides a budget "
            "among layers by itself. Leave one of them out."
        )
    metric = found.get("metric", "fisher" if found.get("redistribution") == "price" else "uniform")
    redistribution, token_sizes = found.get("redistribution", "none"), "token-sizes" in parts
    if token_sizes and (metric, redistribution) != ("fisher", "price"):
        raise SweepError(f"{text} has token-sizes, which are for price by fisher. Leave it out.")
    return Method(
        " + ".join(part.replace("-sizes", " sizes") for part in parts),
        None if metric == "uniform" else metric,  # type: ignore[arg-type]
        redistribution,  # type: ignore[arg-type]
        found.get("correction", "none"),  # type: ignore[arg-type]
        "apart" in parts,
        token_sizes,
    )


def _unknown(part: str) -> str:
    if part in PRESETS:
        return f"{part!r} stands for a whole way to spend a budget, so it can't be part of a sum."
    names = [*PRESETS, *_ADDED, *(name for group in _BY_PART.values() for name in group)]
    near = difflib.get_close_matches(part, names, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(dict.fromkeys(names))}."
    return f"{part!r} is no way to spend a budget. {hint}"
