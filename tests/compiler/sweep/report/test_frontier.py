"""Loss against bytes: which points none beats, and that chart, tables and picture say so."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from alloc_moe.compiler.sweep.records import SweepResults
from alloc_moe.compiler.sweep.report.data import Digest
from alloc_moe.compiler.sweep.report.frontier.chart import frontier_frame, way_styles
from alloc_moe.compiler.sweep.report.frontier.picture import draw_frontier
from alloc_moe.compiler.sweep.report.frontier.points import Frontier, headline, size
from alloc_moe.compiler.sweep.report.frontier.tables import frontier_markdown, points_table
from alloc_moe.compiler.sweep.report.page import render
from alloc_moe.compiler.sweep.report.tables import from_csv
from alloc_moe.compiler.sweep.ways import WAYS

SVG = "{http://www.w3.org/2000/svg}"
DARK = "@media (prefers-color-scheme: dark) {"
# Way, target (k of plain ones), bytes read, added loss.
POINTS = (
    ("int4-price", 1e6, 0.99e6, 0.02),
    ("int4-price", 2e6, 1.9e6, 0.004),
    ("int4-threshold", 1e6, 0.98e6, 0.03),
    ("mixed-int4", 2e6, 1.95e6, 0.004),
    ("int8-price", 2e6, 2.1e6, 0.001),
    ("int4-k", 0.7e6, 0.7e6, 0.2),
    ("int4-k", 0.9e6, 0.9e6, 0.06),
    ("int4-k", 1.2e6, 1.2e6, 0.05),
)
Make = Callable[..., SweepResults]


@pytest.fixture(scope="module")
def make(synthetic_sweep: ModuleType) -> Make:
    """Return a function from points, and seeds, to a sweep with budgets and these."""

    def made(
        points: tuple[tuple[str, float, float, float], ...] = POINTS,
        seeds: tuple[int, ...] = (0,),
        *,
        budgets: bool = False,
    ) -> SweepResults:
        results: SweepResults = synthetic_sweep.synthetic_sweep(budgets=(0.5,), seeds=(0,))
        cell, cells = results.cells[0], list(results.cells) if budgets else []
        for (name, target, read, added), seed in itertools.product(points, seeds):
            off = 0.001 * (seed - len(seeds) // 2)
            cells.append(
                dataclasses.replace(
                    cell,
                    method=WAYS[name].name,
                    seed=seed,
                    allocation="uniform" if WAYS[name].plain else "fisher",
                    redistribution=WAYS[name].redistribution,
                    correction=WAYS[name].correction,
                    dtype=WAYS[name].weights.dtype,
                    loss=results.full_loss + added + off,
                    added_loss=added + off,
                    target_bytes=target,
                    planned_bytes=read,
                    read_bytes=read,
                    divergence=added / 2,
                    bits_per_layer=(4,) * 6,
                    seconds=1.5,
                )
            )
        calibration = dataclasses.replace(results.calibration, seeds=seeds)
        return dataclasses.replace(results, cells=tuple(cells), calibration=calibration)

    return made


def best(results: SweepResults) -> list[tuple[str, float]]:
    return [(point.method, point.target) for point in Frontier(results).best]


def test_points_that_none_beats_are_joined_from_few_bytes_to_many(make: Make) -> None:
    assert best(make()) == [
        ("int4, uniform k", 0.7e6),
        ("int4, uniform k", 0.9e6),
        ("int4, threshold", 1e6),
        ("int4, price", 1e6),
        ("int4, price", 2e6),  # as little loss as mixed bits, which read more
        ("int8, price", 2e6),
    ]


def test_the_same_artifact_made_in_two_ways_beats_neither(make: Make) -> None:
    same = (("int4-price", 1e6, 9e5, 0.01), ("int4-threshold", 1e6, 9e5, 0.01 + 1e-7))
    assert len(best(make((*same, ("mixed-int4", 1e6, 9e5, 0.0101))))) == 2
    assert best(make((*same, ("mixed-int4", 1e6, 8e5, 0.01)))) == [("mixed bits, rest int4", 1e6)]


def test_bytes_that_differ_by_one_percent_are_alike(make: Make) -> None:
    found = (("int4-price", 1e6, 9e5, 0.02), ("int4-threshold", 1e6, 9.08e5, 0.01))
    assert best(make(found)) == [("int4, threshold", 1e6)]
    apart = (("int4-price", 1e6, 9e5, 0.02), ("int4-threshold", 1e6, 9.1e5, 0.01))
    assert len(best(make(apart))) == 2


def test_seeds_are_averaged_before_points_are_compared(make: Make) -> None:
    assert best(make(seeds=(0, 1, 2))) == best(make())
    [point] = (p for p in Frontier(make(seeds=(0, 1, 2))).points if p.added.mean > 0.1)
    assert (point.added.low, point.added.high) == pytest.approx((0.199, 0.201))


def test_a_plain_way_gives_its_largest_k_within_a_target(make: Make) -> None:
    frontier = Frontier(make())
    assert frontier.targets == (1e6, 2e6)
    plain = [frontier.get("int4, uniform k", target) for target in (0.6e6, *frontier.targets)]
    assert [point and point.target for point in plain] == [None, 0.9e6, 1.2e6]
    assert frontier.get("int8, price", 1e6) is None


def test_what_reads_more_than_was_asked_is_not_the_least(make: Make) -> None:
    frontier = Frontier(make())
    over = frontier.get("int8, price", 2e6)
    assert over
    assert over.overspent
    least = frontier.least(2e6)
    assert least
    assert least.method == "int4, price"
    assert headline(frontier) == (
        "Within 2 MB a token, int4, price loses 0.0040 nats; the best plain pair of k and bits "
        "loses 0.0500"
    )


def test_the_tables_have_the_least_in_bold(make: Make) -> None:
    added, divergence = frontier_markdown(make()).split("\n\n")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in added.splitlines()]
    assert rows[0] == ["added loss", "1 MB", "2 MB"]
    table = {row[0]: row[1:] for row in rows[2:]}
    ran = Frontier(make()).points[0].activations.mean
    assert table["int4, price"] == [f"**+0.0200** ({ran:.1f})", f"**+0.0040** ({ran:.1f})"]
    assert table["int8, price"] == ["", f"+0.0010 ({ran:.1f}, over)"]
    assert table["int4, uniform k"][0].startswith("+0.0600 (k = ")
    assert divergence.splitlines()[0].startswith("| divergence | 1 MB")
    assert f"**0.0100** ({ran:.1f})" in divergence


def test_divergences_that_were_not_measured_have_no_table(make: Make) -> None:
    results = make()
    cells = tuple(dataclasses.replace(cell, divergence=None) for cell in results.cells)
    assert "divergence" not in frontier_markdown(dataclasses.replace(results, cells=cells))


def test_every_point_is_in_the_list(make: Make) -> None:
    table = points_table(Frontier(make()))
    for _, _, read, _ in POINTS:
        assert f"{read:.0f}" in table
    assert table.count(">best<") == 6


def parsed(picture: str) -> ElementTree.Element:
    root = ElementTree.fromstring(picture)
    assert picture.count("//") == picture.count("http://www.w3.org/2000/svg") == 1
    for bad in ("href", "url(", "@import", "nan", "inf"):
        assert bad not in picture, bad
    for text in root.iter(f"{SVG}text"):
        assert 0 < float(text.attrib["x"]) < 800
        assert 0 < float(text.attrib["y"]) < 450
    return root


def test_points_lie_where_they_were_measured(make: Make) -> None:
    frontier = Frontier(make())
    root = parsed(draw_frontier(make()))
    # The line in the chart; another explains it.
    line = next(p for p in root.iter(f"{SVG}path") if p.attrib["class"] == "frontier")
    pairs = (pair.split() for pair in line.attrib["d"].removeprefix("M").split("L"))
    drawn = [(float(x), float(y)) for x, y in pairs]
    frame = frontier_frame(frontier, (62, 548, 88, 390))
    expected = [(frame.x(p.read.mean), frame.y(p.added.mean)) for p in frontier.best]
    assert drawn == [pytest.approx(place, abs=0.01) for place in expected]
    assert drawn == sorted(drawn)
    assert [y for _, y in drawn] == sorted(y for _, y in drawn)  # less loss is further down
    faint = [g for g in root.iter(f"{SVG}g") if g.attrib["class"].endswith(" faint")]
    beaten = sum(len([g for g in group if g.attrib["class"] == "tip"]) for group in faint)
    assert beaten == len(frontier.points) - len(frontier.best) == 2


def test_each_way_is_named_and_looks_like_no_other(make: Make) -> None:
    results = make(tuple((name, 1e6, 0.9e6, 0.1) for name in WAYS))
    root = parsed(draw_frontier(results))
    names = [t.text for t in root.iter(f"{SVG}text") if t.attrib.get("class") == "name"]
    assert names == [way.name for way in WAYS.values()]
    styles = way_styles(Frontier(results))
    assert len({style.css.split()[0] for style in styles.values()}) == len(WAYS)
    assert len({style.shape for style in styles.values()}) == len(WAYS)
    some = way_styles(Frontier(make()))
    assert some.items() <= styles.items()  # the same in every report


def test_the_picture_is_told_in_words(make: Make) -> None:
    root = parsed(draw_frontier(make()))
    assert root[1].text
    assert root[1].text.startswith("Within 2 MB a token, int4, price loses 0.0040 nats;")
    assert "int4, price, " in root[1].text
    assert "+0.0010 nats at 2100000 bytes" in root[1].text


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("mode", "card"), [("light", "#ffffff"), ("dark", "#0d1117")])
def test_names_and_the_line_stand_out_from_the_card(make: Make, mode: str, card: str) -> None:
    [style] = parsed(draw_frontier(make())).iter(f"{SVG}style")
    assert style.text
    dark = re.findall(re.escape(DARK) + r"(.*?\n)\}\n", style.text, re.DOTALL)
    assert len(dark) == 2
    light = re.sub(re.escape(DARK) + r".*?\n\}\n", "", style.text, flags=re.DOTALL)
    rules = light if mode == "light" else "".join(dark)
    inks = dict(re.findall(r"\.(m\d) \{ color: (#[0-9a-f]{6}) \}", rules))
    [inks["line"]] = re.findall(r"\.frontier \{[^}]*stroke: (#[0-9a-f]{6})", rules)
    assert len(inks) == 11
    for ink in inks.values():
        low, high = sorted((luminance(card), luminance(ink)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, ink  # WCAG AA


def test_the_page_has_budgets_and_targets_apart(make: Make) -> None:
    both = make(budgets=True)
    page = render(both)
    assert page.count("<h2>What fewer experts cost</h2>") == 1
    assert page.count("<h2>Bits and experts for the same bytes</h2>") == 1
    assert {cell.target_bytes for cell in Digest(both).results.cells} == {None}
    alone = render(make())
    assert "<h2>What fewer experts cost</h2>" not in alone
    assert "<h1>Within 2 MB a token, int4, price loses 0.0040 nats;" in alone
    budgets = render(both.of_budgets)
    assert "Bits and experts" not in budgets


ODD: dict[str, tuple[tuple[str, float, float, float], ...]] = {
    "one point": (("int4-k", 1e6, 1e6, 0.1),),
    "equal points": (("int4-price", 1e6, 1e6, 0.1), ("int8-price", 1e6, 1e6, 0.1)),
    "gains": (("int4-price", 1e6, 1e6, -0.01), ("int8-price", 2e6, 2e6, 0.0)),
    "large": (("int4-price", 1e9, 1e9, 0.1), ("int8-price", 5e10, 4e10, 0.01)),
    "not finite": (("int4-price", 1e6, 1e6, math.nan), ("int8-price", 2e6, 2e6, 0.1)),
}


@pytest.mark.parametrize("case", ODD.values(), ids=ODD.keys())
def test_odd_sweeps_are_drawn(make: Make, case: Any) -> None:
    results = make(case)
    parsed(draw_frontier(results))
    assert frontier_markdown(results).startswith("| added loss |")
    assert "Bits and experts" in render(results)
    assert len(best(results)) >= 1


def test_no_finite_point_is_no_chart(make: Make) -> None:
    results = make((("int4-price", 1e6, 1e6, math.nan),))
    page = render(results)
    assert "Bits and experts" not in page
    assert "The sweep holds no finite result" in page
    parsed(draw_frontier(results))


@pytest.mark.parametrize(
    ("nbytes", "said"),
    [(7.9e5, "0.79 MB"), (1e6, "1 MB"), (1.2345e9, "1.23 GB"), (75_000, "75 KB"), (12, "12 B")],
)
def test_sizes_have_three_digits(nbytes: float, said: str) -> None:
    assert size(nbytes) == said


@pytest.mark.parametrize("name", ["tiny-moe", "tiny-qwen3-moe"])
def test_the_recorded_sweeps_give_the_recorded_pictures(name: str) -> None:
    reports = Path(__file__).parents[4] / "examples" / "reports"
    table = reports / f"{name}-bytes.csv"
    results = from_csv(table.read_text("utf-8"), model=name, path=table)
    assert draw_frontier(results).encode() == table.with_suffix(".svg").read_bytes()


def test_old_tables_have_no_points(make: Make) -> None:
    reports = Path(__file__).parents[4] / "examples" / "reports"
    table = reports / "tiny-moe.csv"
    results = from_csv(table.read_text("utf-8"), model="tiny-moe", path=table)
    assert results.of_targets.cells == ()
    assert {cell.dtype for cell in results.cells} == {"float32"}
    assert Frontier(results).points == []
