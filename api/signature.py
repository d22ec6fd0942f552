"""How a model's arguments become graph inputs and graph outputs its result."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from moec.ir import ArgumentTypeError, ArgumentValueError, DType, Graph
from moec.ir.dims import bind


@dataclass(frozen=True)
class Constant:
    """A leaf that was no tensor when the model was traced: its value is part of the program."""

    value: None | bool | int | float | str


Leaf = int | Constant  # an index into the graph's inputs or outputs, or a constant


@dataclass(frozen=True)
class Signature:
    """The call structure of a compiled model.

    `paths`: a name for each leaf of `(args, kwargs)`, such as `args[0]` or `kwargs['mask']`; `inputs`: what the
    leaf is. `result`: the pytree structure of the result; `outputs`: what its leaves are. `parameters`: names of
    the model's positional parameters, so that an argument may be given by position or by name.
    """

    paths: tuple[str, ...]
    inputs: tuple[Leaf, ...]
    result: pytree.TreeSpec
    outputs: tuple[Leaf, ...]
    parameters: tuple[str, ...] = ()

    @staticmethod
    def positional(graph: Graph) -> Signature:
        """Tensors in the order of the graph's inputs; the outputs as a tuple."""
        names = tuple(str(v.name) for v in graph.inputs)
        result = pytree.tree_structure(tuple(graph.output_names))
        return Signature(
            tuple(f"args[{i}]" for i in range(len(names))),
            tuple(range(len(names))),
            result,
            tuple(range(len(graph.outputs))),
            names,
        )

    def label(self, index: int) -> str:
        """A leaf's path with the parameter's name: `args[0] (input_ids)`."""
        path = self.paths[index]
        at = re.match(r"args\[(\d+)\]", path)
        if at and int(at[1]) < len(self.parameters):
            return f"{path} ({self.parameters[int(at[1])]})"
        return path

    def flatten(self, graph: Graph, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The graph's input tensors, checked against their types.

        Raises ArgumentTypeError (count, structure, kind, dtype) or ArgumentValueError (rank, size, another
        constant) naming the argument, expected and got.
        """
        given = _leaves(*self._arrange(args, kwargs))
        self._check_structure(graph, given)
        tensors: list[torch.Tensor | None] = [None] * len(graph.inputs)
        shapes = []
        for i, (path, leaf) in enumerate(zip(self.paths, self.inputs, strict=True)):
            value = given[path]
            if isinstance(leaf, Constant):
                if type(value) is not type(leaf.value) or value != leaf.value:
                    raise ArgumentValueError(
                        f"argument {self.label(i)} was {leaf.value!r} when the model was compiled, got {_shown(value)}",
                        code="arguments",
                        hint="arguments that are no tensors are part of the program: compile again for this value",
                    )
                continue
            expected = graph.inputs[leaf].type
            if not isinstance(value, torch.Tensor):
                raise ArgumentTypeError(
                    f"argument {self.label(i)} must be a torch.Tensor {expected}, got {_shown(value)}",
                    code="arguments",
                )
            if value.dtype != expected.dtype.torch:
                got = DType.of(value.dtype)
                raise ArgumentTypeError(
                    f"argument {self.label(i)} has dtype {got}, expected {expected.dtype} ({expected})",
                    code="dtype",
                    hint=f"pass argument.to({expected.dtype.torch})",
                )
            tensors[leaf] = value
            shapes.append((self.label(i), expected.shape, tuple(value.shape)))
        bind(shapes)
        return [t for t in tensors if t is not None]

    def unflatten(self, outputs: Sequence[torch.Tensor]) -> Any:
        """The model's own result structure around the graph's outputs."""
        leaves = [leaf.value if isinstance(leaf, Constant) else outputs[leaf] for leaf in self.outputs]
        return pytree.tree_unflatten(leaves, self.result)

    def _arrange(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Move arguments to where they stood at trace time: by position or by name."""
        count = len({m[1] for m in (re.match(r"args\[(\d+)\]", p) for p in self.paths) if m})
        positional, named = list(args), dict(kwargs)
        while len(positional) < min(count, len(self.parameters)) and self.parameters[len(positional)] in named:
            positional.append(named.pop(self.parameters[len(positional)]))
        for name, value in list(zip(self.parameters, positional, strict=False))[count:]:
            if name in named:
                raise ArgumentTypeError(f"argument {name!r} is given twice", code="arguments")
            named[name] = value
        if len(positional) > count:
            positional[count : max(count, len(self.parameters))] = []
        return positional, named

    def _check_structure(self, graph: Graph, given: Mapping[str, Any]) -> None:
        missing = [i for i, p in enumerate(self.paths) if p not in given]
        unexpected = [p for p in given if p not in self.paths]
        if not missing and not unexpected:
            return
        parts = []
        for i in missing[:3]:
            leaf = self.inputs[i]
            what = repr(leaf.value) if isinstance(leaf, Constant) else str(graph.inputs[leaf].type)
            parts.append(f"missing {self.label(i)}: {what}")
        parts += [f"unexpected {p}, got {_shown(given[p])}" for p in unexpected[:3]]
        more = len(missing) + len(unexpected) - len(parts)
        raise ArgumentTypeError(
            f"arguments do not fit: {'; '.join(parts)}" + (f" and {more} more" if more > 0 else ""),
            code="arguments",
            hint="the call takes the argument structure that the model was compiled with: "
            + (", ".join(self.label(i) for i in range(len(self.paths))) or "no arguments"),
        )


def leaf_path(path: Any) -> str:
    """`args[0]`, `kwargs['mask'][1]` … of a key path into `(args, kwargs)`."""
    text = pytree.keystr(path)
    return ("args" if text.startswith("[0]") else "kwargs") + text[3:]


def _leaves(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    flat, _ = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
    return {leaf_path(path): value for path, value in flat}


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {DType.of(value.dtype)}{list(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
