"""States of fixed size: carried from call to call, forked, and what can't be done with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from alloc_moe.runtime.errors import ArtifactError, GenerationError
from alloc_moe.runtime.execution.cache import Cache
from alloc_moe.runtime.execution.session import ArtifactSession, open_session

IDS = np.random.default_rng(3).integers(0, 257, (2, 12))
ONES = np.ones_like(IDS)
PADDED = np.array([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 12])
WIDTH, TAPS = 8, 4
FLOAT = ir.DataType.FLOAT

# What precedes the first layer: a convolution and a recurrence, of real tokens only.
_NODES = """
<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
states (float[a, b, 8] embedded, int64[a, c] attention_mask) => (float[a, b, 8] hidden0)
{
  new_mask = Slice(attention_mask, past, total, axis1)
  new_real = Cast<to=1>(new_mask)
  new_rows = Unsqueeze(new_real, last_axis)
  real_rows = Mul(embedded, new_rows)
  channels = Transpose<perm=[0, 2, 1]>(real_rows)
  convolved, present__0__conv_state = com.microsoft.CausalConvWithState
    <activation="silu">(channels, taps, , past_key_values__0__conv_state)
  mixed_rows = Transpose<perm=[0, 2, 1]>(convolved)
  steps = MatMul(real_rows, rates)
  positive = Softplus(steps)
  decay = Neg(positive)
  recalled, present__0__recurrent_state = com.microsoft.LinearAttention
    <update_rule="gated", q_num_heads=1, kv_num_heads=1, scale=0.1>
    (mixed_rows, mixed_rows, mixed_rows, past_key_values__0__recurrent_state, decay)
  hidden0 = Add(embedded, recalled)
}
"""


def with_states(path: Path, out: Path) -> Path:
    """Write a toy artifact whose first layer has states before it; its data stay where they are."""
    proto = onnx.load(path, load_external_data=False)
    nodes = proto.graph.node
    at = next(index for index, node in enumerate(nodes) if node.output[0] == "hidden0")
    nodes[at].output[0] = "embedded"
    added = list(onnx.parser.parse_model(_NODES).graph.node)
    for node in added:
        for names in (node.input, node.output):
            names[:] = [name.replace("__", ".") for name in names]
    following = list(nodes[at + 1 :])
    del nodes[at + 1 :]
    nodes.extend([*added, *following])
    random = np.random.default_rng(5)
    for name, array in (
        ("taps", random.normal(size=(WIDTH, 1, TAPS)).astype(np.float32)),
        ("rates", random.normal(size=(WIDTH, 1)).astype(np.float32) / 4),
        ("last_axis", np.array([2])),
    ):
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    shapes = {"conv_state": [WIDTH, TAPS - 1], "recurrent_state": [1, WIDTH, WIDTH]}
    for kind, shape in shapes.items():
        for side, values in (
            ("past_key_values", proto.graph.input),
            ("present", proto.graph.output),
        ):
            values.append(ir.to_proto(ir.val(f"{side}.0.{kind}", FLOAT, ["batch", *shape])))
    onnx.save(proto, out)
    return out


@pytest.fixture(params=["copied", "shared"])
def session(request: pytest.FixtureRequest, toy: Path, shared_toy: Path) -> ArtifactSession:
    path = {"copied": toy, "shared": shared_toy}[request.param]
    return open_session(with_states(path, path.with_name("states.onnx")), ep="cpu")


def in_pieces(
    session: ArtifactSession,
    lengths: list[int],
    cache: Cache,
    mask: NDArray[np.int64] = PADDED,
) -> NDArray[np.floating]:
    """Return the logits of all tokens, run in pieces of these lengths."""
    logits, start = [], 0
    for length in lengths:
        end = start + length
        ids, seen = IDS[:, start:end], mask[:, :end]
        logits.append(session.run(ids, attention_mask=seen, cache=cache).logits)
        start = end
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("lengths", [[1] * 12, [5, *[1] * 7], [2, 3, 1, 6]], ids=str)
def test_pieces_equal_one_call(session: ArtifactSession, lengths: list[int]) -> None:
    expected = session.run(IDS, attention_mask=PADDED).logits
    found = in_pieces(session, lengths, session.empty_cache(2))
    real = PADDED > 0
    np.testing.assert_allclose(found[real], expected[real], atol=2e-4)


def test_a_row_is_what_it_is_alone_without_its_left_padding(session: ArtifactSession) -> None:
    together = in_pieces(session, [5, *[1] * 7], session.empty_cache(2))
    alone = session.run(IDS[:1, 3:]).logits
    np.testing.assert_allclose(together[:1, 3:], alone, atol=2e-4)


def test_the_states_count(session: ArtifactSession) -> None:
    """Else the other tests would say nothing of them."""
    cache = session.empty_cache(2)
    in_pieces(session, [11], cache, ONES)
    forgetful = cache.fork()
    forgetful.states.clear()
    ids = IDS[:, 11:]
    right, wrong = (session.run(ids, cache=c).logits for c in (cache, forgetful))
    assert np.abs(right - wrong).max() > 0.05


def test_a_fork_can_be_continued_on_its_own(session: ArtifactSession) -> None:
    cache = session.empty_cache(2)
    in_pieces(session, [4], cache)
    fork = cache.fork()
    first = session.run(IDS[:, 4:5], cache=cache).logits
    session.run(IDS[:, 5:6], cache=cache)
    np.testing.assert_array_equal(session.run(IDS[:, 4:5], cache=fork).logits, first)


def test_a_row_that_pauses_goes_on_where_it_was(session: ArtifactSession) -> None:
    expected = session.run(IDS[1:, :7]).logits[0, -1]
    cache = session.empty_cache(2)
    in_pieces(session, [6], cache, ONES)
    pause = np.concatenate([ONES[:, :6], [[1], [0]]], axis=1)
    session.run(IDS[:, 7:8], attention_mask=pause, cache=cache)
    resumed = np.concatenate([pause, [[1], [1]]], axis=1)
    found = session.run(IDS[:, 6:7], attention_mask=resumed, cache=cache).logits[1, -1]
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize(
    ("first", "then"),
    [([[1, 0, 1], [1, 1, 1]], None), ([[1, 1, 0], [1, 1, 1]], [[1, 1, 0, 1], [1, 1, 1, 1]])],
    ids=["in a call", "between calls"],
)
def test_padding_between_tokens_is_refused(
    session: ArtifactSession, first: list[list[int]], then: list[list[int]] | None
) -> None:
    cache = session.empty_cache(2)
    message = r"Row 1 has padding between its tokens, .* before a row's first token"
    if then is not None:
        session.run(IDS[:, :3], attention_mask=np.array(first), cache=cache)
    mask = np.array(first if then is None else then)
    ids = IDS[:, cache.length : mask.shape[1]]
    with pytest.raises(GenerationError, match=message):
        session.run(ids, attention_mask=mask, cache=cache)
    assert cache.length == mask.shape[1] - ids.shape[1]


def test_a_cache_goes_back_to_its_start_only(session: ArtifactSession) -> None:
    cache = session.empty_cache(2)
    first = in_pieces(session, [12], cache)
    cache.truncate(12)
    message = r"A cache of 12 columns can't be cut to 5, as the model's states \(.*conv_state and 1"
    with pytest.raises(GenerationError, match=message):
        cache.truncate(5)
    assert cache.length == 12
    cache.truncate(0)
    again = in_pieces(session, [12], cache)
    np.testing.assert_array_equal(again, first)


@pytest.mark.parametrize(
    ("dim", "size"), [(0, 2), (1, None)], ids=["fixed batch", "symbolic channels"]
)
def test_a_state_of_no_fixed_size_is_reported(toy: Path, dim: int, size: int | None) -> None:
    path = with_states(toy, toy.with_name("states.onnx"))
    proto = onnx.load(path, load_external_data=False)
    found = next(value for value in proto.graph.input if value.name.endswith(".conv_state"))
    where = found.type.tensor_type.shape.dim[dim]
    if size is None:
        where.dim_param = "some"
    else:
        where.dim_value = size
    onnx.save(proto, path)
    message = r"cache past_key_values\.0\.conv_state .* its only symbolic size, the first"
    with pytest.raises(ArtifactError, match=message):
        open_session(path, ep="cpu")
