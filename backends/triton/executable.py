"""A lowered graph as a schedule of kernel launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from moec.backends.base import Executable, lowering_failed, returned
from moec.backends.triton.backend import TritonBackend, by_reference, torch_reason
from moec.backends.triton.codegen import Custom
from moec.backends.triton.fusion import Group, Unit, plan
from moec.backends.triton.runner import KernelError, Resident, mode, run
from moec.ir import CompileError, DType, Graph, Node, TensorType, Value
from moec.ir.arrays import as_bytes, from_bytes
from moec.ir.dims import evaluate
from moec.ir.interpreter import attributes, bind_inputs
from moec.ir.ops.moe import check_expert_ids, routed
from moec.ir.printer import excerpt
from moec.ir.runtime_sizes import bind_results


class Schedule:
    """Units in running order, and which values die after each. `graph.outputs` and `keep` stay."""

    def __init__(self, graph: Graph, keep: Sequence[Value], custom: Custom):
        self.units: list[Unit] = plan(graph, keep, custom)
        last: dict[Value, int] = {}
        for i, unit in enumerate(self.units):
            for v in (*reads(unit), *writes(unit)):
                last[v] = i
        self.dead: list[list[Value]] = [[] for _ in self.units]
        for v, i in last.items():
            if v.weight is None and not v.is_output and v not in keep:
                self.dead[i].append(v)


def reads(unit: Unit) -> list[Value]:
    return unit.inputs if isinstance(unit, Group) else [v for v in unit.operands if v is not None]


def writes(unit: Unit) -> Sequence[Value]:
    return unit.outputs if isinstance(unit, Group) else unit.results


class TritonExecutable(Executable):
    """See moec.backends.base.Executable. Runs on the current CUDA device, else in Triton's interpreter on the CPU;
    inputs may live on any device, and results come back to that of the first input."""

    def __init__(self, graph: Graph, backend: TritonBackend, functions: dict[str, Executable] | None = None):
        self.graph = graph
        self.backend = backend
        self._functions: dict[str, Executable] = {}
        if functions is None:
            for name, function in graph.functions.items():
                self._functions[name] = TritonExecutable(function, backend, self._functions)
        else:  # a called graph: it may call others of the same table
            self._functions = functions
        self._custom = backend.custom
        self._schedule = Schedule(graph, (), self._custom)
        self._tapped: tuple[tuple[Value, ...], Schedule] | None = None
        self._weights: dict[tuple[Value, torch.device], Resident] = {}
        self._unchecked = {  # experts with ids that no router gave
            n
            for n in graph.nodes
            if n.op in ("moe.experts", "quant.scaled_experts")
            and not routed(n.operand("experts"), int(n.operand("gate_up").shape[0]))
        }

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return self._run(self._schedule, inputs, self.graph.outputs)

    def tap(self, inputs: Sequence[torch.Tensor], values: Sequence[Value]) -> dict[Value, torch.Tensor]:
        wanted = tuple(dict.fromkeys(values))
        if self._tapped is None or self._tapped[0] != wanted:
            known = {
                *self.graph.inputs,
                *self.graph.weights.values(),
                *(r for n in self.graph.nodes for r in n.results),
            }
            for v in wanted:
                if v not in known:
                    raise CompileError(f"{v!r} is not a value of the lowered graph", code="tap", location=v.location)
            self._tapped = wanted, Schedule(self.graph, wanted, self._custom)
        return dict(zip(wanted, self._run(self._tapped[1], inputs, wanted), strict=True))

    @property
    def stats(self) -> dict[str, Any]:
        """`kernels`: launches by wrapper, generated ones under "elementwise"; `fused_nodes`: IR nodes in those;
        `torch_ops`: nodes that torch runs (`torch_reason` says why); `device`: where a run would take place."""
        units = self._schedule.units
        groups = [u for u in units if isinstance(u, Group)]
        nodes = [u for u in units if isinstance(u, Node)]
        by_torch = Counter(n.op for n in nodes if torch_reason(n, self.backend))
        kernels = Counter(n.op for n in nodes if not torch_reason(n, self.backend) and n.op != "call.graph")
        return {
            "kernels": dict(kernels) | ({"elementwise": len(groups)} if groups else {}),
            "fused_nodes": sum(len(g.nodes) for g in groups),
            "torch_ops": dict(by_torch),
            "device": f"{device()} ({mode(device())})",
        }

    def _run(self, schedule: Schedule, inputs: Sequence[torch.Tensor], values: Sequence[Value]) -> list[torch.Tensor]:
        binding = bind_inputs(self.graph, inputs)
        here = device()
        home = inputs[0].device if inputs else torch.device("cpu")
        env: dict[Value, Any] = {v: _moved(t, here) for v, t in zip(self.graph.inputs, inputs, strict=True)}
        # references in torch make their constants on the current default device
        with torch.no_grad(), here:
            for unit, dead in zip(schedule.units, schedule.dead, strict=True):
                for v in reads(unit):
                    if v.weight is not None and v not in env:
                        env[v] = self._weight(v, here)
                with _located(unit if isinstance(unit, Node) else unit.nodes[0]):
                    results = _fused(unit, env, binding) if isinstance(unit, Group) else self._node(unit, env, binding)
                    if isinstance(unit, Node):
                        bind_results(unit, results, binding)
                    _check(writes(unit), results, binding)
                env.update(zip(writes(unit), results, strict=True))
                for v in dead:
                    env.pop(v, None)
            found = [env[v] if v in env else self._weight(v, here) for v in values]
        return [_moved(_plain(x), home) for x in found]

    def _node(self, node: Node, env: Mapping[Value, Any], binding: Mapping[str, int]) -> tuple[torch.Tensor, ...]:
        operands = [None if v is None else env[v] for v in node.operands]
        by_torch = torch_reason(node, self.backend) is not None
        replaced = self.backend.is_replaced(node.op)
        if by_torch or replaced or node.op not in self.backend.keeps_weights:
            operands = [_plain(x) for x in operands]
        instance = node.opdef.instance(operands, attributes(node, binding))
        if node in self._unchecked:
            # the kernels skip ids that are out of range; this waits for the device
            check_expert_ids(_plain(instance.experts), int(node.operand("gate_up").shape[0]))
        if node.op == "call.graph":
            instance.functions = self._functions
        lowering = by_reference if by_torch else self.backend.lowerings[node.op]
        try:
            result = lowering(instance)
        except Exception as error:  # whatever a lowering from outside does wrong is said with its place
            if not replaced:
                raise
            raise lowering_failed(lowering, node, error) from error
        return returned(lowering, node, result, torch.Tensor)

    def _weight(self, value: Value, here: torch.device) -> Resident:
        """The data of a weight on a device, loaded once."""
        key = value, here
        if key not in self._weights:
            assert value.weight is not None
            self._weights[key] = Resident(_moved(value.weight.load(), here))
        return self._weights[key]


def device() -> torch.device:
    """Where kernels run: the current CUDA device, or the CPU without one or where triton interprets."""
    if torch.cuda.is_available() and mode("cuda") == "gpu":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _fused(group: Group, env: Mapping[Value, Any], binding: Mapping[str, int]) -> tuple[torch.Tensor, ...]:
    shape = tuple(evaluate(s, binding) for s in group.shape)
    made = group.program
    return run("elementwise", made.body, made.outputs, shape, *(env[v] for v in group.inputs))


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; torch moves no 4-bit integers, but the bytes that hold them."""
    return from_bytes(as_bytes(tensor).to(device), DType.of(tensor.dtype))


def _plain(x: Any) -> Any:
    return x.tensor if isinstance(x, Resident) else x


def _check(values: Sequence[Value], results: Sequence[torch.Tensor], binding: Mapping[str, int]) -> None:
    for v, r in zip(values, results, strict=True):
        want = v.type.with_shape([evaluate(s, binding) for s in v.shape])
        if TensorType.of(r) != want:
            producer = v.producer.op if v.producer is not None else v.name
            raise CompileError(f"{producer} gave {TensorType.of(r)}, its type says {want}", code="execution")


@contextmanager
def _located(node: Node) -> Iterator[None]:
    """Errors of a kernel or of torch as CompileErrors that name the node."""
    try:
        yield
    except CompileError as e:
        raise e.located(node.location, excerpt(node)) from None
    except (RuntimeError, KernelError, IndexError, ValueError, TypeError) as e:
        raise CompileError(
            f"{node.op} failed on triton: {e}", code="execution", location=node.location, excerpt=excerpt(node)
        ) from e
