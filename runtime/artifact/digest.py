"""What binds an artifact to its data: which bytes the graph was compiled with.

The graph's metadata hold per data file its size and a hash of every block, and the file ends with a
seal made of these, so that another compile's data are known by their last bytes, whatever else is
equal. Loading compares size, seal and a hash of sampled pieces, which takes milliseconds for files
of any size; a damaged byte between the samples is found by `damaged_block`, which reads all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from alloc_moe.runtime.artifact.plan import DATA_KEY
from alloc_moe.runtime.artifact.shapes import (
    ShapeError,
    mapping,
    parse_json,
    record,
    rows,
    string,
    whole,
)
from alloc_moe.runtime.errors import ArtifactError

SEAL_BYTES = 32
_LEAST_BLOCK = 1 << 20
_MOST_BLOCKS = 512
_SAMPLES = 64
_SAMPLE_BYTES = 4096
_PIECE = 1 << 20  # read at a time
_HEX = 32  # 128 bits of a block's hash: against damage and mistakes that is plenty

_DIGESTS = mapping(
    record(
        {
            "size": whole(0),
            "block": whole(_LEAST_BLOCK),
            "samples": string(64),
            "blocks": rows(string(_HEX), most=_MOST_BLOCKS),
        }
    )
)


@dataclass(frozen=True)
class DataDigest:
    """What a data file must hold: ``size`` bytes of weights, then the seal.

    ``blocks`` are hashes of each ``block`` bytes, the last of what is left; ``samples`` is one of
    pieces of the whole.
    """

    size: int
    block: int
    samples: str
    blocks: tuple[str, ...]

    def seal(self) -> bytes:
        """Return the last bytes of the file."""
        words = [str(self.size), self.samples, *self.blocks]
        return hashlib.sha256(" ".join(words).encode()).digest()


class BlockHasher:
    """Hashes a data file of known size while it is written."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.block = _block_bytes(size)
        self._blocks: list[str] = []
        self._hash = hashlib.sha256()
        self._room = self.block

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes."""
        view = memoryview(data)
        while len(view):
            part, view = view[: self._room], view[self._room :]
            self._hash.update(part)
            self._room -= len(part)
            if not self._room:
                self._end_block()

    def digest(self, file: BinaryIO) -> DataDigest:
        """Return the digest of a file, all of whose bytes were given; it is open for reading."""
        if self._room < self.block:
            self._end_block()
        return DataDigest(self._size, self.block, _sampled(file, self._size), tuple(self._blocks))

    def _end_block(self) -> None:
        self._blocks.append(self._hash.hexdigest()[:_HEX])
        self._hash, self._room = hashlib.sha256(), self.block


def to_json(digests: Mapping[str, DataDigest]) -> str:
    """Return digests by file name as the metadata hold them."""
    return json.dumps({name: vars(digest) for name, digest in sorted(digests.items())})


def read_digests(metadata: Mapping[str, str], *, graph: Path) -> dict[str, DataDigest]:
    """Return the digests in a graph's metadata; none if an earlier version compiled it.

    Raises:
        ArtifactError: They can't be read.
    """
    if DATA_KEY not in metadata:
        return {}
    try:
        found = parse_json(metadata[DATA_KEY], _DIGESTS)
        return {name: _checked(DataDigest(**fields)) for name, fields in found.items()}
    except ShapeError as error:
        raise ArtifactError(
            f"The digest in {graph} can't be read: {error}. "
            "Copy the artifact again, or compile the model again."
        ) from error


def difference(path: Path, digest: DataDigest) -> str | None:
    """Return what shows, at a glance, that a file isn't the one of a digest; None if nothing does.

    Raises:
        OSError: The file can't be read.
    """
    with path.open("rb", buffering=0) as file:
        size = file.seek(0, 2)
        if size != digest.size + SEAL_BYTES:
            return f"it has {size} bytes, not {digest.size + SEAL_BYTES}"
        file.seek(digest.size)
        if file.read(SEAL_BYTES) != digest.seal():
            return "its seal is that of another compile"
        if _sampled(file, digest.size) != digest.samples:
            return "it was changed or damaged"
    return None


def damaged_block(path: Path, digest: DataDigest) -> int | None:
    """Return the index of the first block that isn't as compiled; None if all are. Reads all.

    Raises:
        OSError: The file can't be read.
    """
    with path.open("rb", buffering=0) as file:
        for index, expected in enumerate(digest.blocks):
            size = min(digest.block, digest.size - index * digest.block)
            found = hashlib.sha256()
            for piece in pieces(file, size):
                found.update(piece)
            if found.hexdigest()[:_HEX] != expected:
                return index
    return None


def pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield the next `size` bytes of a file, a little at a time; fewer if it ends before."""
    while size > 0 and (piece := file.read(min(_PIECE, size))):
        size -= len(piece)
        yield piece


def _checked(digest: DataDigest) -> DataDigest:
    if digest.block != _block_bytes(digest.size) or len(digest.blocks) != -(
        -digest.size // digest.block
    ):
        raise ShapeError(
            f"{len(digest.blocks)} blocks of {digest.block} bytes don't make up {digest.size}"
        )
    return digest


def _block_bytes(size: int) -> int:
    """Return how long a block is: the shorter, the more exactly damage is found."""
    block = _LEAST_BLOCK
    while block * _MOST_BLOCKS < size:
        block *= 2
    return block


def _sampled(file: BinaryIO, size: int) -> str:
    """Return the hash of pieces evenly spread over the first `size` bytes, the ends among them."""
    found = hashlib.sha256()
    last = max(size - _SAMPLE_BYTES, 0)
    starts = {last * index // (_SAMPLES - 1) for index in range(_SAMPLES)}
    for start in sorted(starts):
        file.seek(start)
        found.update(file.read(min(_SAMPLE_BYTES, size - start)))
    return found.hexdigest()
