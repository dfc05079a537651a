"""The folder in which an artifact is made, and how what is made there takes the output's place."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from alloc_moe.compiler.errors import OutputError, VerificationError
from alloc_moe.compiler.package.folder import (
    NEW,
    OLD,
    SURELY_OURS,
    restore_folder,
    switch_folder,
)
from alloc_moe.compiler.package.pair import BACK, BRIDGE, SWITCH, restore_pair, switch_pair
from alloc_moe.compiler.package.paths import (
    Output,
    belongs_to_shard,
    data_path,
    staging_path,
)
from alloc_moe.compiler.package.weights import drop_journals, resumable_files
from alloc_moe.compiler.workspace.files import explained, sync
from alloc_moe.compiler.workspace.folders import (
    MARK,
    OpenFolder,
    held,
    is_ours,
    remove_if_empty,
)
from alloc_moe.compiler.workspace.unfinished import whole_name

FILES = "files"
"""The folder for what a bundle has besides the graph, inside the staging folder."""

_NOT_PUBLISHED = frozenset({MARK, SWITCH, BRIDGE, BACK, NEW, OLD, FILES})


@contextlib.contextmanager
def staging(output: Output, *, note: Callable[[str], None] | None = None) -> Iterator[Path]:
    """Yield a folder beside the output, on the same file system, that is gone afterwards.

    Its name is fixed: a compile that was killed, interrupted or failed leaves there what the next
    can go on from, which with a mark is all that the folder holds at first. Only after a
    VerificationError nothing is left, as the same weights would fail again.

    Args:
        output: Where the artifact goes.
        note: Called with a line that says what is left.

    Raises:
        OutputError: Another compile is writing the same output, or the folder's name is taken.
    """
    folder = staging_path(output)
    with _locked(folder, output) as found:
        with explained("The artifact", output.path):
            _restore(folder, output)
            if strangers := _clear(found, output):
                raise OutputError(
                    f"{folder} holds {', '.join(strangers)}, which alloc-compile did not write "
                    "there. Move it away, or choose another output."
                )
        failed = True
        try:
            yield folder
            failed = False
        except VerificationError:
            failed = False
            raise
        finally:
            # The artifact is there, or an error is on its way that says more.
            with contextlib.suppress(OSError, OutputError):
                _end(found, output, note, resumable=failed)


def restore(output: Output) -> None:
    """Undo what a compile left that was killed while it replaced an artifact.

    Raises:
        OutputError: Another compile is writing the same output, or its work folder's name is taken.
    """
    folder = staging_path(output)
    if not os.path.lexists(folder):
        return
    with _locked(folder, output) as found, explained("The artifact", output.path):
        _restore(folder, output)
        remove_if_empty(found)


def publish(staged: Path, output: Output) -> None:
    """Let the finished files in `staged` take the output's place.

    Whenever the process is killed, the output is the old artifact, if there was one, or the new
    one: never a graph with another's data, and never less of what else is in a bundle's folder.

    Raises:
        OutputError: They can't; the old artifact is as it was.
    """
    with explained("The artifact", output.path):
        drop_journals(staged)  # no part of an artifact
        files = _published(staged, output)
        for file in (path for top in files for path in (top, *top.rglob("*"))):
            sync(file)
        sync(staged)
        try:
            if output.bundle:
                switch_folder(staged, files, output)
            else:
                switch_pair(staged, output)
        except OSError:
            with contextlib.suppress(OSError, OutputError):
                _restore(staged, output)
            raise


def _published(staged: Path, output: Output) -> list[Path]:
    """Return what is finished, and nothing that a compile of another kind left to go on from."""
    others = staged / FILES
    found = [*others.iterdir()] if others.is_dir() else []
    if not output.is_checkpoint:
        found += [path for path in staged.iterdir() if not belongs_to_shard(path.name)]
    return sorted(path for path in found if whole_name(path.name) not in _NOT_PUBLISHED)


def _restore(staged: Path, output: Output) -> None:
    (restore_folder if output.bundle else restore_pair)(staged, output)


def left_bytes(output: Output) -> int:
    """Return the bytes of weights that a killed compile left: they are used or removed."""
    folder = staging_path(output)
    if not is_ours(folder):
        return 0
    return sum(file.stat().st_size for file in resumable_files(folder))


def _end(
    found: OpenFolder,
    output: Output,
    note: Callable[[str], None] | None,
    *,
    resumable: bool,
) -> None:
    """Remove the folder, or say what it still holds."""
    if not found.is_at_its_path():
        return  # somebody moved it, and what is there now isn't ours
    if not resumable:
        drop_journals(found.path)
    _restore(found.path, output)
    strangers = _clear(found, output)
    if remove_if_empty(found) or note is None:
        return
    if resumable_files(found.path):
        note(
            f"The weights written so far stay in {found.path}: the same command goes on from "
            "there. To give them up, delete the folder."
        )
    elif strangers:
        note(f"{found.path} stays, as it holds {', '.join(strangers)}.")


def alone(output: Output) -> contextlib.AbstractContextManager[OpenFolder]:
    """Keep other compiles of an output away, from the first thing measured to the last one kept.

    Raises:
        OutputError: Another is at work.
    """
    return held(output.results_path, f"Another compile is writing {output.path}")


def _locked(folder: Path, output: Output) -> contextlib.AbstractContextManager[OpenFolder]:
    return held(folder, f"Another compile is writing {output.path}")


def _clear(found: OpenFolder, output: Output) -> list[str]:
    """Remove all of ours that no compile can go on from; return what is not ours."""
    keep = {MARK, SWITCH, *(path.name for path in resumable_files(found.path))}
    ours = _names(output)
    strangers = []
    for name in found.names():
        if name in keep:
            continue
        if name == FILES and not found.is_file(name):
            shutil.rmtree(found.path / FILES)  # made by us, and never given to the user
        elif (whole_name(name) in ours or belongs_to_shard(name)) and found.is_file(name):
            found.unlink(name)
        else:
            strangers.append(name)
    return strangers


def _names(output: Output) -> set[str]:
    """Return the names of whole files that a compile writes into the staging folder."""
    graph = output.graph_name
    data = data_path(Path(graph)).name
    journal = f"{data}.journal"
    return {graph, f".exact.{graph}", data, journal, SWITCH, BRIDGE, BACK} | SURELY_OURS
