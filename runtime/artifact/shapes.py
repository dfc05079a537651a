"""JSON from outside, checked field by field before anything is made of it.

A shape is a function from a value and where it stands to the value, or to a `ShapeError` that names
the field and what is expected there. Every shape has bounds, so that no file can ask for more
memory, depth or digits than a real one has. (A library would do the same, but takes longer to
import than all else that reading a plan needs.)
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Shape = Callable[[Any, str], Any]
"""``shape(value, where)`` -> the value, lists as tuples, or a `ShapeError`."""

MOST_BYTES = 64 << 20
"""No JSON file that this package reads is larger."""
_MOST_WHOLE = 2**63 - 1
_MOST_TEXT = 4096
_SHOWN = 40


class ShapeError(ValueError):
    """A value isn't what its place asks for; the message goes on after a colon.

    ``wrong`` is the place of a value that is none of what is ``expected`` there.
    """

    def __init__(
        self, message: str, *, wrong: str | None = None, expected: tuple[str, ...] = ()
    ) -> None:
        end = f", where {' or '.join(expected)} is expected" if expected else ""
        super().__init__(message + end)
        self.message, self.wrong, self.expected = message, wrong, expected


def load_json(text: str | bytes) -> Any:
    """Return what a JSON text holds, before it is checked.

    Raises:
        ShapeError: It is no JSON, has a field twice or too many levels, or is longer than any file
            that is read.
    """
    if len(text) > MOST_BYTES:  # a list of digits would take eight times as much memory
        raise ShapeError(f"it has {len(text)} characters, more than any that alloc-moe writes")
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ShapeError("it is nested too deeply") from error
    except ShapeError:
        raise
    except ValueError as error:  # of decoding too
        raise ShapeError(f"it is no JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's fields, of which no reader could tell which one counts if one is twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ShapeError(f'it has the field "{_quoted(twice)}" twice')
    return found


def parse_json(text: str | bytes, shape: Shape) -> Any:
    """Return what a JSON text holds, checked.

    Raises:
        ShapeError: It is no JSON, or of another shape.
    """
    return shape(load_json(text), "")


def read_json(path: Path, shape: Shape, *, most: int = MOST_BYTES) -> Any:
    """Return what a JSON file holds, checked.

    Raises:
        ShapeError: As `parse_json`, or it is no file.
        OSError: It can't be read.
    """
    return parse_json(read_file(path, most=most), shape)


def read_file(path: Path, *, most: int = MOST_BYTES) -> bytes:
    """Return the content of a file, if it is one: reading a pipe might never end.

    Raises:
        ShapeError: It is a folder, pipe or device, or larger than `most` bytes; or no file can have
            that name.
        OSError: It can't be read.
    """
    try:
        status = path.stat()
    except ValueError as error:  # NUL, or half of a character
        raise ShapeError("no file can be called so") from error
    if not stat.S_ISREG(status.st_mode):
        raise ShapeError("it is no file")
    if status.st_size > most:
        raise ShapeError(f"it has {status.st_size} bytes, more than any that alloc-moe writes")
    return path.read_bytes()


def number(least: float = -1e300, most: float = 1e300) -> Shape:
    """Take a finite number in a range."""

    def check(value: Any, where: str) -> Any:
        if type(value) not in (int, float) or not least <= value <= most:  # NaN is in no range
            raise _wrong(value, where, f"a number {_range(least, most)}")
        return value

    return check


def measured(value: Any, where: str) -> Any:
    """Take what was measured, which may have come out as NaN or infinite."""
    if type(value) is not float:
        return number()(value, where)
    return value


def whole(least: int = -_MOST_WHOLE, most: int = _MOST_WHOLE) -> Shape:
    """Take a whole number in a range."""

    def check(value: Any, where: str) -> Any:
        if type(value) is not int or not least <= value <= most:
            raise _wrong(value, where, f"a whole number {_range(least, most)}")
        return value

    return check


def boolean(value: Any, where: str) -> Any:
    """Take true or false."""
    if not isinstance(value, bool):
        raise _wrong(value, where, "true or false")
    return value


def string(most: int = _MOST_TEXT) -> Shape:
    """Take a text of at most so many characters."""

    def check(value: Any, where: str) -> Any:
        if not isinstance(value, str) or len(value) > most or not _encodable(value):
            raise _wrong(value, where, f"a text of at most {most} characters")
        return value

    return check


def one_of(*choices: str) -> Shape:
    """Take one of some words."""

    def check(value: Any, where: str) -> Any:
        if value not in choices:
            raise _wrong(value, where, f"one of {', '.join(choices)}")
        return value

    return check


def optional(shape: Shape) -> Shape:
    """Take null besides."""
    return lambda value, where: None if value is None else shape(value, where)


def either(*shapes: Shape) -> Shape:
    """Take what any of the shapes takes; else tell of one place all that it may be.

    That place is in the value, if there is one, and where the fewest fail: the others had no use
    for what stands before it.
    """

    def check(value: Any, where: str) -> Any:
        errors = []
        for shape in shapes:
            try:
                return shape(value, where)
            except ShapeError as error:
                errors.append(error)
        places = [error.wrong for error in errors if error.wrong != where] or [where]
        place = min(places, key=places.count)
        there = [error for error in errors if error.wrong == place]
        expected = dict.fromkeys(each for error in there for each in error.expected)
        raise ShapeError(there[0].message, wrong=place, expected=tuple(expected))

    return check


def rows(item: Shape, *, least: int = 0, most: int = 1 << 16) -> Shape:
    """Take a list of so many items, and return a tuple."""

    def check(value: Any, where: str) -> Any:
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise _wrong(value, where, f"a list of {least} to {most} items")
        return tuple(item(each, f"{where}[{index}]") for index, each in enumerate(value))

    return check


def record(
    required: Mapping[str, Shape],
    other: Mapping[str, Shape] | None = None,
    *,
    closed: bool = False,
) -> Shape:
    """Take an object with these fields and perhaps others.

    Fields of no known name are left out, or if it is `closed`, refused.
    """
    known = {**required, **(other or {})}

    def check(value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise _no_object(value, where)
        if closed and (unknown := sorted(value.keys() - known.keys())):
            raise ShapeError(
                f"it has the unknown field {f'{where}.{_quoted(unknown[0])}'.lstrip('.')}"
            )
        for name in required:
            if name not in value:
                raise ShapeError(f"it lacks {f'{where}.{name}'.lstrip('.')}")
        return {
            name: shape(value[name], f"{where}.{name}".lstrip("."))
            for name, shape in known.items()
            if name in value
        }

    return check


def mapping(item: Shape, *, most: int = 1 << 16) -> Shape:
    """Take an object with any names, all of one shape."""
    name = string()

    def check(value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise _no_object(value, where)
        if len(value) > most:
            raise _wrong(value, where, f"an object of at most {most} fields")
        return {
            name(key, f"a name in {where or 'it'}"): item(
                each, f"{where}.{_quoted(key)}".lstrip(".")
            )
            for key, each in value.items()
        }

    return check


def anything(value: Any, where: str) -> Any:
    """Take any JSON value that is small and not deep: what is only shown, or belongs to others."""
    return _anything(value, where, depth=8)


def _anything(value: Any, where: str, *, depth: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return whole()(value, where)
    if isinstance(value, float):
        # What was measured may be none: it is shown, and no one counts with it.
        return value
    if isinstance(value, str):
        return string()(value, where)
    if depth == 0:
        raise ShapeError(f"it is nested too deeply at {where:.200}")

    def inner(each: Any, place: str) -> Any:
        return _anything(each, place, depth=depth - 1)

    if isinstance(value, dict):
        return mapping(inner)(value, where)
    return list(rows(inner)(value, where))  # as whoever made it has it


def _encodable(value: str) -> bool:
    """Whether a text is one: JSON can write halves of characters."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _range(least: float, most: float) -> str:
    if most in (1e300, _MOST_WHOLE):
        return "" if least in (-1e300, -_MOST_WHOLE) else f"of {least} or more"
    return f"from {least} to {most}"


def _wrong(value: Any, where: str, expected: str) -> ShapeError:
    name = where or "it"
    return ShapeError(f"{name:.200} is {_shown(value)}", wrong=where, expected=(expected.strip(),))


def _quoted(name: str) -> str:
    """Return a name of the file's own choice on one short line."""
    return json.dumps(name[:_SHOWN])[1:-1]


def _no_object(value: Any, where: str) -> ShapeError:
    if not where:
        return ShapeError(f"it is no JSON object but {_shown(value)}")
    return _wrong(value, where, "an object")


def _shown(value: Any) -> str:  # any JSON value
    """Return a value in few words, however large it is."""
    if isinstance(value, dict):
        return f"an object of {len(value)} fields"
    if isinstance(value, list):
        return f"a list of {len(value)} items"
    if isinstance(value, str):
        return repr(value[:_SHOWN]) + ("..." if len(value) > _SHOWN else "")
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"a number of about {math.floor(value.bit_length() * 0.30103)} digits"
    return json.dumps(value)
