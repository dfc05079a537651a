"""The comparison with peers runs on tiny shapes; llama.cpp only where it is installed."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx.parser
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

LAYERS, EXPERTS = 2, 4  # of the toy artifact

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, stops processes")


@pytest.fixture
def toy(tmp_path: Path, toy_artifact: ModuleType) -> Path:
    """An artifact with a dial."""
    return toy_artifact.write_toy(tmp_path / "toy.onnx", dial=True)  # type: ignore[no-any-return]


@pytest.fixture
def gguf_file(tmp_path: Path, speed: Callable[[str], ModuleType]) -> Path:
    pytest.importorskip("gguf", reason="gguf isn't installed")
    path = tmp_path / "tiny.gguf"
    speed("random_gguf").write_gguf(path, speed("random_models/shapes").SHAPES["tiny"])
    return path


class Recorder:
    """A contender that notes what it is told."""

    vocabulary = 50

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def set_budget(self, budget: float) -> None:
        self.calls.append(budget)

    def reset(self) -> None:
        self.calls.append("reset")

    def forward(self, ids: np.ndarray) -> None:
        self.calls.append(len(ids))

    def seconds(self, workload: str, measure: Callable[[], float]) -> float:
        return measure()

    def active_bytes(self) -> float:
        return 3.0

    def activations(self) -> float:
        return 2.0


def test_contenders_decode_after_the_past_and_prefill_at_once(
    speed: Callable[[str], ModuleType],
) -> None:
    answer, recorder = speed("contenders/protocol").answer, Recorder()
    assert answer(recorder, "decode 5 3 0.5\n") > 0
    assert recorder.calls == [0.5, "reset", 5, 1, 1, 1]
    recorder.calls.clear()
    assert answer(recorder, "prefill 7 1.0\n") > 0
    assert recorder.calls == [1.0, "reset", 7]
    assert answer(recorder, "bytes 1.0") == 3
    assert answer(recorder, "activations 1.0") == 2


def test_bandwidth_is_measured_in_several_ways(speed: Callable[[str], ModuleType]) -> None:
    reader = speed("bandwidth").Reader(2, size=1 << 20)
    found = reader.measure(2)
    assert {"numpy dot", "libc memchr", "torch max"} <= set(found)
    assert all(math.isfinite(speed) and speed > 0 for speed in found.values())
    assert reader.size == 1 << 20


def test_artifacts_count_what_they_run(speed: Callable[[str], ModuleType], toy: Path) -> None:
    module = speed("contenders/artifact")
    counting = module.Artifact(str(toy), threads=1, count=True)
    answer = speed("contenders/protocol").answer
    found = []
    for budget in ("1.0", "0.5"):
        answer(counting, f"decode 20 20 {budget}")
        found.append(answer(counting, f"activations {budget}"))
    assert found[0] > found[1] >= 1
    plain = module.Artifact(str(toy), threads=1, count=False)
    assert answer(plain, "activations 0.5") == 0.5 * EXPERTS
    assert answer(plain, "bytes 0.5") > 0


def test_decoded_tokens_read_few_experts_and_no_embeddings(
    speed: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    model = onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g (int64[n] ids, float[n, 4] probs) => (float[n, 7] logits)
        <float[7, 8] embedding = {}, float[4, 10] gate = {}, float[8, 7] head = {}>
        {
          hidden = Gather(embedding, ids)
          out = com.microsoft.MoE(hidden, probs, gate)
          logits = MatMul(out, head)
        }
    """.replace("= {}", "")
    )
    del model.graph.initializer[:]
    for name, shape in {"embedding": (7, 8), "gate": (4, 10), "head": (8, 7)}.items():
        tensor = numpy_helper.from_array(np.zeros(shape, np.float32), name)
        model.graph.initializer.append(tensor)
    onnx.save(
        model, tmp_path / "m.onnx", save_as_external_data=True, location="w", size_threshold=0
    )
    experts, others = speed("contenders/artifact").weight_bytes(tmp_path / "m.onnx")
    assert (experts, others) == (4 * 10 * 4, 8 * 7 * 4)


def test_transformers_uses_fewer_experts_and_extends_to_all_layers(
    speed: Callable[[str], ModuleType],
) -> None:
    torch = pytest.importorskip("torch")
    module, shape = (
        speed("contenders/pytorch"),
        speed("random_models/shapes").SHAPES["tiny"],
    )
    model = module.Transformers(
        shape, layers=2, dtype=torch.float32, implementations=("batched_mm", "eager")
    )
    answer = speed("contenders/protocol").answer
    assert answer(model, "prefill 9 0.5") == pytest.approx(0, abs=100)  # seconds, when busy
    assert answer(model, "activations 0.5") == 2
    quarter, half = (answer(model, f"bytes {budget}") for budget in (0.25, 0.5))
    expert = 3 * shape.hidden * shape.expert_size * 4
    assert half - quarter == shape.layers * expert
    # 2 of 4 layers take 5 s, 1 takes 3 s: each one more adds 2 s.
    times = {2: 5.0, 1: 3.0}
    model._best["any"] = "eager"
    assert model.seconds("any", lambda: times[model._model.config.num_hidden_layers]) == 9.0


def test_gguf_has_the_weights_of_the_shape(
    speed: Callable[[str], ModuleType], gguf_file: Path
) -> None:
    import gguf

    reader = gguf.GGUFReader(gguf_file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    down = tensors["blk.0.ffn_down_exps.weight"]
    assert down.tensor_type == gguf.GGMLQuantizationType.Q4_0
    assert down.shape.tolist() == [32, 64, 8]  # fastest axis first
    assert tensors["blk.0.ffn_gate_inp.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    assert tensors["output.weight"].tensor_type == gguf.GGMLQuantizationType.Q4_0
    values = gguf.quants.dequantize(down.data, down.tensor_type)
    assert values.mean() == pytest.approx(0, abs=1e-3)
    assert values.std() == pytest.approx(0.02, rel=0.05)
    assert reader.fields["olmoe.expert_used_count"].contents() == 4


def test_llama_cpp_reads_the_same_text_in_pieces(
    speed: Callable[[str], ModuleType], gguf_file: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python isn't installed")
    model = speed("contenders/llama").LlamaCpp(
        str(gguf_file), threads=1, flash_attention=-1, mapped=True
    )
    ids = np.random.default_rng(0).integers(0, model.vocabulary, 20)
    found = {}
    for budget in (1.0, 0.25):
        model.set_budget(budget)
        model.reset()
        model.forward(ids)
        found[budget] = model.logits()
        model.reset()
        for token in ids:
            model.forward(token[np.newaxis])
        assert np.isfinite(found[budget]).all()
        np.testing.assert_allclose(model.logits(), found[budget], atol=0.05 * found[budget].std())
    assert (found[1.0] != found[0.25]).any()
    assert model.activations() == 1
    full, quarter = (
        speed("contenders/protocol").answer(model, f"bytes {budget}") for budget in (1.0, 0.25)
    )
    assert full - quarter == 3 * 4 * 3 * 64 * 32 * 18 / 32  # experts, layers, matrices, Q4_0


def test_report_says_what_was_measured(speed: Callable[[str], ModuleType]) -> None:
    report = speed("contenders/report")
    ours, peer = "alloc-moe x", "llama.cpp"
    runs = {
        (ours, 1.0): [10.0, 12.0, 11.0],
        (ours, 0.5): [20.0, 30.0, 22.0],
        (peer, 0.5): [10.0, 20.0, 20.0],
    }
    results = report.Results(
        8.0,
        speeds={"decode 128 32": runs},
        bandwidth=[4e9, 5e9, 4e9],
        activations={"decode 128 32": dict.fromkeys(runs, 3.9)},
        active_bytes=dict.fromkeys(runs, 1e8),
    )
    assert list(report.claims(results, ours)) == [
        "decode 128 32 at k=4: 1.50x llama.cpp's tokens/s (median of 3 rounds, 1.10-2.00)",
        "decode 128 32 at k=4: 0.50 of the time at k=8 (median of 3 rounds, 0.40-0.50)",
    ]
    assert "| alloc-moe x, k=4 | 22.0 (20.0-30.0), 3.90 experts |" in list(report.table(results))
    assert list(report.limits(results))[:2] == [
        "Streaming read bandwidth: 4.0 (4.0-5.0) GB/s",
        "decode 128 32 at k=8, alloc-moe x: 0.100 GB of weights per token, 1.1 GB/s, "
        "0.25 (0.24-0.28) of the bandwidth",
    ]


def test_contenders_take_turns(
    speed: Callable[[str], ModuleType],
    read_little: Callable[[ModuleType], None],
    toy: Path,
    tmp_path: Path,
) -> None:
    peers = speed("peers")
    read_little(peers)
    options = ["--artifact", str(toy), "--torch", "float32", "--shape", "tiny"]
    options += ["--rounds", "2", "--budget", "1.0", "--budget", "0.5", "--threads", "1"]
    options += ["--workload", "decode 8 4", "-o", str(tmp_path / "runs.json")]
    outcome = CliRunner().invoke(peers.main, options)
    assert outcome.exit_code == 0, outcome.output
    assert "decode 8 4 at k=2: " in outcome.stdout
    assert "x transformers float32's tokens/s (median of 2 rounds, " in outcome.stdout
    assert "of the time at k=4 (median of 2 rounds, " in outcome.stdout
    runs = json.loads((tmp_path / "runs.json").read_text())["speeds"]["decode 8 4"]
    assert list(runs) == [
        *("alloc-moe toy 1.0", "alloc-moe toy 0.5"),
        *("transformers float32 1.0", "transformers float32 0.5"),
    ]
    assert all(len(speeds) == 2 for speeds in runs.values())


def test_contender_that_fails_is_named(speed: Callable[[str], ModuleType], toy: Path) -> None:
    peers = speed("peers")
    options = ["--artifact", str(toy), "--gguf", "nowhere.gguf", "--workload", "prefill 4"]
    options += ["--budget", "1.0"]
    outcome = CliRunner().invoke(peers.main, options)
    assert outcome.exit_code == 1
    assert "The process of llama.cpp ended; see its messages." in outcome.output


def test_session_options_are_compared_with_the_defaults(
    speed: Callable[[str], ModuleType], toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = speed("session_options")
    monkeypatch.setattr(module, "DECODE", "decode 8 4")
    monkeypatch.setattr(module, "PREFILL", "prefill 16")
    options = [str(toy), "--rounds", "2", "--only", "no arena"]
    outcome = CliRunner().invoke(module.main, options)
    assert outcome.exit_code == 0, outcome.output
    rows = [line for line in outcome.stdout.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| session", "| defaults", "| no arena"]
    assert "1.00 (1.00-1.00) | 1.00 (1.00-1.00) | 1.00 (1.00-1.00)" in rows[1]
