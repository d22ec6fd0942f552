"""PyTorch models → IR, through torch.export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from moec.frontend.agreement import inputs_at
from moec.frontend.asked import asking
from moec.frontend.aten.registry import LOWERINGS, op_name
from moec.frontend.axes import declared_bounds, explained, inside_both, specialised, untried
from moec.frontend.branches import something_found
from moec.frontend.containers import register_caches
from moec.frontend.dynamic import (
    declared_range,
    declared_size,
    for_export,
    leaf_names,
    leaf_specs,
    parameter_names,
)
from moec.frontend.errors import translated
from moec.frontend.grouped import GroupedMMMode
from moec.frontend.guards import Guard, assumptions, ones, ranges
from moec.frontend.lower import Lowerer, has_lowering, missing_ops, mutates
from moec.frontend.recheck import recheck
from moec.frontend.recurrent import RecurrentMode
from moec.frontend.signature import Signature, as_constant
from moec.frontend.size_bools import plain_bools
from moec.frontend.sizes import Bounds, Sizes
from moec.frontend.stand_ins import Used, standing_in, structural
from moec.ir import ArgumentTypeError, CompileError, Graph, Location
from moec.ir.interpreter import bind_inputs


@dataclass(frozen=True)
class Traced:
    """A traced model.

    `graph`: the program, its inputs the tensor arguments in order; `signature`: how calls map to it;
    `specialised`: axes that dynamic_shapes left open (AUTO) and the model fixed, as "input_ids axis 1 = 24", and named
    ones that it ties to others, as "mask axis 1 (T) = P + S";
    `checked`: the other sizes at which the program was compared with the model.
    """

    graph: Graph
    signature: Signature
    specialised: tuple[str, ...] = ()
    checked: tuple[str, ...] = ()

    @property
    def in_spec(self) -> pytree.TreeSpec:
        return self.signature.in_spec

    @property
    def out_spec(self) -> pytree.TreeSpec:
        return self.signature.out_spec

    @property
    def input_names(self) -> tuple[str, ...]:
        return self.signature.tensor_names

    def flatten(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> list[torch.Tensor]:
        """The graph's inputs for a call. Raises ArgumentTypeError or ArgumentValueError that names the argument,
        for wrong structure, constants, dtypes, shapes and sizes outside the traced bounds."""
        tensors = self.signature.flatten(args, kwargs)
        self.signature.check_bounds(bind_inputs(self.graph, tensors))
        return tensors

    def unflatten(self, results: Sequence[torch.Tensor]) -> Any:
        """The model's result structure from the graph's outputs."""
        return self.signature.unflatten(results)


class _Flat(torch.nn.Module):
    """The user's model with its tensor arguments flattened: export then sees one plain signature, whatever
    mixture of positional, keyword, nested and constant arguments the call has."""

    def __init__(self, model: torch.nn.Module, spec: pytree.TreeSpec, constants: Mapping[int, Any]):
        super().__init__()
        self.model = model
        self._spec, self._constants = spec, constants

    def forward(self, *tensors: torch.Tensor) -> Any:
        rest = iter(tensors)
        leaves = [self._constants[i] if i in self._constants else next(rest) for i in range(self._spec.num_leaves)]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return self.model(*args, **kwargs)


_PREFIX = "model"


def trace(
    model: torch.nn.Module | torch.export.ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    check: bool = True,
) -> Traced:
    """Trace a model into the IR.

    `args`, `kwargs`: example arguments (tensors, plain constants, nested containers of them). `dynamic_shapes`: as
    torch.export's, None for static shapes, or "auto" for every axis as dynamic as the model allows. The model is
    traced in eval mode and without gradients; its state is left as it was, its weights are shared, not copied. With
    `check`, a program with dynamic axes is compared with the model at sizes it was not traced at (1 among them).

    Raises CompileError naming the module and line of the model for what cannot be traced: unsupported ops, control
    flow over tensor values, state changed in forward, axes declared dynamic that the model fixes.
    """
    if isinstance(model, torch.export.ExportedProgram):
        if args or kwargs or dynamic_shapes is not None:
            raise ArgumentTypeError(
                "an ExportedProgram brings its own arguments and shapes", code="arguments", hint="pass it alone"
            )
        return _from_program(model)
    if not isinstance(model, torch.nn.Module):
        raise ArgumentTypeError(
            f"model must be a torch.nn.Module or ExportedProgram, got {type(model).__name__}", code="arguments"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentTypeError("a TorchScript module cannot be traced", code="arguments", hint="pass the nn.Module")
    for name, module in model.named_modules():
        if any(isinstance(v, torch.ScriptObject) for v in vars(module).values()):
            raise CompileError(
                f"module {name!r} ({type(module).__name__}) keeps its weights packed for a quantised kernel",
                code="unsupported-model",
                location=Location.at(name),
                hint="trace the float model; moec.compile(..., quantize=...) quantises it",
            )
    register_caches()
    with evaluating(model):
        return _from_module(model, tuple(args), dict(kwargs or {}), dynamic_shapes, check)


def _from_module(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, check: bool
) -> Traced:
    parameters = parameter_names(model)
    leaves, in_spec = pytree.tree_flatten((args, kwargs))
    names = leaf_names(parameters, args, kwargs)
    specs = leaf_specs(dynamic_shapes, parameters, args, kwargs)
    constants = {
        i: as_constant(n, x)
        for i, (n, x) in enumerate(zip(names, leaves, strict=True))
        if not isinstance(x, torch.Tensor)
    }
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    specs = [s for s, x in zip(specs, leaves, strict=True) if isinstance(x, torch.Tensor)]
    tensor_names = [n for i, n in enumerate(names) if i not in constants]
    if any(p.is_meta for p in model.parameters()):
        tensors = [t.to("meta") for t in tensors]
    used: Used = {}
    wrapper = _Flat(model, in_spec, constants)

    def attempt(structures: bool) -> Traced:
        used.clear()
        with standing_in(model, used, structures), asking() as asked, something_found() as branches:
            program = _decomposed(_export(wrapper, model, tensors, specs), model)
        user_dims = [{axis: n for axis, d in s.items() if (n := declared_size(d)) is not None} for s in specs]
        spans = ranges(program, {(i, axis): declared_range(d) for i, s in enumerate(specs) for axis, d in s.items()})
        lower = partial(Lowerer, program, prefix=_PREFIX, input_names=tensor_names, user_dims=user_dims)
        lowerer = lower(ranges=spans)
        try:
            graph = lowerer.run()
        except CompileError as e:
            fixed = ones(program)
            if not fixed:
                raise explained(e, program, lowerer) from None
            lowerer = lower(ranges=spans | fixed)
            try:
                graph = lowerer.run()
            except CompileError as again:
                raise explained(again, program, lowerer) from None
        notes = specialised(graph, specs, program)
        signature = Signature(
            in_spec, program.call_spec.out_spec, tuple(parameters), tuple(names), constants, tuple(lowerer.outputs)
        )
        declared = declared_bounds(specs)
        checked: tuple[str, ...] = ()
        if check and not any(t.is_meta for t in tensors):
            bounds: Bounds = {}
            conditions: tuple[str, ...] = ()
            if graph.symbols or used or branches:
                assumed = assumptions(program, asked, lowerer.symbols)

                def asked_at(sizes: Sizes) -> list[Guard] | None:
                    others = inputs_at(graph, tensors, sizes)
                    with standing_in(model, {}, structures), asking() as asked, something_found():
                        try:
                            there = _export(wrapper, model, others, specs)
                        except CompileError:
                            return None
                    return assumptions(there, asked, lowerer.symbols, program)

                bounds, conditions, checked = recheck(
                    model, graph, signature, tensors, declared, assumed, asked_at, used, branches
                )
        else:
            bounds, conditions = untried(spans, program, lowerer)
        signature = replace(signature, bounds=inside_both(bounds, declared), conditions=conditions)
        return Traced(graph, signature, notes, checked)

    try:
        return attempt(structures=True)
    except CompileError as e:
        labels = structural(used)
        if not labels:
            raise
        try:  # what only looks like such a module may well be traced as it is
            return attempt(structures=False)
        except CompileError:
            message = f"{e.message}; an op of ours stood in for {', '.join(labels)}"
            e.message = e.message if "stood in for" in e.message else message
            raise e from None


def _export(
    wrapper: torch.nn.Module, model: torch.nn.Module, tensors: list[torch.Tensor], specs: list[dict[int, Any]]
) -> torch.export.ExportedProgram:
    axes = tuple({axis: for_export(d) for axis, d in s.items()} for s in specs)
    shapes = {"tensors": axes} if any(axes) else None
    # backed_size_oblivious: sizes 0 and 1 stay open instead of being assumed away; a lower bound that torch
    # reports is then a branch of the model's own, and an example of size 1 can be dynamic
    with translated(model, "tracing"), torch.no_grad(), _export_settings():
        return torch.export.export(wrapper, tuple(tensors), dynamic_shapes=shapes, strict=False)


def _decomposed(program: torch.export.ExportedProgram, model: torch.nn.Module | None) -> torch.export.ExportedProgram:
    doing = "tracing" if model is not None else "decomposing the exported program"
    with translated(model, doing), torch.no_grad(), _export_settings():
        return decompose(program)


def decompose(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Functional form, in ops that have lowerings as far as torch knows how to get there."""
    if not missing_ops(program) and not mutates(program):
        return program
    program = program.run_decompositions(dict(_decompositions(len(LOWERINGS))))
    rest = torch._decomp.get_decompositions(missing_ops(program))
    return program.run_decompositions(dict(rest)) if rest else program


@cache
def _decompositions(lowerings: int) -> dict[Any, Any]:
    """torch's table without the ops that have a lowering (as many as there were when it was asked for)."""
    table = torch.export.default_decompositions()
    whole = {op for op in table.keys() if isinstance(op, torch._ops.OpOverload) and has_lowering(op_name(op))}  # noqa: SIM118
    return {op: fn for op, fn in table.items() if op not in whole}


@contextmanager
def _export_settings() -> Iterator[None]:
    open_sizes = torch.fx.experimental._config.patch(  # type: ignore[attr-defined]  # made when torch is imported
        backed_size_oblivious=True
    )
    with open_sizes, plain_bools(), GroupedMMMode(), RecurrentMode():
        yield


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode again afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def _from_program(program: torch.export.ExportedProgram) -> Traced:
    functional = _decomposed(program, None)
    torchs_own = (2, None)
    spans = {s: r for s, r in ranges(functional, {}).items() if r != torchs_own}
    lowerer = Lowerer(functional, ranges=spans)
    graph = lowerer.run()
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    count = in_spec.num_leaves
    signature = program.graph_signature
    names = [str(getattr(s.arg, "name", "")) for s in signature.input_specs if s.kind.name == "USER_INPUT"][:count]
    constants = {i: lowerer.constant_inputs[n] for i, n in enumerate(names) if n in lowerer.constant_inputs}
    first, keys = in_spec.child(0).num_children, list(in_spec.child(1).context or ())
    parameters = [f"arg{i}" if i >= len(names) else names[i] for i in range(first)] + keys
    bounds, conditions = untried(spans, functional, lowerer)
    outputs = tuple(lowerer.outputs)
    call = Signature(in_spec, out_spec, tuple(parameters), tuple(names), constants, outputs, bounds, conditions)
    return Traced(graph, call)
