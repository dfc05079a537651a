"""A bundle folder replaced in one step, with all in it that the user put there.

The new folder is made beside the old one. What isn't ours in the old one gets a second name in it,
then both swap places; where the system can't swap, the old one moves away first, and is moved back
if that is as far as it came. Then of the old one only files go that a compile wrote.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from alloc_moe.compiler.package.paths import Output, data_path
from alloc_moe.compiler.workspace.files import save_text, sync
from alloc_moe.compiler.workspace.moves import exchange, link
from alloc_moe.runtime.artifact.plan import CHECKPOINT_PLAN_FILE, MODEL_FILE, PLAN_FILE

MANIFEST = ".alloc-moe-files.json"
"""Names and sizes of what a compile wrote into a bundle."""

NEW, OLD = "new", "old"
SURELY_OURS = frozenset(
    {
        *(MODEL_FILE, data_path(Path(MODEL_FILE)).name, PLAN_FILE, MANIFEST),
        *("config.json", "generation_config.json", "genai_config.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
)
"""What every bundle has, those without a manifest too."""

_LARGEST_MANIFEST = 1 << 20


def switch_folder(staged: Path, files: Iterable[Path], output: Output) -> None:
    """Replace a bundle by `files`, which lie in `staged` and its folders.

    Raises:
        OSError: Something could not be done; `restore_folder` undoes what was.
    """
    target, finished = output.place, staged / NEW
    files = list(files)
    _write_manifest(staged, files)
    finished.mkdir()
    for file in (staged / MANIFEST, *files):  # first of all what says that the others are ours
        os.replace(file, finished / file.name)
    sync(finished)
    if not os.path.lexists(target):
        os.replace(finished, target)
    else:
        _share(target, finished, skip=_written(target) | _written(finished))
        shutil.copymode(target, finished)
        sync(finished)
        if not exchange(finished, target):
            _replace_in_two(staged, finished, target)
    with contextlib.suppress(OSError):  # the new artifact is there, whatever happens now
        sync(target.parent)
        restore_folder(staged, output)


def restore_folder(staged: Path, output: Output) -> None:
    """Undo a switch that ended before its last step, and clear away what one leaves."""
    target = output.place
    if _is_folder(staged / OLD) and not os.path.lexists(target):
        os.replace(staged / OLD, target)
        sync(target.parent)
    for folder in (staged / OLD, staged / NEW):
        if _is_folder(folder):
            _give_up(folder, target)


def written_here(path: Path) -> bool:
    """Whether a compile wrote a folder, or it is empty, so that it may be replaced."""
    plans = (path / PLAN_FILE, path / CHECKPOINT_PLAN_FILE)
    return path.is_dir() and (any(map(Path.is_file, plans)) or not any(path.iterdir()))


def _replace_in_two(staged: Path, finished: Path, target: Path) -> None:
    os.replace(target, staged / OLD)
    try:
        os.replace(finished, target)
    except OSError:
        os.replace(staged / OLD, target)
        raise


def _write_manifest(folder: Path, files: Iterable[Path]) -> None:
    """Say what will be in the bundle before it is there."""
    sizes = {}
    for file in files:
        for path in sorted(file.rglob("*")) if file.is_dir() else [file]:
            if path.is_file():
                sizes[path.relative_to(file.parent).as_posix()] = path.stat().st_size
    text = json.dumps({"format": 1, "files": sizes}, indent=1) + "\n"
    save_text(text, folder / MANIFEST, what="The list of the bundle's files")


def _written(folder: Path) -> set[str]:
    """Return the files of a folder that a compile wrote, as far as that is sure."""
    manifest = folder / MANIFEST
    sizes: object = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if _is_file(manifest) and manifest.stat().st_size <= _LARGEST_MANIFEST:
            sizes = json.loads(manifest.read_text("utf-8"))["files"]
    if not isinstance(sizes, dict):
        return {name for name in SURELY_OURS if _is_file(folder / name)}
    inside = {name: size for name, size in sizes.items() if _is_inside(folder, name)}
    paths = {name: folder / name for name in inside}
    ours = {name for name, path in paths.items() if path.lstat().st_size == inside[name]}
    return ours | {MANIFEST}


def _is_inside(folder: Path, name: str) -> bool:
    """Whether a manifest's name is of a file in the folder, by no link: it may be made up."""
    parts = PurePosixPath(name).parts
    if not parts or any(part in ("..", "/") or "\\" in part or ":" in part for part in parts):
        return False
    above = [folder.joinpath(*parts[:count]) for count in range(1, len(parts))]
    return all(_is_folder(path) for path in above) and _is_file(folder / name)


def _share(source: Path, target: Path, *, skip: set[str]) -> None:
    """Give what the user has in a folder second names in another.

    Where there are no such, things are moved after the switch.
    """
    for path in sorted(source.iterdir()):
        other = target / path.name
        if path.name in skip:
            continue
        if not _is_folder(path):
            if not os.path.lexists(other):
                link(path, other)
        elif _is_folder(other) or not os.path.lexists(other):
            _share_folder(path, other, skip)


def _share_folder(path: Path, other: Path, skip: set[str]) -> None:
    other.mkdir(exist_ok=True)
    inner = f"{path.name}/"
    _share(path, other, skip={name.removeprefix(inner) for name in skip if name.startswith(inner)})
    if any(path.iterdir()) and not any(other.iterdir()):
        other.rmdir()  # nothing in it is the user's, or could be shared
        return
    shutil.copystat(path, other)
    sync(other)


def _give_up(folder: Path, target: Path) -> None:
    """Remove a bundle's folder; what no compile wrote goes where the bundle is now."""
    superseded = _written(target) if _is_folder(target) else set()
    ours = _written(folder) | {name for name in superseded if _is_inside(folder, name)}
    for name in sorted(ours - {MANIFEST}, reverse=True):
        (folder / name).unlink()
        for above in list(PurePosixPath(name).parents)[:-1]:
            with contextlib.suppress(OSError):  # something else is in it
                (folder / above).rmdir()
    _hand_over(folder, target)
    (folder / MANIFEST).unlink(missing_ok=True)  # the last, as it says what is ours
    folder.rmdir()


def _hand_over(folder: Path, target: Path) -> None:
    """Move what is left in a folder to another, unless it is there by a second name."""
    for path in sorted(folder.iterdir()):
        other = target / path.name
        if path.name == MANIFEST:
            continue
        if not os.path.lexists(other):
            target.mkdir(exist_ok=True)
            os.replace(path, other)
        elif _is_folder(path) and _is_folder(other):
            _hand_over(path, other)
            path.rmdir()
        elif os.path.samestat(path.lstat(), other.lstat()):
            path.unlink()
        else:  # two that differ: both stay
            os.replace(path, _free_name(other))


def _free_name(path: Path) -> Path:
    name, count = path.with_name(f"{path.name}.kept"), 1
    while os.path.lexists(name):
        count += 1
        name = path.with_name(f"{path.name}.kept{count}")
    return name


def _is_file(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISREG(path.lstat().st_mode)
    return False


def _is_folder(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISDIR(path.lstat().st_mode)
    return False
