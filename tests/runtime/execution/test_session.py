"""Artifacts in onnxruntime: caches, padding, counts, and what is said when something is missing."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest

from alloc_moe.runtime.artifact.plan import MODEL_FILE
from alloc_moe.runtime.errors import ArtifactError, DeviceError, GenerationError
from alloc_moe.runtime.execution import providers
from alloc_moe.runtime.execution.buffers import to_numpy
from alloc_moe.runtime.execution.providers import session_options
from alloc_moe.runtime.execution.session import open_session

IDS = np.array([[72, 101, 108, 108, 111], [87, 111, 114, 108, 100]])


@pytest.fixture(params=["float", "float16", "bfloat16"])
def cache_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("position_input", [True, False])
def test_pieces_with_a_cache_equal_one_call(
    make_toy: Callable[..., Path], tmp_path: Path, cache_type: str, position_input: bool
) -> None:
    path = make_toy(tmp_path / "a.onnx", cache=cache_type, position_input=position_input)
    session = open_session(path, ep="cpu")
    whole = session.run(IDS)
    start = session.run(IDS[:, :3])
    rest = [session.run(IDS[:, 3:4], cache=start.cache)]
    rest.append(session.run(IDS[:, 4:], cache=rest[0].cache))
    pieces = np.concatenate([start.logits, *(step.logits for step in rest)], axis=1)
    tolerance = {"float": 1e-4, "float16": 2e-2, "bfloat16": 2e-1}[cache_type]
    np.testing.assert_allclose(pieces, whole.logits, atol=tolerance)
    assert rest[1].cache.length == whole.cache.length == 5


def test_ids_and_mask_may_be_of_any_integer_type(toy: Path) -> None:
    session = open_session(toy, ep="cpu")
    mask = np.ones(IDS.shape, np.bool_)
    small = session.run(IDS.astype(np.int32), attention_mask=mask).logits
    np.testing.assert_array_equal(small, session.run(IDS).logits)


def test_left_padding_changes_nothing(toy: Path, toy_without_positions: Path) -> None:
    for path in (toy, toy_without_positions):
        session = open_session(path, ep="cpu")
        alone = session.run(IDS[:1, :3]).logits
        ids = np.array([[0, 0, *IDS[0, :3]], IDS[1]])
        mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
        padded = session.run(ids, attention_mask=mask).logits
        np.testing.assert_allclose(padded[0, 2:], alone[0], atol=1e-5)


def test_the_cache_has_the_shapes_and_types_of_the_graph(
    make_toy: Callable[..., Path], tmp_path: Path, cache_type: str, sizes: SimpleNamespace
) -> None:
    session = open_session(make_toy(tmp_path / "a.onnx", cache=cache_type), ep="cpu")
    empty = session.empty_cache(3)
    assert {tuple(value.shape()) for value in empty.values} == {(3, 1, 0, sizes.width)}
    assert {value.data_type() for value in empty.values} == {f"tensor({cache_type})"}
    grown = session.run(IDS).cache
    assert {tuple(value.shape()) for value in grown.values} == {(2, 1, 5, sizes.width)}
    assert (grown.batch, grown.length) == (2, 5)


def test_activations_are_counted_in_the_call_itself(toy: Path, sizes: SimpleNamespace) -> None:
    counting, plain = open_session(toy, ep="cpu", count_activations=True), open_session(toy)
    output = counting.run(IDS)
    assert output.activations == (IDS.size * sizes.active,) * sizes.layers
    np.testing.assert_array_equal(output.logits, plain.run(IDS).logits)
    assert plain.run(IDS).activations is None


def test_counting_finds_the_data_from_any_working_directory(
    toy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(toy.parent)
    assert open_session("out.onnx", count_activations=True).run(IDS).activations
    monkeypatch.chdir(tmp_path)
    assert open_session(toy, count_activations=True).run(IDS).activations


def test_a_bundle_folder_is_an_artifact(bundle: Path) -> None:
    session = open_session(bundle, ep="cpu", threads=1, stop_spinning=True)
    assert session.files.graph == bundle / MODEL_FILE
    assert session.plan.source == "nowhere/toy"


def test_bfloat16_becomes_float32_exactly() -> None:
    numbers = np.array([[1.0, -2.5], [3.0, 1e30]], np.float32)
    halves = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(halves, 16)
    truncated = (halves.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(to_numpy(value), truncated)


def test_missing_data_is_reported(toy: Path, tmp_path: Path) -> None:
    shutil.copy(toy, tmp_path)
    with pytest.raises(ArtifactError, match=r"weights in .*out\.onnx\.data, which is missing"):
        open_session(tmp_path / "out.onnx")


def test_truncated_data_is_reported(toy: Path, tmp_path: Path) -> None:
    shutil.copy(toy, tmp_path)
    data = (toy.parent / "out.onnx.data").read_bytes()
    (tmp_path / "out.onnx.data").write_bytes(data[:-1])
    message = rf"has {len(data) - 1} bytes, out\.onnx needs {len(data)}"
    with pytest.raises(ArtifactError, match=message):
        open_session(tmp_path / "out.onnx")


def test_a_model_that_alloc_moe_did_not_compile_is_reported(toy: Path, tmp_path: Path) -> None:
    proto = onnx.load(toy)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "other.onnx")
    with pytest.raises(ArtifactError, match=r"other\.onnx was not compiled by alloc-moe"):
        open_session(tmp_path / "other.onnx")


def test_a_folder_that_is_no_bundle_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no model\.onnx, so it is no bundle"):
        open_session(tmp_path)


def test_a_plan_of_a_newer_format_is_reported(
    make_toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_toy(tmp_path / "new.onnx", plan='{"format": 99}')
    with pytest.raises(ArtifactError, match="format 99, this version reads 1"):
        open_session(path)


def edited(toy: Path, target: Path, edit: Callable[[onnx.ModelProto], None]) -> Path:
    """Return a copy of the toy, weights inside, whose graph was edited."""
    proto = onnx.load(toy)
    edit(proto)
    onnx.save(proto, target)
    return target


def test_a_graph_without_router_probabilities_cannot_be_counted(toy: Path, tmp_path: Path) -> None:
    def rename(proto: onnx.ModelProto) -> None:
        for node in proto.graph.node:
            for names in (node.input, node.output):
                names[:] = [name.replace("alloc_moe.router_probs", "probs") for name in names]

    path = edited(toy, tmp_path / "a.onnx", rename)
    open_session(path)
    with pytest.raises(ArtifactError, match=r"no value alloc_moe\.router_probs\.0"):
        open_session(path, count_activations=True)


def test_a_graph_with_an_unknown_input_is_reported(toy: Path, tmp_path: Path) -> None:
    def add_input(proto: onnx.ModelProto) -> None:
        proto.graph.input.append(onnx.ValueInfoProto(name="price", type=proto.graph.input[0].type))

    with pytest.raises(ArtifactError, match="needs price"):
        open_session(edited(toy, tmp_path / "a.onnx", add_input))


def test_a_cache_without_past_axis_is_reported(toy: Path, tmp_path: Path) -> None:
    def fix_past(proto: onnx.ModelProto) -> None:
        proto.graph.input[3].type.tensor_type.shape.dim[2].dim_value = 7

    with pytest.raises(ArtifactError, match=r"cache past_key_values\.0\.key .* that of the past"):
        open_session(edited(toy, tmp_path / "a.onnx", fix_past))


def test_a_cache_that_is_never_returned_is_reported(toy: Path, tmp_path: Path) -> None:
    def drop_output(proto: onnx.ModelProto) -> None:
        del proto.graph.output[-1]

    with pytest.raises(ArtifactError, match=r"never updates past_key_values\.1\.value"):
        open_session(edited(toy, tmp_path / "a.onnx", drop_output))


def test_what_onnxruntime_rejects_is_one_line_without_noise(
    toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def break_node(proto: onnx.ModelProto) -> None:
        proto.graph.node[0].op_type = "NoSuchOp"

    with pytest.raises(ArtifactError, match=r"can't load .*a\.onnx: .*NoSuchOp") as caught:
        open_session(edited(toy, tmp_path / "a.onnx", break_node), ep="cpu")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_onnxruntime_is_told_what_is_asked() -> None:
    options = session_options(
        threads=3,
        stop_spinning=True,
        more={
            "enable_cpu_mem_arena": "0",
            "intra_op_num_threads": "2",
            "session.intra_op.allow_spinning": "0",
        },
    )
    assert options.enable_cpu_mem_arena is False
    assert options.enable_mem_pattern is True
    assert options.intra_op_num_threads == 2
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("enable_mem_arena", "0", "no switch or number 'enable_mem_arena'"),
        ("_init_", "0", "no switch or number '_init_'"),
        ("add_session_config_entry", "0", "no switch or number"),
        ("enable_mem_pattern", "off", "enable_mem_pattern is 'off'. It takes 0 or 1."),
        ("intra_op_num_threads", "two", "is 'two'. It takes a whole number."),
    ],
)
def test_what_onnxruntime_cannot_be_told_is_rejected(name: str, value: str, message: str) -> None:
    with pytest.raises(GenerationError, match=re.escape(message)):
        session_options(more={name: value})


def test_fewer_threads_than_one_are_rejected(toy: Path) -> None:
    with pytest.raises(GenerationError, match="0 threads"):
        open_session(toy, threads=0)


@pytest.fixture
def no_gpu() -> None:
    if providers.cuda_obstacle() is None:
        pytest.skip("this machine has a GPU")


@pytest.mark.usefixtures("no_gpu")
def test_cuda_without_a_gpu_is_an_error(toy: Path) -> None:
    with pytest.raises(DeviceError, match=r"CUDA can't be used: .*(driver|GPU|provider)"):
        open_session(toy, ep="cuda")


@pytest.mark.usefixtures("no_gpu")
def test_auto_without_a_gpu_runs_on_the_cpu_and_says_so_once(
    toy: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [providers.CUDA])
    with caplog.at_level(logging.INFO):
        assert open_session(toy, ep="auto").device == "cpu"
    assert len(caplog.messages) == 1
    assert "Running on the CPU: no NVIDIA driver" in caplog.text
    assert capfd.readouterr().out == ""


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_without_cuda_libraries_is_told_in_one_line(
    toy: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if providers.CUDA not in onnxruntime.get_available_providers():
        pytest.skip("this build of onnxruntime has no CUDA provider")
    monkeypatch.setattr(providers, "cuda_obstacle", lambda: None)
    with caplog.at_level(logging.INFO):
        assert open_session(toy, ep="auto").device == "cpu"
    assert "libraries can't be loaded (pip install" in caplog.text
    assert capfd.readouterr() == ("", "")
