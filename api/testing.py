"""Helpers for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.backends import Backend
from moec.checks import check_pass, check_rewrite, check_unchanged
from moec.comparing import Comparison, compare
from moec.compiled import CompiledModel
from moec.op_check import check_op
from moec.tolerance import Tolerance

if TYPE_CHECKING:
    from moec.fuzzing import check_random
    from moec.fuzzing.graphs import graphs

__all__ = [
    "BackendsDisagree",
    "assert_backends_agree",
    "check_op",
    "check_pass",
    "check_random",
    "check_rewrite",
    "check_unchanged",
    "graphs",
]


def __getattr__(name: str) -> Any:
    """What needs hypothesis, which is asked for when one of them is."""
    if name not in ("graphs", "check_random"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import hypothesis  # noqa: F401
    except ImportError:
        raise ImportError(f"moec.testing.{name} needs hypothesis: pip install hypothesis") from None
    if name == "graphs":
        from moec.fuzzing.graphs import graphs

        return graphs
    from moec.fuzzing import check_random

    return check_random


class BackendsDisagree(AssertionError):
    """Backends that are out of tolerance; `comparison` says where."""

    def __init__(self, comparison: Comparison):
        super().__init__(f"backends disagree\n{comparison}")
        self.comparison = comparison


def assert_backends_agree(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    backends: Sequence[str | Path | Backend | CompiledModel] = ("reference", "onnxruntime"),
    tolerance: Tolerance = None,
    **options: Any,
) -> Comparison:
    """`moec.compare` with the same arguments; BackendsDisagree, an AssertionError with its table and the first
    divergent node, unless everything is in tolerance. Returns the comparison.

    Under pytest, moec's plugin saves what fails as a folder that shows it again; its `backend` fixture runs a test once
    for each backend of `--moec-backends`:

        def test_my_model(backend):
            assert_backends_agree(model, (x,), backends=("reference", backend))
    """
    __tracebackhide__ = True  # pytest shows the test's own line, not this one with the model in full
    comparison = compare(model, args, kwargs, backends=backends, tolerance=tolerance, **options)
    if not comparison.ok:
        raise BackendsDisagree(comparison)
    return comparison
