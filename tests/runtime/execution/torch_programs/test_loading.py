"""What is refused before torch sees it."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alloc_moe.runtime.artifact.files import find_artifact
from alloc_moe.runtime.artifact.plan import PLAN_KEY, PROGRAM_KEY
from alloc_moe.runtime.artifact.torch_file import add_metadata
from alloc_moe.runtime.errors import ArtifactError, DeviceError, GenerationError
from alloc_moe.runtime.execution.session import open_session
from alloc_moe.runtime.execution.torch_programs.loading import (
    CacheTensor,
    Interface,
    check_no_pickle,
)

INTERFACE = Interface(257, True, "float32", (CacheTensor((None, 4, None, 8), 2),) * 2)

RAW = {
    "archive_format": "pt2",
    "models/model.json": "{}",
    "data/sample_inputs/model.pt": "",
    "data/weights/weight_0": "1234",
    "data/weights/model_weights_config.json": '{"config": {"w": {"use_pickle": false}}}',
}


@pytest.fixture
def artifact(tmp_path: Path, toy_artifact: Any) -> Callable[..., Path]:
    """Return a function that writes an archive with a plan and what else it is given."""

    def write(program: str = INTERFACE.to_json(), suffix: str = ".pt", **entries: str) -> Path:
        path = tmp_path / f"out{suffix}"
        with zipfile.ZipFile(path, "w") as file:
            for name, content in {"version": "3", **entries}.items():
                file.writestr(f"out/{name}", content)
        add_metadata(path, {PLAN_KEY: toy_artifact.PLAN.to_json(), PROGRAM_KEY: program})
        return path

    return write


def test_an_interface_is_read_as_it_was_written(artifact: Callable[..., Path]) -> None:
    assert Interface.read(find_artifact(artifact())) == INTERFACE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary": 0}, "vocabulary"),
        ({"dtype": "int8"}, "one of float32, bfloat16"),
        ({"cache": [{"sizes": [None, 4, 5], "past_axis": 2}]}, "not those of batch and past"),
        ({"cache": [{"sizes": [None, 4, None], "past_axis": 1}]}, "not those of batch and past"),
        ({"dial": "yes"}, "true or false"),
    ],
)
def test_an_interface_that_is_none_is_told(
    artifact: Callable[..., Path], change: dict[str, Any], message: str
) -> None:
    path = artifact(json.dumps(json.loads(INTERFACE.to_json()) | change))
    with pytest.raises(ArtifactError, match=rf"alloc_moe\.program in .*out\.pt.*{message}"):
        open_session(path)


def test_raw_weights_are_no_pickle(artifact: Callable[..., Path]) -> None:
    check_no_pickle(artifact(suffix=".pt2", **RAW))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data/sample_inputs/model.pt", "x"),
        ("data/weights/model_weights_config.json", '{"config": {"w": {"use_pickle": true}}}'),
        ("data/constants/custom_obj_0", "x"),
        ("data/constants/model_constants_config.json", '{"config": {"w": {"use_pickle": true}}}'),
        ("serialized_state_dict.pt", "x"),
        ("data/aotinductor/model/x.so", "x"),
    ],
)
@pytest.mark.parametrize("load", [check_no_pickle, open_session])
def test_a_pickle_is_refused(
    artifact: Callable[..., Path], load: Callable[[Path], object], name: str, content: str
) -> None:
    path = artifact(suffix=".pt2", **{**RAW, name: content})
    with pytest.raises(ArtifactError, match=f"out.pt2 has {name}, which may be a pickle"):
        load(path)


def test_a_configuration_that_says_nothing_is_refused(artifact: Callable[..., Path]) -> None:
    name = "data/weights/model_weights_config.json"
    path = artifact(suffix=".pt2", **{**RAW, name: '{"config": {"w": {}}}'})
    with pytest.raises(ArtifactError, match=rf"{name} in .* can't be read: it lacks .*use_pickle"):
        check_no_pickle(path)


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_torch_may_be_missing(
    artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ArtifactError, match=r"runs in torch, which isn't installed\. Install it"):
        open_session(artifact(suffix=suffix, **RAW))


def test_an_archive_without_a_program_is_told(artifact: Callable[..., Path]) -> None:
    with pytest.raises(ArtifactError, match=r"torch .* can't load .*out\.pt"):
        open_session(artifact())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ep": "cuda"}, DeviceError, r"out\.pt runs in torch on the CPU only"),
        ({"ep": "gpu"}, GenerationError, "The provider is 'gpu'. Give auto, cpu or cuda"),
        ({"more_options": {"enable_x": "1"}}, GenerationError, "has no option enable_x"),
        ({"threads": 0}, GenerationError, "0 threads can't run a model"),
    ],
)
def test_what_only_onnxruntime_has_is_refused(
    artifact: Callable[..., Path], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_session(artifact(), **options)
