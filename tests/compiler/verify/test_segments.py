"""Graphs cut where their weights exceed a limit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from alloc_moe.compiler.verify.segments import Segment, cut_graph, extract_segment
from alloc_moe.runtime.execution.providers import create_session, session_options

WEIGHT = 64 * 64 * 4  # bytes of each matrix

# Two layers and a head. `past` and `present` are state, `shift` depends on a weight only, `scale`
# may be given by a call, and an If captures what was made before it.
GRAPH = """
<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
model (float[n, 64] x, float[m, 64] past, float scale,
       float[64, 64] w0, float[64, 64] w1, float[64, 64] w2, float[64] bias)
  => (float[n, 64] y, float[k, 64] present)
<float scale = {2.0}, int64[1] axis = {0}>
{
    length = Shape (past)
    shift = Neg (bias)
    scaled = Mul (x, scale)
    first = MatMul (scaled, w0)
    shifted = Add (first, shift)
    doubled = local.Double (shifted)
    second = MatMul (doubled, w1)
    present = Concat <axis = 0> (past, second)
    sums = ReduceSum <keepdims = 1> (present, axis)
    third = Add (second, sums)
    zero = Sub (scale, scale)
    yes = Cast <to = 9> (zero)
    fourth = MatMul (third, w2)
    chosen = If (yes) <
        then_branch = yes_branch () => (float[n, 64] a) { a = Add (doubled, fourth) },
        else_branch = no_branch () => (float[n, 64] b) { b = Sub (fourth, doubled) }
    >
    counted = Add (chosen, shift)
    lengths = Cast <to = 1> (length)
    total = ReduceMax <keepdims = 0> (lengths)
    y = Add (counted, total)
}
<domain: "local", opset_import: ["" : 21]>
Double (a) => (b) { b = Add (a, a) }
"""
STATE = {"past": "present"}


@pytest.fixture
def model(tmp_path: Path) -> ir.Model:
    model = ir.from_onnx_text(GRAPH)
    random = np.random.default_rng(0)
    for value in list(model.graph.inputs):
        if value.name in ("w0", "w1", "w2", "bias"):
            assert value.shape is not None
            array = random.standard_normal(value.shape.numpy(), np.float32)
            value.const_value = ir.tensor(array, name=value.name)
            model.graph.inputs.remove(value)
            model.graph.register_initializer(value)
    ir.save(model, tmp_path / "model.onnx", external_data="model.data", size_threshold_bytes=128)
    return ir.load(tmp_path / "model.onnx")


@pytest.fixture
def feeds() -> dict[str, NDArray[np.generic]]:
    random = np.random.default_rng(1)
    return {
        "x": random.standard_normal((3, 64), np.float32),
        "past": random.standard_normal((5, 64), np.float32),
    }


def borders(segments: list[Segment]) -> list[tuple[set[str | None], set[str | None]]]:
    return [({v.name for v in s.inputs}, {v.name for v in s.outputs}) for s in segments]


def run(
    model: ir.Model, folder: Path, feeds: dict[str, NDArray[np.generic]]
) -> dict[str, NDArray[np.generic]]:
    """Run a model, whose data are in the folder, on what it takes of the feeds."""
    content = ir.to_proto(model).SerializeToString()
    options = session_options(data_folder=folder)
    session: onnxruntime.InferenceSession = create_session(
        content, options, ep="cpu", name=folder / "model.onnx"
    )
    outputs = [value.name for value in session.get_outputs()]
    given = {value.name: feeds[value.name] for value in session.get_inputs()}
    optional = {value.name for value in session.get_overridable_initializers()}
    given |= {name: array for name, array in feeds.items() if name in optional}
    return dict(zip(outputs, session.run(outputs, given), strict=True))


def test_a_segment_ends_where_its_weights_would_exceed_the_limit(model: ir.Model) -> None:
    assert borders(cut_graph(model.graph, WEIGHT + 256, state=STATE)) == [
        ({"x", "past", "scale"}, {"length", "doubled"}),
        ({"doubled", "past", "scale"}, {"third", "yes", "present"}),
        ({"third", "yes", "doubled", "length"}, {"y"}),
    ]


@pytest.mark.parametrize(
    ("limit", "segments"), [(4 * WEIGHT, 1), (2 * WEIGHT + 256, 2), (WEIGHT + 256, 3), (1, 5)]
)
@pytest.mark.parametrize("scale", [None, 3.0])
def test_segments_in_turn_give_what_the_whole_graph_gives(
    model: ir.Model,
    feeds: dict[str, NDArray[np.generic]],
    tmp_path: Path,
    limit: int,
    segments: int,
    scale: float | None,
) -> None:
    if scale is not None:
        feeds["scale"] = np.array(scale, np.float32)
    expected = run(model, tmp_path, feeds)
    cut = cut_graph(model.graph, limit, state=STATE)
    assert len(cut) == segments
    values = dict(feeds)
    for segment in cut:
        values |= run(extract_segment(model, segment, values), tmp_path, values)
    for name, array in expected.items():
        np.testing.assert_array_equal(values[name], array)


def test_a_segment_refers_to_the_same_data(model: ir.Model) -> None:
    last = cut_graph(model.graph, WEIGHT + 256, state=STATE)[-1]
    graph = extract_segment(model, last, {}).graph
    weights = {name: value.const_value for name, value in graph.initializers.items()}
    assert set(weights) == {"w2", "bias"}
    for name, tensor in weights.items():
        assert isinstance(tensor, ir.ExternalTensor)
        assert tensor is model.graph.initializers[name].const_value


def test_what_reads_a_state_and_what_replaces_it_are_in_one_segment(model: ir.Model) -> None:
    assert borders(cut_graph(model.graph, 1, state={"past": "y"}))[-1] == (
        {"past", "scale", "doubled", "length"},
        {"present", "y"},
    )


def test_types_and_ranks_that_the_graph_lacks_are_those_of_the_values(
    model: ir.Model, feeds: dict[str, NDArray[np.generic]]
) -> None:
    segment = cut_graph(model.graph, WEIGHT + 256, state=STATE)[1]
    given = {"doubled": np.zeros((3, 64), np.float16)}
    inputs = {value.name: value for value in extract_segment(model, segment, given).graph.inputs}
    assert inputs["doubled"].dtype == ir.DataType.FLOAT16
    assert inputs["doubled"].shape is not None
    assert inputs["doubled"].shape.rank() == 2
    assert str(inputs["past"].shape) == "[m,64]"
