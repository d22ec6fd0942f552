"""What a graph leaves open on given inputs, and what it does not."""

import torch

import moec
from moec.spread import spread


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
