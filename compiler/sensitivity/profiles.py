"""Sensitivity profiles before they are measured: empty, or with what an earlier run measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from alloc_moe.compiler.errors import ProfileError
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.records import (
    CorrectionMode,
    Metric,
    MoeLayer,
    PartialSums,
    Redistribution,
    SensitivityProfile,
)
from alloc_moe.compiler.sensitivity.sums import LayerSums
from alloc_moe.runtime.artifact.shapes import ShapeError, read_file

if TYPE_CHECKING:
    from alloc_moe.compiler.calibration.windows import CalibrationSet

_SHOWN = 12  # characters of a long value

COMPARED = {
    "metric": "the metric",
    "model_fingerprint": "the model",
    "layer_names": "the MoE layers",
    "experts_per_token": "the experts per token",
    "calibration_sha256": "the calibration text",
    "tokens": "the number of tokens",
    "sequence_length": "the sequence length",
    "seed": "the seed",
    "redistribution": "the redistribution",
    "correction": "the correction",
    "bits": "the bits of experts",
}
"""What a profile must have in common with the one asked for, in words."""


def empty_profile(
    moe_model: MoeModel,
    calibration: CalibrationSet,
    metric: Metric,
    policy: Redistribution,
    correction: CorrectionMode,
    bits: tuple[int, ...],
) -> SensitivityProfile:
    """Return a profile of which no layer is measured yet."""
    layers: tuple[MoeLayer, ...] = moe_model.layers
    return SensitivityProfile(
        metric=metric,
        model_fingerprint=moe_model.fingerprint,
        calibration_sha256=calibration.sha256,
        tokens=calibration.tokens,
        sequence_length=calibration.sequence_length,
        seed=calibration.seed,
        layer_names=tuple(layer.name for layer in layers),
        experts_per_token=tuple(layer.experts_per_token for layer in layers),
        costs=(None,) * len(layers),
        baseline_loss=0.0,
        seconds=0.0,
        redistribution=policy,
        correction=correction,
        expert_sizes=(None,) * len(layers),
        bits=bits,
    )


def read_profile(
    expected: SensitivityProfile, path: Path, layers: Sequence[MoeLayer]
) -> SensitivityProfile:
    """Read the profile at `path`, of which any number of layers may be measured.

    Raises:
        ProfileError: It can't be read, is damaged, or was measured differently than `expected`.
    """
    try:
        found = SensitivityProfile.from_json(read_file(path), path=path)
    except (OSError, ShapeError) as error:
        raise ProfileError(f"The profile {path} can't be read: {error}.") from error
    there, now = ({name: _in_words(each, name) for name in COMPARED} for each in (found, expected))
    if changed := differences(there, now, COMPARED):
        raise ProfileError(
            f"The profile {path} was measured differently: {', '.join(changed)} changed. "
            "Delete the file, or give another path."
        )
    lengths = [
        k if row is None else len(row) / found.widths
        for k, row in zip(found.experts_per_token, found.costs, strict=False)
    ]
    sums = [len(row) for row in found.partial.layers] if found.partial else []
    nothing = no_sums(layers, found.widths).layers if found.partial else ()
    fits = sums == [len(row) for row in nothing]
    if lengths != list(expected.experts_per_token) or not fits:
        raise ProfileError(
            f"The profile {path} is damaged: its costs don't fit its layers. Delete the file."
        )
    return found


def differences(
    found: Mapping[str, object], expected: Mapping[str, object], words: Mapping[str, str]
) -> list[str]:
    """Return in words which of the values named in `words` differ, and how."""
    return [
        word + _both(found[name], expected[name])
        for name, word in words.items()
        if found[name] != expected[name]
    ]


def _both(found: object, expected: object) -> str:
    """Show two values, long ones from where they part."""
    if isinstance(found, tuple):
        return ""
    pairs = enumerate(zip_longest(str(found), str(expected)))
    same = next(place for place, (one, other) in pairs if one != other)
    there, now = (
        str(value)[:_SHOWN] if same < _SHOWN else f"...{str(value)[same:][:_SHOWN]}"
        for value in (found, expected)
    )
    return f" (there {there}, now {now})"


def _in_words(profile: SensitivityProfile, name: str) -> object:
    value = getattr(profile, name)
    return "/".join(map(str, value)) or "none" if name == "bits" else value


def no_sums(layers: Sequence[MoeLayer], widths: int) -> PartialSums:
    """Return the sums over no windows, in `widths` widths of weights."""
    rows = (LayerSums.of(layer, widths=widths).row() for layer in layers)
    return PartialSums(0, 0.0, tuple(rows))
