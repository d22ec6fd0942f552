"""One sample of torch's op database as a module, and what each backend makes of it.

`judge(sample)` ends in one `Verdict` per backend: "passed"; "skipped", where torch itself cannot run or export the
sample; "refused", a CompileError that names the op; "wrong", another result than torch's; or "crashed", everything
else (an exception that is no CompileError, an error that does not say which op).
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.testing._internal.common_device_type import toleranceOverride
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import DecorateInfo, OpInfo
from torch.utils import _pytree as pytree

import moec
from moec import tolerance
from moec.frontend import Traced
from moec.frontend import trace as trace_module
from moec.ir import CompileError, Graph, run
from moec.ir.interpreter import sizes_of

BACKENDS = ("reference", "onnxruntime")
DTYPE = torch.float32
_REASON = 160  # characters


@dataclass(frozen=True)
class Sample:
    """A call of an op: `index` among the samples that the database draws under `seed`."""

    op: OpInfo
    index: int
    input: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.op.full_name}#{self.index}"


@dataclass(frozen=True)
class Verdict:
    backend: str
    status: str
    reason: str = ""


class OneOp(torch.nn.Module):
    """The call with its tensors as arguments, in order; all else is part of the module."""

    def __init__(self, sample: Sample):
        super().__init__()
        leaves, self.spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        self.op = sample.op.op
        self.fixed = [None if isinstance(x, torch.Tensor) else x for x in leaves]
        self.places = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
        self.tensors = [leaves[i] for i in self.places]

    def forward(self, *tensors: torch.Tensor) -> Any:
        leaves = list(self.fixed)
        for i, t in zip(self.places, tensors, strict=True):
            leaves[i] = t
        x, args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.op(x, *args, **kwargs)

    def fresh(self) -> list[torch.Tensor]:
        """The arguments again, with their strides: an op may write into them."""
        return [_copy(t) for t in self.tensors]


def _copy(t: torch.Tensor) -> torch.Tensor:
    if t.layout is not torch.strided or t.is_quantized or t.is_conj() or t.is_neg():
        return t.detach().clone()
    out = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
    return t.detach().clone() if any(s == 0 for s in t.stride()) else out.copy_(t.detach())


def ops() -> list[OpInfo]:
    """The ops that take float32 on CPU."""
    return [o for o in op_db if DTYPE in o.supported_dtypes("cpu")]


def samples(op: OpInfo, count: int | None, seed: int = 0) -> list[Sample]:
    """`count` seeded samples of the op's (all where None): the same whichever others are drawn."""
    key = f"{seed} {op.full_name}"
    state = random.Random(key).randrange(2**31)
    torch.manual_seed(state)
    np.random.seed(state)
    random.seed(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn = list(op.sample_inputs("cpu", DTYPE, requires_grad=False))
    chosen = range(len(drawn))
    if count is not None and count < len(drawn):
        chosen = sorted(random.Random(key).sample(range(len(drawn)), count))
    return [Sample(op, i, s.input, tuple(s.args), dict(s.kwargs)) for i in chosen for s in (drawn[i],)]


def judge(sample: Sample) -> Iterator[Verdict]:
    """The verdicts on all backends, each as soon as it is known."""
    model = OneOp(sample).eval()
    state = torch.get_rng_state()
    try:
        with torch.no_grad():
            want = model(*model.fresh())
    except Exception as e:  # whatever torch raises
        yield from _all("skipped", f"torch itself raises {type(e).__name__}: {_short(e)}")
        return
    if any(isinstance(x, torch.Tensor) and x.layout is not torch.strided for x in pytree.tree_leaves(want)):
        want = None  # sparse results: the export decides what becomes of them
    try:
        traced = trace_module(model, model.fresh())
    except Exception as e:  # judged below
        exports = _exports(model)
        if exports is not None:
            yield from _all("skipped", f"torch does not export it: {exports}")
        else:
            yield from _all(*_error(e, sample))
        return
    torch.set_rng_state(state)
    for backend in BACKENDS:
        try:
            got = _run(traced, backend, model.fresh())
        except Exception as e:  # judged here
            yield Verdict(backend, *_error(e, sample))
            continue
        try:
            problem = compare(want, got, sample.op, traced.graph, model.tensors)
        except Exception as e:  # a judge that fails is not a verdict on the backend, but has to be seen
            yield Verdict(backend, "crashed", f"comparing: {type(e).__name__}: {_short(e)}")
            continue
        yield Verdict(backend, "wrong" if problem else "passed", problem or "")


def _all(status: str, reason: str) -> Iterator[Verdict]:
    return (Verdict(backend, status, reason) for backend in BACKENDS)


def _exports(model: OneOp) -> str | None:
    """Why torch cannot export it, or None where it can."""
    try:
        with torch.no_grad(), moec.frontend.errors.quiet_torch():
            torch.export.export(model, tuple(model.fresh()), strict=False)
    except Exception as e:  # whatever torch raises
        return f"{type(e).__name__}: {_short(e)}"
    return None


def _run(traced: Traced, backend: str, tensors: Sequence[torch.Tensor]) -> Any:
    flat = traced.flatten(tensors)
    if backend == "reference":
        return traced.unflatten(run(traced.graph, flat))
    compiled = moec.compile(traced.graph, backend=backend, threads=1)
    return traced.unflatten(list(compiled(*flat)))


def _error(error: Exception, sample: Sample) -> tuple[str, str]:
    """What an exception counts as, and its reason with what differs from sample to sample left out."""
    if not isinstance(error, CompileError):
        return "crashed", f"{type(error).__name__}: {_short(error)}"
    if error.code in ("lowering", "execution", "op", "type"):  # the op was taken, and then went wrong
        return "crashed", f"[{error.code}] {_short(error.message)}"
    if not names_op(error, sample.op):
        return "crashed", f"no op is named: [{error.code}] {_short(error.message)}"
    return "refused", f"[{error.code}] {_short(error.message)}"


def names_op(error: CompileError, op: OpInfo) -> bool:
    """Whether the message says which op (or which argument or output of it) it is about."""
    known = {op.name, op.name.split(".")[-1], op.aten_name or op.name}
    if re.search(r"(argument|output) '", error.message):
        return True
    return bool(re.search(r"\b\w+::\w|\b[a-z]+\.[a-z_0-9]+\b", error.message)) or any(
        re.search(rf"\b{re.escape(n)}\b", error.message) for n in known
    )


def _short(error: object) -> str:
    return " ".join(str(error).split())[:_REASON]


# -- comparing ----------------------------------------------------------------------------------------


# memory that nobody has written to: only its type can be judged
_UNDEFINED = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}


def compare(want: Any, got: Any, op: OpInfo, graph: Graph, inputs: Sequence[torch.Tensor]) -> str | None:
    """What differs, or None: structure, dtypes and shapes are equal, numbers within the larger of torch's own
    tolerance for the op and moec's for the graph. NaN equals NaN; integers and booleans are equal."""
    a, spec = pytree.tree_flatten(want)
    b, other = pytree.tree_flatten(got)
    if len(a) != len(b):
        return f"{len(b)} results for {len(a)}: {other} for {spec}"
    rtol, atol = bounds(op, graph, inputs)
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if not isinstance(x, torch.Tensor):
            if x != y and not (x != x and y != y):
                return f"result {i} is {y!r}, torch's {x!r}"
            continue
        if not isinstance(y, torch.Tensor) or (x.dtype, x.shape) != (y.dtype, y.shape):
            shown = f"{y.dtype} {list(y.shape)}" if isinstance(y, torch.Tensor) else repr(y)
            return f"result {i} is {shown}, torch's {x.dtype} {list(x.shape)}"
        problem = None if op.name in _UNDEFINED else difference(x, y, rtol, atol)
        if problem:
            return f"result {i} {problem}"
    return None


def difference(want: torch.Tensor, got: torch.Tensor, rtol: float, atol: float) -> str | None:
    """How two tensors of one type differ, or None. `rtol` is also relative to the largest magnitude of `want`."""
    if not (want.is_floating_point() or want.is_complex()):
        wrong = int((want != got).sum())
        return f"differs in {wrong} of {want.numel()} elements" if wrong else None
    if want.is_complex():
        return difference(torch.view_as_real(want.resolve_conj()), torch.view_as_real(got.resolve_conj()), rtol, atol)
    want, got = want.double(), got.double()
    finite = want[want.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    close = torch.isclose(got, want, rtol=rtol, atol=max(atol, rtol * scale), equal_nan=True)
    if bool(close.all()):
        return None
    error = (got - want).abs()[~close]
    worst = error.nan_to_num(torch.inf).max()
    return f"differs in {int((~close).sum())} of {want.numel()} elements by up to {float(worst):.3g} of {scale:.3g}"


def bounds(op: OpInfo, graph: Graph, inputs: Sequence[torch.Tensor]) -> tuple[float, float]:
    """(rtol, atol): assert_close's own for f32, the database's override for the op, the graph's reduction length."""
    rtol, atol = 1.3e-6, 1e-5
    for d in op.decorators:
        for inner in getattr(d, "decorators", [d]) if isinstance(d, DecorateInfo) else [d]:
            if isinstance(inner, toleranceOverride) and DTYPE in inner.d:
                rtol, atol = max(rtol, inner.d[DTYPE].rtol), max(atol, inner.d[DTYPE].atol)
    binding = sizes_of(graph, [t.resolve_conj() for t in inputs])
    known = tolerance.end_to_end(graph, binding)
    return max([rtol, *(known[v].relative for v in graph.outputs if v in known)]), atol
