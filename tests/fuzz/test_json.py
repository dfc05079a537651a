"""JSON from outside, changed anywhere: it is read, or refused in one sentence."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alloc_moe.compiler.errors import ProfileError
from alloc_moe.compiler.records import SensitivityProfile
from alloc_moe.runtime.artifact.digest import read_digests
from alloc_moe.runtime.artifact.files import ArtifactFiles
from alloc_moe.runtime.artifact.onnx_file import OnnxFile
from alloc_moe.runtime.artifact.plan import DATA_KEY, GENERATION_KEY, TOKENIZER_KEY, AllocationPlan
from alloc_moe.runtime.artifact.shapes import MOST_BYTES, ShapeError, anything, load_json, read_file
from alloc_moe.runtime.commands.tables import plan_table
from alloc_moe.runtime.console import Console
from alloc_moe.runtime.errors import AllocMoeError, ArtifactError

PLAN = {
    "format": 1,
    "source": "a/model",
    "budget": {"requested": 0.5, "activations": 3.5, "original": 8},
    "redistribution": "price",
    "weights": "keep",
    "layers": [
        {"name": "l.0", "experts": 4, "k_original": 4, "k": 1.75, "sizes": [1.0, 2.0, 0.5, 1.0]},
        {"name": "l.1", "experts": 4, "k_original": 4, "k": 1.75, "threshold": 0.25, "bits": 4},
        {
            "name": "l.2",
            "experts": 1,
            "k_original": 1,
            "k": 1,
            "sizes": [1.0],
            "token_sizes": {"hidden": 2, "values": "ADwAPAA8"},
        },
    ],
    "sensitivity": {"metric": "fisher", "tokens": 8192, "calibration_sha256": "0" * 64},
    "verify": {"max_abs_logit_error": 1e-6, "tokens": 108},
    "versions": {"alloc-moe": "0.1.0"},
    "price": 0.1,
    "overlap": 0.2,
    "dial": [{"activations": 7.0, "price": 0.05}, {"activations": 2.5, "price": 0.4}],
    "cap": 1.5,
    "correction": {"mode": "affine"},
    "cost": {"unit": "bytes", "limit": 5, "planned": 4.5, "original": 9},
    "quantization": {"dtype": "int4", "expert_bits": [4, 8]},
}

DEEP: Any = 1
for _ in range(60):
    DEEP = [DEEP]

VALUES = st.one_of(
    st.sampled_from(
        [None, True, False, "", "x", [], {}, [1], {"a": 1}, 0, -1, 1.5, 10**9, 10**40, -(10**400)]
    ),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e308, 1e-320, DEEP, "\ud800", "\x1b[31m"]),
    st.sampled_from(["a" * 10_000, [0] * 70_000]),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        ),
        max_leaves=6,
    ),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to every value inside a JSON value."""
    found = [path] if path else []
    entries = value.items() if isinstance(value, dict) else ()
    entries = enumerate(value) if isinstance(value, list) else entries
    for key, inner in entries:
        found += places(inner, (*path, key))
    return found


def changed(data: Any, draw: st.DrawFn) -> Any:
    """Return JSON with some values replaced, taken away, or put where none was."""
    data = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, 3))):
        every = places(data)
        if not every:
            break
        *way, last = draw(st.sampled_from(every))
        holder = data
        for key in way:
            holder = holder[key]
        kind = draw(st.sampled_from(["set", "drop", "add"]))
        if kind == "drop":
            del holder[last]
        elif kind == "add" and isinstance(holder, dict):
            holder[draw(st.text(max_size=3))] = copy.deepcopy(draw(VALUES))  # examples are shared
        else:
            holder[last] = copy.deepcopy(draw(VALUES))  # examples are shared
    return data


def text_of(data: Any, draw: st.DrawFn) -> str:
    """Return a JSON text, sometimes with some characters cut out or changed."""
    text = json.dumps(data)
    if draw(st.integers(0, 4)) == 0:
        start = draw(st.integers(0, len(text)))
        cut = draw(st.integers(0, 40))
        text = text[:start] + draw(st.text(max_size=3)) + text[start + cut :]
    return text


@st.composite
def changed_texts(draw: st.DrawFn, data: Any) -> str:
    return text_of(changed(data, draw), draw)


def refuse(error: AllocMoeError) -> None:
    """Check that a refusal is one short line."""
    assert "\n" not in str(error)
    assert len(str(error)) < 1000


@settings(settings.get_profile("fuzz"))
@given(changed_texts(PLAN))
def test_a_plan_is_read_and_shown_or_refused(text: str) -> None:
    try:
        plan = AllocationPlan.from_json(text)
    except ArtifactError as error:
        refuse(error)
        return
    assert AllocationPlan.from_json(plan.to_json()) == plan or "NaN" in plan.to_json()
    Console(quiet=True).result(plan_table(plan, name="x"), {})


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, "[" * 990 + "]" * 990, "1" * 5000])
def test_depth_and_digits_are_bounded(text: str) -> None:
    with pytest.raises(ArtifactError, match="plan can't be read") as caught:
        AllocationPlan.from_json(text)
    refuse(caught.value)
    with pytest.raises(ShapeError, match=r"nested too deeply|digits|no JSON"):
        anything(load_json(text), "")


@pytest.mark.parametrize(
    ("text", "name"),
    [('{"k": 1, "k": 1}', "k"), ('[{"a": {"\\ud800": 0, "b": 1, "\\ud800": 2}}]', r"\\ud800")],
)
def test_a_field_that_is_there_twice_is_refused(text: str, name: str) -> None:
    with pytest.raises(ShapeError, match=f'^it has the field "{name}" twice$') as caught:
        load_json(text)
    assert str(caught.value).isascii()


def test_plans_and_profiles_with_a_field_twice_are_refused(tmp_path: Path) -> None:
    twice = json.dumps(PLAN).replace('"experts":', '"experts": 8, "experts":', 1)
    with pytest.raises(ArtifactError, match=r'be read: it has the field "experts" twice\. Copy'):
        AllocationPlan.from_json(twice)
    with pytest.raises(ProfileError, match=r'p\.json .*it has the field "format" twice'):
        SensitivityProfile.from_json('{"format": 1, "format": 1}', path=tmp_path / "p.json")


def test_a_text_of_any_length_is_not_parsed() -> None:
    with pytest.raises(ArtifactError, match="characters, more than any"):
        AllocationPlan.from_json("[" + "0," * (MOST_BYTES // 2) + "0]")


def test_a_file_of_any_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(ShapeError, match="more than any"):
        read_file(path)
    with pytest.raises(ShapeError, match="it is no file"):
        read_file(tmp_path)
    for name in ("a\0b", "a\ud800b"):
        with pytest.raises(ShapeError, match="no file can be called so"):
            read_file(tmp_path / name)


METADATA = {
    GENERATION_KEY: {"eos_token_id": [1, 2], "context_length": 64},
    TOKENIZER_KEY: {"sha256": "0" * 64, "files": ["1" * 64], "bos_token": "<s>"},
    DATA_KEY: {"x.data": {"size": 5, "block": 1 << 20, "samples": "0" * 64, "blocks": ["1" * 32]}},
}


@settings(settings.get_profile("fuzz"))
@given(st.fixed_dictionaries({key: changed_texts(value) for key, value in METADATA.items()}))
def test_metadata_are_read_or_refused(metadata: dict[str, str]) -> None:
    plan = AllocationPlan.from_json(json.dumps(PLAN))
    graph = Path("nowhere/out.onnx")
    files = ArtifactFiles(graph, OnnxFile(metadata, {"x.data": 5}, frozenset()), plan)
    readers: list[Callable[[], object]] = [
        files.eos_ids,
        files.context_length,
        files.tokenizer_identity,
        lambda: read_digests(metadata, graph=graph),
        files.check_data,
    ]
    for read in readers:
        try:
            read()
        except ArtifactError as error:
            refuse(error)


CONFIGURATIONS = {
    "generation_config.json": {"eos_token_id": [1, 2]},
    "config.json": {"eos_token_id": 3, "max_position_embeddings": 64},
    "genai_config.json": {"model": {"eos_token_id": 4, "context_length": 64}},
}


@settings(settings.get_profile("fuzz"))
@given(st.fixed_dictionaries({n: changed_texts(value) for n, value in CONFIGURATIONS.items()}))
def test_configurations_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str]
) -> None:
    folder = tmp_path_factory.mktemp("configurations", numbered=True)
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8", errors="surrogatepass")
    plan = AllocationPlan.from_json(json.dumps(PLAN))
    files = ArtifactFiles(folder / "out.onnx", OnnxFile({}, {}, frozenset()), plan)
    for read in (files.eos_ids, files.context_length):
        try:
            read()
        except ArtifactError as error:
            refuse(error)
    for name in texts:
        (folder / name).unlink()


def saved_files(synthetic_sweep: ModuleType, folder: Path) -> dict[str, tuple[Any, Any]]:
    """Return by name what the compiler saves: an example, and what reads it."""
    from alloc_moe.compiler.planning.saved import read_latencies, read_losses
    from alloc_moe.compiler.records import PartialSums, SensitivityProfile
    from alloc_moe.compiler.sweep.records import SweepResults

    profile = SensitivityProfile(
        *("fisher", "0" * 64, "1" * 64, 256, 128, 0, ("a", "b"), (2, 2), ((1.0, 0.5), None)),
        *(2.5, 1.25, "none", "affine", ((1.0, 2.0), None), PartialSums(1, 2.0, ((1.0,), ())), ()),
    )
    sweep = json.loads(synthetic_sweep.synthetic_sweep(layers=2).to_json())
    sweep["cells"] = sweep["cells"][:2]
    path = folder / "saved.json"
    latency = {"milliseconds": [1.0, 2.0], "spread": [0.1, 0.1], "machine": "x", "shape": {"a": 1}}
    return {
        "profile": (
            json.loads(json.dumps({"format": 1, **dataclasses.asdict(profile)})),
            lambda: SensitivityProfile.from_json(read_file(path), path=path),
        ),
        "sweep": (sweep, lambda: SweepResults.from_json(path.read_text("utf-8"), path=path)),
        "latencies": ({"format": 1, "measurements": [latency]}, lambda: read_latencies(path)),
        "losses": ({"format": 1, "losses": {"a": {"1 2": 0.5}}}, lambda: read_losses(path)),
    }


@pytest.mark.parametrize("name", ["profile", "sweep", "latencies", "losses"])
def test_what_the_compiler_saved_is_read_or_refused(
    synthetic_sweep: ModuleType, tmp_path: Path, name: str
) -> None:
    example, read = saved_files(synthetic_sweep, tmp_path)[name]
    path = tmp_path / "saved.json"
    path.write_text(json.dumps(example), "utf-8")
    read()

    @settings(settings.get_profile("fuzz"))
    @given(changed_texts(example))
    def check(text: str) -> None:
        path.write_text(text, "utf-8", errors="replace")
        try:
            read()
        except AllocMoeError as error:
            refuse(error)

    check()
