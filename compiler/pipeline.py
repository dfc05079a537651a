"""The compiler's stages in their order: the only file that knows it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from alloc_moe.compiler import package
from alloc_moe.compiler.allocate import cost_limit, parse_budget
from alloc_moe.compiler.cache_scales import measure_cache_scales
from alloc_moe.compiler.calibration import CalibrationSet, load_calibration
from alloc_moe.compiler.costs import CostTable, expert_shapes, measure_costs, mixed_costs
from alloc_moe.compiler.errors import UnsupportedModelError
from alloc_moe.compiler.export import export_graph
from alloc_moe.compiler.latency import latency_path
from alloc_moe.compiler.load import load_model
from alloc_moe.compiler.mixed_bits import allocate_mixed
from alloc_moe.compiler.offload import layers_progress
from alloc_moe.compiler.planning import Planned, PlanOptions, make_planned
from alloc_moe.compiler.policies import layer_parameters
from alloc_moe.compiler.quantization import (
    BITS,
    choose_formats,
    formats_of_bits,
    mixed_formats,
    quantized,
    with_expert_formats,
)
from alloc_moe.compiler.records import CompileOptions, Correction, DType, MoeModel, OffloadMode
from alloc_moe.compiler.refinement import Refinement
from alloc_moe.compiler.saved_passes import SavedPasses
from alloc_moe.compiler.sensitivity import measure_sensitivity
from alloc_moe.compiler.space import needed_space
from alloc_moe.compiler.verify import Verification, check_verifiable, verify_artifact
from alloc_moe.compiler.weights_file import weights_key, written_bytes
from alloc_moe.passes.correct_experts import ExpertCorrection
from alloc_moe.passes.default import normalize_passes, specialize_passes
from alloc_moe.passes.group_attention import group_attention
from alloc_moe.passes.lower_experts import Allocation
from alloc_moe.passes.stamp_plan import StampPlanPass
from alloc_moe.runtime.artifact import (
    GENERATION_KEY,
    PLAN_KEY,
    SHARED_CACHE_KEY,
    AllocationPlan,
    Budget,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from alloc_moe.compiler.quantization import Quantization
    from alloc_moe.passes.blockwise import BlockFormat
    from alloc_moe.passes.quantize_cache import CacheScales
    from alloc_moe.runtime.command import Console

_RECORDED = ("alloc-moe", "torch", "transformers", "onnx", "onnx-ir", "onnxscript")


@dataclass(frozen=True)
class Compiled:
    """What a compile made: the artifact's path, its plan, its profile if one was needed."""

    path: Path
    plan: AllocationPlan
    profile: Path | None
    verification: Verification


def compile_model(options: CompileOptions, console: Console) -> Compiled:
    """Compile a checkpoint into an artifact.

    Raises:
        AllocMoeError: Anything that the user can act on; no output file was touched then.
    """
    output = package.parse_output(options.output, force=options.force)
    check_verifiable(options.dtype)
    moe = load(
        options.model,
        console,
        trust_remote_code=options.trust_remote_code,
        offload=options.offload,
        passes=output.passes_path,
    )
    package.check_space(output, needed_space(moe, options))
    formats: Sequence[Sequence[BlockFormat]] = ()
    if options.dtype in BITS:
        with console.step(f"Rounding weights to {options.dtype}"):
            chosen = choose_formats(
                moe.skeleton,
                moe.layers,
                options.dtype,
                block=options.block,
                device=options.device,
            )
            moe = quantized(moe, chosen, round_experts=not options.mixed_bits)
        formats = mixed_formats(chosen) if options.mixed_bits else ()
    budget = parse_budget(
        options.budget, [layer.experts_per_token for layer in moe.layers], kind=options.cost
    )
    costs = _costs(moe, options, formats, output, console)
    if costs is not None:
        cost_limit(budget, costs)  # what can't be met is said before the profile is measured
    calibration = calibrate(
        moe, options.calibration, console, tokens=options.tokens, seed=options.seed
    )
    profile, profile_path = None, None
    if _needs_profile(options, budget):
        profile_path = options.profile or output.profile_path
        profile = measure_sensitivity(
            moe,
            calibration,
            metric=options.sensitivity,
            redistribution=options.redistribution,
            correction=options.correction,
            formats=formats,
            path=profile_path,
            console=console,
        )
    mixed = None
    if formats:
        assert profile is not None
        assert costs is not None
        mixed = allocate_mixed(profile, moe.layers, budget, costs)
        profile, costs = mixed.profile, mixed.costs
        with console.step("Rounding experts"):
            moe = with_expert_formats(moe, formats_of_bits(formats, mixed.bits))
    planned = make_planned(
        moe,
        calibration,
        budget,
        PlanOptions(options.redistribution, options.weights, options.correction, options.cap),
        source=options.model,
        profile=profile,
        costs=costs,
        allocation=mixed.ks if mixed else None,
        refinement=_refinement(options, output),
        console=console,
    )
    described = moe.quantization.to_plan() if moe.quantization else {}
    plan = mixed.mark(planned.plan) if mixed else planned.plan
    plan = dataclasses.replace(plan, versions=versions(), quantization=described)
    planned = dataclasses.replace(planned, plan=plan)
    with package.staging(output, note=console.note) as staged:
        plan, verification = _build(moe, planned, calibration.ids, options, output, staged, console)
        package.publish(staged, output)
    moe.passes.delete()
    return Compiled(output.path, plan, profile_path, verification)


def _needs_profile(options: CompileOptions, budget: Budget) -> bool:
    """Whether anything is decided by sensitivities; a dial needs sizes at the full budget too."""
    if options.mixed_bits:
        return True
    if options.allocation != "sensitivity" or options.redistribution in ("top-p", "ratio"):
        return False
    return options.redistribution == "price" or budget.activations < budget.original


def _refinement(options: CompileOptions, output: package.Output) -> Refinement | None:
    if not options.refine:
        return None
    profile = options.profile or output.profile_path
    return Refinement(
        options.refine,
        options.refine_seconds,
        options.seed,
        profile.with_name(f"{profile.stem}.refine.json"),
    )


def _costs(
    moe: MoeModel,
    options: CompileOptions,
    formats: Sequence[Sequence[BlockFormat]],
    output: package.Output,
    console: Console,
) -> CostTable | None:
    """Return the prices of experts, unless each costs one activation."""
    if formats:
        return mixed_costs(
            expert_shapes(moe.skeleton, moe.layers),
            formats,
            dtype=options.dtype,
            bits=BITS[options.dtype],
            batch=options.cost_batch,
        )
    if options.cost == "activations":
        return None
    return measure_costs(
        options.cost,
        expert_shapes(moe.skeleton, moe.layers),
        dtype=options.dtype,
        batch=options.cost_batch,
        device=options.device,
        path=latency_path(options.profile or output.profile_path),
        console=console,
    )


def load(
    source: str,
    console: Console,
    *,
    trust_remote_code: bool,
    offload: OffloadMode = "auto",
    passes: Path | None = None,
) -> MoeModel:
    """Load a model and say what was found; if it is offloaded, it keeps its passes at `passes`."""
    console.note(f"Loading {source}")
    moe = load_model(source, trust_remote_code=trust_remote_code, offload=offload)
    ks = sorted({layer.experts_per_token for layer in moe.layers})
    experts = sorted({layer.num_experts for layer in moe.layers})
    console.note(
        f"{moe.config.model_type}: {len(moe.layers)} MoE layers, "
        f"{'/'.join(map(str, experts))} experts, top-{'/'.join(map(str, ks))}"
    )
    if moe.offloading is not None:
        console.note(moe.offloading.describe())
        moe = dataclasses.replace(moe, passes=SavedPasses(passes))
    return moe


def calibrate(
    moe: MoeModel, text: str | None, console: Console, *, tokens: int, seed: int
) -> CalibrationSet:
    """Return tokens of `text`, else of calibration.txt beside the model, else of built-in text."""
    beside = moe.folder / "calibration.txt"
    if text is None:
        built_in = Path(__file__).with_name("calibration.txt")
        text = str(beside if beside.is_file() else built_in)
        console.note(
            f"Calibrating on {text}"
            if beside.is_file()
            else "Calibrating on the built-in text (public-domain English prose); "
            "give --calibration with text like yours for a plan that fits it better"
        )
    return load_calibration(text, moe.tokenizer, moe.config, tokens=tokens, seed=seed)


def export(moe: MoeModel, *, dtype: DType, trust_remote_code: bool = False) -> ir.Model:
    """Return the model's graph, ready to be specialised for any number of plans.

    Linear layers and embeddings are stored as the model's quantization says, if it has one.
    """
    graph = export_graph(
        moe.config,
        moe.reader,
        moe.layers,
        dtype=moe.quantization.activations if moe.quantization else dtype,
        trust_remote_code=trust_remote_code,
    )
    normalize_passes(moe.quantization.weights if moe.quantization else {})(graph)
    _check_inputs(graph, moe)
    graph.metadata_props[GENERATION_KEY] = json.dumps(
        {
            "eos_token_id": package.eos_token_id(moe),
            "context_length": getattr(
                moe.config.get_text_config(), "max_position_embeddings", None
            ),
        }
    )
    return graph


def _check_inputs(graph: ir.Model, moe: MoeModel) -> None:
    known = re.compile(r"input_ids|attention_mask|position_ids|past_key_values\.\d+\.(key|value)")
    unknown = [v.name for v in graph.graph.inputs if not known.fullmatch(v.name or "")]
    if unknown:
        raise UnsupportedModelError(
            f"{moe.config.model_type} keeps more state than keys and values ({unknown[0]}), "
            "sliding windows or recurrent layers, which the runtimes can't carry from call to call."
        )


def specialize(
    graph: ir.Model,
    plan: AllocationPlan,
    *,
    device: str,
    corrections: Sequence[Correction | None] = (),
    quantization: Quantization | None = None,
    cache_scales: CacheScales = MappingProxyType({}),
) -> ir.Model:
    """Return a copy of a normalised graph with a plan compiled in; weights stay lazy and shared.

    With `cache_scales` its cache is int8.

    Raises:
        UnsupportedModelError: There are scales, but its attention takes no int8 cache.
    """
    model = graph.clone()
    parameters = layer_parameters(plan)
    allocation = Allocation(
        [given.k for given in parameters],
        plan.redistribution,
        plan.weights,
        thresholds=[given.threshold for given in parameters],
        sizes=[layer.sizes for layer in plan.layers],
        overlap=plan.overlap or 0.0,
        cap=plan.cap,
        dial=plan.redistribution == "price" and plan.cap is None,
    )
    changed = {
        layer: ExpertCorrection(correction.scale, correction.bias)
        for layer, correction in enumerate(corrections)
        if correction is not None
    }
    formats = dict(enumerate(quantization.experts)) if quantization else {}
    pairs = device == "cuda"
    specialize_passes(
        allocation, pairs=pairs, corrections=changed, formats=formats, cache_scales=cache_scales
    )(model)
    StampPlanPass(PLAN_KEY, plan.to_json())(model)
    if any(group_attention(model)):
        model.metadata_props[SHARED_CACHE_KEY] = "int8" if cache_scales else "float32"
    elif cache_scales:
        raise UnsupportedModelError(
            "An int8 cache needs keys and values of one shape in float32 on the CPU, which this "
            "model doesn't have. Use --cache float32."
        )
    return model


def _build(
    moe: MoeModel,
    planned: Planned,
    token_ids: NDArray[np.int64],
    options: CompileOptions,
    output: package.Output,
    staged: Path,
    console: Console,
) -> tuple[AllocationPlan, Verification]:
    """Export, rewrite, write into `staged`, and verify what was written."""
    plan, corrections = planned.plan, planned.corrections
    with console.step("Exporting the graph"):
        graph = export(moe, dtype=options.dtype, trust_remote_code=options.trust_remote_code)
    scales: CacheScales = {}
    if options.cache == "int8":
        with layers_progress(console, "Scaling the cache", moe, passes=1):
            scales = measure_cache_scales(moe, token_ids)
    model = specialize(
        graph,
        plan,
        device=options.device,
        corrections=corrections,
        quantization=moe.quantization,
        cache_scales=scales,
    )
    if SHARED_CACHE_KEY not in model.metadata_props and options.device == "cpu":
        console.note("The cache is copied at every step: attention stays the standard operator")
    path = staged / output.graph_name
    weights = [value.const_value for value in model.graph.initializers.values()]
    nbytes = sum(tensor.nbytes for tensor in weights if tensor is not None)
    key = weights_key(model, moe, [corrections, sorted(scales.items())])
    done = written_bytes(package.data_path(path), key)
    with console.progress("Writing weights", nbytes, unit="bytes", done=done) as progress:
        package.save_graph(model, path, advance=progress.advance, key=key)
    readings = 2 if moe.quantization else 1  # with rounded weights, and with floats
    with layers_progress(console, "Verifying against PyTorch", moe, passes=readings):
        verification = verify_artifact(
            path,
            moe,
            plan,
            token_ids,
            dtype=options.dtype,
            corrections=corrections,
            cache_scales=scales,
        )
    plan = dataclasses.replace(plan, verify=verification.to_plan())
    package.stamp(path, plan)
    if output.bundle:
        package.write_bundle_files(staged, moe, model, plan)
    return plan, verification


def versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in _RECORDED}
    # Its distribution is onnxruntime or onnxruntime-gpu.
    return {**versions, "onnxruntime": onnxruntime.__version__}
