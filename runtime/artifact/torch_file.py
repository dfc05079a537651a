"""What the runtime must know of a TorchScript or torch.export file, read without torch.

Both are zip archives. What was compiled in lies in their ``extra/`` folder, as torch's own
``_extra_files`` do; reading it runs nothing.
"""

from __future__ import annotations

import stat
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from alloc_moe.runtime.artifact.plan import PLAN_KEY
from alloc_moe.runtime.errors import ArtifactError

SCRIPT, EXPORT = ".pt", ".pt2"
"""How the names of TorchScript and of torch.export artifacts end."""

_PREFIX = PLAN_KEY.partition(".")[0]
_MOST_BYTES = 64 << 20  # of an entry; a tokenizer has a tenth
_MOST_ENTRIES = 1 << 20


def read_metadata(path: Path) -> dict[str, str]:
    """Return the entries that a compile put into an archive, by key.

    Raises:
        ArtifactError: There is no such file, or it is no archive of torch, or it was cut off.
    """
    with opened_archive(path) as archive:
        names = archive.namelist()
        if len(names) > _MOST_ENTRIES:
            raise ArtifactError(f"{path} has {len(names)} entries, more than any artifact.")
        found = {}
        for info in archive.infolist():
            _, _, inner = info.filename.partition("/")
            key = inner.removeprefix("extra/")
            if key == inner or not key.startswith(f"{_PREFIX}."):
                continue
            if key in found:
                raise ArtifactError(
                    f"{path} has its {key} twice. "
                    "Don't run it; alloc-compile writes no such artifact."
                )
            try:
                found[key] = read_entry(path, archive, info).decode()
            except UnicodeDecodeError as error:
                raise _damaged(path) from error
        return found


def read_entry(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Return what an entry of an archive holds.

    Raises:
        ArtifactError: It is damaged, or larger than any that isn't of weights.
    """
    if max(info.file_size, info.compress_size) > _MOST_BYTES:
        raise ArtifactError(
            f"{path} has {info.filename} of {info.file_size} bytes; {_MOST_BYTES} are the most. "
            "Don't run it; alloc-compile writes no such artifact."
        )
    try:
        return archive.read(info)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        raise _damaged(path) from error


def add_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Put entries into an archive that has none of them; its weights stay where they are.

    Raises:
        OSError: It can't be written.
    """
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        for key, text in metadata.items():
            info = zipfile.ZipInfo(f"{root}/extra/{key}")  # its date is the same at all times
            archive.writestr(info, text)


def damaged_entry(path: Path) -> str | None:
    """Return the first entry of an archive whose bytes aren't as compiled. Reads all.

    Raises:
        ArtifactError: It is no archive.
    """
    with opened_archive(path) as archive:
        try:
            return archive.testzip()
        except (zlib.error, EOFError, RuntimeError) as error:
            raise _damaged(path) from error


def opened_archive(path: Path) -> zipfile.ZipFile:
    """Return an archive to read.

    Raises:
        ArtifactError: It is none, or can't be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe might never end
            raise ArtifactError(
                f"{path} can't be read: it is a folder, pipe or device, and no file."
            )
        return zipfile.ZipFile(path)
    except FileNotFoundError as error:
        raise ArtifactError(f"There is no file {path}.") from error
    except OSError as error:
        raise ArtifactError(f"{path} can't be read: {error.strerror}.") from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> ArtifactError:
    return ArtifactError(
        f"{path} is no archive of torch, or a damaged one. "
        "Copy it again, or compile the model again."
    )
