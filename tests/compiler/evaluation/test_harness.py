"""Artifacts and plans as a model of lm-evaluation-harness, on a small random checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from alloc_moe.compiler.commands.alloc_lm_eval import NAME, register
from alloc_moe.compiler.errors import AllocMoeError
from alloc_moe.compiler.evaluation.harness import AllocMoeLM, choose_batch_size
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.records import Redistribution
from alloc_moe.compiler.reference.experts import allocated
from alloc_moe.compiler.reference.policies import layer_parameters
from alloc_moe.runtime.execution.session import open_session
from alloc_moe.runtime.text.generation import generate
from alloc_moe.runtime.text.model import load

TEXTS = (
    "The committee",
    "In the beginning was",
    "a",
    "experts of a layer are chosen by its router",
)
GREEDY = {"until": [], "do_sample": False, "max_gen_toks": 8}


@pytest.fixture(scope="module")
def lm(artifact: Path) -> AllocMoeLM:
    return AllocMoeLM(artifact=str(artifact), threads=1, batch_size=1)


def asked(kind: str, *requests: tuple[Any, ...]) -> list[Instance]:
    """Return requests of the harness."""
    return [Instance(kind, {}, request, number) for number, request in enumerate(requests)]


def direct(lm: AllocMoeLM, moe: MoeModel, ids: list[int], scored: int) -> tuple[float, bool]:
    """Score the last tokens of a sequence in PyTorch under the plan of `lm`, nothing padded."""
    plan = lm.backend.plan
    with (
        torch.inference_mode(),
        allocated(
            moe.model,
            moe.layers,
            layer_parameters(plan),
            redistribution="none",
            weights="keep",
        ),
    ):
        logits = moe.model(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0]
    rows, targets = logits[-scored:].double().log_softmax(-1), torch.tensor(ids[-scored:])
    total = rows.gather(1, targets[:, None]).sum().item()
    return total, bool((rows.argmax(-1) == targets).all())


@pytest.fixture(params=["artifact", "plan"])
def either(request: pytest.FixtureRequest, artifact: Path, moe_model: Any) -> AllocMoeLM:
    """The same plan as an artifact and in PyTorch, in batches."""
    if request.param == "artifact":
        return AllocMoeLM(artifact=str(artifact), threads=1, batch_size=3)
    source = moe_model("olmoe").checkpoint.source
    return AllocMoeLM(pretrained=source, plan=str(artifact / "allocation.json"), batch_size=3)


def test_loglikelihood_is_that_of_the_model_under_the_plan(
    either: AllocMoeLM, moe_model: Callable[[str], MoeModel]
) -> None:
    pairs = [*((text, f" {other}") for text, other in pairwise(TEXTS)), ("", "text"), ("a", "b")]
    answers = either.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), answer in zip(pairs, answers, strict=True):
        before = either.tok_encode(context) or [either.prefix_token_id]
        ids = [*before, *either.tok_encode(continuation)]
        expected = direct(either, moe_model("olmoe"), ids, len(continuation))
        assert answer[0] == pytest.approx(expected[0], abs=1e-4)
        assert answer[1] == expected[1]


def test_the_greedy_continuation_is_known_as_such(lm: AllocMoeLM, artifact: Path) -> None:
    context = lm.tok_encode(TEXTS[0])
    best = generate(open_session(artifact), [context], max_new_tokens=3, eos_ids=())[0]
    other = [*best[:2], (best[2] + 1) % 256]
    scores = lm._loglikelihood_tokens([(None, context, best), (None, context, other)], True)
    assert [greedy for _, greedy in scores] == [True, False]
    assert scores[0][0] > scores[1][0]


def test_options_of_one_token_share_a_call(lm: AllocMoeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    step = lm.backend.step

    def counting(*arguments: Any) -> Any:
        calls.append(arguments[0].shape)
        return step(*arguments)

    monkeypatch.setattr(lm, "backend", dataclasses.replace(lm.backend, step=counting))
    options = asked("loglikelihood", *((TEXTS[0], option) for option in "ABCD"))
    together = lm.loglikelihood(options, disable_tqdm=True)
    assert calls == [(1, len(TEXTS[0]))]
    assert together == [lm.loglikelihood([option], disable_tqdm=True)[0] for option in options]


def test_an_empty_continuation_is_certain(lm: AllocMoeLM) -> None:
    assert lm.loglikelihood(asked("loglikelihood", ("a", "")), True) == [(0.0, True)]


def test_a_long_context_is_cut_on_the_left(artifact: Path) -> None:
    short = AllocMoeLM(artifact=str(artifact), threads=1, max_length=8)
    scores = short.loglikelihood(asked("loglikelihood", ("x" * 40 + "12345678", "9")), True)
    assert scores == short.loglikelihood(asked("loglikelihood", ("12345678", "9")), True)
    assert scores != short.loglikelihood(asked("loglikelihood", ("2345678", "9")), True)
    with pytest.raises(AllocMoeError, match=r"9 tokens; the context of .* holds 8"):
        short.loglikelihood(asked("loglikelihood", ("a", "123456789")), True)


def test_rolling_scores_each_token_once_in_as_much_context_as_fits(
    artifact: Path, moe_model: Callable[[str], MoeModel]
) -> None:
    short = AllocMoeLM(artifact=str(artifact), threads=1, max_length=8, batch_size=2)
    text = "0123456789abcdefghi"  # 19 tokens: two windows of 8, one that scores the last 3
    total = short.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)), True)[0]
    ids = [short.prefix_token_id, *short.tok_encode(text)]
    windows = [(ids[:9], 8), (ids[8:17], 8), (ids[11:], 3)]
    moe = moe_model("olmoe")
    assert total == pytest.approx(
        sum(direct(short, moe, window, scored)[0] for window, scored in windows), abs=1e-4
    )


def test_answers_are_those_of_the_runtime_up_to_a_stop_string(
    either: AllocMoeLM, artifact: Path
) -> None:
    whole = [done.text for done in load(artifact, threads=1).generate(TEXTS, max_new_tokens=8)]
    settings = asked("generate_until", *((text, GREEDY) for text in TEXTS))
    assert either.generate_until(settings, disable_tqdm=True) == whole
    stops = [text[2:4] for text in whole]
    stopped = asked(
        "generate_until",
        *((text, {**GREEDY, "until": [stop]}) for text, stop in zip(TEXTS, stops, strict=True)),
    )
    assert either.generate_until(stopped, disable_tqdm=True) == [
        text.partition(stop)[0] for text, stop in zip(whole, stops, strict=True)
    ]


def test_a_row_stops_at_its_stop_string(lm: AllocMoeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    text = lm.generate_until(asked("generate_until", (TEXTS[0], GREEDY)), True)[0]
    widths = []
    step = lm.backend.step

    def counting(*arguments: Any) -> Any:
        widths.append(arguments[0].shape[1])
        return step(*arguments)

    monkeypatch.setattr(lm, "backend", dataclasses.replace(lm.backend, step=counting))
    lm.generate_until(asked("generate_until", (TEXTS[0], {**GREEDY, "until": text[0]})), True)
    assert len(widths) <= text.encode().index(text[0].encode()) + len(text[0].encode())


@pytest.mark.parametrize("size", [2, 4])
def test_a_batch_of_different_lengths_answers_as_singles_do(
    lm: AllocMoeLM, artifact: Path, size: int
) -> None:
    batched = AllocMoeLM(artifact=str(artifact), threads=1, batch_size=size)
    pairs = asked("loglikelihood", *((text, " experts") for text in TEXTS))
    one, many = lm.loglikelihood(pairs, True), batched.loglikelihood(pairs, True)
    np.testing.assert_allclose([a for a, _ in one], [a for a, _ in many], atol=1e-4)
    prompts = asked("generate_until", *((text, GREEDY) for text in TEXTS))
    assert lm.generate_until(prompts, True) == batched.generate_until(prompts, True)


def test_sampling_repeats_with_its_seed_and_differs_between_batches(artifact: Path) -> None:
    settings = {**GREEDY, "do_sample": True, "temperature": 3.0, "top_p": 0.95}
    prompts = asked("generate_until", (TEXTS[0], settings), (TEXTS[0], settings))

    def answers(seed: int) -> list[str]:
        model = AllocMoeLM(artifact=str(artifact), threads=1, batch_size=1, seed=seed)
        return model.generate_until(prompts, True)

    assert answers(1) == answers(1)
    assert len({*answers(1), *answers(7)}) == 4


def test_answers_that_leave_no_room_are_refused(lm: AllocMoeLM) -> None:
    settings = {**GREEDY, "max_gen_toks": lm.max_length}
    with pytest.raises(AllocMoeError, match="leave no room for a prompt"):
        lm.generate_until(asked("generate_until", ("a", settings)), True)


def test_automatic_batches_are_of_one_where_sequences_compete(
    lm: AllocMoeLM, caplog: pytest.LogCaptureFixture
) -> None:
    pooled = dataclasses.replace(
        lm.backend, plan=dataclasses.replace(lm.backend.plan, redistribution="batch")
    )
    capped = dataclasses.replace(lm.backend, plan=dataclasses.replace(lm.backend.plan, cap=1.5))
    with caplog.at_level("INFO"):
        assert [choose_batch_size(model, "auto") for model in (lm.backend, pooled, capped)] == [
            8,
            1,
            1,
        ]
        assert "Batch size 1: sequences of one call compete" in caplog.text
        assert choose_batch_size(pooled, "4") == 4
        assert "Results depend on the batch size 4" in caplog.text
    assert choose_batch_size(lm.backend, None, most=2) == 2
    with pytest.raises(AllocMoeError, match="batch size is 'many'"):
        choose_batch_size(lm.backend, "many")


def test_arguments_that_do_not_fit_together_are_refused(artifact: Path) -> None:
    with pytest.raises(AllocMoeError, match=r"Give one of artifact=out\.onnx and pretrained=MODEL"):
        AllocMoeLM()
    with pytest.raises(AllocMoeError, match="an artifact has its own plan"):
        AllocMoeLM(artifact=str(artifact), plan="allocation.json")


def test_a_budget_needs_a_dial(artifact: Path) -> None:
    with pytest.raises(AllocMoeError, match="plan has no dial"):
        AllocMoeLM(artifact=str(artifact), budget=0.4)


def test_one_artifact_answers_at_every_budget_of_its_dial(
    compile_with: Callable[[Redistribution], Path], moe_model: Callable[[str], MoeModel]
) -> None:
    path, source = str(compile_with("price")), moe_model("olmoe").checkpoint.source
    request = asked("loglikelihood", (TEXTS[0], TEXTS[1]))
    scores = {}
    for budget in (None, 0.75, 1.0):
        in_pytorch = AllocMoeLM(pretrained=source, plan=path, budget=budget)
        compiled = AllocMoeLM(artifact=path, budget=budget, threads=1)
        scores[budget] = compiled.loglikelihood(request, True)[0][0]
        expected = in_pytorch.loglikelihood(request, True)[0][0]
        assert scores[budget] == pytest.approx(expected, abs=1e-4)
    assert len(set(scores.values())) == 3
    full = AllocMoeLM(pretrained=source).loglikelihood(request, True)[0][0]
    assert scores[1.0] == pytest.approx(full, abs=1e-4)


def test_a_plan_of_another_model_is_refused(
    artifact: Path, checkpoint: Callable[[str], Path]
) -> None:
    with pytest.raises(AllocMoeError, match="Give a plan made of this model"):
        AllocMoeLM(pretrained=str(checkpoint("mixtral")), plan=str(artifact))


def test_a_plan_whose_artifact_has_weights_of_its_own_is_refused(
    artifact: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    plan = {
        **json.loads((artifact / "allocation.json").read_text()),
        "correction": {"mode": "gain"},
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(AllocMoeError, match=r"has a correction, .* Evaluate the artifact"):
        AllocMoeLM(pretrained=str(checkpoint("olmoe")), plan=str(tmp_path / "plan.json"))


def test_without_a_plan_every_expert_runs(checkpoint: Callable[[str], Path]) -> None:
    model = AllocMoeLM(pretrained=str(checkpoint("olmoe")))
    info = model.get_model_info()["alloc_moe"]
    assert info["activations_per_token"] == info["activations_per_token_original"] > 0
    assert model.loglikelihood(asked("loglikelihood", ("a", "b")), True)[0][0] < 0


def test_the_name_resolves() -> None:
    register()
    register()
    assert get_model(NAME) is AllocMoeLM


def test_a_task_runs_from_end_to_end_by_name(artifact: Path, tmp_path: Path) -> None:
    questions = [{"text": f"{n}", "choices": ["a", "bc"], "answer": n % 2} for n in range(4)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)), "utf-8")
    task = {
        "task": "toy",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "q.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    register()
    arguments = {"artifact": str(artifact), "threads": 1}
    manager = TaskManager(include_defaults=False)  # the harness's own take ten seconds to find
    results = simple_evaluate(
        NAME, arguments, tasks=[task], bootstrap_iters=0, task_manager=manager
    )
    assert 0 <= results["results"]["toy"]["acc,none"] <= 1
    assert results["config"]["alloc_moe"]["redistribution"] == "none"
    assert [len(sample["resps"]) for sample in results["samples"]["toy"]] == [2] * 4
