"""A Triton kernel of a user as data: its source and what it names, so that the interpreter worker can run it.

A kernel is known by its text, not by its module: what was written in a notebook, a script or a documentation block
reaches the worker as well, and the module that holds it (a training script, say) is not run a second time there.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import importlib
import linecache
from collections.abc import Collection, Sequence
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.core import is_builtin
from triton.runtime.jit import JITFunction

from moec.ir import CompileError

Tree = dict[str, Any]


def check_kernel(kernel: Any, constants: Collection[str]) -> None:
    """Raise CompileError unless `kernel` came from @triton.jit alone, and has parameters of these names."""
    if isinstance(kernel, JITFunction):
        for name in constants:
            if name not in kernel.arg_names:
                near = difflib.get_close_matches(name, kernel.arg_names, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"its parameters: {', '.join(kernel.arg_names)}"
                raise _error(kernel, f"has no parameter {name!r}", hint)
        return
    raise CompileError(
        f"launch() takes a function decorated with @triton.jit, got {type(kernel).__name__} "
        f"{getattr(kernel, '__name__', kernel)}",
        code="kernel",
        hint="is the decorator missing? In place of @triton.autotune and @triton.heuristics, choose in the lowering",
    )


def pack_kernel(kernel: JITFunction) -> list[Tree]:
    """The functions that make up a kernel, itself first: source, where it is from, and the globals that it names.

    Raises CompileError for a global that has no encoding.
    """
    order: dict[int, JITFunction] = {id(kernel): kernel}
    parts: list[Tree] = []
    while len(parts) < len(order):
        part = list(order.values())[len(parts)]
        scope = part.get_capture_scope()
        named = {}
        for name in sorted(_free_names(part.src)):
            if name in scope:
                named[name] = _pack_global(part, name, scope[name], order)
            elif not hasattr(builtins, name):
                raise _error(part, f"names {name!r}, which is not defined")
        parts.append(
            {"name": part.fn.__name__, "source": part.src, "line": part.def_file_line_number,
             "file": part.file_name, "globals": named}
        )  # fmt: skip
    return parts


def _free_names(source: str) -> set[str]:
    tree = ast.parse(source)
    names = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
    arguments = {a.arg for n in ast.walk(tree) if isinstance(n, ast.arguments) for a in _all_arguments(n)}
    stored = {n.id for n in names if not isinstance(n.ctx, ast.Load)}
    return {n.id for n in names} - stored - arguments


def _all_arguments(a: ast.arguments) -> list[ast.arg]:
    return [*a.posonlyargs, *a.args, *a.kwonlyargs, *(x for x in (a.vararg, a.kwarg) if x is not None)]


def _error(kernel: JITFunction, what: str, hint: str | None = None) -> CompileError:
    where = f"{kernel.file_name}:{kernel.def_file_line_number}"
    return CompileError(f"kernel {kernel.fn.__name__} ({where}) {what}", code="kernel", hint=hint)


def _pack_global(kernel: JITFunction, name: str, value: Any, order: dict[int, JITFunction]) -> Tree:
    module = getattr(value, "__module__", None) or ""
    if isinstance(value, JITFunction) and module.split(".")[0] != "triton":
        order.setdefault(id(value), value)
        return {"function": list(order).index(id(value))}
    if isinstance(value, ModuleType):
        return {"module": value.__name__}
    if is_builtin(value):  # the interpreter replaces these in the module
        raise _error(kernel, f"names {name!r}, a function of triton.language", f"write tl.{value.__name__} for it")
    if module.split(".")[0] == "triton" and not isinstance(value, tl.constexpr | tl.dtype):
        return {"attribute": [module, value.__qualname__]}
    try:
        return {"value": pack_value(value)}
    except TypeError:
        raise _error(
            kernel,
            f"names {name!r}, which is of type {type(value).__name__}; numbers, strings, dtypes, modules "
            "and @triton.jit functions reach the interpreter worker",
            "a process started with TRITON_INTERPRET=1 runs any kernel in place",
        ) from None


def pack_value(value: Any) -> Any:
    """A number, string, dtype or constexpr, tuples included, for `wire`. Raises TypeError for anything else."""
    if isinstance(value, tl.constexpr):
        return {"constexpr": pack_value(value.value)}
    if type(value) is tl.dtype:
        return {"dtype": value.name}
    if isinstance(value, list | tuple):
        return tuple(pack_value(v) for v in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"cannot send a {type(value).__name__} to the interpreter worker")


def unpack_value(tree: Any) -> Any:
    """What `pack_value` packed."""
    if isinstance(tree, tuple):
        return tuple(map(unpack_value, tree))
    if not isinstance(tree, dict):
        return tree
    if "constexpr" in tree:
        return tl.constexpr(unpack_value(tree["constexpr"]))
    return next(t for t in vars(tl).values() if isinstance(t, tl.dtype) and t.name == tree["dtype"])


def unpack_kernel(parts: Sequence[Tree]) -> Any:
    """The first function of `pack_kernel`, made anew in this process; tracebacks name its own file and lines."""
    spaces: list[dict[str, Any]] = []
    made = []
    for part in parts:
        space: dict[str, Any] = {"__name__": "moec_user_kernel"}
        for name, tree in part["globals"].items():
            if "module" in tree:
                space[name] = importlib.import_module(tree["module"])
            elif "attribute" in tree:
                module, qualname = tree["attribute"]
                found: Any = importlib.import_module(module)
                for step in qualname.split("."):
                    found = getattr(found, step)
                space[name] = found
            elif "value" in tree:
                space[name] = unpack_value(tree["value"])
        # the line of the definition stays what it was, and the name tells that the text was sent
        filename = f"<{part['file']}, sent to the interpreter>"
        text = "\n" * (part["line"] - 1) + part["source"]
        linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)
        exec(compile(text, filename, "exec"), space)
        made.append(triton.jit(space[part["name"]]))
        spaces.append(space)
    for part, space in zip(parts, spaces, strict=True):
        for name, tree in part["globals"].items():
            if "function" in tree:
                space[name] = made[tree["function"]]
    return made[0]


def pack_arguments(values: Sequence[Any]) -> tuple[list[torch.Tensor], list[Tree]]:
    """(memory, arguments): every memory that tensors lie in as bytes, once however many views there are, and each
    argument as a view into one or a value. Raises TypeError for a value without an encoding."""
    memory: dict[int, torch.Tensor] = {}
    packed: list[Tree] = []
    for value in values:
        if not isinstance(value, torch.Tensor):
            packed.append({"value": pack_value(value)})
            continue
        storage = value.untyped_storage()
        key = storage.data_ptr() or -len(memory) - 1
        if key not in memory:
            memory[key] = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]  # untyped too
        place = list(memory).index(key)
        view = (value.dtype, tuple(value.shape), tuple(value.stride()), value.storage_offset())
        packed.append({"memory": place, "view": view})
    return list(memory.values()), packed


def unpack_arguments(memory: Sequence[torch.Tensor], packed: Sequence[Tree]) -> list[Any]:
    """What `pack_arguments` packed, on this process's memory."""
    values = []
    for tree in packed:
        if "value" in tree:
            values.append(unpack_value(tree["value"]))
            continue
        dtype, shape, stride, offset = tree["view"]
        whole = memory[tree["memory"]]
        length = whole.numel() // dtype.itemsize * dtype.itemsize
        values.append(whole[:length].view(dtype).as_strided(shape, stride, offset))
    return values
