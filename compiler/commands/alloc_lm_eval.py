"""alloc-lm-eval: the command lm_eval of lm-evaluation-harness, which then knows our model.

The harness finds no models of other packages by itself.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback

NAME = "alloc-moe"
_TARGET = "alloc_moe.compiler.evaluation.harness:AllocMoeLM"


def register() -> None:
    """Make the model ``alloc-moe`` known to lm_eval; it is loaded when first used."""
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=_TARGET)


def main() -> None:
    """Run lm_eval on the command line's arguments, our errors without a traceback."""
    from alloc_moe.runtime.errors import AllocMoeError

    if importlib.util.find_spec("lm_eval") is None:
        sys.exit("Error: alloc-lm-eval needs lm-evaluation-harness. Install alloc-moe[eval].")
    from lm_eval.__main__ import cli_evaluate

    register()
    try:
        cli_evaluate()
    except AllocMoeError as error:
        sys.exit(f"Error: {error}")
    except ValueError as error:
        if not _is_of_arguments(error):
            raise
        sys.exit(f"Error: lm-evaluation-harness can't do that: {error}")


def _is_of_arguments(error: ValueError) -> bool:
    """Whether the harness refuses what it was asked; anything else is a bug, shown whole."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"]).startswith(("lm_eval.config.", "lm_eval._cli."))


if __name__ == "__main__":
    main()
