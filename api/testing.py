"""Helpers for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moec.checks import check_pass, check_rewrite, check_unchanged
from moec.comparing import Comparison, compare
from moec.op_check import check_op

__all__ = ["assert_backends_agree", "check_op", "check_pass", "check_rewrite", "check_unchanged"]


def assert_backends_agree(
    model: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any
) -> Comparison:
    """`moec.compare(model, args, kwargs, **options)`; AssertionError with its table unless everything is in
    tolerance. Returns the comparison."""
    comparison = compare(model, args, kwargs, **options)
    if not comparison.ok:
        raise AssertionError(f"backends disagree\n{comparison}")
    return comparison
