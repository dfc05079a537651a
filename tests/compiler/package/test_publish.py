"""Artifacts replaced while the process may be killed, or the disk fail, at any moment."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from alloc_moe.compiler.errors import OutputError
from alloc_moe.compiler.package import folder as folder_module
from alloc_moe.compiler.package import pair as pair_module
from alloc_moe.compiler.package.external import data_names, renamed_data
from alloc_moe.compiler.package.folder import MANIFEST
from alloc_moe.compiler.package.output import parse_output, publish, staging
from alloc_moe.compiler.workspace import moves

Make = Callable[..., Any]

KINDS = ("file", "bundle", "bundle moved twice", "file copied")


@pytest.fixture(params=KINDS)
def bundle(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return whether the output is a bundle, on systems with and without what makes it easy."""
    if request.param == "bundle moved twice":
        monkeypatch.setattr(folder_module, "exchange", lambda *_: False)
    if request.param == "file copied":
        monkeypatch.setattr(moves, "link", lambda *_: False)
    return str(request.param).startswith("bundle")


def moments(disk: Any) -> Iterator[int]:
    """Yield the number of every call that the last run made."""
    for moment in itertools.count():
        yield moment
        if disk.calls <= moment:
            return


@pytest.mark.parametrize("old", [False, True])
def test_a_kill_at_any_moment_leaves_a_whole_artifact_and_all_of_the_users_files(
    artifacts: Make, disk: Any, bundle: bool, old: bool, request: pytest.FixtureRequest
) -> None:
    in_two = "moved twice" in request.node.name and old
    seen = set()
    expected = artifacts(bundle=bundle, old=old)
    expected.publish("newer", force=old)
    for moment in moments(disk):
        made = artifacts(bundle=bundle, old=old)
        users = made.users_files()
        with disk.killed_at(moment):
            made.publish("new", force=old)
        age = made.age()
        seen.add(age)
        if age is not None:
            assert made.users_files() == users
        calls = disk.calls
        made.publish("newer", force=age is not None or in_two)
        assert made.age() == "newer"
        assert made.users_files() == users
        assert made.names() == expected.names()
        disk.calls = calls
    assert moment > 10
    assert seen == ({"old", "new"} if old else {None, "new"}) | ({None} if in_two else set())


def test_an_old_bundle_that_a_kill_left_aside_comes_back_with_the_next_start(
    artifacts: Make, disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "exchange", lambda *_: False)
    lost = 0
    for moment in moments(disk):
        made = artifacts(bundle=True, old=True)
        users = made.users_files()
        with disk.killed_at(moment):
            made.publish("new")
        calls = disk.calls
        lost += made.age() is None
        with pytest.raises(OutputError, match=r"half exists\. Give --force"):
            parse_output(made.text, force=False)
        assert made.age() in ("old", "new")
        assert made.users_files() == users
        disk.calls = calls
    assert lost > 0


@pytest.mark.parametrize("old", [False, True])
def test_a_call_that_fails_leaves_the_old_artifact_and_nothing_else(
    artifacts: Make, disk: Any, bundle: bool, old: bool
) -> None:
    failures = []
    for moment in moments(disk):
        made = artifacts(bundle=bundle, old=old)
        before, users = made.names(), made.users_files()
        failure = None
        try:
            with disk.failing_at(moment, code=errno.ENOSPC):
                made.publish("new", force=old)
        except OutputError as error:
            failure = str(error)
        calls = disk.calls
        if failure:
            failures.append(failure)
            assert made.age() == ("old" if old else None)
            assert {name for name in made.names() if ".partial/" not in name} == before
        else:
            assert made.age() == "new"
        assert made.users_files() == users
        made.publish("newer")
        assert made.age() == "newer"
        assert not [name for name in made.names() if ".partial" in name or ".kept" in name]
        disk.calls = calls
    assert len(failures) > 8
    assert all("No space left on device. Free some space, or " in each for each in failures)


def test_a_disk_that_fails_from_some_moment_on_leaves_a_whole_artifact(
    artifacts: Make, disk: Any, bundle: bool, request: pytest.FixtureRequest
) -> None:
    for moment in moments(disk):
        made = artifacts(bundle=bundle, old=True)
        users = made.users_files()
        ended = None
        try:
            with disk.failing_at(moment, code=errno.EROFS, ever=True):
                made.publish("new")
        except OutputError as error:
            ended = error
        calls = disk.calls
        age = made.age()
        assert age in (("old",) if ended else ("new",)) or "moved twice" in request.node.name
        made.publish("newer")
        assert made.age() == "newer"
        assert made.users_files() == users
        disk.calls = calls


# pairs


def test_old_data_that_cant_be_replaced_leave_the_old_graph(artifacts: Make) -> None:
    made = artifacts(bundle=False, old=True)
    (made.output.path.parent / "out.onnx.data").unlink()
    (made.output.path.parent / "out.onnx.data" / "x").mkdir(parents=True)
    before = made.graph.read_bytes()
    with pytest.raises(OutputError, match=r"out\.onnx\.data is a folder, .* Move it away"):
        made.publish("new")
    assert made.graph.read_bytes() == before
    assert made.names() == {"out.onnx"}


def test_a_graph_that_is_no_model_and_its_data_come_back_if_they_cant_be_replaced(
    artifacts: Make, disk: Any
) -> None:
    for moment in moments(disk):
        made = artifacts(bundle=False)
        data = made.graph.with_name("out.onnx.data")
        made.graph.write_text("old")
        data.write_text("old")
        try:
            with disk.failing_at(moment):
                made.publish("new")
        except OutputError:
            assert (made.graph.read_text(), data.read_text()) == ("old", "old")
        else:
            assert made.age() == "new"


def test_a_pair_can_be_copied_and_links_can_be_replaced(artifacts: Make, tmp_path: Path) -> None:
    made = artifacts(bundle=False, old=True)
    other = artifacts(bundle=False)
    for name in ("out.onnx", "out.onnx.data"):
        (other.graph.parent / name).symlink_to(made.graph.parent / name)
    other.publish("new")
    assert (made.age(), other.age()) == ("old", "new")
    assert not other.graph.is_symlink()


def test_a_graph_that_names_its_data_differently_runs_in_onnxruntime(tmp_path: Path) -> None:
    x = ir.val("x", ir.DataType.FLOAT, [100])
    weight = ir.tensor(np.arange(100, dtype=np.float32), name="weight")
    value = ir.Value(name="weight", shape=weight.shape, type=ir.TensorType(weight.dtype))
    value.const_value = weight
    node = ir.node("Add", [x, value])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[value], name="g")
    graph.opset_imports[""] = 21
    node.outputs[0].type, node.outputs[0].shape = x.type, x.shape
    path = tmp_path / "out.onnx"
    ir.save(ir.Model(graph, ir_version=10), path, external_data="./out.onnx.data")
    saved = path.read_bytes()
    assert data_names(saved) == {"out.onnx.data"}
    moved = renamed_data(saved, "out.onnx.data", ".out.onnx.0.old")
    assert data_names(moved) == {".out.onnx.0.old"}
    (tmp_path / "out.onnx.data").rename(tmp_path / ".out.onnx.0.old")
    path.write_bytes(moved)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [sums] = session.run(None, {"x": np.ones(100, np.float32)})
    np.testing.assert_array_equal(sums, np.arange(100) + 1)


def test_what_is_no_model_names_no_data() -> None:
    assert data_names(b"old") is None
    assert data_names(b"") is None


def test_a_damaged_note_of_a_switch_is_reported(artifacts: Make) -> None:
    made = artifacts(bundle=False, old=True)
    with staging(made.output) as staged:
        pass
    for text in ("{", '{"graph": "", "aside": "../../etc/passwd", "data": null}', "[]"):
        with staging(made.output) as staged:
            (staged / pair_module.SWITCH).write_text(text)
        with pytest.raises(OutputError, match=rf"{pair_module.SWITCH} is damaged"):
            parse_output(made.text, force=True)
        (staged / pair_module.SWITCH).unlink()
    assert made.age() == "old"


# bundles


def test_files_of_an_old_compile_go_and_the_users_stay(artifacts: Make) -> None:
    made = artifacts(bundle=True, old=True)
    assert (made.output.path / "only-old.json").is_file()
    (made.output.path / "config.json").write_text("edited")
    inode = (made.output.path / "notes.txt").stat().st_ino
    made.publish("new")
    assert made.age() == "new"
    assert not (made.output.path / "only-old.json").exists()
    assert made.users_files() == made.USERS
    assert (made.output.path / "notes.txt").stat().st_ino == inode


def test_a_file_that_the_user_changed_is_the_users(artifacts: Make) -> None:
    made = artifacts(bundle=True, old=True)
    (made.output.path / "only-old.json").write_text("edited by the user")
    made.publish("new")
    assert (made.output.path / "only-old.json").read_text() == "edited by the user"


def test_of_a_bundle_without_a_list_only_what_every_bundle_has_goes(artifacts: Make) -> None:
    made = artifacts(bundle=True, old=True)
    (made.output.path / MANIFEST).unlink()
    (made.output.path / "genai_config.json").write_text("old")
    made.publish("new")
    left = {name for name in made.names() if "only-" in name or "genai" in name}
    assert left == {"half/only-new.json", "half/only-old.json"}
    assert made.users_files() == made.USERS


@pytest.mark.parametrize("name", ["../thesis.txt", "/thesis.txt", "link/thesis.txt", "notes.txt"])
def test_a_list_that_is_made_up_removes_nothing(artifacts: Make, name: str) -> None:
    made = artifacts(bundle=True, old=True)
    thesis = made.output.path.parent / "thesis.txt"
    thesis.write_text("years")
    (made.output.path / "link").symlink_to(made.output.path.parent)
    for text in (f'{{"format": 1, "files": {{"{name}": 5}}}}', "[]", "{", '{"files": 3}'):
        (made.output.path / MANIFEST).write_text(text)
        made.publish("new")
        assert thesis.read_text() == "years"
        assert made.users_files() == made.USERS
        assert (made.output.path / "link").is_symlink()


def test_a_link_to_a_bundle_stays_a_link(artifacts: Make) -> None:
    made = artifacts(bundle=True, old=True)
    real = made.output.path.rename(made.output.path.with_name("real"))
    made.output.path.symlink_to(real)
    made.publish("new")
    assert made.output.path.is_symlink()
    assert made.age() == "new"
    assert made.users_files() == made.USERS
    assert not [name for name in made.names() if ".partial" in name]


def test_a_file_written_at_the_last_moment_is_kept(
    artifacts: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = artifacts(bundle=True, old=True)

    def late(first: Path, second: Path) -> bool:
        (second / "late.txt").write_text("late")
        (second / "notes.txt").unlink()
        (second / "notes.txt").write_text("saved by an editor")
        return moves.exchange(first, second)

    monkeypatch.setattr(folder_module, "exchange", late)
    made.publish("new")
    assert made.age() == "new"
    assert (made.output.path / "late.txt").read_text() == "late"
    assert (made.output.path / "notes.txt").read_text() == "mine"
    assert (made.output.path / "notes.txt.kept").read_text() == "saved by an editor"


def test_a_bundle_that_cant_be_moved_leaves_the_old_one(
    artifacts: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = artifacts(bundle=True, old=True)

    def refuse(*_: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(folder_module, "exchange", refuse)
    before = made.names()
    with pytest.raises(OutputError, match=r"can't be saved as .*half: Permission denied\. Choose"):
        made.publish("new")
    assert made.age() == "old"
    assert made.names() == before
    assert made.users_files() == made.USERS


def test_publishing_without_the_staging_folder_works(artifacts: Make, tmp_path: Path) -> None:
    made = artifacts(bundle=False, old=True)
    staged = tmp_path / "staged"
    staged.mkdir()
    made.write(staged, "new")
    publish(staged, made.output)
    assert made.age() == "new"
