"""What a graph leaves open on given inputs, and what it does not."""

import torch

import moec
from moec.fuzzing.spread import spread


def of(text, *inputs):
    graph = moec.parse(text)
    (found,) = spread(graph, inputs)
    return found, moec.ir.run(graph, inputs)[0]


def test_the_sign_of_zero_is_open_and_what_is_made_of_it():
    text = (
        "graph(%x: f16[T]) -> (%y: f16[T]) {\n  %0: f16[T] = math.neg(%x)\n  %1: f16[T] = math.mul(%x, %0)\n"
        "  %2: f16[T] = math.rsqrt(%1)\n  return %2\n}"
    )
    found, y = of(text, torch.tensor([0.0], dtype=torch.float16))
    assert found.explains(y, -y, 0.0)  # an infinity of either sign
    text = "graph(%x: f32[T]) -> (%y: f32[T]) {\n  %0: f32[T] = math.rsqrt(%x)\n  return %0\n}"
    found, y = of(text, torch.tensor([4.0]))
    assert not found.explains(y, -y, 0.0)


def test_silu_of_a_large_negative_number_is_right_to_the_unit_of_its_operand():
    text = "graph(%g: f32[T], %u: f32[T]) -> (%y: f32[T]) {\n  %0: f32[T] = math.swiglu(%g, %u)\n  return %0\n}"
    gate, up = torch.tensor([-20.0]), torch.tensor([-1.0])
    found, y = of(text, gate, up)
    assert 0 < float(y) < 1e-7
    assert found.explains(y, torch.zeros(1), 0.0)
    assert not found.explains(y, y + 1e-3, 0.0)


def test_units_inside_of_an_op_round_too():
    """Where what glu multiplies is next to nothing (up near -up_offset, sigmoid of a large negative number)."""
    text = (
        "graph(%g: f32[T], %u: f32[T]) -> (%y: f32[T]) {\n"
        "  %0: f32[T] = math.glu(%g, %u) {limit=7.0, alpha=1.702, up_offset=1.0}\n  return %0\n}"
    )
    found, y = of(text, torch.tensor([-10.0]), torch.tensor([2.0]))
    assert abs(float(y)) < 2e-6
    assert found.explains(y, y * 1.1, 0.0)
    assert not found.explains(y, y + 1e-4, 0.0)


TWO = "graph(%x: f64[T]) -> (%y: f64[T]) {{\n  %0: f64[T] = {}\n  %1: f64[T] = {}\n  return %1\n}}"


def test_float64_is_moved_where_an_op_rounds_and_only_there():
    found, y = of(TWO.format("math.silu(%x)", "math.pow(%0, %x)"), torch.tensor([30.0], dtype=torch.float64))
    assert found.explains(y, y * (1 + 1e-15), 0.0)  # 30 roundings of silu
    assert not found.explains(y, y * (1 + 1e-12), 0.0)
    found, y = of(TWO.format("math.neg(%x)", "math.exp(%0)"), torch.tensor([700.0], dtype=torch.float64))
    assert not found.explains(y, y * (1 + 1e-13), 0.0)  # a neg that rounds would open 700 roundings


def test_called_functions_are_moved_inside():
    """bf16 that cancels in a function: the cast may be carried wider."""
    text = (
        'graph(%x: f32[2]) -> (%y: bf16[1]) {\n  %0: bf16[1] = call.graph(%x) {callee="f"}\n  return %0\n}\n\n'
        "function @f(%a: f32[2]) -> (%out: bf16[1]) {\n  %0: bf16[2] = math.cast(%a) {dtype=bf16}\n"
        "  %1: bf16[1] = math.sum(%0) {axes=[0], keepdim=true}\n  return %1\n}"
    )
    x = torch.tensor([1.003, -0.998])
    found, y = of(text, x)
    assert found.explains(y, x.sum().bfloat16().reshape(1), 0.0)
    assert not found.explains(y, y + 0.5, 0.0)


def test_what_is_less_than_its_error_may_be_0():
    graph = moec.parse(
        "graph(%x: f32[T]) -> (%y: bool[T]) {\n  weight @zero: f32[1]\n  %0: f32[T] = math.sigmoid(%x)\n"
        "  %1: bool[T] = math.gt(%0, @zero)\n  return %1\n}"
    )
    graph.bind_weights({"zero": torch.zeros(1)})
    (found,) = spread(graph, [torch.tensor([-20.0])])
    assert bool(found.free)
    (found,) = spread(graph, [torch.tensor([-2.0])])
    assert not bool(found.free)


def test_what_underflows_may_be_carried_on():
    """bf16 carried in f32 keeps −1e-42, and −1e-42 · ∞ is −∞, not NaN."""
    text = (
        "graph(%x: f32[2], %y: bf16[2]) -> (%z: bf16[2]) {\n  %0: bf16[2] = math.cast(%x) {dtype=bf16}\n"
        "  %1: bf16[2] = math.mul(%0, %y)\n  return %1\n}"
    )
    found, want = of(text, torch.tensor([-1e-42, 1e-42]), torch.tensor([float("inf"), 2.0], dtype=torch.bfloat16))
    assert found.free.tolist() == [True, False]
    assert found.explains(want, torch.tensor([float("-inf"), 0.0], dtype=torch.bfloat16), 1e-30)
