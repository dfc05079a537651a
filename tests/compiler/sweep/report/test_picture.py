"""The main chart as a picture: whole, readable in light and dark, and true."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from alloc_moe.compiler.sweep.methods import PRESETS
from alloc_moe.compiler.sweep.records import SweepResults
from alloc_moe.compiler.sweep.report.data import Digest
from alloc_moe.compiler.sweep.report.picture import draw_picture
from alloc_moe.compiler.sweep.report.tables import from_csv

REPORTS = Path(__file__).parents[4] / "examples" / "reports"
SVG = "{http://www.w3.org/2000/svg}"
DARK = "@media (prefers-color-scheme: dark) {"


@pytest.fixture(scope="module")
def results(synthetic_sweep: ModuleType) -> SweepResults:
    made: SweepResults = synthetic_sweep.synthetic_sweep()
    return made


def parsed(picture: str) -> ElementTree.Element:
    """Return the picture after what must hold for every one."""
    root = ElementTree.fromstring(picture)  # well-formed, or it raises
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        *("svg", "title", "desc", "style", "g", "text", "rect", "line", "path"),
        *("circle", "polygon"),
    }
    # Nothing is loaded, by whatever way.
    assert picture.count("//") == picture.count("http://www.w3.org/2000/svg") == 1
    for bad in ("href", "url(", "@import", "@font-face", "nan", "inf"):
        assert bad not in picture, bad
    for text in root.iter(f"{SVG}text"):
        assert 0 < float(text.attrib["x"]) < 800
        assert 0 < float(text.attrib["y"]) < 450
    return root


def lines(root: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """Return each method's group by the name at its line's end."""
    found = {}
    for group in root.iter(f"{SVG}g"):
        if group.attrib["class"].startswith("series"):
            [name] = (t.text for t in group.iter(f"{SVG}text") if t.attrib["class"] == "name")
            assert name
            found[name] = group
    return found


def points(line: ElementTree.Element) -> list[tuple[float, float]]:
    [path] = (p for p in line.iter(f"{SVG}path") if p.attrib["class"] == "curve")
    pairs = (pair.split() for pair in path.attrib["d"].removeprefix("M").split("L"))
    return [(float(x), float(y)) for x, y in pairs]


def test_the_same_results_give_the_same_picture(results: SweepResults) -> None:
    assert draw_picture(results) == draw_picture(results)


def test_few_lines_are_shown_those_that_are_well_known_and_the_best_others(
    results: SweepResults,
) -> None:
    # Of nine; drawn from worst to best, so that the best lies over the others.
    shown = list(lines(parsed(draw_picture(results))))
    assert shown == ["uniform k", "top-p", "threshold", "price", "price + affine"]
    renamed = tuple(
        dataclasses.replace(cell, method=PRESETS["paper"].name)
        if cell.method == "data-free"
        else cell
        for cell in results.cells
    )
    shown = list(lines(parsed(draw_picture(dataclasses.replace(results, cells=renamed)))))
    assert shown == ["Alloc-MoE", "uniform k", "top-p", "price", "price + affine"]


def test_well_known_methods_look_the_same_in_every_picture(
    synthetic_sweep: ModuleType, results: SweepResults
) -> None:
    def looks(results: SweepResults) -> dict[str, str]:
        return {name: g.attrib["class"] for name, g in lines(parsed(draw_picture(results))).items()}

    fewer = [m for m in synthetic_sweep.METHODS if m.label in ("top-p", "uniform k")]
    own = [m for m in synthetic_sweep.METHODS if m.label.endswith("(default)")]
    many, few = looks(results), looks(synthetic_sweep.synthetic_sweep(methods=(*fewer, *own)))
    assert few == {
        "uniform k": "series m1",
        "top-p": "series m3",
        "price + affine": "series m0 own",
    }
    assert few.items() <= many.items()
    assert len(set(many.values())) == len(many)


def test_points_lie_where_results_were_measured(results: SweepResults) -> None:
    digest = Digest(results)
    drawn = lines(parsed(draw_picture(results)))
    for name, method in (("price + affine", "price + affine (default)"), ("top-p", "top-p")):
        row = digest.row(method)[::-1]
        full, *measured = points(drawn[name])
        assert len(measured) == len(row) == 5
        # Distances from the full model are in proportion to what was saved and what was lost.
        for (x, y), summary in zip(measured, row, strict=True):
            saved = 48 - summary.activations.mean
            assert (x - full[0]) / saved == pytest.approx(
                (measured[-1][0] - full[0]) / (48 - row[-1].activations.mean), rel=1e-3
            )
            assert full[1] - y == pytest.approx(
                summary.added.mean / row[-1].added.mean * (full[1] - measured[-1][1]), abs=0.02
            )
    ends = [points(line)[-1][1] for line in drawn.values()]
    assert ends == sorted(ends)  # worst above


def test_each_line_says_what_it_loses_at_half_the_experts(results: SweepResults) -> None:
    digest = Digest(results)
    said = {}
    for name, line in lines(parsed(draw_picture(results))).items():
        [said[name]] = (t.text for t in line.iter(f"{SVG}text") if t.attrib["class"] == "what")
    plain, own = digest.get("uniform k", 0.5), digest.get("price + affine (default)", 0.5)
    assert plain
    assert own
    assert said["uniform k"] == f"+{plain.added.mean:.4f} at 50 %"
    assert said["price + affine"] == f"default: +{own.added.mean:.4f} at 50 %"


def test_the_picture_is_told_in_words(synthetic_sweep: ModuleType) -> None:
    methods = [m for m in synthetic_sweep.METHODS if m.label in ("uniform k", "top-p")]
    results = synthetic_sweep.synthetic_sweep(
        methods=tuple(m._replace(overshoot=1.0) for m in methods), budgets=(0.5,), seeds=(0,)
    )
    added = [
        dataclasses.replace(cell, added_loss=loss, activations=24.0)
        for cell, loss in zip(results.cells, (0.03, 0.0214), strict=True)
    ]
    root = parsed(draw_picture(dataclasses.replace(results, cells=tuple(added))))
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-labelledby"] == "title desc"
    title, desc = root[0], root[1]
    assert (title.attrib["id"], desc.attrib["id"]) == ("title", "desc")
    assert title.text == "tiny-moe: what running fewer experts costs"
    assert desc.text == (
        "At half the experts, top-p loses 0.0214 nats; uniform k loses 0.0300: 29 % of the loss "
        "recovered. Added loss in nats per token, at experts run per token, of 48: "
        "top-p: +0.0214 at 24.0. uniform k: +0.0300 at 24.0."
    )


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_and_lines_stand_out_from_the_card(results: SweepResults, mode: str) -> None:
    root = parsed(draw_picture(results))
    [style] = root.iter(f"{SVG}style")
    assert style.text
    light, dark = style.text.split(DARK)
    rules = {}
    for names, body in re.findall(r"([.\w, ]+)\{([^}]*)\}", light if mode == "light" else dark):
        for name in names.split(","):
            for kind, color in re.findall(r"(fill|color|stroke): (#[0-9a-f]{6})", body):
                rules[name.strip(), kind] = color
    card = luminance(rules[".card", "fill"])
    inks = [rules["text", "fill"], rules[".tick", "fill"], rules[".what", "fill"]]
    used = {css for line in lines(root).values() for css in line.attrib["class"].split()}
    inks += [rules[f".{css}", "color"] for css in sorted(used) if re.fullmatch(r"m\d", css)]
    assert len(inks) == 3 + 5
    for ink in inks:
        low, high = sorted((card, luminance(ink)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, ink  # WCAG AA


ODD: dict[str, dict[str, Any]] = {
    "one of each": {"budgets": (0.3,), "methods": 1, "seeds": (0,), "layers": 1},
    "some gains": {"offset": -0.016},
    "only gains": {"offset": -1.0},
    "the full model as a budget": {"budgets": (0.5, 1.0)},
    "no cells": {"methods": 0},
    "twenty budgets": {"budgets": tuple(0.2 + 0.04 * i for i in range(20))},
}


@pytest.mark.parametrize("case", ODD.values(), ids=ODD.keys())
def test_odd_sweeps_are_drawn(synthetic_sweep: ModuleType, case: dict[str, Any]) -> None:
    changed = dict(case)
    count = changed.pop("methods", 5)
    methods = synthetic_sweep.METHODS[len(synthetic_sweep.METHODS) - count :]
    root = parsed(draw_picture(synthetic_sweep.synthetic_sweep(methods=methods, **changed)))
    drawn = lines(root)
    assert len(drawn) == count
    labels = [float(t.attrib["y"]) for g in drawn.values() for t in g.iter(f"{SVG}text")]
    assert all(b - a >= 16.9 for a, b in itertools.pairwise(sorted(labels)))


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("data-free layers (LExI)", "LExI"),
        ("f(x)", "f(x)"),
        ("a method with a name far too long", "a method with a name far to…"),
    ],
)
def test_names_are_short(results: SweepResults, method: str, name: str) -> None:
    cells = tuple(dataclasses.replace(c, method=method, default=False) for c in results.cells[:1])
    assert list(lines(parsed(draw_picture(dataclasses.replace(results, cells=cells))))) == [name]


def test_methods_without_a_finite_loss_are_left_out(results: SweepResults) -> None:
    cells = tuple(
        dataclasses.replace(c, loss=math.nan, added_loss=math.nan) if c.default else c
        for c in results.cells
    )
    drawn = lines(parsed(draw_picture(dataclasses.replace(results, cells=cells))))
    assert list(drawn) == ["uniform k", "top-p", "Alloc-T batch", "threshold", "price"]
    assert drawn["price"].attrib["class"] == "series m0 own"


def test_text_from_outside_cannot_become_markup(results: SweepResults) -> None:
    evil = "<script>&'\""
    cells = tuple(dataclasses.replace(c, method=f"{evil} {c.method}") for c in results.cells)
    root = parsed(draw_picture(dataclasses.replace(results, model=evil, cells=cells)))
    assert root[0].text == f"{evil}: what running fewer experts costs"
    assert all(name.startswith(evil) for name in lines(root))


@pytest.mark.parametrize("name", ["tiny-moe", "tiny-qwen3-moe"])
def test_the_recorded_sweeps_give_the_recorded_pictures(name: str) -> None:
    table = REPORTS / f"{name}.csv"
    results = from_csv(table.read_text("utf-8"), model=name, path=table)
    assert draw_picture(results).encode() == (REPORTS / f"{name}.svg").read_bytes()
