"""Whole compiles to files of torch."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from alloc_moe import runtime
from alloc_moe.compiler.errors import OptionsError, OutputError, VerificationError
from alloc_moe.compiler.programs import build
from alloc_moe.compiler.programs.capture import Captured, capture
from alloc_moe.compiler.records import Compiled
from alloc_moe.compiler.verify import parity
from alloc_moe.runtime.artifact.checking import check_all
from alloc_moe.runtime.artifact.files import find_artifact
from alloc_moe.runtime.errors import AllocMoeError
from alloc_moe.runtime.execution.session import open_session

Compile = Callable[..., Compiled]
PLAIN: dict[str, Any] = {"allocation": "uniform", "redistribute": "none", "correct": "none"}


@pytest.fixture(scope="module")
def traced() -> list[Captured]:
    """Return a list of the plain plan's program, once a test has traced it."""
    return []


@pytest.fixture
def trace_once(traced: list[Captured], monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace the plain plan for the first test alone: what fails comes after that."""

    def capture_once(*given: Any, **options: Any) -> Captured:
        if not traced:
            traced.append(capture(*given, **options))
        return traced[0]

    monkeypatch.setattr(build, "capture", capture_once)


def test_a_dialled_and_corrected_script_is_verified_and_runs(
    compile_to: Compile, tmp_path: Path
) -> None:
    path = tmp_path / "out.pt"
    compiled = compile_to(path)
    assert compiled.verification.max_abs_logit_error < 1e-4
    assert compiled.plan.correction["mode"] == "affine"
    assert {p.name for p in tmp_path.iterdir()} == {
        "out.pt",
        "out.pt.profile.json",
        "out.pt.profile.json.token-sizes.json",
    }
    files = find_artifact(path)
    assert files.plan == compiled.plan
    assert check_all(files) == {"out.pt": path.stat().st_size}
    session = open_session(path, count_activations=True)
    ids = np.arange(2, 42)[None]
    own, full = session.run(ids).activations, session.run(ids, price=0.0).activations
    assert own is not None
    assert full == tuple(40 * layer.k_original for layer in compiled.plan.layers)
    assert sum(own) < sum(full)
    model = runtime.load(path, count_activations=True)
    text = model.generate(["The committee"], max_new_tokens=4, budget=1.0)[0]
    assert len(text.ids) == 4
    [held] = model.generate(["The committee " * 4], max_new_tokens=40, budget=9, hold=True)
    assert held.experts_per_token == pytest.approx(9, rel=0.05)
    with pytest.raises(AllocMoeError, match=r"2 sequences can't .* compile an \.onnx file"):
        model.generate(["a", "b"], max_new_tokens=4, budget=9, hold=True)


def test_bfloat16_is_verified_on_the_cpu(
    compile_to: Compile, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path, model = tmp_path / "out.pt2", checkpoint("olmoe", num_hidden_layers=1)
    options = {"dtype": "bfloat16", "redistribute": "threshold", "correct": "gain"}
    compiled = compile_to(path, model=model, **options)
    assert 0 < compiled.verification.kl < parity.MAX_KL["bfloat16"]
    session = open_session(path)
    cache = session.run([[5, 6, 7]]).cache
    assert {value.data_type() for value in cache.values} == {"tensor(bfloat16)"}
    weights = sum(p.file_size for p in zipfile.ZipFile(path).infolist() if "/weight_" in p.filename)
    parameters = 2 * 288 * 64 + 3 * 8 * 32 * 64  # embeddings, head, experts
    assert 2 * parameters < weights < 3 * parameters  # and attention


@pytest.mark.usefixtures("trace_once")
def test_an_old_artifact_stays_where_the_new_one_differs(
    compile_to: Compile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.pt"
    path.write_bytes(b"an old artifact")
    monkeypatch.setattr(parity, "MAX_LOGIT_ERROR", -1.0)
    with pytest.raises(VerificationError, match="differ from PyTorch's by up to"):
        compile_to(path, **PLAIN, force=True)
    assert path.read_bytes() == b"an old artifact"
    assert [p.name for p in tmp_path.iterdir()] == ["out.pt"]


@pytest.mark.usefixtures("trace_once")
def test_a_full_disk_is_told(
    compile_to: Compile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed\nat")

    monkeypatch.setattr(build, "to_script", lambda *_: SimpleNamespace(save=fail))
    path = tmp_path / "out.pt"
    with pytest.raises(OutputError, match=r"data/3: file write failed\. Free some space, or"):
        compile_to(path, **PLAIN)
    assert not path.exists()


@pytest.mark.usefixtures("trace_once")
def test_what_torch_cannot_script_is_not_blamed_on_the_disk(
    compile_to: Compile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Unknown type name")

    monkeypatch.setattr(build, "to_script", fail)
    with pytest.raises(RuntimeError, match="Unknown type name"):
        compile_to(tmp_path / "out.pt", **PLAIN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4"}, "--dtype int4"),
        ({"dtype": "int8"}, "--dtype int8"),
        ({"dtype": "float16"}, "--dtype float16"),
        ({"cache": "int8"}, "--cache int8"),
        ({"device": "cuda"}, "--device cuda"),
        ({"block": 32}, "--block 32"),
    ],
)
@pytest.mark.parametrize("name", ["out.pt", "out.pt2"])
def test_what_only_onnx_has_is_refused_before_the_model_is_loaded(
    compile_to: Compile, tmp_path: Path, options: dict[str, Any], message: str, name: str
) -> None:
    with pytest.raises(OptionsError, match=rf"{message} is for ONNX artifacts; {name} is one of"):
        compile_to(tmp_path / name, model="nowhere", **options)
