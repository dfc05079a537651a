"""Speed measured in turns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.execution.calls import Output
from alloc_moe.runtime.execution.session import ArtifactSession, open_session
from alloc_moe.runtime.measure.bench import Speed, Workload, benchmark, machine


def test_runs_alternate_and_the_warm_up_is_left_out(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = [open_session(toy), open_session(toy)]
    calls: list[tuple[int, int]] = []
    run = ArtifactSession.run

    def spy(session: ArtifactSession, ids: np.ndarray, **arguments: object) -> Output:
        calls.append((sessions.index(session), ids.shape[1]))
        return run(session, ids, **arguments)

    monkeypatch.setattr(ArtifactSession, "run", spy)
    told: list[None] = []
    workload = Workload(prompt_tokens=7, past=5, new_tokens=2, runs=2)
    measurements = benchmark(sessions, workload, on_run=lambda: told.append(None))
    turn = [(0, 7), (0, 1), (0, 1), (1, 7), (1, 1), (1, 1)]
    assert calls == [(0, 5), (1, 5), *turn, *turn, *turn]
    assert len(told) == 6
    assert all(len(m.prefill.runs) == len(m.decode.runs) == 2 for m in measurements)


def test_decode_without_a_past_starts_with_an_empty_cache(toy: Path) -> None:
    [measurement] = benchmark([open_session(toy)], Workload(past=0, new_tokens=2, runs=1))
    assert measurement.decode.median > 0


def test_the_ratio_pairs_the_runs_of_a_turn() -> None:
    first, second = Speed((10, 1, 10)), Speed((20, 2, 15))  # the second turn was disturbed
    assert second.ratio(first) == 2
    assert (first.median, second.median) == (10, 15)


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "runs"])
def test_a_workload_of_nothing_is_rejected(toy: Path, name: str) -> None:
    with pytest.raises(GenerationError, match=f"{name} is 0"):
        benchmark([open_session(toy)], Workload(**{name: 0}))


def test_a_workload_beyond_the_context_is_rejected(bundle: Path) -> None:
    workload = Workload(prompt_tokens=8, past=60, new_tokens=8)
    with pytest.raises(GenerationError, match=r"holds 64 tokens, the benchmark needs 68"):
        benchmark([open_session(bundle)], workload)


def test_the_machine_has_a_name() -> None:
    assert "logical CPUs" in machine()
