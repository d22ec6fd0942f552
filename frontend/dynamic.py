"""`dynamic_shapes` in all the forms torch.export takes → one specification per flattened tensor argument."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.export import Dim
from torch.utils import _pytree as pytree

from moec.ir import ArgumentTypeError
from moec.ir.dims import Dim as Size

AxisSpecs = dict[int, Any]


def leaf_specs(
    dynamic_shapes: Any, parameters: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[AxisSpecs]:
    """Axis → Dim, Dim.AUTO, Dim.DYNAMIC or int, for every leaf of (args, kwargs) in pytree order.

    dynamic_shapes: None, "auto", a dict by parameter name, or a sequence in the order of the arguments, nested
    like them. Raises ArgumentTypeError where it does not fit the arguments.
    """
    if dynamic_shapes is None:
        return [{} for _ in pytree.tree_leaves((tuple(args), dict(kwargs)))]
    if dynamic_shapes == "auto":
        return [
            dict.fromkeys(range(x.dim()), Dim.AUTO) if isinstance(x, torch.Tensor) else {}
            for x in pytree.tree_leaves((tuple(args), dict(kwargs)))
        ]
    names = [*_positional_names(parameters, len(args)), *kwargs]
    values = [*args, *kwargs.values()]
    if isinstance(dynamic_shapes, Mapping):
        given = dict(dynamic_shapes)
        rest = [n for n in parameters if n.startswith("*")]
        if len(rest) == 1 and len(given) == 1 and rest[0].strip("*") in given:
            inner = given[rest[0].strip("*")]
            given = dict(inner) if isinstance(inner, Mapping) else dict(zip(names, inner, strict=False))
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise _bad(f"it names {unknown}, the arguments are {names}")
        specs = [given.get(n) for n in names]
    elif isinstance(dynamic_shapes, Sequence) and not isinstance(dynamic_shapes, str):
        specs = list(dynamic_shapes)
        if len(specs) != len(values):
            raise _bad(f"it has {len(specs)} entries for {len(values)} arguments ({', '.join(names)})")
    else:
        raise _bad(f"it is {dynamic_shapes!r}; allowed are None, 'auto', a dict by argument name, or a sequence")
    result: list[AxisSpecs] = []
    for name, value, spec in zip(names, values, specs, strict=True):
        result += _walk(value, spec, name)
    return result


def parameter_names(model: torch.nn.Module) -> list[str]:
    """Names of the forward's parameters that can be passed by position; variadic ones with their stars."""
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return ["*args", "**kwargs"]
    return [stars.get(p.kind, "") + n for n, p in parameters.items() if p.kind is not p.KEYWORD_ONLY]


def _positional_names(parameters: Sequence[str], count: int) -> list[str]:
    plain = [p for p in parameters if not p.startswith("*")]
    variadic = next((p[1:] for p in parameters if p.startswith("*") and not p.startswith("**")), "arg")
    return plain[:count] + [f"{variadic}_{i}" for i in range(count - len(plain))]


def leaf_names(parameters: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """A readable name per leaf: `input_ids`, `past_0_1`, `batch_mask`."""
    names: list[str] = []
    for name, value in zip(
        [*_positional_names(parameters, len(args)), *kwargs], [*args, *kwargs.values()], strict=True
    ):
        for path, _ in pytree.tree_flatten_with_path(value)[0]:
            names.append("_".join([name, *(_key(k) for k in path)]))
    return _unique(names)


def _key(key: Any) -> str:
    raw = getattr(key, "idx", getattr(key, "key", getattr(key, "name", key)))
    return "".join(ch if ch.isalnum() else "_" for ch in str(raw))


def _unique(names: Sequence[str]) -> list[str]:
    result: list[str] = []
    for n in names:
        fresh, i = n, 0
        while fresh in result:
            i += 1
            fresh = f"{n}_{i}"
        result.append(fresh)
    return result


def result_names(spec: pytree.TreeSpec) -> list[str]:
    """A name per leaf of a result: `logits`, `past_key_values_key_cache_0`, `output_1`; `output` for a lone one."""

    def walk(spec: pytree.TreeSpec, path: str) -> Iterator[str]:
        if spec.is_leaf():
            yield path
        for i, key in enumerate(_child_keys(spec)):
            yield from walk(spec.child(i), f"{path}_{_key(key)}" if path else _key(key))

    names = list(walk(spec, ""))
    return _unique([n if n[:1].isalpha() else f"output_{n}" if n else "output" for n in names])


def _child_keys(spec: pytree.TreeSpec) -> list[Any]:
    """Keys of a dict-like node (the context of its kind holds them), field names of a named tuple, else indices."""
    context = spec.context
    for keys in (context, context[0] if isinstance(context, list | tuple) and context else None):
        if isinstance(keys, list | tuple) and len(keys) == spec.num_children and all(isinstance(k, str) for k in keys):
            return list(keys)
    return list(getattr(context, "_fields", range(spec.num_children)))


def _walk(value: Any, spec: Any, where: str) -> list[AxisSpecs]:
    if isinstance(value, torch.Tensor):
        return [_axes(value, spec, where)]
    children, _ = pytree.tree_flatten(value, is_leaf=lambda x: x is not value)
    if spec is None or (len(children) == 1 and children[0] is value):
        if spec is not None and not (isinstance(spec, Mapping | list | tuple) and not spec):
            raise _bad(f"{where} is a {type(value).__name__}, not a tensor, but has {spec!r}")
        return [{} for _ in pytree.tree_leaves(value)]
    if isinstance(spec, Mapping) and isinstance(value, Mapping):
        unknown = sorted(map(str, set(spec) - set(value)))
        if unknown:
            raise _bad(f"{where} has no {unknown}")
        entries: list[Any] = [spec.get(k) for k in value]
    else:
        entries = list(spec.values()) if isinstance(spec, Mapping) else list(spec)
    if len(entries) == 1 < len(children):  # the older form of a list of lists in one more tuple
        entries = list(entries[0])
    if len(entries) != len(children):
        raise _bad(f"{where} has {len(children)} entries, its specification {len(entries)}")
    pairs = enumerate(zip(children, entries, strict=True))
    return [leaf for i, (v, s) in pairs for leaf in _walk(v, s, f"{where}[{i}]")]


def _axes(tensor: torch.Tensor, spec: Any, where: str) -> AxisSpecs:
    if spec is None:
        return {}
    if isinstance(spec, Mapping):
        items = dict(spec)
    elif isinstance(spec, list | tuple):
        if len(spec) != tensor.dim():
            raise _bad(f"{where} has rank {tensor.dim()}, its specification {len(spec)} axes")
        items = dict(enumerate(spec))
    else:
        raise _bad(f"{where} is a tensor; its specification must be a dict or a sequence of axes, not {spec!r}")
    result: AxisSpecs = {}
    for axis, dim in items.items():
        if not isinstance(axis, int) or not -tensor.dim() <= axis < tensor.dim():
            raise _bad(f"{where} has rank {tensor.dim()}, no axis {axis!r}")
        if isinstance(dim, str):
            dim = Dim(dim)
        if dim is not None and dim is not Dim.STATIC and dim != Dim.STATIC:
            result[axis % tensor.dim()] = dim
    return result


def declared_size(spec: Any) -> Size | None:
    """The named size of a Dim("S"), or 2*S of a derived one; None for AUTO, DYNAMIC and ints."""
    if hasattr(spec, "root"):
        root = spec.root
        result = spec.fn(Size(root.__name__)) if hasattr(root, "__name__") else None
        return result if isinstance(result, Size) else None
    name = getattr(spec, "__name__", None)
    return Size(name) if isinstance(name, str) else None


def declared_range(spec: Any) -> tuple[int, int | None]:
    """Least and greatest size that the user declared (0, None: any)."""
    least, greatest = getattr(spec, "min", None), getattr(spec, "max", None)
    unbounded = greatest is None or not (isinstance(greatest, int) and greatest < 2**62)
    return (least if isinstance(least, int) and least > 0 else 0), (None if unbounded else greatest)


def must_be_dynamic(spec: Any) -> bool:
    """Whether the user insists on the axis being dynamic (AUTO leaves it open)."""
    return spec is not None and not isinstance(spec, int) and getattr(spec, "type", None) != Dim.AUTO.type


def for_export(spec: Any) -> Any:
    """What torch.export is told: AUTO for all dynamic axes. Of a named Dim torch demands a proof for every size,
    which no model with a branch like `if length > 1` can give; here the program is run at other sizes instead."""
    return spec if isinstance(spec, int) else Dim.AUTO


def _bad(message: str) -> ArgumentTypeError:
    return ArgumentTypeError(f"dynamic_shapes does not fit the arguments: {message}", code="dynamic-shape")
