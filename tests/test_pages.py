"""What the pages say of the repository: links, paths and options that exist, lines that fit."""

from __future__ import annotations

import importlib
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest

ROOT = Path(__file__).parents[1]
COLUMNS = 100
README_LINES = 200
FOLDERS = ("compiler", "passes", "runtime", "examples")

_FENCE = re.compile(r"\s*(`{3,})(\w*)")
_HEADING = re.compile(r"#{1,6} +(.*?)(?: +#+)?$")
_LINK = re.compile(r"\]\(([^()\s]+)\)")  # of a picture too, be it a link itself
_SPAN = re.compile(r"`([^`]+)`")
_PATH = re.compile(rf"(?:{'|'.join((*FOLDERS, 'tests'))})/[\w./*-]*")
_OF_OTHERS = {"alloc-lm-eval"}  # its options are those of another program


class Line(NamedTuple):
    """A line of a page; ``code`` is None in prose, else what its fence says it is."""

    number: int
    text: str
    code: str | None


def pages() -> list[Path]:
    """Return the tracked pages."""
    command = ["git", "ls-files", "-z", "--", "*.md"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(name) for name in found.stdout.split("\0") if (ROOT / name).is_file()]


PAGES = pages()


def lines(text: str) -> Iterator[Line]:
    """Yield the lines of a page, those of fences themselves left out."""
    code: str | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if fence := _FENCE.match(line):
            code = fence[2] if code is None else None
        else:
            yield Line(number, line, code)


def prose(text: str) -> str:
    """Return a page without its code, inline code included."""
    return _SPAN.sub("", "\n".join(line.text for line in lines(text) if line.code is None))


def anchor(heading: str) -> str:
    """Return what GitHub makes of a heading: lower case, no punctuation, hyphens for spaces."""
    shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    """Return the anchors of a page; a heading that is there twice gets a number."""
    found: set[str] = set()
    for line in lines(text):
        if line.code is None and (match := _HEADING.match(line.text)):
            name, again = anchor(match[1]), 0
            while (unique := f"{name}-{again}" if again else name) in found:
                again += 1
            found.add(unique)
    return found


def broken_links(page: Path, text: str) -> list[str]:
    """Return the links of a page, images among them, that lead nowhere in the repository."""
    broken = []
    for target in _LINK.findall(prose(text)):
        if re.match(r"\w+:", target):
            continue
        name, _, fragment = target.partition("#")
        path = (ROOT / page.parent / name).resolve() if name else ROOT / page
        there = path.exists() and path.is_relative_to(ROOT)
        if there and fragment:
            there = fragment in anchors(path.read_text("utf-8") if name else text)
        if not there:
            broken.append(target)
    return broken


def long_lines(text: str) -> list[int]:
    """Return the lines that are too long for no reason.

    A table's row, a link and what a program printed can't be broken.
    """
    return [
        line.number
        for line in lines(text)
        if len(line.text) > COLUMNS
        and line.code != ""
        and not line.text.lstrip().startswith("|")
        and not re.fullmatch(r"\s*(?:[-*] )?\S+", line.text)
    ]


def missing_paths(text: str) -> list[str]:
    """Return the paths in back-ticks below the project's folders where nothing is."""
    spans = _SPAN.findall("\n".join(line.text for line in lines(text) if line.code is None))
    named = [word for span in spans for word in span.split()]
    paths = [word.rstrip(".,:;") for word in named if _PATH.fullmatch(word.rstrip(".,:;"))]
    return [path for path in paths if not any(ROOT.glob(path.rstrip("/") or path))]


def commands() -> dict[str, click.Command]:
    """Return the project's commands that have options of their own, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    found = {}
    for name, target in project["scripts"].items():
        module, _, attribute = target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        if name not in _OF_OTHERS:
            assert isinstance(command, click.Command)
            found[name] = command
    return found


COMMANDS = commands()


def options_of(command: click.Command) -> set[str]:
    """Return the options that a command's --help shows."""
    with click.Context(command) as context:
        parameters = command.get_params(context)
    return {
        name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)
    }


def mentioned_options(text: str) -> list[tuple[str | None, str]]:
    """Return (command, option) as a page mentions them; None is no command in particular."""
    code = "\n".join(line.text for line in lines(text) if line.code == "bash")
    spans = _SPAN.findall("\n".join(line.text for line in lines(text) if line.code is None))
    found: list[tuple[str | None, str]] = []
    for statement in (*code.replace("\\\n", " ").splitlines(), *spans):
        for part in re.split(r"&&|\||;", statement):
            words = part.split()
            own = [word.rpartition("/")[2] for word in words if "alloc-" in word]
            command = next((word for word in own if re.fullmatch(r"alloc-[a-z-]+", word)), None)
            is_ours = command is not None or (words and words[0].startswith("-"))
            if is_ours and command not in _OF_OTHERS:
                options = [word for word in words if re.match(r"--?[a-z]", word)]
                found.extend((command, option.partition("=")[0]) for option in options)
    return found


def unknown_options(text: str) -> list[tuple[str | None, str]]:
    """Return the options that the command they stand with, or no command at all, has."""
    everywhere = {option for command in COMMANDS.values() for option in options_of(command)}
    return [
        (command, option)
        for command, option in mentioned_options(text)
        if option not in (everywhere if command is None else options_of(COMMANDS[command]))
        and option != "--help"
    ]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_and_pictures_resolve(page: Path) -> None:
    assert broken_links(page, (ROOT / page).read_text("utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_lines_fit(page: Path) -> None:
    assert long_lines((ROOT / page).read_text("utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_paths_in_back_ticks_exist(page: Path) -> None:
    assert missing_paths((ROOT / page).read_text("utf-8")) == []


def test_readme_is_read_to_the_end() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= README_LINES


def test_options_in_readme_exist() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert unknown_options(text) == []
    assert {command for command, _ in mentioned_options(text)} > {None, "alloc-compile"}
    assert set(COMMANDS) == {name for name in COMMANDS if f"`{name} " in text}


def test_every_room_has_its_pages() -> None:
    expected = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/benchmarks/README.md"}
    assert expected | {f"{folder}/README.md" for folder in FOLDERS} <= set(map(str, PAGES))


def test_the_families_that_are_tested_are_told_by_their_model_type() -> None:
    page = (ROOT / "compiler/README.md").read_text("utf-8")
    rows = re.findall(r"^\| (?:in place|copied).*\|(.*)\|$", page, re.MULTILINE)
    told = re.findall(r"`(\w+)`", " ".join(rows))
    listed = tomllib.loads((ROOT / "examples/checkpoints/families.toml").read_text("utf-8"))
    assert {*told} == {family["model_type"] for family in listed["families"].values()}


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("[a](README.md) ![b](LICENSE) [c](https://example.org/x)", []),
        ("[a](absent.md) ![b](absent.svg)", ["absent.md", "absent.svg"]),
        ("[![a](absent.svg)](README.md)", ["absent.svg"]),
        ("# Two words, `code`\n[a](#two-words-code) [b](#two-words)", ["#two-words"]),
        ("# One\n# One\n[a](#one) [b](#one-1) [c](#one-2)", ["#one-2"]),
        ("```\n[a](absent.md)\n# One\n```\n`[a](absent.md)` [b](#one)", ["#one"]),
        ("[a](../absent/README.md)", ["../absent/README.md"]),
    ],
)
def test_a_link_that_leads_nowhere_is_found(text: str, broken: list[str]) -> None:
    assert sorted(broken_links(Path("README.md"), text)) == broken


@pytest.mark.parametrize(
    ("text", "long"),
    [
        ("word " * 20 + "\n" + "word " * 21, [2]),
        ("| " + "cell " * 30 + "|", []),
        ("```\n" + "word " * 30 + "\n```", []),
        ("```bash\n" + "word " * 30 + "\n```", [2]),
        ("- https://example.org/" + "x" * 100, []),
    ],
)
def test_a_long_line_is_found(text: str, long: list[int]) -> None:
    assert long_lines(text) == long


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("`compiler/pipeline.py` and `passes/*/lower.py`", []),
        ("`python examples/absent.py x`", ["examples/absent.py"]),
        ("`compiler/absent/` but not `see compiler/pipeline.py.`", ["compiler/absent/"]),
        ("```\n`compiler/absent/`\n```", []),
    ],
)
def test_a_path_to_nothing_is_found(text: str, missing: list[str]) -> None:
    assert missing_paths(text) == missing


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("`alloc-run --budget 0.4` and `--cap 1.2`", []),
        ("`alloc-run --cap 1.2`", [("alloc-run", "--cap")]),
        ("`--absent`", [(None, "--absent")]),
        ("```bash\nalloc-eval out.onnx \\\n  --tokenz 1\n```", [("alloc-eval", "--tokenz")]),
        (
            "```bash\npip install --pre x && .venv/bin/alloc-inspect -x\n```",
            [("alloc-inspect", "-x")],
        ),
        ("`alloc-lm-eval --model x`", []),
    ],
)
def test_an_option_of_no_command_is_found(text: str, unknown: list[tuple[str | None, str]]) -> None:
    assert unknown_options(text) == unknown
