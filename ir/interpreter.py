"""The reference interpreter: runs a graph by each op's `reference`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from moec.ir.dims import Dim, bind, evaluate
from moec.ir.errors import ArgumentTypeError, CompileError
from moec.ir.graph import Graph, Node, Value, undefined
from moec.ir.printer import excerpt
from moec.ir.runtime_sizes import bind_results, measured, runtime_symbols
from moec.ir.types import DType, TensorType

Tap = Callable[[Value, torch.Tensor], "torch.Tensor | None"]


def bind_inputs(graph: Graph, inputs: Sequence[torch.Tensor]) -> dict[str, int]:
    """Check count, dtypes and shapes of the inputs and solve the dimension symbols.

    Raises ArgumentTypeError or ArgumentValueError that names the argument, expected and got.
    """
    if len(inputs) != len(graph.inputs):
        names = ", ".join(str(v.name) for v in graph.inputs)
        raise ArgumentTypeError(
            f"expected {len(graph.inputs)} tensor inputs ({names}), got {len(inputs)}", code="arguments"
        )
    for v, t in zip(graph.inputs, inputs, strict=True):
        if not isinstance(t, torch.Tensor):
            raise ArgumentTypeError(
                f"argument {v.name!r} must be a torch.Tensor {v.type}, got {type(t).__name__}", code="arguments"
            )
        if t.is_meta or t.layout is not torch.strided:
            what = "a meta tensor without data" if t.is_meta else f"a tensor of layout {t.layout}"
            raise ArgumentTypeError(f"argument {v.name!r} is {what}, expected {v.type} with its data", code="arguments")
        if DType.of(t.dtype) != v.dtype:
            raise ArgumentTypeError(
                f"argument {v.name!r} has dtype {DType.of(t.dtype)}, expected {v.dtype}", code="dtype"
            )
    return bind([(str(v.name), v.shape, tuple(t.shape)) for v, t in zip(graph.inputs, inputs, strict=True)])


MOST_KEYS = 256  # calls of other shapes that are remembered


def call_key(inputs: Sequence[Any]) -> Any:
    """What `bind_inputs` goes by, to remember what it found."""
    return tuple([(t.shape, t.dtype, t.layout, t.is_meta) if isinstance(t, torch.Tensor) else type(t) for t in inputs])


def plain_tensor(name: str | None, tensor: torch.Tensor) -> torch.Tensor:
    """An argument without its subclass and its gradient. Raises ArgumentTypeError where it has no dense data."""
    kind = None
    if tensor.is_nested:
        kind, hint = "nested", "torch.nested.to_padded_tensor makes a dense one"
    elif tensor.layout is not torch.strided:
        kind, hint = f"sparse ({tensor.layout})", ".to_dense() makes a dense one"
    elif tensor.is_quantized:
        kind, hint = f"quantised ({tensor.dtype})", ".dequantize() makes a dense one"
    elif tensor.device.type == "meta":
        kind, hint = "on meta, a device without data", "pass a tensor with data"
    if kind is not None:
        raise ArgumentTypeError(f"argument {name!r} is {kind}, expected a dense tensor", code="arguments", hint=hint)
    return (tensor if type(tensor) is torch.Tensor else tensor.as_subclass(torch.Tensor)).detach()


def evaluate_attr(value: Any, binding: Mapping[str, int]) -> Any:
    """An attribute with its dims replaced by integers."""
    if isinstance(value, Dim):
        return value.evaluate(binding)
    if isinstance(value, tuple):
        return tuple(evaluate_attr(v, binding) for v in value)
    return value


def attributes(node: Node, binding: Mapping[str, int]) -> dict[str, Any]:
    """The attributes of a node as numbers; names of sizes that its results are the first to have stay names."""
    return {k: v if k in node.opdef.binds else evaluate_attr(v, binding) for k, v in node.attrs.items()}


def evaluate_node(
    node: Node,
    operands: Sequence[torch.Tensor | None],
    binding: dict[str, int],
    functions: Mapping[str, Graph] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Run one node's reference on tensors; sizes known only then are added to `binding`. Raises CompileError where
    the results lack the inferred type."""
    instance = node.opdef.instance(operands, attributes(node, binding))
    if node.op == "call.graph":
        instance.functions = functions or {}
    try:
        result = instance.reference()
    except CompileError as e:
        raise e.located(node.location, excerpt(node)) from None
    except (RuntimeError, IndexError, ValueError, TypeError) as e:
        raise CompileError(
            f"{node.op} failed: {e}", code="execution", location=node.location, excerpt=excerpt(node)
        ) from e
    except Exception as e:  # whatever a definition does wrong is said with its place
        raise CompileError(
            f"{node.op} ({node.opdef.file}:{node.opdef.line}): reference() raised {type(e).__name__}: {e}",
            code="op",
            location=node.location,
            excerpt=excerpt(node),
        ) from e
    results = tuple(result) if isinstance(result, list | tuple) else (result,)
    if len(results) != len(node.results) or not all(isinstance(r, torch.Tensor) for r in results):
        shown = ", ".join(type(r).__name__ for r in results) or "nothing"
        raise CompileError(
            f"{node.op} ({node.opdef.file}:{node.opdef.line}): reference() returned {shown}, expected "
            f"{len(node.results)} Tensor(s)",
            code="op",
            location=node.location,
            excerpt=excerpt(node),
            hint="is a return missing?" if result is None else None,
        )
    bind_results(node, results, binding)
    for r, v in zip(results, node.results, strict=True):
        shape = tuple(evaluate(s, binding) for s in v.shape)
        if DType.of(r.dtype) is not v.dtype or tuple(r.shape) != shape:
            raise CompileError(
                f"{node.op} gave {TensorType.of(r)}, its type says {v.dtype}{list(shape)}",
                code="execution",
                location=node.location,
                excerpt=excerpt(node),
            )
    return results


def run(
    graph: Graph,
    inputs: Sequence[torch.Tensor],
    *,
    tap: Tap | None = None,
    functions: Mapping[str, Graph] | None = None,
) -> list[torch.Tensor]:
    """Run a graph on tensors; values are freed after their last use.

    `tap(value, tensor)` sees every input and node result in order; a tensor that it returns takes the
    value's place. Raises ArgumentTypeError/ArgumentValueError on inputs that do not fit.
    """
    binding = bind_inputs(graph, inputs)
    functions = graph.functions if functions is None else functions
    env: dict[Value, torch.Tensor] = {}

    def record(value: Value, tensor: torch.Tensor) -> None:
        replaced = tap(value, tensor) if tap else None
        env[value] = tensor if replaced is None else replaced

    last: dict[Value, Node] = {}
    for node in graph.nodes:
        for v in node.operands:
            if v is not None:
                last[v] = node
    with torch.no_grad():
        for v, t in zip(graph.inputs, inputs, strict=True):
            record(v, t)
        for node in graph.nodes:
            try:
                operands = [None if v is None else _tensor(v, env) for v in node.operands]
            except KeyError:
                raise undefined(node, env) from None
            for v, t in zip(node.results, evaluate_node(node, operands, binding, functions), strict=True):
                record(v, t)
            for v in {v for v in (*node.operands, *node.results) if v is not None}:
                if last.get(v, node) is node and not v.is_output:
                    env.pop(v, None)
        return [_tensor(v, env) for v in graph.outputs]


def sizes_of(graph: Graph, inputs: Sequence[torch.Tensor]) -> dict[str, int]:
    """Every symbol of a graph on these inputs; sizes known only at run time cost a run of the reference. Raises as
    `run` does."""
    binding = bind_inputs(graph, inputs)
    if not runtime_symbols(graph):
        return binding

    values: dict[Value, torch.Tensor] = {}
    shown = {value for value, _ in runtime_symbols(graph).values()}

    def see(value: Value, tensor: torch.Tensor) -> None:
        if value in shown:
            values[value] = tensor

    run(graph, inputs, tap=see)
    return measured(values, graph, binding)


def _tensor(v: Value, env: Mapping[Value, torch.Tensor]) -> torch.Tensor:
    # kernels round otherwise on a view's strides, which a saved weight does not have
    return v.weight.load().contiguous() if v.weight is not None else env[v]
