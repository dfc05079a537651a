"""From nothing to the first token: seconds and resident memory, each run in a new process.

    python examples/benchmarks/speed/loading.py olmoe.onnx

Time counts from before onnxruntime is imported to the first token of a prompt of eight tokens. The
artifact's file may be in the system's cache from earlier runs: a cold disk takes longer.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click


def first_token(artifact: str) -> dict[str, float]:
    """Load an artifact and make one token; return seconds and bytes."""
    start = time.perf_counter()
    from alloc_moe.runtime.execution.session import open_session
    from alloc_moe.runtime.text.generation import generate

    session = open_session(artifact, ep="cpu")
    loaded = time.perf_counter()
    generate(session, [list(range(1, 9))], max_new_tokens=1)
    done = time.perf_counter()
    status = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text("ascii").splitlines()
    )
    return {
        "load": loaded - start,
        "first_token": done - start,
        "resident": int(status["VmRSS"].split()[0]) * 1024,
        "peak": int(status["VmHWM"].split()[0]) * 1024,
    }


@click.command()
@click.argument("artifact")
@click.option("--runs", default=5, show_default=True)
@click.option("--child", is_flag=True, hidden=True)
def main(artifact: str, runs: int, *, child: bool) -> None:
    """Print medians over new processes, and what they claim."""
    if child:
        print(json.dumps(first_token(artifact)))
        return
    # Not at the top: a child's clock starts with nothing of alloc_moe imported.
    from alloc_moe.runtime.artifact.files import find_artifact

    found = []
    for _ in range(runs):
        command = [sys.executable, __file__, artifact, "--child"]
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(answer.stdout))
    median = {key: statistics.median(run[key] for run in found) for key in found[0]}
    seconds = [run["first_token"] for run in found]
    files = find_artifact(artifact)
    size = files.graph.stat().st_size + sum(files.onnx.data_files.values())
    print(
        f"{artifact}, {size / 1e9:.2f} GB: loaded in {median['load']:.1f} s, first token after "
        f"{median['first_token']:.1f} s ({min(seconds):.1f}-{max(seconds):.1f}, {runs} processes), "
        f"resident {median['resident'] / 1e9:.2f} GB = {median['resident'] / size:.2f}x the "
        f"artifact, peak {median['peak'] / size:.2f}x"
    )


if __name__ == "__main__":
    main()
