"""A process that has loaded torch, and forks for each code that a test runs in a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

# It imports and forks, and computes nothing: threads of its own wouldn't outlive a fork.
SERVER = """
import json, os, sys, time, traceback
import torch
import transformers.models.olmoe.modeling_olmoe
import alloc_moe.compiler.commands.alloc_profile
import alloc_moe.compiler.pipeline

def run(code, arguments, environment, out, err):
    for path, number in ((os.devnull, 0), (out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    status = 0
    try:
        exec(compile(code, "<test>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

def wait(process, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None

for line in sys.stdin:
    asked = json.loads(line)
    if "code" not in asked:
        answer = wait(**asked)
    elif not (answer := os.fork()):
        run(**asked)
    print(json.dumps(answer), flush=True)
"""


class Done(NamedTuple):
    """What a process came to: a negative code is that of the signal that ended it."""

    returncode: int
    stdout: str
    stderr: str


class Warm:
    """Starts processes without the seconds that imports take."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            text=True,
        )

    def ask(self, **asked: Any) -> Any:
        """Return the answer to a question in JSON."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(f"{json.dumps(asked)}\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(
        self, code: str, *arguments: object, environment: Mapping[str, str] | None = None
    ) -> Process:
        """Begin to run a code with arguments, as ``python -c`` does."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        out, err = folder / "out", folder / "err"
        number = self.ask(
            code=code,
            arguments=[*map(str, arguments)],
            environment={**(environment or {})},
            out=str(out),
            err=str(err),
        )
        return Process(self, number, out, err)

    def run(self, code: str, *arguments: object) -> Done:
        """Run a code with arguments to its end."""
        return self.start(code, *arguments).finish()

    def close(self) -> None:
        """End the process that forks."""
        self._server.communicate(timeout=120)


class Process(NamedTuple):
    """A code that runs."""

    warm: Warm
    number: int
    out: Path
    err: Path

    def finish(self, seconds: float = 600) -> Done:
        """Wait for its end, and fail when that doesn't come."""
        code = self.warm.ask(process=self.number, seconds=seconds)
        said = [path.read_text("utf-8") for path in (self.out, self.err)]
        assert code is not None, f"a process runs for {seconds} s already: {said[1]}"
        return Done(code, *said)
