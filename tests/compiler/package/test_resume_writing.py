"""Compiles that are killed while they write or verify weights go on there, to the same bytes."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from alloc_moe.compiler import artifact, compile
from alloc_moe.compiler.errors import OutputError, VerificationError
from alloc_moe.compiler.package import output as package
from alloc_moe.compiler.package.output import Output, staging
from alloc_moe.compiler.workspace.folders import MARK

COMPILE = """
import os, signal, sys
from pathlib import Path
import onnx_ir as ir
import torch
from alloc_moe.compiler import artifact, compile
from alloc_moe.compiler.package import output as package
from alloc_moe.compiler.package import weights as weights_file
from alloc_moe.passes.base import lazy_tensor

moment, graph, model, output, log = sys.argv[1:]
torch.set_num_threads(1)
weights_file._COMMIT_BYTES = 1
made = []

def die(*_, **__):
    Path(log).write_text(" ".join(made))
    os.kill(os.getpid(), signal.SIGKILL)

def export(*_, **__):
    loaded = ir.load(graph)
    for name, value in loaded.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            def compute(name=name, tensor=tensor):
                if moment == str(len(made)):
                    die()
                made.append(name)
                return tensor.numpy()
            value.const_value = lazy_tensor(compute, tensor.shape.numpy(), tensor.dtype, name)
    return loaded

artifact.export_model = export
if moment == "verifying":
    artifact.verify_artifact = die
if moment == "interrupted":
    artifact.verify_artifact = lambda *_, **__: signal.raise_signal(signal.SIGINT)
compile(model, output=output, tokens=256, force=True)
Path(log).write_text(" ".join(made))
"""


@pytest.fixture
def run_compile(
    exported: Callable[[str], ir.Model],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    warm: Any,
) -> Callable[[str, Path], tuple[int, list[str]]]:
    """Return a function from a moment to die at and an output to what a compile came to.

    That is the exit code, and the weights it read, in order.
    """
    graph, log = tmp_path / "graph.onnx", tmp_path / "log"
    package.save_graph(exported("olmoe"), graph)

    def run(moment: str, output: Path) -> tuple[int, list[str]]:
        log.write_text("")
        done = warm.run(COMPILE, moment, graph, checkpoint("olmoe"), output, log)
        expected = {"never": 0, "interrupted": None}.get(moment, -signal.SIGKILL)
        assert expected in (done.returncode, None), done.stderr
        return done.returncode, log.read_text().split()

    return run


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize(
    ("bundle", "moments"),
    [(False, ["1", "9", "verifying", "interrupted"]), (True, ["verifying"])],
    ids=["file", "bundle"],
)
def test_a_compile_killed_again_and_again_makes_the_same_artifact(
    run_compile: Callable[[str, Path], tuple[int, list[str]]],
    tmp_path: Path,
    bundle: bool,
    moments: list[str],
) -> None:
    def output(folder: str) -> Path:
        (tmp_path / folder).mkdir(exist_ok=True)
        path = tmp_path / folder / ("half" if bundle else "out.onnx")
        if bundle:
            path.mkdir(exist_ok=True)
        return path

    _, every = run_compile("never", output("whole"))
    assert len(every) > 20
    read = []
    for moment in moments:
        read += run_compile(moment, output("parts"))[1]
        partial = tmp_path / "parts" / f".{output('parts').name}.partial"
        kept = {path.suffix for path in partial.iterdir()}
        assert kept >= {".data", ".journal"}
    assert read == every
    assert run_compile("never", output("parts")) == (0, [])
    assert not partial.exists()
    whole, parts = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "whole", tmp_path / "parts")
    )
    for files in (whole, parts):  # it says how long profiling took
        files.pop(Path(f"{output('whole').name}.profile.json"))
    assert parts == whole


def test_weights_that_fail_verification_are_not_kept(
    tmp_path: Path,
    exported: Callable[[str], ir.Model],
    checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise VerificationError("differs")

    monkeypatch.setattr(artifact, "export_model", lambda *_, **__: exported("olmoe"))
    monkeypatch.setattr(artifact, "verify_artifact", fail)
    with pytest.raises(VerificationError, match="differs"):
        compile(checkpoint("olmoe"), output=tmp_path / "out.onnx", tokens=256)
    kept = {"out.onnx.profile.json", "out.onnx.profile.json.token-sizes.json"}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_weights_with_a_journal_outlast_an_error(tmp_path: Path) -> None:
    output = Output(tmp_path / "out.onnx", bundle=False)
    notes: list[str] = []
    weights = ("out.onnx.data", "out.onnx.data.journal")

    def run(error: BaseException | None) -> set[str]:
        with contextlib.suppress(BaseException), staging(output, note=notes.append) as folder:
            found = {path.name for path in folder.iterdir()} - {MARK}
            for name in (*weights, "out.onnx"):
                (folder / name).write_text("new")
            if error is not None:
                raise error
        return found

    assert run(KeyboardInterrupt()) == set()
    [note] = notes
    assert f"stay in {tmp_path}/.out.onnx.partial: the same command goes on" in note
    assert run(OutputError("full")) == set(weights)
    assert run(VerificationError("wrong")) == set(weights)
    assert run(MemoryError()) == set()
    assert run(None) == set(weights)
    assert len(notes) == 3
    assert list(tmp_path.iterdir()) == []
