"""What every section of the page is made of: a title, how to read it, what can be unfolded."""

from __future__ import annotations

from alloc_moe.compiler.sweep.report.svg import element, escape


def section(title: str, how: str, *content: str) -> str:
    """Return a section; `how` and the content are markup already."""
    head = element("h2", {}, escape(title)) + element("p", {"class": "how"}, how)
    return element("section", {}, head, *content)


def fold(title: str, content: str, *, is_open: bool = False) -> str:
    """Return markup under a title that opens and closes."""
    attributes = {"open": ""} if is_open else {}
    return element("details", attributes, element("summary", {}, escape(title)), content)
