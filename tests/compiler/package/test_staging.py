"""The folder in which an artifact is made: ours alone, and gone afterwards."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from alloc_moe.compiler.errors import OutputError
from alloc_moe.compiler.package.output import FILES, Output, alone, parse_output, staging
from alloc_moe.compiler.records import Compiled
from alloc_moe.compiler.workspace.folders import MARK, claim

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="needs links and owners")


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output(tmp_path / "out.onnx", bundle=False)


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """Return the folder that a killed compile left."""
    folder = tmp_path / ".out.onnx.partial"
    claim(folder)
    return folder


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """Return a folder with what nobody wants to lose."""
    folder = tmp_path / "victim"
    (folder / "sub").mkdir(parents=True)
    for name in ("thesis.txt", "sub/a", "out.onnx.data", "out.onnx.data.journal"):
        (folder / name).write_text("precious")
    return folder


def content(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def stage(output: Output, folder: Path) -> None:
    with staging(output) as staged:
        assert staged == folder
        assert [path.name for path in staged.iterdir()] == [MARK]


def test_staging_is_empty_beside_the_output_and_gone_afterwards(
    output: Output, left: Path, tmp_path: Path
) -> None:
    (left / FILES / "more").mkdir(parents=True)
    for name in ("out.onnx.data", ".exact.out.onnx", f"{FILES}/vocab.json", f"{FILES}/more/a"):
        (left / name).write_text("of a killed compile")
    with staging(output) as folder:
        assert folder == left
        assert [path.name for path in folder.iterdir()] == [MARK]
        (folder / "out.onnx").write_text("unfinished")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing(output: Output, tmp_path: Path) -> None:
    def fail() -> None:
        with staging(output) as folder:
            (folder / "out.onnx").write_text("unfinished")
            raise OutputError("stop")

    with pytest.raises(OutputError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []


@posix_only
def test_two_compiles_of_one_output_are_refused(output: Output) -> None:
    with staging(output) as folder:
        (folder / "out.onnx").write_text("unfinished")
        with (
            pytest.raises(OutputError, match=r"Another compile is writing .*out\.onnx\. Wait"),
            staging(output),
        ):
            pass
        with pytest.raises(OutputError, match="Another compile is writing"):
            parse_output(str(output.path), force=False)
        assert (folder / "out.onnx").read_text() == "unfinished"
    with staging(output):
        pass


@posix_only
def test_a_compile_of_an_output_is_refused_while_another_measures_for_it(
    output: Output, compile_to: Callable[..., Compiled], tmp_path: Path
) -> None:
    given = {"allocation": "uniform", "redistribute": "none", "correct": "none"}
    with alone(output):
        (output.results_path / "kept").write_text("by the other")
        with pytest.raises(OutputError, match=r"Another compile is writing .*out\.onnx\. Wait"):
            compile_to(output.path, model="never read", **given)
        compile_to(tmp_path / "other.onnx", **given)
        (output.results_path / "kept").unlink()
    compile_to(output.path, **given)
    assert {path.name for path in tmp_path.iterdir() if not path.is_dir()} == {
        *("out.onnx", "out.onnx.data", "other.onnx", "other.onnx.data")
    }
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@posix_only
@pytest.mark.parametrize("to", ["victim", "victim/thesis.txt", "nowhere"])
def test_a_link_in_its_place_is_refused(
    output: Output, victim: Path, tmp_path: Path, to: str
) -> None:
    (tmp_path / ".out.onnx.partial").symlink_to(tmp_path / to)
    before = content(victim)
    for attempt in (
        lambda: stage(output, victim),
        lambda: parse_output(str(output.path), force=True),
    ):
        with pytest.raises(OutputError, match=r"\.out\.onnx\.partial is a link, .* Move it away"):
            attempt()
    assert content(victim) == before
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_of_the_users_in_its_place_is_refused(
    output: Output, victim: Path, tmp_path: Path
) -> None:
    folder = victim.rename(tmp_path / ".out.onnx.partial")
    before = content(folder)
    with pytest.raises(OutputError, match=rf"lacks the mark {re.escape(MARK)}, so it is no work"):
        stage(output, folder)
    assert content(folder) == before


def test_a_file_in_its_place_is_refused(output: Output, tmp_path: Path) -> None:
    file = tmp_path / ".out.onnx.partial"
    file.write_text("precious")
    with pytest.raises(OutputError, match="is no folder, so it is no work folder"):
        stage(output, file)
    assert file.read_text() == "precious"


def test_an_empty_folder_in_its_place_is_used(output: Output, tmp_path: Path) -> None:
    (tmp_path / ".out.onnx.partial").mkdir()
    stage(output, tmp_path / ".out.onnx.partial")
    assert list(tmp_path.iterdir()) == []


@posix_only
def test_another_users_folder_in_its_place_is_refused(
    output: Output, left: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: left.stat().st_uid + 1)
    owner = Path.stat

    def others(path: Path, **options: bool) -> os.stat_result:
        info = owner(path, **options)
        return os.stat_result([*info[:4], 12345, *info[5:10]]) if path == tmp_path else info

    monkeypatch.setattr(Path, "stat", others)
    with pytest.raises(OutputError, match="belongs to another user"):
        stage(output, left)


def test_what_the_user_put_into_it_is_not_removed(output: Output, left: Path) -> None:
    (left / "thesis.txt").write_text("precious")
    (left / "sub").mkdir()
    (left / "sub" / "a").write_text("precious")
    with pytest.raises(OutputError, match=r"holds sub, thesis\.txt, which alloc-compile did not"):
        stage(output, left)
    assert content(left) == {
        MARK: content(left)[MARK],
        "sub/a": "precious",
        "thesis.txt": "precious",
    }


def test_what_the_user_puts_into_it_meanwhile_is_not_removed(
    output: Output, tmp_path: Path
) -> None:
    notes: list[str] = []
    with staging(output, note=notes.append) as folder:
        (folder / "thesis.txt").write_text("precious")
    assert (folder / "thesis.txt").read_text() == "precious"
    assert notes == [f"{folder} stays, as it holds thesis.txt."]


@posix_only
@pytest.mark.parametrize("name", ["out.onnx", "out.onnx.data", FILES, "new", MARK])
def test_a_link_inside_it_is_not_followed(
    output: Output, left: Path, victim: Path, name: str
) -> None:
    (left / name).unlink(missing_ok=True)
    (left / "out.onnx.data.journal").write_text("{}")
    (left / name).symlink_to(victim if name in (FILES, "new") else victim / "thesis.txt")
    before = content(victim)
    with pytest.raises(OutputError):
        stage(output, left)
    assert content(victim) == before


@posix_only
def test_a_folder_that_becomes_a_link_meanwhile_is_not_followed(
    output: Output, victim: Path, tmp_path: Path
) -> None:
    before = content(victim)
    with staging(output) as folder:
        (folder / "out.onnx").write_text("unfinished")
        folder.rename(tmp_path / "moved")
        folder.symlink_to(victim)
    assert content(victim) == before
