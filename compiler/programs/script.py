"""torch.export.ExportedProgram -> TorchScript: one line of source per operator.

A trace would do the same, but asks for example inputs and real weights, and says nothing where it
takes a size for a constant. Here each size is what the exported program says it is.
"""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.export.graph_signature import InputKind

from alloc_moe.compiler.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from alloc_moe.compiler.programs.capture import Captured
    from alloc_moe.runtime.execution.torch_programs.loading import CacheTensor

_INFIX = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.floordiv: "//",
    operator.mod: "%",
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
}
_TYPES = {
    InputKind.PARAMETER,
    InputKind.BUFFER,
    InputKind.CONSTANT_TENSOR,
}


def to_script(captured: Captured, weights: Mapping[str, torch.Tensor]) -> torch.jit.ScriptModule:
    """Return the program as a TorchScript module.

    Its ``forward(input_ids, attention_mask, position_ids, cache, price=None, logits_to_keep=0)``
    returns logits, the grown cache and how many experts ran [layers, tokens]; there is a price only
    if there is a dial. ``empty_cache(batch)`` returns the cache to begin with.

    Args:
        captured: The program.
        weights: The values of its state, by name; none is copied.

    Raises:
        UnsupportedModelError: It has an operator without a form in TorchScript.
    """
    program = captured.program
    # TorchScript gives modules of one class and the same attributes one type, whose methods can be
    # defined only once: a second program of the same shape needs a class of its own.
    holder: torch.nn.Module = type("Program", (torch.nn.Module,), {})()
    bound, inputs = {}, []
    for spec in program.graph_signature.input_specs:
        if spec.kind not in _TYPES:
            inputs.append(spec.arg.name)
            continue
        assert spec.target is not None
        found = weights if spec.target in weights else {**program.state_dict, **program.constants}
        holder.register_buffer(spec.arg.name, found[spec.target].detach())
        bound[spec.arg.name] = f"self.{spec.arg.name}"
    script = torch.jit.script(holder.eval())
    script.define(_empty_cache(captured.cache, captured.dtype))
    script.define(_forward(captured, inputs, bound))
    return script


def _empty_cache(cache: Sequence[CacheTensor], dtype: str) -> str:
    sizes = []
    for shape in cache:
        free = {0: "batch", shape.past_axis: "0"}
        sizes.append([free.get(axis, str(size)) for axis, size in enumerate(shape.sizes)])
    made = ", ".join(f"torch.empty([{', '.join(each)}], dtype=torch.{dtype})" for each in sizes)
    return f"def empty_cache(self, batch: int) -> List[Tensor]:\n    return [{made}]\n"


def _forward(captured: Captured, inputs: Sequence[str], bound: Mapping[str, str]) -> str:
    """Return the source of ``forward``; `inputs` are the placeholders that are no weights."""
    ids, mask, positions, *rest = inputs
    cache, (columns, *price) = rest[: len(captured.cache)], rest[len(captured.cache) :]
    dial = ", price: Optional[float] = None" if price else ""
    lines = [
        f"def forward(self, {ids}: Tensor, {mask}: Tensor, {positions}: Tensor, "
        f"cache: List[Tensor]{dial}, logits_to_keep: int = 0) "
        "-> Tuple[Tensor, List[Tensor], Tensor]:",
        f"alloc_length = {ids}.size(1)",
        "alloc_first = alloc_length - logits_to_keep if logits_to_keep > 0 else 0",
        f"{columns} = torch.arange(max(alloc_first, 0), alloc_length)",
    ]
    if price:
        lines.append(
            f"{price[0]}_ = torch.tensor(-1.0 if price is None else price, dtype=torch.float32)"
        )
    lines += [f"{name} = cache[{index}]" for index, name in enumerate(cache)]
    emitter = _Emitter({**bound, **({price[0]: f"{price[0]}_"} if price else {})})
    for node in captured.program.graph.nodes:
        if node.op == "call_function":
            lines.append(f"{emitter.name(node)} = {emitter.call(node)}")
        elif node.op == "output":
            logits, *grown, kept = map(emitter.value, node.args[0])
            lines.append(f"return {logits}, [{', '.join(grown)}], {kept}")
        elif node.op != "placeholder":
            raise _unsupported(f"a nested graph ({node.target})")
    return "\n    ".join(lines) + "\n"


class _Emitter:
    """Writes nodes of a graph as TorchScript; `bound` are names that stand for something else."""

    def __init__(self, bound: Mapping[str, str]) -> None:
        self._bound = bound

    def name(self, node: torch.fx.Node) -> str:
        return f"{node.name}_" if keyword.iskeyword(node.name) else node.name

    def call(self, node: torch.fx.Node) -> str:
        target = node.target
        args = [self.value(arg) for arg in node.args]
        if target in _INFIX:
            return f"{args[0]} {_INFIX[target]} {args[1]}"
        if target is operator.getitem:
            return f"{args[0]}[{args[1]}]"
        if target is torch.ops.aten.sym_size.int:
            return f"{args[0]}.size({args[1]})"
        if target is torch.ops.aten.lift_fresh_copy.default:
            return f"{args[0]}.clone()"
        if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
            raise _unsupported(str(target))
        schema = target._schema.arguments
        args = [self._typed(*each) for each in zip(node.args, schema, strict=False)]
        args += [f"{key}={self.value(value)}" for key, value in node.kwargs.items()]
        return f"torch.ops.aten.{target._opname}({', '.join(args)})"

    def _typed(self, value: Any, argument: Any) -> str:
        """Lists whose items don't tell the type of the list."""
        if isinstance(value, list | tuple):
            kind = str(argument.type)
            if "Optional[Tensor]" in kind and kind.startswith("List"):
                return f"torch.jit.annotate(List[Optional[Tensor]], {self.value(value)})"
            if not value:
                return "torch.jit.annotate(List[int], [])"
        return self.value(value)

    def value(self, value: Any) -> str:
        match value:
            case torch.fx.Node():
                return self._bound.get(value.name, self.name(value))
            case list() | tuple():
                return f"[{', '.join(map(self.value, value))}]"
            case torch.device():
                return f'torch.device("{value}")'
            case torch.dtype() | torch.memory_format() | torch.layout():
                return str(value)
            case float() if not math.isfinite(value):
                return f'float("{value}")'
            case None | bool() | int() | float() | str():
                return repr(value)
        raise _unsupported(f"a constant of type {type(value).__name__}")


def _unsupported(what: str) -> UnsupportedModelError:
    what = re.sub(r"\s+", " ", what)
    return UnsupportedModelError(
        f"The model computes with {what}, which has no form in TorchScript. Write an .onnx file, "
        "or a .pt2 file for torch.export."
    )
