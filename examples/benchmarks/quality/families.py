"""The matrix of families: what artifacts of each compute, against PyTorch under the same plan.

    python examples/benchmarks/quality/families.py [FAMILY...]

Small random checkpoints go through the compiler's stages, one row a cell:

- ``dtype``: float32, int8, int4. The latter two are compared with PyTorch on rounded weights, and
  with kernels that don't round activations, so what is left is what the compiler did.
- ``policy``: ``full`` is the whole budget; the others, named by their redistribution, have half of
  it, ``price`` with an affine correction.
- ``error``: the largest difference of a logit, over a left-padded batch, prefill and decode.
- ``equal``: how many of ``tokens`` greedy ones are PyTorch's, for another left-padded batch, beyond
  every window.
- ``settled``, where not all are: the largest difference of a logit over the artifact's own text,
  with PyTorch on the artifact's side of near-ties. A small one says that a tie is why they part.

Without names it takes all families, some two minutes each. The rows go to
``examples/reports/families.csv``; those of families that it has whole are kept. ``--summary``
prints it as a Markdown table.
"""

from __future__ import annotations

import csv
import runpy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
import numpy as np
import torch

from alloc_moe.compiler.calibration.windows import calibrate
from alloc_moe.compiler.choices import chosen_rounding
from alloc_moe.compiler.export.normalize import export_model
from alloc_moe.compiler.export.specialize import specialize
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.package import output as package
from alloc_moe.compiler.planning.allocation import parse_budget
from alloc_moe.compiler.planning.plan import make_planned
from alloc_moe.compiler.records import (
    CalibrationOptions,
    DType,
    PlanOptions,
    SensitivityProfile,
)
from alloc_moe.compiler.reference.experts import under_plan
from alloc_moe.compiler.rounding.formats import BITS, choose_formats
from alloc_moe.compiler.rounding.stage import round_model
from alloc_moe.compiler.sensitivity.measuring import measure_sensitivity
from alloc_moe.compiler.verify.artifact_run import ArtifactRun, run_by_segments
from alloc_moe.compiler.verify.batch import PromptBatch
from alloc_moe.compiler.verify.exact import exact_copy
from alloc_moe.compiler.verify.expected import Reference, with_same_ties
from alloc_moe.compiler.verify.parity import SEGMENT_BYTES, verify_artifact
from alloc_moe.runtime import open_session
from alloc_moe.runtime.artifact.plan import SHARED_CACHE_KEY
from alloc_moe.runtime.console import Console
from alloc_moe.runtime.text.generation import generate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from alloc_moe.compiler.calibration.windows import CalibrationSet
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.records import Planned

EXAMPLES = Path(__file__).parents[2]
SMALL = EXAMPLES / "checkpoints" / "small.py"
TABLE = EXAMPLES / "reports" / "families.csv"
DTYPES: tuple[DType, ...] = ("float32", "int8", "int4")
POLICIES = {
    "full": ("1.0", PlanOptions(redistribution="none", correction="none")),
    "none": ("0.5", PlanOptions(redistribution="none", correction="none")),
    "batch": ("0.5", PlanOptions(redistribution="batch", correction="none")),
    "sequence": ("0.5", PlanOptions(redistribution="sequence", correction="none")),
    "price": ("0.5", PlanOptions()),
}
LENGTHS = (23, 14, 5)
NEW_TOKENS = 64
QUIET = Console(quiet=True)


@dataclass(frozen=True)
class Cell:
    """One artifact of a family, and how near it comes to PyTorch."""

    family: str
    dtype: str
    policy: str
    cache: str
    error: str
    equal: int
    tokens: int
    settled: str = ""


def cells(folder: Path, family: str) -> Iterator[Cell]:
    """Yield the cells of the family whose checkpoint is in `folder`."""
    profile: SensitivityProfile | None = None
    for dtype in DTYPES:
        moe = load_model(str(folder))
        text = calibrate(moe.checkpoint, CalibrationOptions(tokens=512), QUIET)
        profile = profile or measure_sensitivity(moe, text, metric="fisher")
        chosen = choose_formats(moe.checkpoint, dtype) if dtype in BITS else None
        moe = round_model(moe, chosen, chosen_rounding(None, dtype), text, QUIET)
        graph = export_model(moe, dtype=dtype)
        for policy, (budget, options) in POLICIES.items():
            trained = [layer.experts_per_token for layer in moe.layers]
            planned = make_planned(
                moe, text, parse_budget(budget, trained), options, profile=profile, console=QUIET
            )
            model = specialize(
                graph,
                planned.plan,
                device="cpu",
                corrections=planned.corrections,
                quantization=moe.quantization,
            )
            shared = SHARED_CACHE_KEY in model.metadata_props
            package.save_graph(model, folder / "out.onnx")
            found = verify_artifact(
                folder / "out.onnx",
                moe,
                planned.plan,
                text.ids,
                dtype=dtype,
                corrections=planned.corrections,
            )
            yield Cell(
                family,
                dtype,
                policy,
                "in place" if shared else "copied",
                f"{found.max_abs_logit_error:.1e}",
                *_equal_tokens(folder / "out.onnx", moe, planned, text),
            )


def _equal_tokens(
    path: Path, moe: MoeModel, planned: Planned, text: CalibrationSet
) -> tuple[int, int, str]:
    """Compare the greedy tokens of an artifact with PyTorch's; return equal, tokens, settled."""
    prompts = [text.ids[0, :length] for length in LENGTHS]
    with ExitStack() as stack:
        exact = path if moe.quantization is None else stack.enter_context(exact_copy(path))
        session = open_session(exact, ep="cpu", threads=1)
        made = np.array(generate(session, prompts, max_new_tokens=NEW_TOKENS, eos_ids=()))
        batch = _padded(prompts, made[:, :-1])
        equal = int((made == _expected_tokens(moe, planned, batch)).sum())
        error = (
            "" if equal == made.size else f"{_error_beside_ties(exact, moe, planned, batch):.1e}"
        )
    return equal, made.size, error


def _padded(prompts: list[NDArray[np.int64]], decoded: NDArray[np.int64]) -> PromptBatch:
    columns = max(LENGTHS)
    padded = np.stack([np.pad(ids, (columns - len(ids), 0)) for ids in prompts])
    mask = np.stack([np.arange(columns) >= columns - len(ids) for ids in prompts])
    return PromptBatch(padded, mask.astype(np.int64), decoded)


def _error_beside_ties(path: Path, moe: MoeModel, planned: Planned, batch: PromptBatch) -> float:
    run = ArtifactRun(batch.steps(), None)
    run_by_segments(path, [run], limit=SEGMENT_BYTES)
    actual = batch.real(run.logits)
    reference = with_same_ties(
        Reference(batch, actual, run.executed, margin=0.0, lead=0.0),
        run.chosen,
        moe=moe,
        plan=planned.plan,
        price=None,
        corrections=planned.corrections,
        cache_scales={},
    )
    return float(np.abs(actual - reference.logits).max())


def _expected_tokens(moe: MoeModel, planned: Planned, batch: PromptBatch) -> NDArray[np.int64]:
    in_force = under_plan(moe, planned.plan, planned.corrections)
    with torch.inference_mode(), in_force:
        tokens = moe.model.generate(
            torch.from_numpy(batch.prompts),
            attention_mask=torch.from_numpy(batch.mask),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
    return cast("NDArray[np.int64]", tokens[:, batch.prompts.shape[1] :].numpy())


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file of cells; there may be no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def measure(names: Sequence[str], path: Path) -> None:
    """Append the rows of families that the file lacks."""
    small: dict[str, Any] = runpy.run_path(str(SMALL))  # what that script defines
    complete = len(DTYPES) * len(POLICIES)
    for family in names or small["FAMILIES"]:
        kept = [row for row in read(path) if row["family"] != family]
        if len(read(path)) - len(kept) == complete:
            continue
        with tempfile.TemporaryDirectory() as folder:
            small["save_checkpoint"](Path(folder), small["FAMILIES"][family])
            found = [asdict(cell) for cell in cells(Path(folder), family)]
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, [each.name for each in fields(Cell)], lineterminator="\n")
            writer.writeheader()
            writer.writerows([*kept, *found])
        worst = max(float(row["error"]) for row in found)
        print(f"{family}: {len(found)} cells, largest error {worst:.1e}", flush=True)


def table(rows: list[dict[str, str]]) -> str:
    """Return a line per family: the largest errors, and the tokens that differ."""
    lines = [
        "| family | cache | " + " | ".join(DTYPES) + " | tokens that differ | beside ties |",
        "|---|---|" + "---|" * (len(DTYPES) + 2),
    ]
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == family]
        errors = [
            max((row["error"] for row in own if row["dtype"] == dtype), key=float, default="")
            for dtype in DTYPES
        ]
        differ = sum(int(row["tokens"]) - int(row["equal"]) for row in own)
        every = sum(int(row["tokens"]) for row in own)
        settled = max((row["settled"] for row in own if row["settled"]), key=float, default="")
        cells = [family, own[0]["cache"], *errors, f"{differ} of {every}", settled]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@click.command()
@click.argument("families", nargs=-1)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=TABLE, help="The file of cells."
)
@click.option("--summary", is_flag=True, help="Print the file as a table.")
def main(families: tuple[str, ...], output: Path, summary: bool) -> None:
    """Measure the cells of FAMILIES that the file lacks, by default of all."""
    if summary:
        click.echo(table(read(output)))
        return
    torch.set_num_threads(1)
    measure(families, output)


if __name__ == "__main__":
    main()
