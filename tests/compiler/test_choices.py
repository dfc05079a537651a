"""Numbers from Python and numpy as options, and those that are none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alloc_moe.compiler import compile, profile
from alloc_moe.compiler.choices import budget_text, byte_count, chosen_rounding, finite, whole
from alloc_moe.compiler.errors import OptionsError


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (0.5, "0.5"),
        (1.0, "1.0"),
        (np.float64(0.5), "0.5"),
        (np.float32(0.7), "0.7"),
        (np.float16(0.25), "0.25"),
        (np.array(0.5), "0.5"),
        (1e-7, "0.0000001"),
        (24, "24"),
        (np.int64(24), "24"),
        (np.array(24), "24"),
        (np.uint8(1), "1"),
        ("0.5", "0.5"),
    ],
)
def test_budgets_are_taken_as_they_are_written(budget: Any, text: str) -> None:
    assert budget_text(budget) == text


@pytest.mark.parametrize(
    "budget", [True, np.bool_(1), None, math.nan, np.inf, np.array([0.5]), 1j, b"0.5", [0.5]]
)
def test_budgets_that_are_none_are_rejected(budget: Any) -> None:
    with pytest.raises(OptionsError, match="is no number"):
        budget_text(budget)


@pytest.mark.parametrize("value", [5, np.int8(5), np.array(5), "5"])
def test_whole_numbers_of_any_kind(value: Any) -> None:
    assert whole("--tokens", value) == 5
    assert type(whole("--tokens", value)) is int


@pytest.mark.parametrize(
    "value", [True, 5.0, np.float32(5), math.nan, -1, 10**30, "x", None, np.array([5])]
)
def test_what_is_no_whole_number_in_the_range(value: Any) -> None:
    with pytest.raises(OptionsError, match="--tokens is"):
        whole("--tokens", value)


def test_finite_numbers_of_any_kind() -> None:
    for value in (2, 2.0, np.float32(2), np.array(2), np.int64(2)):
        assert finite("--cap", value, 1, 10) == 2
        assert type(finite("--cap", value, 1, 10)) is float
    for value in (math.nan, math.inf, 0.5, 11, True, "2", None, np.float32("nan")):
        with pytest.raises(OptionsError, match="--cap is"):
            finite("--cap", value, 1, 10)
    with pytest.raises(OptionsError, match="above 0 and up to 10"):
        finite("--refine-minutes", 0, 0, 10, above=True)


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 1},
        {"tokens": math.nan},
        {"seed": -1},
        {"cost_batch": 0},
        {"cost_batch": 10**9},
        {"cap": math.nan},
        {"cap": 0.5},
        {"refine": -1},
        {"refine_minutes": math.inf},
        {"refine_minutes": 0},
        {"budget": math.nan},
        {"block": 5},
    ],
    ids=str,
)
def test_no_compile_begins_with_absurd_numbers(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(OptionsError):
        compile("nowhere", output=tmp_path / "out.onnx", **options)
    if options.keys() & {"tokens", "seed"}:
        with pytest.raises(OptionsError):
            profile("nowhere", **options)


@pytest.mark.parametrize(
    ("dtype", "mixed_bits", "rounding"),
    [
        ("int4", False, "gptq"),
        ("int4", True, "gptq"),
        ("int8", False, "nearest"),
        ("int8", True, "gptq"),
        ("float32", False, "nearest"),
    ],
)
def test_four_bits_are_chosen_on_the_text_and_eight_are_the_nearest(
    dtype: str, mixed_bits: bool, rounding: str
) -> None:
    assert chosen_rounding(None, dtype, mixed_bits=mixed_bits) == rounding
    assert chosen_rounding("nearest", dtype, mixed_bits=mixed_bits) == "nearest"
    assert chosen_rounding("gptq", "int8") == "gptq"
    assert chosen_rounding("gptq", "int4", mixed_bits=True) == "gptq"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16", "rounding": "gptq"}, "int4 or int8; float16 isn't rounded"),
        ({"dtype": "int4", "rounding": "gptp"}, "--rounding can't be 'gptp'. Did you mean gptq"),
    ],
)
def test_a_rounding_that_can_not_be_is_rejected(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionsError, match=message):
        compile("nothing", output=tmp_path / "out.onnx", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"redistribute": "threshold"}, "needs a price to set: --redistribute price, no --cap"),
        ({"cap": 2.0}, "needs a price to set: --redistribute price, no --cap"),
        ({"output": "out.pt"}, "--price-per sequence is for ONNX artifacts; out.pt is one of"),
        ({"price_per": "token"}, "--price-per can't be 'token'"),
    ],
    ids=str,
)
def test_a_price_per_sequence_that_can_not_be_is_rejected(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    output = tmp_path / options.get("output", "out.onnx")
    given = {"price_per": "sequence", **options, "output": output}
    with pytest.raises(OptionsError, match=message):
        compile("nothing", **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"redistribute": "threshold"}, "needs --redistribute price, not threshold"),
        ({"cost": "bytes"}, "needs a budget of activations: leave out --cost and --mixed-bits"),
        ({"mixed_bits": True, "dtype": "int4"}, "a budget of activations: leave out --cost and"),
        ({"sensitivity": "output"}, "needs --sensitivity fisher, not output"),
        ({"sensitivity": "kl"}, "needs --sensitivity fisher, not kl"),
        ({"allocation": "uniform"}, "needs --allocation sensitivity, not uniform"),
    ],
    ids=str,
)
def test_token_sizes_that_can_not_be_are_rejected(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    output = f"{tmp_path}/{options.get('output', 'out.onnx')}"
    with pytest.raises(OptionsError, match=message):
        compile("nothing", **{"token_sizes": True, **options, "output": output})


@pytest.mark.parametrize("path", ["a\0b.onnx", Path("a\0b"), "out/\0/a/", "a\ud800.onnx"])
def test_what_no_file_can_be_called_is_rejected(path: str | Path) -> None:
    for option, given in (
        ("--output", {"output": path}),
        ("--profile", {"profile": path}),
        ("--calibration", {"calibration": path}),
    ):
        with pytest.raises(
            OptionsError, match=rf"^{option} is '.*', which no file can be called\.$"
        ):
            compile("nothing", **given)
    with pytest.raises(OptionsError, match=r"^MODEL is .* no file can be called") as caught:
        compile(path)
    assert str(caught.value).isprintable()
    with pytest.raises(OptionsError, match=r"^--output is .* no file can be called"):
        profile("nothing", output=path)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (1500, 1500),
        ("1500", 1500),
        ("1.5KB", 1500),
        ("1.5 kb", 1500),
        ("1.5K", 1536),
        ("2M", 2 << 20),
        ("2MB", 2_000_000),
        (".5G", 1 << 29),
        ("3GB", 3_000_000_000),
    ],
)
def test_bytes_with_a_b_are_of_thousands_and_without_of_1024(text: Any, count: int) -> None:
    assert byte_count("--target-bytes", text) == count


@pytest.mark.parametrize("text", ["", "MB", "1.5MiB", "-3", "1e6", 0, True, "nan", float("nan")])
def test_what_is_no_number_of_bytes_is_rejected(text: Any) -> None:
    with pytest.raises(OptionsError, match="--target-bytes is"):
        byte_count("--target-bytes", text)
