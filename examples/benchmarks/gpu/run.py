"""Check and time artifacts on a GPU: one command, one table, under eight minutes.

    python examples/benchmarks/gpu/make.py -o graphs/        (once, on any machine)
    python examples/benchmarks/gpu/run.py --graphs graphs/   (where the GPU is)
    python examples/benchmarks/gpu/run.py --graphs graphs/ --only olmoe,decode,prefill

Weights are random and made here. Every part is a process: what fails prints its error, and the
rest goes on. `--device cpu` tries the script itself out, with graphs of `make.py --tiny`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from artifacts import Sizes
from memory import machine
from report import table, with_fractions

PARTS = (
    *("memory", "olmoe", "olmoe+groups", "small", "olmoe-int4", "transformers"),
    *("deepseek", "deepseek+groups", "deepseek-int4", "transformers-deepseek"),
)
KINDS = ("copy", "decode", "batch", "prefill", "logits", "tokens")
_SMALLEST = Sizes(past=16, steps=6, prompt=48, batch=2, tokens=20)
_SILENCE = 180  # seconds that a measurement may take, loading and compiling included
_SPARE = 2 << 30
_SHARED_MEMORY = Path("/dev/shm")


def chosen(only: str | None) -> tuple[list[str], list[str]]:
    """Return the parts and kinds that names with commas between mean.

    Raises:
        ValueError: There is no such part or kind.
    """
    names = only.split(",") if only else []
    if unknown := set(names) - {*PARTS, *KINDS}:
        raise ValueError(f"no {', '.join(sorted(unknown))} among {', '.join((*PARTS, *KINDS))}")
    parts = [part for part in PARTS if part in names] or list(PARTS)
    kinds = [kind for kind in KINDS if kind in names]
    if kinds and "copy" not in kinds and "memory" in parts:
        kinds.append("copy")  # fractions of the byte floor need it
    return parts, kinds


def run_part(
    part: str, options: list[str], *, deadline: float, silence: float = _SILENCE
) -> Iterator[dict[str, Any]]:
    """Yield the records of one part; a process that ends or hangs is followed by another."""
    done: list[str] = []
    while True:
        begun: str | None = None
        ended = None
        for line in _lines(part, [*options, "--skip", json.dumps(done)], deadline, silence):
            if "begin" in line:
                begun = line["begin"]
                done.append(begun)
            elif "name" in line:
                begun = None
                yield line
            else:
                ended = line
        if begun is not None:
            yield {"name": begun, "error": (ended or {}).get("ended", "the process ended")}
        elif ended is not None and not done:
            yield {"name": f"{part}/-/-/-", "error": ended["ended"]}
        if ended is None or (begun is None and not ended.get("again")) or time.time() >= deadline:
            return


def _lines(
    part: str, options: list[str], deadline: float, silence: float
) -> Iterator[dict[str, Any]]:
    """Yield what a process says, and at last how it ended, if not well."""
    command = [sys.executable, str(Path(__file__).with_name("parts.py")), part, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for text in process.stdout:
            lines.put(text)
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    failed = False
    try:
        while True:
            left = deadline - time.time()
            try:
                text = lines.get(timeout=max(min(silence, left), 0.0))
            except queue.Empty:
                reason = "out of time" if left <= silence else f"no answer in {silence:.0f} s"
                yield {"ended": reason, "again": True}
                return
            if text is None:
                break
            line = json.loads(text)
            failed = "error" in line
            yield line
        if code := process.wait():
            yield {"ended": f"the process ended with {code}", "again": failed}
    finally:
        process.kill()
        process.wait()
        reader.join()
        assert process.stdout is not None
        process.stdout.close()


def work_folder(needed: int) -> Path:
    """Return a new folder with room for so many bytes, in memory where that is large enough."""
    memory = _SHARED_MEMORY
    if memory.is_dir() and shutil.disk_usage(memory).free > needed + _SPARE:
        return Path(tempfile.mkdtemp(prefix="alloc-moe-", dir=memory))
    return Path(tempfile.mkdtemp(prefix="alloc-moe-"))


def main() -> int:
    """Run what was asked for and print the table; return 1 if something failed or is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--graphs", type=Path, required=True, help="What make.py wrote.")
    parser.add_argument("--only", help=f"Of {', '.join(PARTS)}; {', '.join(KINDS)}.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="Nothing goes on after.")
    parser.add_argument("--json", type=Path, help="Where to write all figures, as they come.")
    given = parser.parse_args()
    try:
        parts, kinds = chosen(given.only)
    except ValueError as error:
        parser.error(str(error))
    deadline = time.time() + 60 * given.minutes
    sizes = dataclasses.asdict(Sizes() if given.device == "cuda" else _SMALLEST)
    about, records = machine(), []
    if lacking := [name for name in ("torch", "transformers") if name not in about]:
        parts = [part for part in parts if not part.startswith("transformers")]
        print(f"No peer: {' and '.join(lacking)} isn't here.", file=sys.stderr)
    for part in parts:
        if time.time() >= deadline:
            records.append({"name": f"{part}/-/-/-", "error": "out of time"})
            continue
        work = work_folder(_needed(given.graphs, part))
        options = ["--graphs", str(given.graphs), "--work", str(work), "--device", given.device]
        options += ["--sizes", json.dumps(sizes), "--kinds", ",".join(kinds)]
        try:
            for record in run_part(part, options, deadline=deadline):
                records.append(record)
                shown = record.get("error") or f"{record['value']:.4g} {record['unit']}"
                print(f"{record['name']}: {shown} {record.get('note', '')}", file=sys.stderr)
                if given.json:
                    found = {"machine": about, "sizes": sizes, "records": with_fractions(records)}
                    given.json.write_text(json.dumps(found, indent=1), "utf-8")
        finally:
            shutil.rmtree(work, ignore_errors=True)
    print(", ".join(f"{name} {value}" for name, value in about.items()) + "\n")
    print("\n".join(table(records, sizes)))
    return int(any("error" in record or not record.get("ok", True) for record in records))


def _needed(graphs: Path, part: str) -> int:
    """Return the bytes of the weights that a part makes."""
    if part == "memory" or part.startswith("transformers"):
        return 0
    model = part.partition("+")[0]
    files = graphs.glob("small-*.json") if part == "small" else [graphs / f"{model}.json"]
    return sum(
        json.loads(file.read_text("utf-8"))["data"]["bytes"] for file in files if file.exists()
    )


if __name__ == "__main__":
    sys.exit(main())
