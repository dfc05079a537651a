"""Token sizes in a file beside the sensitivity profile: fitted once for all budgets.

They depend on the model as it is rounded, the text, the seed and the profile's sizes, on no budget.
So a compile that was killed behind the fit, and one of another budget with the same profile, read
them. The file says what they were fitted to, and with a digest what it holds: those of something
else are fitted again, as all of it but the time is in the profile's compile; damaged ones are not
believed.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from alloc_moe.compiler.errors import OutputError, ProfileError
from alloc_moe.compiler.sensitivity.profiles import differences
from alloc_moe.compiler.sensitivity.token_sizes.fitting import METHOD, fit_token_sizes
from alloc_moe.compiler.workspace.files import check_format, save_text
from alloc_moe.compiler.workspace.results import digest_of
from alloc_moe.runtime.artifact.shapes import (
    MOST_BYTES,
    read_json,
    record,
    rows,
    string,
    whole,
)
from alloc_moe.runtime.artifact.token_sizes import TokenSizes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from alloc_moe.compiler.calibration.windows import CalibrationSet
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.runtime.console import Console

_FORMAT = 2
_COMPARED = {
    "model_fingerprint": "the model",
    "calibration_sha256": "the calibration text",
    "tokens": "the number of tokens",
    "further_tokens": "the number of further tokens",
    "sequence_length": "the sequence length",
    "seed": "the seed",
    "sizes": "the profile's sizes of experts",
    "method": "how they are fitted",
}
"""What kept token sizes must have in common with those asked for, in words."""

_LAYER = record({"hidden": whole(1, 1 << 20), "values": string(MOST_BYTES)})
_KEPT = record(
    {
        "format": whole(),
        "model_fingerprint": string(),
        "calibration_sha256": string(),
        "tokens": whole(0),
        "further_tokens": whole(0),
        "sequence_length": whole(0),
        "seed": whole(),
        "sizes": string(),
        "method": string(),
        "layers": rows(_LAYER),
        "sha256": string(),
    }
)


def token_sizes_path(profile: Path) -> Path:
    """Return where token sizes are kept: beside the sensitivity profile, each of whose has one."""
    return profile.with_name(f"{profile.name}.token-sizes.json")


def fit_once(
    moe: MoeModel,
    calibration: CalibrationSet,
    sizes: Sequence[Sequence[float]],
    path: Path,
    console: Console,
) -> tuple[TokenSizes, ...]:
    """Return the token sizes kept at `path`, else what `fit_token_sizes` does, and keep it there.

    The file is replaced in one step. Where it holds those of something else, or can't be written,
    that is told.

    Args:
        moe: The model.
        calibration: The text.
        sizes: Of each layer's experts [experts], in nats.
        path: The file, from `token_sizes_path`.
        console: Where progress, and what is read, is told.

    Raises:
        ProfileError: What is kept can't be read, or is damaged.
        TokenSizesError: There is too little text, or some are beyond float16.
    """
    fitted_to = _fitted_to(moe, calibration, sizes)
    experts, hidden = (
        [layer.num_experts for layer in moe.layers],
        moe.config.get_text_config().hidden_size,
    )
    found = _read(path)
    if found is not None and (changed := differences(found, fitted_to, _COMPARED)):
        console.note(f"Token sizes are fitted again, for {', '.join(changed)} changed: {path}")
    elif found is not None:
        console.note(f"Token sizes were fitted before: {path}")
        return _layers(found, path, experts, hidden)
    fitted = fit_token_sizes(moe, calibration, sizes, console)
    layers = [dataclasses.asdict(layer) for layer in fitted]
    data = {**fitted_to, "layers": layers}
    text = json.dumps({"format": _FORMAT, **data, "sha256": _digest(data)}, indent=1)
    try:
        save_text(text + "\n", path, what="What was fitted")
    except OutputError as error:  # this compile doesn't need it
        console.warn(f"Token sizes will be fitted again next time. {error}")
    return fitted


def _fitted_to(
    moe: MoeModel, calibration: CalibrationSet, sizes: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """Return all that a fit depends on, by the names of `_COMPARED`."""
    further = calibration.further
    return {
        "model_fingerprint": moe.fingerprint,
        "calibration_sha256": calibration.sha256,
        "tokens": calibration.tokens,
        "further_tokens": 0 if further is None else further.size,
        "sequence_length": calibration.sequence_length,
        "seed": calibration.seed,
        "sizes": digest_of([list(map(float, row)) for row in sizes]),
        "method": digest_of(METHOD),
    }


def _read(path: Path) -> dict[str, Any] | None:
    """Return what a file keeps, and what for; None if there is no file."""
    try:
        found: dict[str, Any] = read_json(path, _KEPT)
        check_format(found, _FORMAT)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # a ShapeError is one
        raise ProfileError(
            f"The token sizes {path} can't be read: {error}. Delete the file."
        ) from error
    if found["sha256"] != _digest(found):
        raise _damaged(path, "their digest is another")
    return found


def _digest(data: Mapping[str, Any]) -> str:
    """Return the digest of all that a file says but its format and the digest itself."""
    layers = [[layer["hidden"], layer["values"]] for layer in data["layers"]]
    return digest_of([[data[name] for name in _COMPARED], layers])


def _layers(
    found: Mapping[str, Any], path: Path, experts: Sequence[int], hidden: int
) -> tuple[TokenSizes, ...]:
    """Return what is kept for so many experts of each layer."""
    layers = tuple(TokenSizes(**layer) for layer in found["layers"])
    fit = len(layers) == len(experts) and all(map(TokenSizes.fits, layers, experts))
    if not fit or any(layer.hidden != hidden for layer in layers):
        raise _damaged(path, "they don't fit the model's layers")
    return layers


def _damaged(path: Path, why: str) -> ProfileError:
    return ProfileError(f"The token sizes {path} are damaged: {why}. Delete the file.")
