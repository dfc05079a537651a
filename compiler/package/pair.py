"""A graph and its data replaced together, though no system renames two files at once.

The old data get a second name, and the old graph is replaced by itself naming that; then the new
data take their place, and at last the new graph takes the old one's. Each step is one rename, and
after each there is a graph that finds the data which belong to it. A note in the staging folder
says what is to be undone if the steps end in between.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from alloc_moe.compiler.errors import OutputError
from alloc_moe.compiler.package.external import data_names, renamed_data
from alloc_moe.compiler.package.paths import Output, data_path
from alloc_moe.compiler.workspace.files import create, discard, save_text, sync
from alloc_moe.compiler.workspace.moves import link_or_copy

SWITCH = "switch.json"
BRIDGE = "bridge.onnx"
BACK = "back.data"


@dataclass(frozen=True)
class _Switch:
    """What is under way.

    ``graph`` is the digest of the new graph, in whose place it is done; ``aside`` the second name
    of the old data, if there are any; ``data`` identifies the new data if there were no old.
    """

    graph: str
    aside: str | None
    data: tuple[int, int] | None


def switch_pair(staged: Path, output: Output) -> None:
    """Replace a graph and its data by those in `staged`.

    Raises:
        OSError: Something could not be done; `restore_pair` undoes what was.
    """
    graph, data = output.place, data_path(output.place)
    for path in (graph, data):
        _check_file(path)
    if not (staged / data.name).exists():
        os.replace(staged / graph.name, graph)
        return
    _set_aside(staged, graph, data)
    os.replace(staged / data.name, data)
    sync(data.parent)
    os.replace(staged / graph.name, graph)
    with contextlib.suppress(OSError):  # the new artifact is there, whatever happens now
        sync(graph.parent)
        restore_pair(staged, output)


def restore_pair(staged: Path, output: Output) -> None:
    """Undo a switch that ended before its last step, and clear away what one leaves."""
    graph, data = output.place, data_path(output.place)
    switch = _read_switch(staged, graph)
    if switch is None:
        return
    aside = None if switch.aside is None else graph.with_name(switch.aside)
    found = _read(graph)
    if found is None or hashlib.sha256(found).hexdigest() != switch.graph:
        if aside is not None and os.path.lexists(aside):
            _put_back(staged, graph, data, aside, found)
        elif switch.data is not None and _identity(data) == switch.data:
            data.unlink()  # new data that never got their graph
    if aside is not None:
        aside.unlink(missing_ok=True)
    sync(graph.parent)
    (staged / SWITCH).unlink()


def check_pair(output: Output) -> None:
    """Raise OutputError unless both files may be replaced: before hours of work."""
    for path in (output.place, data_path(output.place)):
        _check_file(path)


def _check_file(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        raise OutputError(
            f"{path} is a folder, where the artifact has a file. Move it away, or choose another "
            "output."
        )


def _set_aside(staged: Path, graph: Path, data: Path) -> None:
    """Let the old graph find the old data under another name, whatever happens to the first."""
    new = hashlib.sha256((staged / graph.name).read_bytes()).hexdigest()
    if not os.path.lexists(data):
        _note(staged, _Switch(new, None, _identity(staged / data.name)))
        return
    aside = graph.with_name(f".{graph.name}.{secrets.token_hex(4)}.old")
    _note(staged, _Switch(new, aside.name, None))
    link_or_copy(data, aside)
    old = _read(graph)
    if old is not None and data.name in (data_names(old) or ()):
        _replace_graph(staged, graph, renamed_data(old, data.name, aside.name))
    sync(graph.parent)


def _put_back(staged: Path, graph: Path, data: Path, aside: Path, found: bytes | None) -> None:
    """Let the old data have their name again, and the graph that names them say so."""
    bridged = found is not None and aside.name in (data_names(found) or ())
    if not bridged:
        os.replace(aside, data)
        return
    assert found is not None
    if _identity(aside) != _identity(data):
        discard(staged / BACK)
        link_or_copy(aside, staged / BACK)
        os.replace(staged / BACK, data)
        sync(data.parent)
    _replace_graph(staged, graph, renamed_data(found, aside.name, data.name))
    sync(graph.parent)


def _replace_graph(staged: Path, graph: Path, content: bytes) -> None:
    with create(staged / BRIDGE) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    shutil.copymode(graph, staged / BRIDGE)
    os.replace(staged / BRIDGE, graph)


def _note(staged: Path, switch: _Switch) -> None:
    data = {"graph": switch.graph, "aside": switch.aside, "data": switch.data}
    save_text(json.dumps(data), staged / SWITCH, what="What is being replaced")
    sync(staged)


def _read_switch(staged: Path, graph: Path) -> _Switch | None:
    path = staged / SWITCH
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text("utf-8"))
        switch = _Switch(data["graph"], data["aside"], data["data"] and tuple(data["data"]))
        ours = re.escape(f".{graph.name}.") + "[0-9a-f]{8}" + re.escape(".old")
        if switch.aside is None or re.fullmatch(ours, switch.aside):
            return switch
    except (ValueError, KeyError, TypeError):
        pass
    raise OutputError(f"{path} is damaged. Move it away: it tells what an old compile replaced.")


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from all others on its file system."""
    with contextlib.suppress(FileNotFoundError):
        info = os.lstat(path)
        return info.st_dev, info.st_ino
    return None
