"""Sessions whose decode steps run by our kernels, emulated, against onnxruntime."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from alloc_moe.runtime.execution.session import ArtifactSession, open_session
from alloc_moe.runtime.execution.step_programs.kernels import OwnKernels
from alloc_moe.runtime.execution.step_programs.programs import check_graph, step_program

TOLERANCE = {"float32": 1e-4, "float16": 3e-2}
SMALL_GPU = 101_376  # bytes of shared memory
CASES = [
    ("tiny-moe", None, "float32", "price"),  # whole: other tests have its graph captured
    ("tiny-qwen3-moe", 2, "float16", "price"),
    ("deepseek_v2", None, "float32", "price"),
    ("deepseek_v2", None, "float16", "none"),
    ("deepseek_v2", None, "float16", "batch"),
    ("tiny-moe", 2, "int4", "price"),
    ("tiny-moe", 2, "int8", "price"),
    ("deepseek_v2", None, "int4", "price"),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def opened(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    compiled_for_cuda: Callable[..., Path],
    emulator: ModuleType,
) -> tuple[ArtifactSession, OwnKernels]:
    """Return a session on the CPU and what emulates its kernels."""
    _, _, dtype, redistribution = request.param
    own_sizes = redistribution == "price" and dtype != "int4"  # of tokens
    options: dict[str, Any] = {} if own_sizes else {"token_sizes": False}
    if own_sizes and dtype == "float32":
        options["price_per"] = "sequence"
    path = compiled_for_cuda(*request.param, **options)
    _keep_activations(path)
    with mock.patch.dict(os.environ, {"ORT_QMOE_CPU_QNBIT_GEMM": "fp32"}):
        session = open_session(path, ep="cpu")
    program = step_program(session.files.onnx.metadata)
    assert not isinstance(program, str), program
    routes = [op for op in program["ops"] if op["op"] == "route"]
    assert all(("token_sizes" in op["keep"]) is own_sizes for op in routes)
    check_graph(program, session.slots, session.vocabulary, path=session.files.graph)
    device = emulator.EmulatedDevice(tmp_path_factory.mktemp("kernels"))
    if request.param[2] == "int8":  # the smaller tiles too
        device.most_shared = SMALL_GPU
    return session, OwnKernels(program, session.files, session.files.check_data(), device)


def _keep_activations(path: Path) -> None:
    """Have dense products of weights in blocks round no activations to 8 bits, as on a GPU."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    path.write_bytes(model.SerializeToString())


def _decode(
    session: ArtifactSession, kernels: OwnKernels | None, price: float | None
) -> list[NDArray[np.floating]]:
    """Return logits of a left-padded prompt and of steps after it; row 0 ends before the last."""
    session._kernels = kernels
    random = np.random.default_rng(0)
    mask = np.ones((3, 9), np.int64)
    mask[1, :4] = mask[2, :1] = 0
    cache = session.empty_cache(3, capacity=16)
    logits = []
    for step in range(4):
        size = mask.shape[1] if not step else 1
        if step:
            mask = np.hstack([mask, [[int(step < 3)], [1], [1]]])
        output = session.run(
            random.integers(3, session.vocabulary, (3, size)),
            attention_mask=mask,
            cache=cache,
            price=price if step == 1 else None,
            logits_to_keep=1,
        )
        logits.append(output.logits)
    return logits


def test_steps_give_the_graphs_logits(opened: tuple[ArtifactSession, OwnKernels]) -> None:
    session, kernels = opened
    price = 0.05 if session.has_dial else None
    expected, actual = _decode(session, None, price), _decode(session, kernels, price)
    dtype = "float16" if expected[0].dtype == np.float16 else "float32"
    for step, (one, other) in enumerate(zip(expected, actual, strict=True)):
        rows = slice(1 if step == 3 else 0, None)
        assert other.dtype == one.dtype
        assert np.abs(one[rows].astype(float) - other[rows]).max() < TOLERANCE[dtype]
    assert np.abs(actual[1][0] - actual[2][0]).max() > 0.1, "all steps are alike"


def test_prompts_give_the_logits_of_steps(opened: tuple[ArtifactSession, OwnKernels]) -> None:
    session, kernels = opened
    if kernels.prefill_obstacle:
        pytest.skip(f"onnxruntime computes its prompts: {kernels.prefill_obstacle}")
    session._kernels = kernels
    ids = np.random.default_rng(1).integers(3, session.vocabulary, (3, 7))
    mask = np.ones_like(ids)
    mask[1, :4] = 0
    prompt = session.run(ids, attention_mask=mask, logits_to_keep=1).logits
    cache = session.empty_cache(3, capacity=8)
    for at in range(ids.shape[1]):
        tokens, seen = ids[:, at : at + 1], mask[:, : at + 1]
        step = session.run(tokens, attention_mask=seen, cache=cache, logits_to_keep=1).logits
    assert np.abs(prompt.astype(float) - step).max() < TOLERANCE["float16"]
    assert np.abs(step).max() > 1


def test_a_shared_experts_gate_and_factor_may_be_two_weights(
    opened: tuple[ArtifactSession, OwnKernels], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, kernels = opened
    program, address = copy.deepcopy(dict(kernels.stepper.program)), kernels.stepper.weight
    shared = next((op["shared"] for op in program["ops"] if op.get("shared")), None)
    if shared is None or not shared.get("format"):
        pytest.skip("it has no shared expert in blocks")
    session._kernels = kernels
    ids = np.random.default_rng(2).integers(3, session.vocabulary, (1, 5))
    expected = session.run(ids, logits_to_keep=1).logits
    name, form = shared["gate_up"], shared["format"]["gate_up"]
    values = shared["intermediate"] * program["hidden"]
    second = {
        "second": address(name) + values * form["bits"] // 8,
        "second.scales": address(form["scales"]) + values // form["block"] * 2,
    }
    shared["gate_up"] = {"gate": name, "up": "second"}
    shared["format"]["gate_up"] = {"gate": form, "up": {**form, "scales": "second.scales"}}
    monkeypatch.setattr(kernels.stepper, "program", program)
    monkeypatch.setattr(kernels.stepper, "weight", lambda name: second.get(name) or address(name))
    np.testing.assert_array_equal(session.run(ids, logits_to_keep=1).logits, expected)


def test_prompts_of_half_precision_run_by_own_kernels(
    opened: tuple[ArtifactSession, OwnKernels],
) -> None:
    session, kernels = opened
    prompt = np.zeros((2, 5), np.int64), np.ones((2, 5), np.int64)
    half = kernels.stepper.program["dtype"] == "float16"
    competing = session.files.plan.redistribution == "batch"
    assert kernels.takes(*prompt, 1) is (half and not competing)
    assert not kernels.takes(*prompt, None), "logits of all tokens"
    assert not kernels.takes(np.zeros((17, 1), np.int64), np.ones((17, 1), np.int64), 1)


@pytest.mark.parametrize("width", [1, 5])
def test_each_sequence_has_its_price(
    opened: tuple[ArtifactSession, OwnKernels], width: int
) -> None:
    session, kernels = opened
    if not session.has_dial or (width > 1 and kernels.prefill_obstacle):
        pytest.skip("this program has no prices, or onnxruntime computes its prompts")
    prices = 0.0, 0.05, 10.0
    ids = np.random.default_rng(0).integers(3, session.vocabulary, (3, width))
    new = np.ones_like(ids)

    def logits(price: float | tuple[float, ...]) -> NDArray[np.floating]:
        cache = session.empty_cache(3, capacity=width)
        return kernels.run(ids, new, cache, price)

    alone = np.concatenate([logits(price)[row : row + 1] for row, price in enumerate(prices)])
    # Sums are in another order where other experts run beside one's own.
    off = np.abs(logits(prices).astype(float) - alone).max()
    assert off < TOLERANCE[kernels.stepper.program["dtype"]] / 3
    assert off < np.abs(logits(prices) - logits(0.0)).max() / 10


def test_prices_of_sequences_give_the_graphs_logits(
    opened: tuple[ArtifactSession, OwnKernels],
) -> None:
    session, kernels = opened
    if not session.takes_prices:
        pytest.skip("calls of this artifact have one price")
    ids = np.random.default_rng(0).integers(3, session.vocabulary, (3, 8))

    def logits(by: OwnKernels | None, prices: list[float]) -> NDArray[np.floating]:
        session._kernels, cache = None, session.empty_cache(3, capacity=8)
        session.run(ids[:, :7], cache=cache)
        session._kernels = by
        return session.run(ids[:, 7:], cache=cache, price=prices, logits_to_keep=1).logits

    prices = [0.0, 0.05, 10.0]
    assert np.abs(logits(kernels, prices) - logits(None, prices)).max() < TOLERANCE["float32"]
    assert np.abs(logits(kernels, prices) - logits(kernels, [0.0] * 3)).max() > 0.01
