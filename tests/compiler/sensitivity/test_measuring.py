from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from alloc_moe.compiler.calibration.windows import CalibrationSet
from alloc_moe.compiler.errors import OutputError, ProfileError, UnsupportedModelError
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.records import Metric, SensitivityProfile
from alloc_moe.compiler.reference.experts import allocated
from alloc_moe.compiler.reference.policies import LayerParameters
from alloc_moe.compiler.sensitivity import job
from alloc_moe.compiler.sensitivity import measuring as sensitivity
from alloc_moe.compiler.sensitivity import replayed as sensitivity_replay
from alloc_moe.compiler.sensitivity.measuring import measure_sensitivity
from alloc_moe.runtime.console import Console

Models = Callable[[str], MoeModel]

CALIBRATION = CalibrationSet(
    ids=np.random.default_rng(0).integers(0, 256, (5, 24)),
    sha256="0123456789abcdef",
    seed=0,
    tokens=120,
    sequence_length=24,
    name="random",
)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make 5 windows take 3 batches, and a window's logits several."""
    monkeypatch.setattr(sensitivity_replay, "_TOKENS_PER_BATCH", 2 * 4 * 24)
    monkeypatch.setattr(sensitivity_replay, "_LOGITS_PER_BATCH", 20 * 4 * 288)
    monkeypatch.setattr(sensitivity_replay, "_FEWEST_POSITIONS", 1)


def logits(moe: MoeModel, ks: list[int]) -> torch.Tensor:
    """Run the whole model with k experts in each layer."""
    with (
        torch.inference_mode(),
        allocated(
            moe.model,
            moe.layers,
            [LayerParameters(k) for k in ks],
            redistribution="none",
            weights="keep",
        ),
    ):
        return moe.model(input_ids=torch.from_numpy(CALIBRATION.ids)).logits.double()


def loss(of: torch.Tensor) -> float:
    targets = torch.from_numpy(CALIBRATION.ids)[:, 1:].flatten()
    return F.cross_entropy(of[:, :-1].flatten(0, 1), targets).item()


def naive_cost(moe: MoeModel, metric: Metric, layer: int, k: int) -> float:
    full = [each.experts_per_token for each in moe.layers]
    later = full[layer + 1 :] if metric == "kl" else [1] * (len(full) - layer - 1)
    changed = logits(moe, [*full[:layer], k, *later])
    if metric == "ppl-suffix":
        return math.exp(loss(changed))
    p, q = logits(moe, full).log_softmax(-1), changed.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v2"])
@pytest.mark.parametrize("metric", ["kl", "ppl-suffix"])
def test_costs_equal_those_of_whole_forward_passes(
    moe_model: Models, family: str, metric: Metric
) -> None:
    moe = moe_model(family)
    profile = measure_sensitivity(moe, CALIBRATION, metric=metric)
    full = [layer.experts_per_token for layer in moe.layers]
    assert profile.complete
    assert profile.experts_per_token == tuple(full)
    assert profile.layer_names == tuple(layer.name for layer in moe.layers)
    assert profile.baseline_loss == pytest.approx(loss(logits(moe, full)), abs=1e-5)
    for layer, row in enumerate(profile.costs):
        assert row is not None
        expected = [naive_cost(moe, metric, layer, k) for k in range(1, full[layer] + 1)]
        assert row == pytest.approx(expected, rel=2e-5, abs=2e-6)
        assert max(row) > 1e-4


def test_all_experts_diverge_by_exactly_nothing(moe_model: Models) -> None:
    profile = measure_sensitivity(moe_model("olmoe"), CALIBRATION, metric="kl")
    assert [row[-1] for row in profile.costs if row] == [0.0, 0.0, 0.0]


def test_a_model_is_left_as_it_was(moe_model: Models) -> None:
    moe = moe_model("deepseek_v2")
    ids = torch.from_numpy(CALIBRATION.ids)
    with torch.inference_mode():
        before = moe.model(input_ids=ids).logits
        measure_sensitivity(moe, CALIBRATION, metric="kl")
        assert torch.equal(moe.model(input_ids=ids).logits, before)
    assert not any("forward" in vars(module) for module in moe.model.modules())


def test_whole_forward_passes_are_few(moe_model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = moe_model("olmoe")
    rows = [0] * 3
    for index, layer in enumerate(moe.model.model.layers):

        def count(
            *args: Any, index: int = index, attend: Any = layer.self_attn.forward, **kw: Any
        ) -> Any:
            rows[index] += len(kw["hidden_states"])
            return attend(*args, **kw)

        monkeypatch.setattr(layer.self_attn, "forward", count)
    measure_sensitivity(moe, CALIBRATION, metric="kl")
    once, variants, check = 5, 5 * 3, 2
    assert rows == [
        once + once + variants + check,  # full model, on to layer 1, replay
        once + once + 2 * (variants + check),
        once + 3 * (variants + check),
    ]


class _StopError(Exception):
    pass


def interrupt_after(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = sensitivity.ReplayRun.measure
    left = [layers]

    def stop(self: Any, *args: Any) -> tuple[float, ...]:
        if left[0] == 0:
            raise _StopError
        left[0] -= 1
        return measure(self, *args)

    monkeypatch.setattr(sensitivity.ReplayRun, "measure", stop)


@pytest.mark.parametrize("metric", ["kl", "ppl-suffix"])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_a_resumed_profile_is_identical(
    moe_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: Metric, layers: int
) -> None:
    moe = moe_model("olmoe")
    whole = measure_sensitivity(moe, CALIBRATION, metric=metric)
    path = tmp_path / "profile.json"
    with monkeypatch.context() as patch:
        interrupt_after(layers, patch)
        with pytest.raises(_StopError):
            measure_sensitivity(moe, CALIBRATION, metric=metric, path=path)
    partial = SensitivityProfile.from_json(path.read_text(), path=path)
    assert [row is not None for row in partial.costs] == [index < layers for index in range(3)]
    with monkeypatch.context() as patch:
        interrupt_after(3 - layers, patch)  # more would mean that a layer is measured again
        resumed = measure_sensitivity(moe, CALIBRATION, metric=metric, path=path)
    assert dataclasses.replace(resumed, seconds=0) == dataclasses.replace(whole, seconds=0)
    assert SensitivityProfile.from_json(path.read_text(), path=path) == resumed
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("metric", ["output", "fisher"])
@pytest.mark.parametrize("batches", [0, 1, 2])
def test_a_resumed_profile_of_one_pass_is_identical(
    moe_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: Metric, batches: int
) -> None:
    monkeypatch.setattr(job, "_TOKENS_PER_BATCH", 2 * 24)
    monkeypatch.setattr(sensitivity, "_SECONDS_PER_SAVE", 0)
    moe = moe_model("olmoe")
    whole = measure_sensitivity(moe, CALIBRATION, metric=metric)
    path = tmp_path / "profile.json"
    counted: list[int] = []
    make = sensitivity._one_pass

    def counting(most: int, *args: Any) -> Callable[..., float]:
        add = make(*args)

        def count(ids: torch.Tensor, first: int, sums: Any) -> float:
            if len(counted) == most:
                raise _StopError
            counted.append(first)
            return add(ids, first, sums)

        return count

    monkeypatch.setattr(sensitivity, "_one_pass", functools.partial(counting, batches))
    with pytest.raises(_StopError):
        measure_sensitivity(moe, CALIBRATION, metric=metric, path=path)
    partial = SensitivityProfile.from_json(path.read_text(), path=path)
    assert (partial.partial.windows if partial.partial else 0) == 2 * batches
    assert not partial.complete
    monkeypatch.setattr(sensitivity, "_one_pass", functools.partial(counting, 3))
    resumed = measure_sensitivity(moe, CALIBRATION, metric=metric, path=path)
    assert counted == [0, 2, 4]
    assert dataclasses.replace(resumed, seconds=0) == dataclasses.replace(whole, seconds=0)
    assert SensitivityProfile.from_json(path.read_text(), path=path) == resumed
    assert resumed.partial is None


def test_profiles_of_earlier_versions_are_read(moe_model: Models, saved: Path) -> None:
    data = json.loads(saved.read_text())
    for name in ("redistribution", "expert_sizes", "partial"):
        del data[name]
    before = SensitivityProfile.from_json(saved.read_text(), path=saved)
    saved.write_text(json.dumps(data))
    assert measure_sensitivity(moe_model("mixtral"), CALIBRATION, metric="kl", path=saved) == before
    with pytest.raises(ProfileError, match=r"the redistribution \(there none, now sequence\)"):
        measure_sensitivity(
            moe_model("mixtral"), CALIBRATION, metric="kl", redistribution="batch", path=saved
        )


def test_a_complete_profile_is_returned_without_a_run(
    moe_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe, path = moe_model("mixtral"), tmp_path / "profile.json"
    first = measure_sensitivity(moe, CALIBRATION, metric="kl", path=path)
    monkeypatch.setattr(sensitivity, "ReplayRun", None)
    assert measure_sensitivity(moe, CALIBRATION, metric="kl", path=path) == first


@pytest.fixture
def saved(moe_model: Models, tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    measure_sensitivity(moe_model("mixtral"), CALIBRATION, metric="kl", path=path)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sha256": "fedcba9876543210"},
            r"the calibration text \(there 0123456789ab, now fedcba98",
        ),
        (
            {"sha256": "0123456789abcdefX"},
            r"the calibration text \(there \.\.\., now \.\.\.X\) changed",
        ),
        ({"seed": 1}, r"the seed \(there 0, now 1\) changed"),
        ({"tokens": 96}, r"the number of tokens \(there 120, now 96\)"),
        ({"sequence_length": 12}, r"the sequence length \(there 24, now 12\)"),
        ({"seed": 1, "tokens": 96}, r"the number of tokens \(.*\), the seed \(.*\) changed"),
    ],
)
def test_a_profile_of_another_text_is_refused(
    moe_model: Models, saved: Path, changes: dict[str, Any], message: str
) -> None:
    before = saved.read_bytes()
    other = dataclasses.replace(CALIBRATION, **changes)
    with pytest.raises(ProfileError, match=message) as error:
        measure_sensitivity(moe_model("mixtral"), other, metric="kl", path=saved)
    assert "Delete the file, or give another path" in str(error.value)
    assert saved.read_bytes() == before


def test_a_profile_of_another_model_or_metric_is_refused(moe_model: Models, saved: Path) -> None:
    with pytest.raises(ProfileError, match=r"the model \(there .*the MoE layers, the experts per"):
        measure_sensitivity(moe_model("olmoe"), CALIBRATION, metric="kl", path=saved)
    with pytest.raises(ProfileError, match=r"the metric \(there kl, now ppl-suffix\) changed"):
        measure_sensitivity(moe_model("mixtral"), CALIBRATION, metric="ppl-suffix", path=saved)


def test_a_file_that_is_no_profile_is_refused(moe_model: Models, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    for content in (b"", b"{}", b"\xff", b"[1]"):
        path.write_bytes(content)
        with pytest.raises(ProfileError, match=r"profile\.json (is no|can't be read)"):
            measure_sensitivity(moe_model("mixtral"), CALIBRATION, metric="kl", path=path)
        assert path.read_bytes() == content


def test_a_damaged_profile_is_refused(moe_model: Models, saved: Path) -> None:
    data = json.loads(saved.read_text())
    data["costs"][1] = data["costs"][1][:-1]
    saved.write_text(json.dumps(data))
    with pytest.raises(ProfileError, match="is damaged"):
        measure_sensitivity(moe_model("mixtral"), CALIBRATION, metric="kl", path=saved)
    data["costs"] = [None] * len(data["costs"])
    data["partial"] = {"windows": 2, "loss": 1.0, "layers": [[0.0] * 3] * len(data["costs"])}
    saved.write_text(json.dumps(data))
    with pytest.raises(ProfileError, match="is damaged"):
        measure_sensitivity(moe_model("mixtral"), CALIBRATION, metric="kl", path=saved)


def test_an_impossible_path_is_reported_before_any_work(
    moe_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "ReplayRun", None)
    with pytest.raises(OutputError, match=r"can't be saved as .*: No such file or directory"):
        measure_sensitivity(
            moe_model("mixtral"), CALIBRATION, metric="kl", path=tmp_path / "no" / "profile.json"
        )


@pytest.mark.parametrize("metric", ["kl", "ppl-suffix", "output", "fisher"])
def test_progress_ends_at_its_total(
    moe_model: Models, metric: Metric, capsys: pytest.CaptureFixture[str]
) -> None:
    measure_sensitivity(moe_model("olmoe"), CALIBRATION, metric=metric, console=Console())
    assert capsys.readouterr().err.startswith("Profiling: ")


@pytest.mark.parametrize("metric", ["kl", "ppl-suffix", "output", "fisher"])
def test_broken_weights_are_reported(
    moe_model: Models, monkeypatch: pytest.MonkeyPatch, metric: Metric
) -> None:
    moe = moe_model("mixtral")
    weight = moe.model.get_output_embeddings().weight
    monkeypatch.setattr(weight, "data", torch.full_like(weight.data, math.nan))
    with pytest.raises(UnsupportedModelError, match="loss on the calibration text is nan"):
        measure_sensitivity(moe, CALIBRATION, metric=metric)


def test_layers_that_depend_on_more_than_their_input_are_reported(
    moe_model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = moe_model("olmoe")
    first, _, last = moe.model.model.layers
    seen: list[torch.Tensor] = []

    def remember(*args: Any, original: Any = first.forward, **kwargs: Any) -> torch.Tensor:
        seen.append(original(*args, **kwargs))
        return seen[-1]

    def add(*args: Any, original: Any = last.forward, **kwargs: Any) -> torch.Tensor:
        return original(*args, **kwargs) + (seen.pop() if seen else 0)  # type: ignore[no-any-return]

    monkeypatch.setattr(first, "forward", remember)
    monkeypatch.setattr(last, "forward", add)
    with pytest.raises(UnsupportedModelError, match="olmoe can't be profiled: its decoder layers"):
        measure_sensitivity(moe, CALIBRATION, metric="kl")
