"""Step programs compute what the graphs do that carry them."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from alloc_moe.compiler.export.normalize import export_model
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.rounding.formats import choose_formats
from alloc_moe.compiler.rounding.weights import quantized
from alloc_moe.compiler.verify.exact import keep_activations
from alloc_moe.passes.default import specialize_passes
from alloc_moe.passes.experts.lower import Allocation, TokenFactors
from alloc_moe.runtime.execution.step_programs.programs import step_program

FAMILIES = ["olmoe", "qwen2_moe", "qwen3_moe", "mixtral", "glm4_moe", "deepseek_v2"]
V3 = pytest.param("deepseek_v3", marks=pytest.mark.rare)
# Biased projections, norms of each head, half of a head rotated, a first dense layer, a router with
# sigmoid scores and a bias for the choice alone, a shared expert without a gate.
GLM4_MOE: dict[str, Any] = {
    "num_hidden_layers": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "head_dim": 32,
    "partial_rotary_factor": 0.5,
}
PROMPTS = ([5, 9, 2, 7], [3, 8])
STEPS = ([11, 4], [6, 1], [12, 12])
NEAR = 2e-5
Models = Callable[[str], MoeModel]


@pytest.fixture(scope="module")
def models(moe_model: Models, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Return a function from a family's name to its model."""

    @functools.cache
    def glm() -> MoeModel:
        root = Path(__file__).parents[3]
        source = root / "examples" / "checkpoints" / "small.py"
        spec = importlib.util.spec_from_file_location("small", source)
        assert spec is not None
        assert spec.loader is not None
        small = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(small)
        settings = {**small.FAMILIES["glm4_moe"], **GLM4_MOE}
        return load_model(str(small.save_checkpoint(tmp_path_factory.mktemp("glm"), settings)))

    return lambda family: glm() if family == "glm4_moe" else moe_model(family)


@pytest.fixture(scope="module")
def graphs(models: Models) -> Callable[..., ir.Model]:
    """Return a function from a family's name to its normalised graph, exported once."""
    return functools.cache(lambda family: export_model(models(family), dtype="float32"))


def specialized(graph: ir.Model, allocation: Allocation, **options: Any) -> ir.Model:
    model = graph.clone()
    specialize_passes(allocation, pairs=True, positions=128, **options)(model)
    return model


def allocated(moe: MoeModel, redistribution: str = "none", **options: Any) -> Allocation:
    ks = [max(layer.experts_per_token // 2, 1) for layer in moe.layers]
    return Allocation(ks, redistribution, **options)


def program(model: ir.Model) -> dict[str, Any]:
    assert "alloc_moe.no_step" not in model.metadata_props, model.metadata_props
    taken = step_program(model.metadata_props)
    assert not isinstance(taken, str), f"the runtime doesn't take it: {taken}"
    found: dict[str, Any] = json.loads(model.metadata_props["alloc_moe.step"])
    return found


def weights(model: ir.Model) -> Mapping[str, NDArray[Any]]:
    found = model.graph.initializers.items()
    return {name: value.const_value.numpy() for name, value in found if value.const_value}


class Artifact:
    """A graph in onnxruntime, with the cache of rows that begin with their tokens."""

    def __init__(self, model: ir.Model, *, price: float | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        content = ir.to_proto(model).SerializeToString()
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(content, options, providers=providers)
        self.names = [value.name for value in self.session.get_inputs()]
        self.price = {} if price is None else {"alloc_moe.price": np.array(price, np.float32)}
        self.past: dict[str, NDArray[Any]] = {}
        for value in self.session.get_inputs():
            if value.name.startswith("past"):
                _, heads, _, size = value.shape
                dtype = np.float16 if "float16" in value.type else np.float32
                self.past[value.name] = np.zeros((len(PROMPTS), heads, 0, size), dtype)
        self.lengths = np.zeros(len(PROMPTS), np.int64)

    def run(self, ids: Sequence[Sequence[int]]) -> NDArray[Any]:
        """Return the logits [rows, V] of each row's last token."""
        width = max(map(len, ids))
        self.lengths += [len(row) for row in ids]
        tokens = np.array([[*row, *[0] * (width - len(row))] for row in ids])
        columns = np.arange(max(int(self.lengths.max()), width))
        inputs = {
            "input_ids": tokens,
            "attention_mask": (columns < self.lengths[:, None]).astype(np.int64),
            "position_ids": self.lengths[:, None] - [[len(row)] for row in ids] + np.arange(width),
            **self.past,
        }
        inputs = {name: value for name, value in inputs.items() if name in self.names}
        inputs |= self.price  # an input that may be left out isn't named
        outputs = [value.name for value in self.session.get_outputs()]
        made = dict(zip(outputs, self.session.run(None, inputs), strict=True))
        for name in self.past:
            self.past[name] = made[name.replace("past_key_values", "present")]
        last = np.array([len(row) for row in ids]) - 1
        logits: NDArray[Any] = made["logits"][np.arange(len(ids)), last]
        return logits.astype(np.float32)

    def cache(self) -> dict[int, list[tuple[NDArray[np.float32], NDArray[np.float32]]]]:
        """Return keys and values of each layer and row, as long as the row."""
        found = {}
        for layer in range(len(self.past) // 2):
            parts = [self.past[f"past_key_values.{layer}.{kind}"] for kind in ("key", "value")]
            keys, values = (part.astype(np.float32) for part in parts)
            found[layer] = [
                (keys[row, :, :length], values[row, :, :length])
                for row, length in enumerate(self.lengths)
            ]
        return found


def check(
    model: ir.Model, interpreter: ModuleType, *, near: float = NEAR, price: float | None = None
) -> list[NDArray[np.bool_]]:
    """Continue rows of two lengths in both; return what the last step kept."""
    artifact = Artifact(model, price=price)
    artifact.run(PROMPTS)
    steps = interpreter.Interpreter(program(model), weights(model), sequences=2, price=price)
    steps.cache = artifact.cache()
    for tokens in STEPS:
        expected = artifact.run([[token] for token in tokens])
        made = steps.step(tokens)
        assert np.abs(made - expected).max() < near * np.abs(expected).max()
    for layer, rows in artifact.cache().items():
        for given, found in zip(rows, steps.cache[layer], strict=True):
            for one, other in zip(given, found, strict=True):
                np.testing.assert_allclose(other, one, atol=near * np.abs(one).max())
    kept: list[NDArray[np.bool_]] = steps.kept
    return kept


@pytest.mark.parametrize("weights", ["keep", "renorm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_program_computes_what_its_graph_does(
    graphs: Callable[..., ir.Model],
    models: Models,
    step_interpreter: ModuleType,
    family: str,
    weights: str,
) -> None:
    model = specialized(graphs(family), allocated(models(family), weights=weights))
    check(model, step_interpreter)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_a_launch_of_its_own_that_could_join_another(
    graphs: Callable[..., ir.Model], models: Models, family: str
) -> None:
    model = specialized(graphs(family), allocated(models(family)))
    found = [op["op"] for op in program(model)["ops"]]
    dense = {"qwen2_moe": 1, "glm4_moe": 1, "deepseek_v2": 1}.get(family, 0)
    expanding = int(family == "deepseek_v2")  # products that make keys and values
    layers, sparse = models(family).config.num_hidden_layers, len(models(family).layers)
    assert sorted(found) == sorted(
        [
            *["embed", "linear"],
            *[*["linear"] * expanding, "linear", "attention", "linear"] * layers,
            *["route", "experts"] * sparse,
            *["linear", "swiglu", "linear"] * dense,
        ]
    )


def test_windows_and_sinks_are_said_to_have_no_program(
    graphs: Callable[..., ir.Model], models: Models
) -> None:
    model = specialized(graphs("gpt_oss"), allocated(models("gpt_oss")))
    assert "alloc_moe.step" not in model.metadata_props
    reason = model.metadata_props["alloc_moe.no_step"]
    assert reason == "its attention stays the standard operator"


@pytest.mark.parametrize("changed", [{"alpha": 1.702}, {"beta": 1.0}, {"limit": 7.0}], ids=str)
def test_another_gate_than_silu_is_said_to_have_no_program(
    graphs: Callable[..., ir.Model], models: Models, changed: dict[str, float]
) -> None:
    graph = graphs("olmoe").clone()
    node = next(node for node in graph.graph if node.op_type == "RoutedExperts")
    for name, value in changed.items():
        node.attributes[name] = ir.AttrFloat32(name, value)
    model = specialized(graph, allocated(models("olmoe")))
    assert "alloc_moe.step" not in model.metadata_props
    assert model.metadata_props["alloc_moe.no_step"] == "its experts' gate is no plain SiLU"


@pytest.mark.parametrize(
    "options",
    [
        {"redistribution": "batch"},
        {"redistribution": "sequence"},
        {"redistribution": "threshold", "thresholds": [0.12] * 3},
        {"redistribution": "ratio", "thresholds": [0.6] * 3},
        {"redistribution": "top-p", "thresholds": [-0.4] * 3},
        {"redistribution": "threshold", "thresholds": [0.02] * 3, "cap": 1.2},
    ],
    ids=lambda options: "-".join([options["redistribution"], *["cap"] * ("cap" in options)]),
)
def test_policies_keep_what_the_graph_keeps(
    graphs: Callable[..., ir.Model],
    models: Models,
    step_interpreter: ModuleType,
    options: dict[str, Any],
) -> None:
    model = specialized(graphs("olmoe"), allocated(models("olmoe"), **options))
    kept = check(model, step_interpreter)
    counts = np.concatenate([mask.sum(1) for mask in kept])
    assert 1 <= counts.min() <= counts.max() <= 4
    if options["redistribution"] == "batch":
        assert [mask.sum() for mask in kept] == [4, 4, 4]


@pytest.mark.parametrize("overlap", [0.0, 0.4])
@pytest.mark.parametrize("price", [None, 0.05])
def test_prices_can_be_dialled(
    graphs: Callable[..., ir.Model],
    models: Models,
    step_interpreter: ModuleType,
    overlap: float,
    price: float | None,
) -> None:
    sizes = np.random.default_rng(0).uniform(0.5, 1.5, (3, 8)).tolist()
    allocation = allocated(
        models("olmoe"),
        "price",
        thresholds=[0.2] * 3,
        sizes=sizes,
        overlap=overlap,
        dial=True,
    )
    model = specialized(graphs("olmoe"), allocation)
    kept = check(model, step_interpreter, price=price)
    assert 0 < np.mean(kept) < 1


@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_tokens_have_sizes_of_their_own(
    graphs: Callable[..., ir.Model], models: Models, step_interpreter: ModuleType, overlap: float
) -> None:
    given = {"thresholds": [0.2] * 3, "sizes": [[1.0] * 8] * 3, "overlap": overlap}
    allocation = allocated(models("olmoe"), "price", **given)
    random = np.random.default_rng(0)
    hidden = models("olmoe").config.hidden_size
    maps = [random.normal(size=(hidden, 8)).astype(np.float32) for _ in range(3)]
    factors = [TokenFactors(each, each[0], 2.5) for each in maps]
    model = specialized(graphs("olmoe"), dataclasses.replace(allocation, token_factors=factors))
    alike = specialized(graphs("olmoe"), allocation)
    assert not np.array_equal(*(check(each, step_interpreter) for each in (model, alike)))


def test_a_program_in_float16_is_as_near_as_rounding_lets_it_be(
    half_graph: ir.Model, models: Models, step_interpreter: ModuleType
) -> None:
    model = specialized(half_graph, allocated(models("olmoe")))
    assert program(model)["dtype"] == "float16"
    check(model, step_interpreter, near=1e-2)


@pytest.mark.parametrize("redistribution", ["batch", "price"])
def test_latent_attention_goes_with_plans_that_choose_per_call(
    graphs: Callable[..., ir.Model],
    models: Models,
    step_interpreter: ModuleType,
    redistribution: str,
) -> None:
    options: dict[str, Any] = {}
    if redistribution == "price":
        options = {"thresholds": [0.2] * 2, "sizes": [[1.0] * 8] * 2, "dial": True}
    allocation = allocated(models("deepseek_v2"), redistribution, **options)
    check(specialized(graphs("deepseek_v2"), allocation), step_interpreter)


@pytest.mark.parametrize(
    ("family", "where", "changed"),
    [("deepseek_v2", "k_shared", {"offset": 16}), ("olmoe", "k_norm", {"eps": 1e-2})],
)
def test_what_is_changed_shows(
    graphs: Callable[..., ir.Model],
    models: Models,
    step_interpreter: ModuleType,
    family: str,
    where: str,
    changed: dict[str, float],
) -> None:
    model = specialized(graphs(family), allocated(models(family)))
    steps = program(model)
    next(op for op in steps["ops"] if op["op"] == "attention")[where].update(changed)
    model.metadata_props["alloc_moe.step"] = json.dumps(steps)
    with pytest.raises(AssertionError):
        check(model, step_interpreter)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v2", V3])
def test_quantised_weights_are_read_as_the_kernels_read_them(
    checkpoint: Callable[..., Path], step_interpreter: ModuleType, family: str, dtype: str
) -> None:
    wide = {"qk_nope_head_dim": 48, "v_head_dim": 32} if family.startswith("deepseek") else {}
    moe = load_model(str(checkpoint(family, **wide)))
    forms = choose_formats(moe.checkpoint, dtype, device="cuda")
    moe = quantized(moe, dataclasses.replace(forms, activations="float32"))
    assert moe.quantization is not None
    formats = dict(enumerate(moe.quantization.experts))
    model = specialized(export_model(moe, dtype=dtype), allocated(moe), formats=formats)
    keep_activations(model)
    with mock.patch.dict(os.environ, {"ORT_QMOE_CPU_QNBIT_GEMM": "fp32"}):
        check(model, step_interpreter)
