"""Every numbered example runs as written, on a small model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def test_compile_and_generate(
    load: Callable[[str], ModuleType],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main = load("01_compile_and_generate").main
    main(str(checkpoint("olmoe")), f"{tmp_path / 'half'}/", tokens=256, new_tokens=4)
    printed = capsys.readouterr().out
    assert re.search(
        r"^Experts per layer: \d\.\d\d \d\.\d\d \d\.\d\d, trained with 4$", printed, re.M
    )
    assert "'In the beginning' -> " in printed
    assert (tmp_path / "half" / "genai_config.json").is_file()


def test_many_budgets(
    load: Callable[[str], ModuleType],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    example, model = load("02_many_budgets"), checkpoint("olmoe")
    monkeypatch.setattr(example, "BUDGETS", (0.5, 0.75))
    text = str(model / "calibration.txt")
    example.main(str(model), str(tmp_path), text, tokens=256)
    printed = capsys.readouterr().out.splitlines()
    names = [f"budget-{budget}.onnx" for budget in ("0.5", "0.75")]
    assert [line.partition(" made in ")[0] for line in printed[:2]] == names
    assert {path.name for path in tmp_path.glob("*.onnx")} == set(names)
    half = "budget-0.5.onnx"
    found = [re.fullmatch(r"(\S+) at (\S+): (\S+) experts, loss \d\.\d{4}", p) for p in printed[2:]]
    assert [match[1] for match in found if match] == [half, half, names[1]]
    for match in found:
        assert match is not None
        assert float(match[3]) == pytest.approx(12 * float(match[2]), rel=0.2)


def test_every_example_is_tested(examples: Path) -> None:
    names = {path.name for path in examples.glob("[0-9]*.py")}
    assert names == {"01_compile_and_generate.py", "02_many_budgets.py"}
