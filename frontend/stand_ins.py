"""While a model is traced: what computes the same for any length stands in the place of Python loops over it.

Functions are recognised by the kernel contract that they declare or are named by (`recurrences.CONTRACTS`), in the
modules that define the classes of a model and in the attributes of its modules; forwards by the structure of their
module (lightning attention, loops over experts).
That they mean the same is not taken for granted: the program is compared with the model as it is (see recheck).
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType
from typing import Any

import torch

from moec.frontend.expert_loops import CountingGate, ExpertsWithIdentity, ParallelLinear, SplitGatedExperts
from moec.frontend.recurrences import CONTRACTS, Lightning

_STRUCTURES: tuple[Any, ...] = (Lightning, SplitGatedExperts, ExpertsWithIdentity, CountingGate, ParallelLinear)
Namespace = MutableMapping[str, Any]
_ABSENT: Any = object()
_PACKED = ("cu_seqlens", "seq_idx")  # several sequences in one row

# what stood in for what in the trace of this thread: kernel → a length past which the two may part. Other threads
# call what they always do
Used = dict[str, int]
_used: ContextVar[Used | None] = ContextVar("_used", default=None)


# torch's export is for one thread at a time
_exporting = threading.RLock()


@contextmanager
def standing_in(model: torch.nn.Module, used: Used, structures: bool = True) -> Iterator[None]:
    """Within, in this thread: calls of the model's go to the replacements, and `used` records which did. Without
    `structures` only functions by a kernel's contract are replaced.

    Exports of several threads take turns here.
    """
    with _exporting:
        before: list[tuple[Namespace, str, Any]] = []
        token = _used.set(used)
        try:
            for namespace, name, replacement in list(_find(model, structures)):
                before.append((namespace, name, namespace.get(name, _ABSENT)))
                namespace[name] = replacement
            yield
        finally:
            _used.reset(token)
            for namespace, name, value in reversed(before):
                if value is _ABSENT:
                    del namespace[name]
                else:
                    namespace[name] = value


def structural(used: Used) -> list[str]:
    """Those of the used that are known by a module's structure, which another module may have too."""
    return [label for label in used if label in {s.label for s in _STRUCTURES}]


def _find(model: torch.nn.Module, structures: bool) -> Iterator[tuple[Namespace, str, _Dispatch]]:
    """What a name in a namespace is to stand for."""
    namespaces: dict[int, Namespace] = {}
    for module in model.modules():
        for cls in type(module).__mro__:
            defined = sys.modules.get(cls.__module__)
            if defined is not None:
                namespaces[id(vars(defined))] = vars(defined)
        namespaces[id(vars(module))] = vars(module)
        for structure in _STRUCTURES if structures else ():
            if structure.fits(module):
                replacement = structure(module)
                forward = _Dispatch(module.forward, replacement, structure.label, replacement.block)
                yield vars(module), "forward", forward
    for namespace in namespaces.values():
        for name, value in list(namespace.items()):
            contract = _contract(value)
            if contract is not None:
                yield namespace, name, _Dispatch(value, CONTRACTS[contract], contract)


def _contract(value: Any) -> str | None:
    """The kernel that a function stands for: transformers' wrapper keeps the name that it was declared with."""
    value = value.original if isinstance(value, _Dispatch) else value  # in a trace within a trace
    if not isinstance(value, FunctionType):
        return None
    closure = dict(zip(value.__code__.co_freevars, value.__closure__ or (), strict=True))
    declared = closure.get("func_name")
    name = value.__name__.removeprefix("torch_") if declared is None else declared.cell_contents
    return name if isinstance(name, str) and name in CONTRACTS else None


class _Dispatch:
    """Calls the replacement where a trace is under way in this thread and the arguments are those it knows."""

    def __init__(self, original: Callable[..., Any], replacement: Callable[..., Any], label: str, block: int = 1):
        self.original: Callable[..., Any] = original.original if isinstance(original, _Dispatch) else original
        self.replacement, self.label, self.block = replacement, label, block
        self.accepted = inspect.signature(self.original).parameters
        self.understood = inspect.signature(replacement)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        used = _used.get()
        if used is None or any(kwargs.get(name) is not None for name in _PACKED):
            return self.original(*args, **kwargs)
        # what the original takes by no name of its own, it ignores
        known = {k: v for k, v in kwargs.items() if k in self.accepted}
        try:
            bound = self.understood.bind(*args, **known)
        except TypeError:
            return self.original(*args, **kwargs)
        bound.apply_defaults()
        size = bound.arguments.get("chunk_size")
        used[self.label] = max(used.get(self.label, 1), self.block, size if isinstance(size, int) else 1)
        return self.replacement(*args, **known)
