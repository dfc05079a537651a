"""Files of an artifact: where they go, that they appear at once, and what is in them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest

from alloc_moe.compiler import compile
from alloc_moe.compiler.errors import OutputError
from alloc_moe.compiler.export.specialize import specialize
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.package import output as package
from alloc_moe.compiler.package.output import Output, parse_output
from alloc_moe.compiler.workspace.folders import claim
from alloc_moe.runtime.artifact.files import find_artifact
from alloc_moe.runtime.artifact.plan import MODEL_FILE, PLAN_FILE, PLAN_KEY, AllocationPlan
from alloc_moe.runtime.execution.session import open_session
from alloc_moe.runtime.text.generation import generate


def test_an_onnx_file_is_a_bare_artifact(tmp_path: Path) -> None:
    output = parse_output(str(tmp_path / "out.onnx"), force=False)
    assert output == Output(tmp_path / "out.onnx", bundle=False)
    assert output.graph_name == "out.onnx"
    assert output.profile_path == tmp_path / "out.onnx.profile.json"


@pytest.mark.parametrize("existing", [False, True])
def test_a_folder_is_a_bundle(tmp_path: Path, existing: bool) -> None:
    if existing:
        (tmp_path / "half").mkdir()
    output = parse_output(f"{tmp_path / 'half'}/", force=existing)
    assert output == Output(tmp_path / "half", bundle=True)
    assert output.graph_name == MODEL_FILE
    assert output.profile_path == tmp_path / "half.profile.json"


def test_the_current_folder_can_be_a_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_output(".", force=True) == Output(tmp_path, bundle=True)


@pytest.mark.parametrize("name", ["out", "out.bin"])
def test_a_name_that_is_neither_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(
        OutputError,
        match=re.escape(f"Write {tmp_path / 'out.onnx'}, or {path}/ for a bundle."),
    ):
        parse_output(str(path), force=False)


def test_a_missing_parent_is_reported(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"The folder .*gone for the output doesn't exist"):
        parse_output(str(tmp_path / "gone" / "out.onnx"), force=False)


def test_a_folder_that_is_read_only_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(OutputError, match="can't be written to"):
        parse_output(str(tmp_path / "out.onnx"), force=False)


def test_the_root_of_the_file_system_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "root").symlink_to("/")
    for text in ("/", f"{tmp_path / 'root'}/"):
        with pytest.raises(OutputError, match=f"^{text} is the root of the file system"):
            parse_output(text, force=True)


def test_a_path_that_leads_nowhere_is_reported(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "far").symlink_to("missing/deep")
    (tmp_path / "file").touch()
    for name, reason in (
        ("loop/", "saved as .*loop: Too many levels of symbolic links"),
        ("far/", "The folder .*missing for the output doesn't exist"),
        ("file/out.onnx", "saved as .*out.onnx: Not a directory"),
        ("x" * 300 + "/", "saved as .*x: File name too long"),
    ):
        with pytest.raises(OutputError, match=reason):
            parse_output(f"{tmp_path}/{name}", force=False)


@pytest.mark.parametrize("name", ["out.onnx", "out.onnx.data"])
def test_an_existing_file_is_replaced_with_force_only(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(OutputError, match=rf"{re.escape(name)} exists\. Give --force"):
        parse_output(str(tmp_path / "out.onnx"), force=False)
    parse_output(str(tmp_path / "out.onnx"), force=True)


def test_an_existing_bundle_is_replaced_with_force_only(tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / PLAN_FILE).write_text("{}")
    with pytest.raises(OutputError, match=r"half exists\. Give --force"):
        parse_output(f"{tmp_path}/half/", force=False)
    parse_output(f"{tmp_path}/half/", force=True)


def test_an_empty_folder_needs_no_force(tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    assert parse_output(f"{tmp_path / 'half'}/", force=False).place == tmp_path / "half"
    (tmp_path / "half" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not a bundle that alloc-compile wrote"):
        parse_output(f"{tmp_path / 'half'}/", force=True)


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_bundle_is_never_replaced(tmp_path: Path, force: bool) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("no folder")
    for name in ("home", "file"):
        with pytest.raises(OutputError, match=rf"{name} is not a bundle that alloc-compile wrote"):
            parse_output(f"{tmp_path}/{name}/", force=force)


# writing


@pytest.fixture(scope="module")
def plan(
    moe_model: Callable[[str], MoeModel], plan_for: Callable[..., AllocationPlan]
) -> AllocationPlan:
    return plan_for(moe_model("olmoe"), [2, 3, 1])


@pytest.fixture(scope="module")
def specialized(exported: Callable[[str], ir.Model], plan: AllocationPlan) -> ir.Model:
    return specialize(exported("olmoe"), plan, device="cpu")


def test_all_weights_are_written_and_reported(specialized: ir.Model, tmp_path: Path) -> None:
    reported: list[int] = []
    package.save_graph(specialized, tmp_path / "out.onnx", advance=reported.append)
    assert {path.name for path in tmp_path.iterdir()} == {"out.onnx", "out.onnx.data"}
    loaded = ir.load(tmp_path / "out.onnx")
    for name, value in specialized.graph.initializers.items():
        expected, found = value.const_value, loaded.graph.initializers[name].const_value
        assert expected is not None
        assert found is not None
        np.testing.assert_array_equal(found.numpy(), expected.numpy())
    assert sum(reported) <= sum(
        value.const_value.nbytes
        for value in specialized.graph.initializers.values()
        if value.const_value is not None
    )


def test_stamping_a_plan_leaves_the_weights(
    specialized: ir.Model, plan: AllocationPlan, tmp_path: Path
) -> None:
    import dataclasses

    package.save_graph(specialized, tmp_path / "out.onnx")
    data = (tmp_path / "out.onnx.data").read_bytes()
    final = dataclasses.replace(plan, verify={"kl": 0.25})
    package.stamp(tmp_path / "out.onnx", final)
    assert (tmp_path / "out.onnx.data").read_bytes() == data
    found = find_artifact(tmp_path / "out.onnx")
    found.check_data()
    assert found.plan == final
    assert found.onnx.metadata[PLAN_KEY] == final.to_json()
    assert found.context_length() == 128
    assert found.eos_ids() == {256}


def test_a_bundle_has_what_runtimes_need(
    specialized: ir.Model,
    plan: AllocationPlan,
    moe_model: Callable[[str], MoeModel],
    tmp_path: Path,
) -> None:
    package.write_bundle_files(tmp_path, moe_model("olmoe"), specialized, plan)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        PLAN_FILE,
        "genai_config.json",
    }
    assert AllocationPlan.from_json((tmp_path / PLAN_FILE).read_text()) == plan


@pytest.mark.parametrize(
    ("family", "layers", "heads", "size"),
    [("olmoe", 3, 4, 16), ("qwen2_moe", 4, 2, 16), ("deepseek_v2", 3, 1, 32)],
)
def test_onnxruntime_genai_gets_its_configuration(
    exported: Callable[[str], ir.Model],
    moe_model: Callable[[str], MoeModel],
    family: str,
    layers: int,
    heads: int,
    size: int,
) -> None:
    config = json.loads(json.dumps(package.genai_config(moe_model(family), exported(family))))
    model = config["model"]
    assert (model["eos_token_id"], model["bos_token_id"]) == (256, 256)
    assert (model["context_length"], model["vocab_size"], model["type"]) == (128, 288, "decoder")
    decoder = model["decoder"]
    assert decoder["filename"] == MODEL_FILE
    assert decoder["num_hidden_layers"] == layers
    assert (decoder["num_key_value_heads"], decoder["head_size"]) == (heads, size)
    assert decoder["inputs"] == {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "position_ids": "position_ids",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    assert config["search"]["past_present_share_buffer"] is False


def test_onnxruntime_genai_is_told_which_layers_have_states(
    moe_model: Callable[[str], MoeModel],
) -> None:
    slots = [
        *(f"0.{kind}_state" for kind in ("conv", "recurrent")),
        *(f"1.{kind}" for kind in ("key", "value")),
    ]
    inputs = [
        ir.val(f"past_key_values.{slot}", ir.DataType.FLOAT, ["batch_size", 2, "past", 16])
        for slot in slots
    ]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 23}, name="states")
    config = package.genai_config(moe_model("qwen3_next"), ir.Model(graph, ir_version=10))
    decoder = config["model"]["decoder"]
    assert decoder["layer_types"] == ["linear_attention", "full_attention"]
    assert decoder["inputs"] == {
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
        "past_conv_names": "past_key_values.%d.conv_state",
        "past_recurrent_names": "past_key_values.%d.recurrent_state",
    }
    assert decoder["outputs"]["present_recurrent_names"] == "present.%d.recurrent_state"
    assert decoder["num_key_value_heads"] == 2


@pytest.mark.families
@pytest.mark.parametrize("family", ["lfm2_moe", "qwen3_next", "granitemoehybrid_mamba"])
def test_onnxruntime_genai_continues_a_hybrid_as_we_do(
    checkpoint: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    compile(str(checkpoint(family)), budget=1.0, output=f"{tmp_path}/out/", tokens=256)
    model = genai.Model(str(tmp_path / "out"))
    session = open_session(tmp_path / "out", ep="cpu")
    lengths = []
    for seed in range(4):  # random models say the end of the text early
        prompt = np.random.default_rng(seed).integers(0, 256, 20)
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=60, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(prompt.astype(np.int32))
        tokens = []
        while not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        (ours,) = generate(session, [prompt], max_new_tokens=40)
        assert ours[: len(tokens)] == tokens
        lengths.append(len(tokens))
    assert max(lengths) > 10


def test_onnxruntime_genai_shares_a_cache_that_is_appended_to_in_place(
    specialized: ir.Model, moe_model: Callable[[str], MoeModel]
) -> None:
    config = package.genai_config(moe_model("olmoe"), specialized)
    assert config["search"]["past_present_share_buffer"] is True


def test_a_disk_that_is_too_full_is_reported_with_both_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 3 << 30
    monkeypatch.setattr(package.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    output = package.parse_output(str(tmp_path / "out.onnx"), force=False)
    package.check_space(output, free)
    with pytest.raises(
        OutputError,
        match=rf"Writing {tmp_path}/out\.onnx needs 12\.50 GiB, but {tmp_path} has 3\.00 GiB free\."
        " Free some space, or choose an output on another disk",
    ):
        package.check_space(output, 25 << 29)


def test_what_a_killed_compile_left_counts_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    output = package.parse_output(str(tmp_path / "out.onnx"), force=False)
    claim(tmp_path / ".out.onnx.partial")
    for name in ("out.onnx.data", "out.onnx.data.journal"):
        (tmp_path / ".out.onnx.partial" / name).write_bytes(bytes(25))
    package.check_space(output, 150)
    with pytest.raises(OutputError):
        package.check_space(output, 151)


def test_what_lies_behind_a_planted_link_counts_as_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    output = package.parse_output(str(tmp_path / "out.onnx"), force=False)
    claim(tmp_path / "other")
    for name in ("out.onnx.data", "out.onnx.data.journal"):
        (tmp_path / "other" / name).write_bytes(bytes(25))
    (tmp_path / ".out.onnx.partial").symlink_to(tmp_path / "other")
    with pytest.raises(OutputError):
        package.check_space(output, 101)
