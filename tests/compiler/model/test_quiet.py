from __future__ import annotations

import logging
import warnings

import pytest
from transformers.utils import logging as transformers_logging

from alloc_moe.compiler.model.quiet import first_line, quiet


def speak() -> None:
    print("a print")  # noqa: T201
    warnings.warn("a warning", stacklevel=1)
    transformers_logging.get_logger("transformers.some").warning("a note")
    logging.getLogger("torch._export.some").warning("a note")


def test_libraries_say_nothing_inside(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with quiet():
        speak()
        assert not transformers_logging.is_progress_bar_enabled()
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_errors_are_still_logged(caplog: pytest.LogCaptureFixture) -> None:
    with quiet():
        logging.getLogger("torch").error("an error")
    assert [record.message for record in caplog.records] == ["an error"]


@pytest.mark.parametrize("fails", [False, True])
def test_all_is_as_before_afterwards(fails: bool, caplog: pytest.LogCaptureFixture) -> None:
    def run() -> None:
        with quiet(), quiet():
            if fails:
                raise ValueError("stop")

    if fails:
        with pytest.raises(ValueError, match="stop"):
            run()
    else:
        run()
    assert transformers_logging.is_progress_bar_enabled()
    logging.getLogger("torch._export.some").warning("a note")
    assert [record.message for record in caplog.records] == ["a note"]
    with pytest.warns(UserWarning, match="a warning"):
        warnings.warn("a warning", stacklevel=1)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n  first\nsecond"), "first"),
        (ValueError(), "ValueError"),
        (KeyError("name"), "'name'"),
    ],
)
def test_the_first_line_of_an_error_says_something(error: Exception, line: str) -> None:
    assert first_line(error) == line
