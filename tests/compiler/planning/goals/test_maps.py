"""Maps of token sizes in plans for a goal: counted where they are, and not there for nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from alloc_moe.compiler.planning.goals import search
from alloc_moe.compiler.records import Compiled
from alloc_moe.runtime.console import Console


def test_bytes_count_what_says_the_sizes_of_tokens(
    compile_to: Callable[..., Compiled], tmp_path: Path
) -> None:
    paths = {chosen: tmp_path / f"{chosen}.onnx" for chosen in (True, False)}
    targets, stored = {}, {}
    for chosen, path in paths.items():
        target = {"target_bytes": "1GB", "token_sizes": chosen}
        targets[chosen] = compile_to(path, **target).plan.target
        stored[chosen] = path.with_name(f"{path.name}.data").stat().st_size
    added = targets[True]["bytes"] - targets[False]["bytes"]
    assert added > 0
    assert targets[True]["bytes_original"] == targets[False]["bytes_original"]
    # Weights begin at addresses that are aligned, and small biases are in the graph.
    assert abs(stored[True] - stored[False] - added) < 0.1 * added


@pytest.mark.parametrize(
    ("options", "ks"),
    [
        ({"target_bytes": "1GB"}, 4),
        ({"target_bytes": "1GB", "token_sizes": True}, 4),
        ({"target_loss": 1e-4, "correct": "none"}, 4),
        ({"target_loss": 50.0}, 1),
        ({"budget": 1.0, "token_sizes": True}, 4),
    ],
    ids=["bytes", "asked for", "loss", "one each", "budget"],
)
def test_where_a_cap_leaves_nothing_to_choose_there_are_no_maps_and_none_are_counted(
    compile_to: Callable[..., Compiled],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    ks: int,
) -> None:
    if options.get("target_loss") == 1e-4:  # what the model wrote is another text
        monkeypatch.setattr(search._Search, "_added", lambda _, made, __: made.nbytes < full)
    full = 574_976
    compiled = compile_to(tmp_path / "out.onnx", **options, cap=1.0, console=Console())
    plan = compiled.plan
    assert [layer.k for layer in plan.layers] == [ks] * 3
    assert not any(layer.token_sizes for layer in plan.layers)
    graph = onnx.load(str(compiled.path), load_external_data=False).graph
    assert not [tensor.name for tensor in graph.initializer if "token_" in tensor.name]
    assert capsys.readouterr().err.count("Token sizes are left out: they would decide nothing") == 1
    if plan.target and ks == 4:
        assert plan.target["bytes"] == plan.target["bytes_predicted"] == full


def test_under_a_cap_that_leaves_a_choice_maps_stay_and_are_counted(
    compile_to: Callable[..., Compiled], tmp_path: Path
) -> None:
    found = {
        chosen: compile_to(
            tmp_path / f"{chosen}.onnx", target_loss=50.0, cap=1.5, token_sizes=chosen
        ).plan
        for chosen in (True, False)
    }
    assert all(layer.token_sizes for layer in found[True].layers)
    maps = 3 * 8 * (64 + 1) * 4
    assert found[True].target["bytes"] - found[False].target["bytes"] == maps
