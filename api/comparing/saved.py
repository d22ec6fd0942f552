"""Files of outputs against each other, without a model."""

from __future__ import annotations

from pathlib import Path

from moec.comparing.contenders import read_tensors, short_name
from moec.comparing.result import Comparison, OutputResult, dtype_note
from moec.difference import difference
from moec.ir import ArgumentValueError, TensorType
from moec.tolerance import Tolerance, check_tolerance, given_bound, scale_of, unknown_length


def compare_files(first: str | Path, second: str | Path, tolerance: Tolerance = None) -> Comparison:
    """The tensors of two `.safetensors` or `.npz` files by name, `first` being the reference. The tolerance is
    `moec.tolerance.unknown_length` of their dtype, or `tolerance` times the largest magnitude of each. Raises
    ArgumentValueError for files that cannot be read, hold other names or none."""
    a, b = Path(first), Path(second)
    mine, theirs = read_tensors(a), read_tensors(b)
    if mine.keys() != theirs.keys():
        sides = ((a, mine.keys() - theirs.keys()), (b, theirs.keys() - mine.keys()))
        only = "; ".join(f"only {path.name} has {', '.join(sorted(names))}" for path, names in sides if names)
        raise ArgumentValueError(f"{a} and {b} hold other outputs: {only}", code="arguments")
    if not mine:
        raise ArgumentValueError(f"{a} and {b} hold no outputs, so there is nothing to compare", code="arguments")
    check_tolerance(tolerance)
    comparison = Comparison(short_name(a), False)
    for name, expected in mine.items():
        bound = given_bound(unknown_length(TensorType.of(expected)), tolerance, output=name)
        d = difference(expected, theirs[name], bound, scale_of(expected, None, {}))
        comparison.outputs.append(OutputResult(short_name(b), name, d))
        if theirs[name].dtype is not expected.dtype:
            comparison.notes.append(dtype_note(short_name(b), name, expected, theirs[name]))
    return comparison
