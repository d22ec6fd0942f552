"""Texts that are damaged, cut short, very long, or no text at all: refused with the place of the error."""

from __future__ import annotations

import contextlib
import re

import pytest

from moec.ir import CompileError, parse

from .effects import refused
from .limits import limited
from .texts import chain, function, text


@limited()
@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("%0: i64[3] = tensor.arange() {end=\"__import__('os').system('true')\"}", "'end' must be int or Dim, got str"),
        ("%0: i64[] = tensor.dim() {value=\"open('x', 'w')\"}", "'value' must be int or Dim, got str"),
        ("%0: i64[3] = tensor.arange() {end=1.5}", "must be int or Dim"),
        ("%0: i64[3] = tensor.arange() {end=true}", "must be int or Dim"),
        ("%0: i64[3] = tensor.arange() {end=3, step=0}", "step 0 is not positive"),
        ("%0: f32[3] = tensor.full() {shape=[3], value=" + "9" * 400 + ", dtype=f32}", "digits|hold"),
        ("%0: f32[3] = tensor.full() {shape=[3], value=" + "9" * 5000 + ", dtype=f32}", "a number of 5000 digits"),
        ("%0: f32[3] = tensor.full() {shape=[3], value=1e999, dtype=f32}", "beyond 64-bit floats"),
        ("%0: f32[3] = tensor.full() {shape=[3], value=-1e400, dtype=f32}", "beyond 64-bit floats"),
        ("%0: i64[3] = tensor.full() {shape=[3], value=9223372036854775808, dtype=i64}", "cannot hold|does not hold"),
        ("%0: u8[3] = tensor.full() {shape=[3], value=256, dtype=u8}", "u8 does not hold value 256"),
        ("%0: i64[3] = tensor.full() {shape=[3], value=nan, dtype=i64}", "i64 does not hold value nan"),
        ("%0: i64[1] = tensor.constant() {value=[1.5], type=i64[1]}", "i64 does not hold"),
        ('%0: i64[1] = tensor.constant() {value=["1"], type=i64[1]}', "'value' must hold bool or int or float"),
        ("%0: i64[1] = tensor.constant() {value=" + "[" * 5000 + "]" * 5000 + ", type=i64[1]}", "nested more than"),
        ("%0: i64[1] = tensor.constant() {value=" + "[" * 100_000, "nested more than"),
        ("%0: f32[T, 4] = norm.rms(%x) {eps=1" + "0" * 500 + "}", "digits"),
        ('%0: f32[T, 4] = math.silu(%x) loc("m" "f.py":' + "1" * 5000 + ")", "a number of 5000 digits"),
        ('%0: f32[T, 4] = math.silu(%x) loc("m" "f.py":x)', "expected a line number"),
        ('%0: f32[T, 4] = math.silu(%x) loc("m', "expected a quoted string"),
        ('%0: f32[T, 4] = math.silu(%x) origin("a" | "b")', "2 origin groups for 1 results"),
        ('%0: f32[T, 4] = math.silu(%x) origin("\\q")', "bad string"),
        ('%0: f32[T, 4] = math.silu(%"x', "expected a quoted string"),
        ("%0: f32[T, 4] = math.silu(%x) {", "expected '=', got '%0'"),
        ("%0: f32[T, 4] = math.silu(\0)", "expected"),
        ("%0: f32[T\0, 4] = math.silu(%x)", "bad dimension"),
        ("%0: f32[" + "1, " * 400_000 + "1] = math.silu(%x)", "400001 axes, more than 64"),
        ("%" + "a" * 1_000_000 + ": f32[T, 4] = math.silu(%b)", "%b is used before"),
        ("%0: f32[T, 4] = math.silu(%" + "a" * 1_000_000 + ")", "used before it is defined"),
        ("%0: f32[T, 4] = " + "a" * 1_000_000 + "(%x)", "unknown op"),
        ("%0: f32[T, 4] = math.silu(%x) {" + "a" * 1_000_000 + "=1}", "no attribute"),
        ("%0: f32[T, 4] = math.silu(%x) {a=" + "b" * 1_000_000 + "}", "dimension of 1000000 characters"),
        ("x" * 1_000_000, "expected '%'"),
        (" " * 1_000_000 + "%0", "expected ':'"),
        ("(" * 1_000_000, "expected '%'"),
    ],
    ids=lambda v: v[:40].replace("\0", "NUL") if v.startswith(("%", "x", " ", "(")) else "",
)  # fmt: skip
def test_hostile_text(row, said):
    declared = re.match(r"%0: (\w+\[\w*\]) = ", row)
    with refused(said):
        parse(text(row, outputs=f"%y: {declared[1]}") if declared else text(row))


@limited()
def test_a_truncated_text_is_refused_wherever_it_ends():
    whole = text("weight @w: f32[4]", '%0: f32[T, 4] = math.add(%x, @w) loc("a.b" "f.py":3) origin("o")') + function(
        "f", "%0: f32[T, 4] = norm.rms(%x) {eps=1e-06}"
    )
    parse(whole)
    ends = {len(whole[:end].rstrip()) for end in (len(whole), whole.index("function"))}
    for end in range(len(whole)):
        if len(whole[:end].rstrip()) not in ends:
            with pytest.raises(CompileError, match=r"line \d+, column"):
                parse(whole[:end])


@limited()
def test_a_damaged_text_is_refused_or_another_graph():
    """Every character replaced by others, in turn: a graph that verifies, or an error; never another exception."""
    whole = text("weight @w: f32[4]", '%0: f32[T, 4] = math.add(%x, @w) loc("a" "f":3)', "%1: f32[T, 4] = norm.rms(%0)")
    for i in range(len(whole)):
        for c in '\0"%@[]{}()\\,9-\n\ud800\u0660²':
            with contextlib.suppress(CompileError):
                parse(whole[:i] + c + whole[i + 1 :]).verify()


@limited()
def test_what_is_no_text():
    for what in (b"graph() -> () {}", None, 3, ["graph"], bytearray(4)):
        with refused(f"is a str, got {type(what).__name__}"):
            parse(what)  # type: ignore[arg-type]  # what is no str is what is tested


@limited()
def test_one_line_of_a_megabyte_works():
    """Line breaks are spaces like others."""
    graph = parse(chain(20_000, "math.silu({})").replace("\n", " "))
    assert len(graph) == 20_000
