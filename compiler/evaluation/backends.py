"""Models under a plan as lm-evaluation-harness needs them: artifacts, and originals in PyTorch.

Artifacts need neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from tokenizers import Tokenizer

from alloc_moe.runtime.artifact.dial import price_of
from alloc_moe.runtime.artifact.files import read_settings
from alloc_moe.runtime.artifact.plan import AllocationPlan
from alloc_moe.runtime.artifact.shapes import either, optional, record, string
from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.execution.session import open_session
from alloc_moe.runtime.text.generation import Step
from alloc_moe.runtime.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.records import Redistribution, Weights
    from alloc_moe.runtime.artifact.files import ArtifactFiles
    from alloc_moe.runtime.execution.cache import Cache
    from alloc_moe.runtime.execution.providers import Provider

_TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKEN = optional(either(string(), record({"content": string()})))
_TOKENS = record({}, {"bos_token": _TOKEN, "eos_token": _TOKEN})


@dataclass(frozen=True)
class Backend:
    """A model under a plan: ``step`` runs a call of it.

    ``prefix_id`` is the token that texts without context are scored after, ``eos_ids`` end an
    answer. ``context_length`` is None where the model doesn't say, ``price`` unless a budget was
    asked for that is not the plan's own.
    """

    source: str
    plan: AllocationPlan
    step: Step
    tokenizer: Tokenizer
    prefix_id: int
    eos_ids: frozenset[int]
    context_length: int | None
    price: float | None = None


def open_artifact(
    path: str,
    *,
    budget: str | float | None,
    tokenizer: str | None,
    ep: Provider,
    threads: int | None,
) -> Backend:
    """Load a compiled artifact, to run at a budget if it has a dial, else at its own.

    Raises:
        ArtifactError: Something is missing, damaged, or was not compiled by alloc-moe.
        DeviceError: ``ep="cuda"``, but CUDA can't be used.
        GenerationError: There is a budget, but no dial that reaches it.
    """
    session = open_session(path, ep=ep, threads=threads)
    loaded = load_tokenizer(session.files, tokenizer)
    eos_ids = session.files.eos_ids()
    price = None if budget is None else price_of(session.plan, budget)

    def step(
        ids: NDArray[np.int64], mask: NDArray[np.int64], cache: Cache | None
    ) -> tuple[NDArray[np.floating], Cache]:
        output = session.run(ids, attention_mask=mask, cache=cache, price=price)
        return output.logits, output.cache

    return Backend(
        source=path,
        plan=session.plan,
        step=step,
        tokenizer=loaded,
        prefix_id=_prefix(loaded, _special_tokens(session.files, tokenizer), eos_ids, source=path),
        eos_ids=eos_ids,
        context_length=session.context_length,
        price=price,
    )


def open_model(
    source: str,
    *,
    plan_file: str | None,
    budget: str | float | None,
    trust_remote_code: bool,
) -> Backend:
    """Load an original model, to run in PyTorch under the plan in a file, else as trained.

    Raises:
        AllocMoeError: The model can't be loaded, or the plan is not one of this model.
    """
    from alloc_moe.compiler.errors import need_compile_extra

    need_compile_extra()
    from alloc_moe.compiler.model.loading import load_model
    from alloc_moe.compiler.reference.plans import read_plan, trained_plan

    moe = load_model(source, trust_remote_code=trust_remote_code)
    plan = (
        trained_plan(moe.checkpoint)
        if plan_file is None
        else read_plan(Path(plan_file), moe.checkpoint)
    )
    price = None if budget is None else price_of(plan, budget)
    tokenizer = Tokenizer.from_str(moe.checkpoint.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    names = {key: getattr(moe.checkpoint.tokenizer, key) for key in ("bos_token", "eos_token")}
    ends = getattr(moe.model.generation_config, "eos_token_id", None)
    eos_ids = frozenset([ends] if isinstance(ends, int) else ends or ())
    return Backend(
        source=source,
        plan=plan,
        step=_torch_step(moe, plan, price),
        tokenizer=tokenizer,
        prefix_id=_prefix(tokenizer, names, eos_ids, source=source),
        eos_ids=eos_ids,
        context_length=getattr(moe.config.get_text_config(), "max_position_embeddings", None),
        price=price,
    )


def _torch_step(moe: MoeModel, plan: AllocationPlan, price: float | None) -> Step:
    import torch

    from alloc_moe.compiler.reference.experts import allocated
    from alloc_moe.compiler.reference.policies import layer_parameters

    parameters = layer_parameters(plan, price)

    def step(
        ids: NDArray[np.int64], mask: NDArray[np.int64], cache: Any
    ) -> tuple[NDArray[np.floating], Any]:
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        with (
            torch.inference_mode(),
            allocated(
                moe.model,
                moe.layers,
                parameters,
                redistribution=cast("Redistribution", plan.redistribution),
                weights=cast("Weights", plan.weights),
            ),
        ):
            output = moe.model(
                input_ids=torch.from_numpy(ids),
                attention_mask=torch.from_numpy(mask),
                position_ids=torch.from_numpy(positions.copy()),
                past_key_values=cache,
                use_cache=True,
            )
        return output.logits.float().numpy(), output.past_key_values

    return step


def _special_tokens(files: ArtifactFiles, tokenizer: str | None) -> Mapping[str, str | None]:
    """Return the texts of the tokens that start and end a text, as far as anything says."""
    if tokenizer is None and (identity := files.tokenizer_identity()) is not None:
        return {"bos_token": identity.bos_token, "eos_token": identity.eos_token}
    if tokenizer is None:
        config = files.find_json(_TOKENIZER_CONFIG, _TOKENS)
    else:
        folder = Path(tokenizer) if Path(tokenizer).is_dir() else Path(tokenizer).parent
        file = folder / _TOKENIZER_CONFIG
        config = read_settings(file, _TOKENS) if file.is_file() else {}
    return {
        key: token["content"] if isinstance(token, dict) else token for key, token in config.items()
    }


def _prefix(
    tokenizer: Tokenizer,
    special: Mapping[str, str | None],
    eos_ids: frozenset[int],
    *,
    source: str,
) -> int:
    """Return the start token, else the end token, as the harness does for its own models."""
    for key in ("bos_token", "eos_token"):
        text = special.get(key)
        number = None if text is None else tokenizer.token_to_id(text)
        if number is not None:
            return int(number)
    if not eos_ids:
        raise GenerationError(
            f"Nothing says which token starts or ends a text of {source}. Put the model's "
            f"{_TOKENIZER_CONFIG} beside the artifact."
        )
    return min(eos_ids)
