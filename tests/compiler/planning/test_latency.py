from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from alloc_moe.compiler.errors import CostError, OutputError
from alloc_moe.compiler.planning import latency
from alloc_moe.compiler.planning.latency import (
    LayerLatency,
    measure_latencies,
    measure_layer,
    write_layer,
)
from alloc_moe.compiler.planning.shapes import ExpertShape
from alloc_moe.runtime.artifact.plan import DROPPED

SHAPE = ExpertShape(experts=8, experts_per_token=3, hidden=16, intermediate=8)
OTHER = dataclasses.replace(SHAPE, intermediate=24)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ExpertShape, int]]:
    """Measure nothing; return the list of what would have been."""
    calls: list[tuple[ExpertShape, int]] = []

    def measure(shape: ExpertShape, *, batch: int, **_: object) -> LayerLatency:
        calls.append((shape, batch))
        return LayerLatency((float(len(calls)), 0.5, 2.0), (0.0, 0.1, 0.2))

    monkeypatch.setattr(latency, "measure_layer", measure)
    return calls


@pytest.mark.parametrize("biased", [False, True])
def test_the_timed_graph_runs_the_unmasked_experts_only(tmp_path: Path, *, biased: bool) -> None:
    shape = dataclasses.replace(SHAPE, biased=biased)
    graph = write_layer(shape, tmp_path, np.random.default_rng(0))
    run = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]).run
    hidden = np.random.default_rng(1).standard_normal((1, 16), dtype=np.float32)

    def output(*experts: int) -> np.ndarray:
        probabilities = np.full((1, 8), DROPPED, np.float32)
        probabilities[0, list(experts)] = 0.0
        return np.asarray(run(None, {"hidden": hidden, "router_probs": probabilities})[0])

    # All experts have the same weights, so how many run doesn't show but in the mean of them.
    np.testing.assert_allclose(output(2), output(1, 4, 7), rtol=1e-5, atol=1e-6)
    rows = _initializer(graph, "gate_up")[0] @ hidden[0] + (
        _bias(graph, "gate_up_bias") if biased else 0
    )
    gated = rows[0::2] / (1 + np.exp(-rows[0::2])) * rows[1::2]
    down = _initializer(graph, "down")[0]
    expected = down @ gated + (_bias(graph, "down_bias") if biased else 0)
    np.testing.assert_allclose(output(2)[0], expected, rtol=1e-4, atol=1e-5)


def _initializer(graph: str, name: str) -> np.ndarray:
    tensor = ir.load(graph).graph.initializers[name].const_value
    assert tensor is not None
    return np.array(tensor.numpy())


def _bias(graph: str, name: str) -> np.ndarray:
    return np.asarray(_initializer(graph, name)[0])


def test_more_experts_take_longer() -> None:
    shape = ExpertShape(experts=16, experts_per_token=8, hidden=256, intermediate=128)
    found = measure_layer(shape, batch=4, rounds=5)
    assert len(found.milliseconds) == len(found.spread) == 8
    assert 0 < found.milliseconds[0] < found.milliseconds[-1]


def test_layers_of_one_shape_are_measured_once(measured: list) -> None:
    times = measure_latencies([SHAPE, OTHER, SHAPE], dtype="float32", batch=2)
    assert measured == [(SHAPE, 2), (OTHER, 2)]
    # As measured: two experts that took less than one are not smoothed away.
    assert times == {SHAPE: (1.0, 0.5, 2.0), OTHER: (2.0, 0.5, 2.0)}


def test_a_measurement_is_used_again_if_it_is_the_same(measured: list, tmp_path: Path) -> None:
    path = tmp_path / "out.latency.json"
    first = measure_latencies([SHAPE], dtype="float32", batch=1, path=path)
    again = measure_latencies([SHAPE, OTHER], dtype="float32", batch=1, path=path)
    assert again[SHAPE] == first[SHAPE]
    measure_latencies([SHAPE], dtype="float32", batch=4, path=path)
    assert measured == [(SHAPE, 1), (OTHER, 1), (SHAPE, 4)]
    measure_latencies([SHAPE, OTHER], dtype="float32", batch=1, path=path)
    assert len(measured) == 3


def test_what_another_compile_measures_meanwhile_stays(
    measured: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.latency.json"
    alone = latency.measure_layer

    def together(shape: ExpertShape, **options: Any) -> LayerLatency:
        monkeypatch.setattr(latency, "measure_layer", alone)
        measure_latencies([OTHER], dtype="float32", batch=1, path=path)
        return alone(shape, **options)

    monkeypatch.setattr(latency, "measure_layer", together)
    measure_latencies([SHAPE], dtype="float32", batch=1, path=path)
    measure_latencies([SHAPE, OTHER], dtype="float32", batch=1, path=path)
    assert measured == [(OTHER, 1), (SHAPE, 1)]


def test_a_measurement_of_another_machine_is_not_used(measured: list, tmp_path: Path) -> None:
    path = tmp_path / "out.latency.json"
    measure_latencies([SHAPE], dtype="float32", batch=1, path=path)
    data = json.loads(path.read_text())
    data["measurements"][0]["machine"] = "another"
    path.write_text(json.dumps(data))
    measure_latencies([SHAPE], dtype="float32", batch=1, path=path)
    assert len(measured) == 2
    assert len(json.loads(path.read_text())["measurements"]) == 2


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1, "measurements": [{"spread": 1}]}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "out.latency.json"
    path.write_text(text)
    with pytest.raises(CostError, match=r"out\.latency\.json holds no latencies .* Delete it"):
        measure_latencies([SHAPE], dtype="float32", batch=1, path=path)


def test_a_file_that_cannot_be_written_is_named(measured: list, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"latencies can't be saved as .*missing"):
        measure_latencies(
            [SHAPE], dtype="float32", batch=1, path=tmp_path / "missing" / "out.latency.json"
        )


def test_types_the_cpu_does_not_compute_in_are_refused() -> None:
    with pytest.raises(CostError, match=r"no float16\. Use --cost bytes"):
        measure_latencies([SHAPE], dtype="float16", batch=1)


def test_a_busy_machine_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    from alloc_moe.runtime.console import Console

    noisy = {SHAPE: LayerLatency((1.0, 2.0, 3.0), (0.0, 0.4, 0.1))}
    latency._report(noisy, Console())
    told = capsys.readouterr().err
    assert "8 experts of 16x8: 1 2 3 ms" in told
    assert "vary by 40%" in told
