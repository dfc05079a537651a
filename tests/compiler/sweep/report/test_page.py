"""The report as a page."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from html.parser import HTMLParser
from types import ModuleType
from typing import Any

import pytest

from alloc_moe.compiler.sweep.records import Cell, SweepResults
from alloc_moe.compiler.sweep.report.data import Digest, signed
from alloc_moe.compiler.sweep.report.page import render
from alloc_moe.compiler.sweep.report.tables import markdown_table, to_csv

VOID = {"meta", "br", "img", "link", "input", "hr"}
# What could make a browser fetch something.
LOADING = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"}


class Page(HTMLParser):
    """Collects text, tags and what is out of balance."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def check(html: str) -> Page:
    """Return the page after what must hold for every report."""
    page = Page(html)
    assert page.faults == []
    assert page.open == []
    assert "http:" not in html
    assert "https:" not in html
    assert "//" not in re.sub(r"(?m)^\s*// .*$", "", html)
    assert "url(" not in html
    assert "@import" not in html
    assert not {name for _, attributes in page.tags for name in attributes} & LOADING
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "embed"}
    for bad in (">nan", "NaN", '"nan', " nan", "inf<", '"inf', "None"):
        assert bad not in html, bad
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden")
        for name in ("width", "height"):
            if tag in ("rect", "svg") and name in attributes:
                assert float(attributes[name] or "") >= 0
    return page


@pytest.fixture(scope="module")
def results(synthetic_sweep: ModuleType) -> SweepResults:
    made: SweepResults = synthetic_sweep.synthetic_sweep()
    return made


def test_the_same_results_give_the_same_page(results: SweepResults) -> None:
    assert render(results) == render(results)


def test_the_page_is_whole_and_needs_nothing_else(results: SweepResults) -> None:
    html = render(results)
    page = check(html)
    assert html.startswith("<!DOCTYPE html>")
    policies = [a["content"] for _, a in page.tags if "http-equiv" in a]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]


def test_every_method_and_number_is_in_the_text(results: SweepResults) -> None:
    page = check(render(results))
    digest = Digest(results)
    for summary in digest.summaries.values():
        assert summary.method in page.text
        assert signed(summary.added.mean) in page.text
        assert f"{summary.activations.mean:.1f} experts" in page.text
    for cell in results.cells:
        assert f"{cell.loss:.5f}" in page.text
        assert f"{cell.activations:.2f}" in page.text
    for sensitivity in results.sensitivities:
        assert all(f"{cost:.4g}" in page.text for row in sensitivity.costs for cost in row)
    for said in (results.command, results.date, results.text.sha256, results.calibration.sha256):
        assert said in page.text
    for facts in (results.machine, results.versions):
        assert all(f"{name} {value}" in page.text for name, value in facts.items())


def test_charts_have_a_point_per_summary_and_a_cell_per_cost(results: SweepResults) -> None:
    page = check(render(results))
    labels = [a["aria-label"] or "" for tag, a in page.tags if tag == "svg" and "aria-label" in a]
    assert sum(label.startswith("Sensitivity of each layer") for label in labels) == 2
    assert sum("in grey" in label for label in labels) == 9
    markers = [a for tag, a in page.tags if tag in ("circle", "polygon") and a["class"] == "mark"]
    legend, charts = 9 * 2 + 9 * 3, 3  # keys of lists, panels and tables; wide, narrow, panels
    assert len(markers) >= charts * 45 + legend
    shades = [a for tag, a in page.tags if tag == "rect" and re.match(r"q\d", a["class"] or "")]
    assert len(shades) == 2 * (6 * 8 + 9)


def test_methods_differ_by_more_than_colour(results: SweepResults) -> None:
    from alloc_moe.compiler.sweep.report.curves import method_styles

    styles = method_styles(Digest(results)).values()
    # Nine methods share eight shapes, but no two share shape and dashes.
    assert len({(style.shape, style.dash) for style in styles}) == len(results_methods(results))
    assert len({style.css for style in styles}) == len(results_methods(results))


def results_methods(results: SweepResults) -> set[str]:
    return {cell.method for cell in results.cells}


def test_the_best_of_each_budget_is_bold(results: SweepResults) -> None:
    bold = re.findall(r"<strong>(.*?)</strong>", render(results))
    digest = Digest(results)
    best = [digest.best(budget) for budget in digest.budgets]
    assert sorted(bold) == sorted(signed(summary.added.mean) for summary in best if summary)


def test_a_method_that_overspent_is_marked(results: SweepResults) -> None:
    page = check(render(results))
    assert "24.8 experts †" in page.text
    assert "† ran over 2 % more experts than asked for: not compared." in page.text


def test_text_from_outside_cannot_become_markup(results: SweepResults) -> None:
    evil = '<script>alert("x")</script>&\'"'
    cells = tuple(
        dataclasses.replace(cell, method=f"{cell.method} {evil}", allocation=evil)
        for cell in results.cells
    )
    changed = dataclasses.replace(
        results,
        model=evil,
        family=evil,
        cells=cells,
        command=evil,
        date=evil,
        layers=tuple(f"{name}{evil}" for name in results.layers),
        machine={evil: evil},
        versions={evil: evil},
        text=dataclasses.replace(results.text, name=evil, sha256=evil),
        calibration=dataclasses.replace(results.calibration, name=evil, sha256=evil),
        sensitivities=tuple(
            dataclasses.replace(item, metric=evil, redistribution=evil)
            for item in results.sensitivities
        ),
    )
    page = check(render(changed))
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert evil in page.text


ODD: dict[str, dict[str, Any]] = {
    "one budget": {"budgets": (0.5,)},
    "one method": {"methods": 1},
    "one seed": {"seeds": (7,)},
    "one of each": {"budgets": (0.3,), "methods": 1, "seeds": (0,), "layers": 1},
    "the full model as a budget": {"budgets": (0.5, 1.0)},
    "many layers": {"layers": 48, "methods": 2},
    "two experts": {"k": 2},
    "sixteen experts": {"k": 16, "methods": 3},
    "some gains": {"offset": -0.016},
    "only gains": {"offset": -1.0},
    "no sensitivities": {"sensitivities": ()},
    "no decoding": {"decode": False},
    "no cells": {"methods": 0},
    "twenty budgets": {"budgets": tuple(0.2 + 0.04 * i for i in range(20)), "methods": 2},
}


@pytest.mark.parametrize("case", ODD.values(), ids=ODD.keys())
def test_odd_sweeps_are_reported(synthetic_sweep: ModuleType, case: dict[str, Any]) -> None:
    changed = dict(case)
    if "methods" in changed:
        # The last are the default and what it is built on.
        count = len(synthetic_sweep.METHODS) - changed["methods"]
        changed["methods"] = synthetic_sweep.METHODS[count:]
    results = synthetic_sweep.synthetic_sweep(**changed)
    check(render(results))
    assert len(list(csv.reader(io.StringIO(to_csv(results))))) == 1 + len(results.cells)
    assert len(markdown_table(results).splitlines()) == 2 + len(results_methods(results))


def test_many_methods_keep_their_labels_apart(synthetic_sweep: ModuleType) -> None:
    methods = tuple(
        synthetic_sweep.Method(f"method {i:02}", ("a", "b", "c"), 0.01 * 1.02**i, 1.0)
        for i in range(30)
    )
    page = check(render(synthetic_sweep.synthetic_sweep(methods=methods, seeds=(0,))))
    assert all(method.label in page.text for method in methods)


def test_layers_of_different_k_are_reported(results: SweepResults) -> None:
    def cut(cell: Cell) -> Cell:
        rows = cell.experts_per_token_histogram
        return dataclasses.replace(cell, experts_per_token_histogram=(rows[0][:5], *rows[1:]))

    first = results.sensitivities[0]
    costs = (first.costs[0][:4], *first.costs[1:])
    changed = dataclasses.replace(
        results,
        experts_per_token=(4, *results.experts_per_token[1:]),
        cells=tuple(cut(cell) for cell in results.cells),
        sensitivities=(dataclasses.replace(first, costs=costs),),
    )
    assert "4–8 a layer" in check(render(changed)).text  # noqa: RUF001


def test_missing_cells_leave_a_gap(results: SweepResults) -> None:
    cells = tuple(c for c in results.cells if not (c.method == "price" and c.budget == 0.5))
    changed = dataclasses.replace(results, cells=cells)
    page = check(render(changed))
    assert "not measured" in page.text
    [row] = [line for line in markdown_table(changed).splitlines() if line.startswith("| price |")]
    assert "|  |" in row


def test_losses_that_are_not_finite_leave_a_gap(results: SweepResults) -> None:
    cells = tuple(
        dataclasses.replace(c, loss=math.nan, added_loss=math.nan, loss_decode=math.nan)
        if c.method in ("price", "data-free") or c.default
        else c
        for c in results.cells
    )
    costs = ((math.nan,) * 8, *results.sensitivities[0].costs[1:])
    changed = dataclasses.replace(
        results,
        cells=cells,
        sensitivities=(dataclasses.replace(results.sensitivities[0], costs=costs),),
    )
    page = check(render(changed))
    assert "data-free" in page.text
    assert "price + affine (default)" in page.text


def test_results_without_any_loss_still_make_a_page(results: SweepResults) -> None:
    cells = tuple(dataclasses.replace(c, loss=math.nan, added_loss=math.nan) for c in results.cells)
    page = check(render(dataclasses.replace(results, cells=cells)))
    assert "The sweep holds no finite result" in page.text
