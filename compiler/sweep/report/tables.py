"""A sweep's results as tables: CSV, Markdown, HTML."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from alloc_moe.compiler.errors import SweepError
from alloc_moe.compiler.sweep.records import CalibrationText, Cell, ScoredText, SweepResults
from alloc_moe.compiler.sweep.report.data import Digest, Summary, figure, mean_rows, percent, signed
from alloc_moe.compiler.sweep.report.layers import layer_labels
from alloc_moe.compiler.sweep.report.svg import DASH, Style, element, escape, key

COLUMNS = (
    *("method", "default", "allocation", "redistribution", "correction", "budget", "seed"),
    *("loss", "added_loss", "loss_decode", "activations", "full_activations"),
    *("activations_per_layer", "planned_per_layer", "experts_per_token_histogram"),
    *("dtype", "target_bytes", "planned_bytes", "read_bytes", "bits_per_layer", "perplexity"),
    *("divergence", "seconds"),
)


def to_csv(results: SweepResults) -> str:
    """Return one row per cell, numbers with all their digits.

    A tuple over layers is one column of numbers between spaces; in a histogram ``|`` separates
    the layers.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for cell in results.cells:
        writer.writerow(
            [
                *(cell.method, "yes" if cell.default else "no", cell.allocation),
                *(cell.redistribution, cell.correction, cell.budget, cell.seed),
                *(cell.loss, cell.added_loss),
                _known(cell.loss_decode),
                *(cell.activations, results.full_activations),
                *(_spaced(cell.activations_per_layer), _spaced(cell.planned_per_layer)),
                "|".join(_spaced(row) for row in cell.experts_per_token_histogram),
                *(cell.dtype, _known(cell.target_bytes), _known(cell.planned_bytes)),
                *(_known(cell.read_bytes), _spaced(cell.bits_per_layer), cell.perplexity),
                *(_known(cell.divergence), _known(cell.seconds)),
            ]
        )
    return file.getvalue()


def from_csv(content: str, *, model: str, path: Path) -> SweepResults:
    """Read back what `to_csv` wrote, enough to draw curves again.

    Cells are as they were. What a table doesn't hold is empty: names, texts, sensitivities.

    Args:
        content: The table.
        model: What was swept; a table doesn't say it.
        path: Where the table is from, for the message.

    Raises:
        SweepError: The content is no table of a sweep's cells.
    """
    try:
        cells = tuple(map(_cell, csv.DictReader(io.StringIO(content, newline=""), strict=True)))
        experts_per_token = _experts_per_token(cells)
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        raise SweepError(
            f"{path} holds no table of a sweep ({error!r}). Give a sweep.csv that alloc-sweep "
            "wrote, or make it again."
        ) from error
    seeds = tuple(sorted({cell.seed for cell in cells}))
    return SweepResults(
        model,
        "",
        layers=tuple(map(str, range(len(experts_per_token)))),
        experts=(),
        experts_per_token=experts_per_token,
        full_loss=next((c.loss - c.added_loss for c in cells if math.isfinite(c.loss)), math.nan),
        text=ScoredText("", "", 0),
        calibration=CalibrationText("", "", 0, seeds),
        machine={},
        versions={},
        date="",
        command="",
        sensitivities=(),
        cells=cells,
    )


def markdown_table(results: SweepResults) -> str:
    """Return methods by budgets: added loss, half the spread over seeds, measured activations.

    The lowest loss of each column among those that kept the budget is bold.
    """
    digest = Digest(results)
    rows = [["", *(f"{budget:g}" for budget in digest.budgets)]]
    rows.append(["---", *("---:" for _ in digest.budgets)])
    for method in digest.methods:
        cells = (digest.get(method, budget) for budget in digest.budgets)
        rows.append([_markdown(method), *(_markdown_cell(cell, digest) for cell in cells)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def html_table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first column names the rows; contents are markup already."""
    titles = "".join(element("th", {"scope": "col"}, head) for head in heads)
    body = "".join(
        element(
            "tr",
            {},
            element("th", {"scope": "row"}, row[0]),
            *(element("td", {}, cell) for cell in row[1:]),
        )
        for row in rows
    )
    table = element(
        "table",
        {},
        element("caption", {}, caption),
        element("thead", {}, element("tr", {}, titles)),
        element("tbody", {}, body),
    )
    # Tables wider than a phone scroll on their own; focusable, so that the keyboard can do it.
    frame = {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": caption}
    return element("div", frame, table)


def results_table(digest: Digest, styles: Mapping[str, Style]) -> str:
    """Return the table of all methods and budgets, mean over seeds."""
    rows = []
    for method in digest.methods:
        name = key(styles[method], width=26) + " " + escape(method)
        cells = [_html_cell(digest.get(method, budget), digest) for budget in digest.budgets]
        rows.append([name, *cells])
    heads = ["method", *(_budget_head(budget, digest) for budget in digest.budgets)]
    return html_table("Added loss and measured activations, by method and budget", heads, rows)


def runs_table(results: SweepResults) -> str:
    """Return every single run, nothing averaged."""
    rows = [
        [
            *(escape(cell.method), percent(cell.budget), str(cell.seed)),
            *(figure(cell.loss, ".5f"), signed(cell.added_loss), figure(cell.activations, ".2f")),
            DASH if cell.loss_decode is None else figure(cell.loss_decode, ".5f"),
            escape(f"{cell.allocation} / {cell.redistribution} / {cell.correction}"),
        ]
        for cell in results.cells
    ]
    heads = ["method", "budget", "seed", "loss", "added", "activations", "loss, one token per call"]
    return html_table("Every run", [*heads, "allocation / redistribution / correction"], rows)


def cost_table(results: SweepResults, index: int) -> str:
    """Return one sensitivity matrix in numbers."""
    sensitivity = results.sensitivities[index]
    most = max((len(row) for row in sensitivity.costs), default=1)
    rows = [
        [escape(name), *(figure(cost, ".4g") for cost in costs), *[""] * (most - len(costs))]
        for name, costs in zip(results.layers, sensitivity.costs, strict=True)
    ]
    caption = escape(f"Sensitivity by {sensitivity.metric}, per layer and k")
    return html_table(caption, ["layer", *(f"k = {k}" for k in range(1, most + 1))], rows)


def layers_table(results: SweepResults, row: Sequence[Summary]) -> str:
    """Return the experts each layer ran, and was planned to run, per budget."""
    columns = []
    for summary in row:
        used = mean_rows([cell.activations_per_layer for cell in summary.cells])
        planned = mean_rows([cell.planned_per_layer for cell in summary.cells])
        pairs = zip(used, planned, strict=True)
        columns.append([f"{ran:.2f} <small>({plan:.2f})</small>" for ran, plan in pairs])
    heads = ["layer", *(percent(summary.budget) for summary in row)]
    rows = [[escape(name), *cells] for name, *cells in zip(results.layers, *columns, strict=True)]
    return html_table("Experts per token that ran, in brackets the plan", heads, rows)


def tokens_table(results: SweepResults, summary: Summary) -> str:
    """Return per layer the shares of tokens by number of experts that ran."""
    by_layer = zip(*(cell.experts_per_token_histogram for cell in summary.cells), strict=True)
    shares = [mean_rows(rows) for rows in by_layer]
    most = max(len(row) for row in shares)
    rows = [
        [escape(label), *(percent(value) for value in row), *[""] * (most - len(row))]
        for label, row in zip(layer_labels(results), shares, strict=True)
    ]
    caption = f"Share of tokens by experts that ran, {percent(summary.budget)} asked for"
    return html_table(caption, ["layer", *(str(n) for n in range(most))], rows)


def spread_text(summary: Summary) -> str:
    """Return half the spread over seeds, nothing for one seed."""
    return f"±{summary.added.half_spread:.4f}" if len(summary.cells) > 1 else ""


def _spaced(values: Sequence[float]) -> str:
    return " ".join(repr(value) for value in values)


def _known(value: float | None) -> float | str:
    return "" if value is None else value


def _number(row: Mapping[str, str], column: str) -> float | None:
    """Return a number that need not be there: tables of earlier versions have fewer columns."""
    return float(row[column]) if row.get(column) else None


def _cell(row: Mapping[str, str]) -> Cell:
    return Cell(
        row["method"],
        float(row["budget"]),
        seed=int(row["seed"]),
        allocation=row["allocation"],
        redistribution=row["redistribution"],
        correction=row["correction"],
        loss=float(row["loss"]),
        added_loss=float(row["added_loss"]),
        activations=float(row["activations"]),
        activations_per_layer=_numbers(row["activations_per_layer"]),
        planned_per_layer=_numbers(row["planned_per_layer"]),
        experts_per_token_histogram=tuple(
            map(_numbers, row["experts_per_token_histogram"].split("|"))
        ),
        loss_decode=_number(row, "loss_decode"),
        default=row["default"] == "yes",
        dtype=row.get("dtype", "float32"),
        target_bytes=_number(row, "target_bytes"),
        planned_bytes=_number(row, "planned_bytes"),
        read_bytes=_number(row, "read_bytes"),
        divergence=_number(row, "divergence"),
        bits_per_layer=tuple(map(int, row.get("bits_per_layer", "").split())),
        seconds=_number(row, "seconds"),
    )


def _numbers(spaced: str) -> tuple[float, ...]:
    return tuple(map(float, spaced.split()))


def _experts_per_token(cells: Sequence[Cell]) -> tuple[int, ...]:
    """Return each layer's k in the full model: its histograms reach from 0 to it."""
    if not cells:
        raise ValueError("no rows")
    return tuple(len(row) - 1 for row in cells[0].experts_per_token_histogram)


def _markdown(content: str) -> str:
    escaped = "".join(f"\\{letter}" if letter in "\\|*_`<[" else letter for letter in content)
    return " ".join(escaped.split())


def _markdown_cell(summary: Summary | None, digest: Digest) -> str:
    if not summary:
        return ""
    value = signed(summary.added.mean, minus="-")
    if spread_text(summary):
        value += f" {spread_text(summary)}"
    if summary == digest.best(summary.budget):
        value = f"**{value}**"
    remark = f"; {summary.remark}" if summary.remark else ""
    return f"{value} ({summary.activations.mean:.1f}{remark})"


def _html_cell(summary: Summary | None, digest: Digest) -> str:
    if not summary:
        return element("span", {"class": "none", "aria-label": "not measured"}, DASH)
    value = signed(summary.added.mean)
    best = summary == digest.best(summary.budget)
    shown = element("strong", {}, value) if best else value
    spread = spread_text(summary)
    if spread:
        shown += " " + element("small", {}, spread)
    shown += element(
        "span",
        {"class": "below"},
        f"{summary.activations.mean:.1f} experts{' †' * summary.overspent}",
    )
    if summary.decode:
        decode = f"one by one {signed(summary.decode.mean)}"
        shown += element("span", {"class": "below"}, decode)
    if summary.remark:
        shown += element("span", {"class": "below"}, summary.remark)
    return shown


def _budget_head(budget: float, digest: Digest) -> str:
    count = f"{budget * digest.results.full_activations:.1f}".removesuffix(".0")
    return f"{percent(budget)} <small>of experts, {count}</small>"
