"""Names of ways to spend a budget, as `alloc-sweep --plans` reads them."""

from __future__ import annotations

import dataclasses

import pytest

from alloc_moe.compiler.commands.alloc_sweep import sweep_command
from alloc_moe.compiler.errors import SweepError
from alloc_moe.compiler.records import CompileOptions
from alloc_moe.compiler.sweep.methods import DEFAULT, PRESETS, Method, parse_method


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_found_by_its_name(name: str) -> None:
    assert parse_method(name) is PRESETS[name]


def test_the_command_compares_all_presets_unless_told_otherwise() -> None:
    (plans,) = (option for option in sweep_command.params if option.name == "plans")
    assert plans.default.split(",") == list(PRESETS)


def test_the_default_is_what_alloc_compile_does() -> None:
    compiled = CompileOptions("model", "out.onnx", "0.5")
    assert (DEFAULT.metric, DEFAULT.redistribution, DEFAULT.correction) == (
        compiled.sensitivity,
        compiled.plan.redistribution,
        compiled.plan.correction,
    )
    assert not DEFAULT.apart
    assert compiled.token_sizes is None  # wherever they can be
    assert DEFAULT.token_sizes
    assert parse_method("price+token-sizes+affine") == dataclasses.replace(
        DEFAULT, name="price + token sizes + affine"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kl+batch+affine", Method("kl + batch + affine", "kl", "batch", "affine")),
        ("gain+sequence", Method("gain + sequence", None, "sequence", "gain")),
        ("output", Method("output", "output")),
        ("uniform+threshold", Method("uniform + threshold", None, "threshold")),
        ("price+gain", Method("price + gain", "fisher", "price", "gain")),
        ("uniform+price", Method("uniform + price", None, "price")),
        ("output+price", Method("output + price", "output", "price")),
        (
            "ppl-suffix+batch+apart",
            Method("ppl-suffix + batch + apart", "ppl-suffix", "batch", "none", True),
        ),
        ("kl+none", Method("kl + none", "kl")),
        ("price+affine", Method("price + affine", "fisher", "price", "affine")),
        (
            "token-sizes+price",
            Method("token sizes + price", "fisher", "price", token_sizes=True),
        ),
    ],
)
def test_a_sum_names_the_parts(text: str, expected: Method) -> None:
    assert parse_method(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unifrom", "'unifrom' is no way to spend a budget. Did you mean uniform"),
        ("kl+bacth", "'bacth' is no way .* Did you mean batch"),
        ("kl+token-sizes", "kl.token-sizes has token-sizes, which are for price by fisher"),
        ("output+price+token-sizes", "token-sizes, which are for price by fisher. Leave it out"),
        ("price+token-size", "'token-size' is no way .* Did you mean token-sizes"),
        ("papper", "Did you mean paper"),
        ("xyzzy", "'xyzzy' is no way .* Known are uniform, data-free, .*fisher.*affine"),
        ("", "'' is no way"),
        ("kl+", "'' is no way"),
        ("kl+fisher", "kl.fisher has two parts, kl and fisher, where one is possible"),
        ("uniform+kl", "two parts, uniform and kl"),
        ("batch+price", "two parts, batch and price"),
        ("gain+affine", "two parts, gain and affine"),
        ("default+gain", "'default' stands for a whole way .* can't be part of a sum"),
    ],
)
def test_what_is_no_method_is_refused(text: str, message: str) -> None:
    with pytest.raises(SweepError, match=message):
        parse_method(text)


def test_what_depends_on_the_calibration_text_is_known() -> None:
    fixed = {name for name, method in PRESETS.items() if not method.calibrated}
    assert fixed == {"uniform", "batch"}


@pytest.mark.parametrize("redistribution", ["top-p", "ratio"])
def test_a_metric_that_nothing_goes_by_is_refused(redistribution: str) -> None:
    with pytest.raises(SweepError, match=rf"no use for kl: {redistribution} divides a budget"):
        parse_method(f"kl+{redistribution}")
    assert parse_method(f"uniform+{redistribution}").metric is None
