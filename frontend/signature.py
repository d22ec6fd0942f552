"""How a call with the user's arguments becomes flat tensors, and flat results become the user's structure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.utils import _pytree as pytree

from moec.frontend.containers import check_spec, import_classes
from moec.frontend.limits import Limits
from moec.ir import ArgumentTypeError, ArgumentValueError, ArtifactError, CompileError, Graph
from moec.ir.interpreter import plain_tensor

Constant = None | bool | int | float | str

_MALFORMED = (
    KeyError, TypeError, ValueError, AttributeError, NotImplementedError, AssertionError, RecursionError, OverflowError,
)  # fmt: skip

# what a graph output of each kind is to the caller
_READ: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda t: t,
    "complex": lambda t: torch.view_as_complex(t.contiguous()),
    "size": int,
    "number": lambda t: t.item(),
}

_PLAIN = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Signature:
    """The calling convention of a traced program.

    `in_spec`: pytree of `(args, kwargs)`; `parameters`: names of the forward's parameters; `input_names`: names of
    all leaves of in_spec; `constants`: leaf index → the value it was traced with (every leaf that is no tensor);
    `out_spec` and `outputs`: the result's pytree and, per leaf, ("tensor", graph output), ("complex", graph output
    f32[…, 2] of real and imaginary parts), ("size" or "number", graph output holding one) or ("constant", value);
    `bounds`: symbol → (least, greatest or None) sizes the program holds for, where that is not all; `conditions`: what
    else has to be true of sizes, see `conditions.Condition`.
    """

    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    parameters: tuple[str, ...]
    input_names: tuple[str, ...]
    constants: Mapping[int, Constant] = field(default_factory=dict)
    outputs: tuple[tuple[str, Any], ...] = ()
    bounds: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    conditions: tuple[str, ...] = ()

    @property
    def limits(self) -> Limits:
        return Limits(self.bounds, self.conditions)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of the tensor arguments: the graph's inputs, in order."""
        return tuple(n for i, n in enumerate(self.input_names) if i not in self.constants)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> list[torch.Tensor]:
        """The tensors of a call, in the order of the graph's inputs.

        Arguments may be passed by position or by name, whichever way they were traced. Raises ArgumentTypeError on
        missing, unknown or differently nested arguments and ArgumentValueError where a constant has another value
        than at tracing.
        """
        if not kwargs and len(args) == self._tensors and all(type(a) is torch.Tensor for a in args):
            return [plain_tensor(name, a) for name, a in zip(self.input_names, args, strict=True)]
        args, kwargs = self._arrange(tuple(args), dict(kwargs or {}))
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.in_spec:
            raise ArgumentTypeError(
                f"the arguments are nested differently than at tracing: expected {_shown(self.in_spec)}, got "
                f"{_shown(spec)}",
                code="arguments",
            )
        tensors = []
        for i, (name, leaf) in enumerate(zip(self.input_names, leaves, strict=True)):
            if i in self.constants:
                want = self.constants[i]
                if isinstance(leaf, torch.Tensor) or type(leaf) is not type(want) or leaf != want:
                    got = "a tensor" if isinstance(leaf, torch.Tensor) else repr(leaf)
                    raise ArgumentValueError(
                        f"argument {name!r} was {want!r} when the model was traced and is fixed, got {got}",
                        code="arguments",
                        hint="compile again with the other value",
                    )
            elif not isinstance(leaf, torch.Tensor):
                raise ArgumentTypeError(
                    f"argument {name!r} must be a torch.Tensor, got {type(leaf).__name__}", code="arguments"
                )
            else:
                tensors.append(plain_tensor(name, leaf))
        return tensors

    @cached_property
    def _tensors(self) -> int | None:
        """How many tensors by position are a call, where one is no more than that: such calls are told at a glance."""
        args, kwargs = self.in_spec.child(0), self.in_spec.child(1)
        flat = args.type is tuple and all(c.is_leaf() for c in args.children()) and not kwargs.num_children
        return args.num_children if flat and not self.constants else None

    def check_bounds(self, binding: Mapping[str, int]) -> None:
        """Raise ArgumentValueError if dimensions are not of the sizes that the traced program holds for."""
        self.limits.check(binding)

    def unflatten(self, results: Sequence[torch.Tensor]) -> Any:
        """The model's own result structure from the graph's outputs."""
        leaves = []
        for kind, v in self.outputs:
            leaves.append(_READ[kind](results[v]) if kind in _READ else v)
        return pytree.tree_unflatten(leaves, self.out_spec)

    def _arrange(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Move arguments between positions and names so that they are passed as they were traced."""
        traced_args, traced_kwargs = self.in_spec.child(0), self.in_spec.child(1)
        plain = [p for p in self.parameters if not p.startswith("*")]
        count, keys = traced_args.num_children, list(traced_kwargs.context or ())
        moved: list[str] = []
        if len(args) < count:
            moved = plain[len(args) : count]
            if not all(m in kwargs for m in moved):
                missing = [m for m in moved if m not in kwargs]
                raise ArgumentTypeError(f"missing arguments: {', '.join(missing)}", code="arguments")
            args = (*args, *(kwargs.pop(m) for m in moved))
        for name in plain[: len(args)]:
            if name in kwargs and name not in moved:
                raise ArgumentTypeError(f"argument {name!r} is given twice", code="arguments")
        if len(args) > max(count, len(plain)):
            raise ArgumentTypeError(f"expected {count} positional arguments, got {len(args)}", code="arguments")
        kwargs.update(dict(zip(plain[count : len(args)], args[count:], strict=False)))
        args = args[:count]
        missing, unknown = [k for k in keys if k not in kwargs], [k for k in kwargs if k not in keys]
        if missing or unknown:
            fixed = {n: self.constants[i] for i, n in enumerate(self.input_names) if i in self.constants}
            notes = [f"{m}={fixed[m]!r}" if m in fixed else m for m in missing]
            text = "; ".join(
                part
                for part in (
                    f"missing arguments: {', '.join(notes)}" if missing else "",
                    f"arguments that were not there at tracing: {', '.join(unknown)}" if unknown else "",
                )
                if part
            )
            raise ArgumentTypeError(text, code="arguments", hint="the model was traced with exactly these arguments")
        return args, {k: kwargs[k] for k in keys}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form. Raises CompileError if a structure is of a class that torch cannot serialise."""
        try:
            specs = [json.loads(pytree.treespec_dumps(s)) for s in (self.in_spec, self.out_spec)]
        except (NotImplementedError, TypeError) as e:
            raise CompileError(f"the argument or result structure cannot be saved: {e}", code="save") from None
        return {
            "in_spec": specs[0],
            "out_spec": specs[1],
            "parameters": list(self.parameters),
            "input_names": list(self.input_names),
            "constants": {str(k): _written(v) for k, v in self.constants.items()},
            "outputs": [[kind, _written(v)] for kind, v in self.outputs],
            **self.limits.to_dict(),
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Signature:
        """Raises ArtifactError naming the field that is missing or malformed."""
        field_name = ""
        try:
            values: dict[str, Any] = {}
            for field_name in ("in_spec", "out_spec"):
                import_classes(data[field_name])
                check_spec(data[field_name])
                values[field_name] = pytree.treespec_loads(json.dumps(data[field_name]))
            for field_name in ("parameters", "input_names"):
                values[field_name] = _names(data[field_name])
            field_name = "constants"
            values["constants"] = {int(k): _read(v) for k, v in data["constants"].items()}
            field_name = "outputs"
            values["outputs"] = tuple((str(kind), _read(v)) for kind, v in data["outputs"])
            limits = Limits.from_dict(data)
            return Signature(**values, bounds=limits.bounds, conditions=limits.conditions)
        except ArtifactError as e:
            raise ArtifactError(f"signature: {e.message}", code="load") from None
        except (CompileError, *_MALFORMED) as e:
            raise ArtifactError(f"signature: field {field_name!r} is missing or malformed ({e})", code="load") from None


def positional(graph: Graph, names: Sequence[str] | None = None) -> Signature:
    """The call structure of a graph: tensors in the order of its inputs (or by their names), or arguments with these
    names, not all of them inputs; a tuple of outputs."""
    names = tuple(str(v.name) for v in graph.inputs) if names is None else tuple(names)
    return Signature(
        pytree.tree_structure((names, {})),
        pytree.tree_structure(tuple(graph.output_names)),
        names,
        names,
        outputs=tuple(("tensor", i) for i in range(len(graph.outputs))),
    )


def by_name(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments given by position or name, none of which must be there. Raises ArgumentTypeError."""
    if len(args) > len(names):
        raise ArgumentTypeError(f"expected {len(names)} positional arguments, got {len(args)}", code="arguments")
    given = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in names:
            raise ArgumentTypeError(f"no argument {name!r}; there are {', '.join(names)}", code="arguments")
        if name in given:
            raise ArgumentTypeError(f"argument {name!r} is given twice", code="arguments")
        given[name] = value
    return given


def _names(data: Any) -> tuple[str, ...]:
    if not isinstance(data, list) or not all(isinstance(n, str) for n in data):
        raise ValueError("not a list of names")
    return tuple(data)


def _written(v: Constant) -> Any:
    """A constant as JSON, which has no infinity and no NaN."""
    return {"float": repr(v)} if isinstance(v, float) and not math.isfinite(v) else v


def _read(v: Any) -> Constant:
    if isinstance(v, dict) and v.get("float") in ("inf", "-inf", "nan") and len(v) == 1:
        return float(v["float"])
    if not isinstance(v, _PLAIN):
        raise ValueError(f"{type(v).__name__} value")
    return v


def as_constant(name: str, leaf: Any) -> Constant:
    """An argument that is no tensor. Raises ArgumentTypeError where it is no plain value either."""
    if isinstance(leaf, _PLAIN):
        return leaf
    raise ArgumentTypeError(
        f"argument {name!r} is a {type(leaf).__module__}.{type(leaf).__name__}; arguments may be tensors, None, "
        "numbers, strings, and lists, tuples, dicts or registered pytrees of them",
        code="arguments",
        hint="pass its tensors, or register the class with torch.utils._pytree.register_pytree_node",
    )


def _shown(spec: pytree.TreeSpec) -> str:
    leaves = ["·"] * spec.num_leaves
    try:
        text = repr(pytree.tree_unflatten(leaves, spec)).replace("'·'", "·")
        return re.sub(r"(·, ){4,}·", "·, … ·", text)[:300]
    except Exception:  # a user's class may check its fields; the text is for an error message only
        return f"{spec.num_leaves} leaves"
