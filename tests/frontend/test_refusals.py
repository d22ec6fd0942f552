"""What cannot be traced is refused with the module, the line and advice."""

from __future__ import annotations

import inspect

import pytest
import torch

from moec.frontend import trace
from moec.ir import CompileError


class Loop(torch.nn.Module):
    def forward(self, x):
        while x.sum() > 1:
            x = x / 2
        return x


class Item(torch.nn.Module):
    def forward(self, x):
        return x[: int(x.argmax())]


class Different(torch.nn.Module):
    def forward(self, x):
        return torch.unique(x).sum()


class Counter(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return x + self.seen


class InPlace(torch.nn.Module):
    def forward(self, x):
        x.add_(1)
        return x


class Divisor(torch.nn.Module):
    def forward(self, x):
        return torch.gcd(x, x)


class Noise(torch.nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class Masked(torch.nn.Module):
    def forward(self, x):
        y = x.clone()
        y[x > 0] = torch.ones(2)
        return y


class Raises(torch.nn.Module):
    def forward(self, x):
        raise ValueError("the model's own complaint")


class Fourier(torch.nn.Module):
    def forward(self, x):
        return torch.view_as_complex(x).sin().real


class Outer(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = torch.nn.ModuleList([torch.nn.Identity(), inner])

    def forward(self, x):
        return self.inner[1](x)


CASES = [
    (Loop, torch.ones(3), "data-dependent", "torch.where", "while x.sum()"),
    (Item, torch.ones(3), "data-dependent", "", "int(x.argmax())"),
    (Different, torch.ones(3), "data-dependent", "", "torch.unique(x)"),
    (Counter, torch.ones(3), "mutation", "KV cache", "self.seen += 1"),
    (InPlace, torch.ones(3), "mutation", "", "x.add_(1)"),
    (Divisor, torch.ones(3, dtype=torch.int64), "unsupported-op", "register a lowering", "torch.gcd(x, x)"),
    (Masked, torch.ones(3), "data-dependent", "torch.where(mask, a, b)", "y[x > 0] = "),
    (Noise, torch.ones(3), "unsupported-op", "argument", "rand_like"),
    (Raises, torch.ones(3), "trace", "", "raise ValueError"),
    (Fourier, torch.ones(3, 2), "dtype", "cos, sin", "view_as_complex(x).sin()"),
]


@pytest.mark.parametrize(("inner", "x", "code", "hint", "code_line"), CASES)
def test_refusal_names_module_line_and_way_out(inner, x, code, hint, code_line):
    with pytest.raises(CompileError) as e:
        trace(Outer(inner()), (x,))
    error = e.value
    lines, start = inspect.getsourcelines(inner)
    expected = start + next(i for i, text in enumerate(lines) if code_line in text)
    assert error.code == code
    assert error.location is not None
    frame = error.location.frames[-1]
    assert frame.module.startswith("inner.1")
    assert (frame.file.rsplit("/", 1)[-1], frame.line) == ("test_refusals.py", expected)
    assert hint in (error.hint or "")
    assert "/site-packages" not in str(error)


def test_unsupported_op_is_named():
    with pytest.raises(CompileError, match=r"(aten|prims)::gcd"):
        trace(Divisor(), (torch.ones(3, dtype=torch.int64),))


def test_own_exception_keeps_its_message():
    with pytest.raises(CompileError, match="ValueError: the model's own complaint"):
        trace(Raises(), (torch.ones(3),))


def test_wrong_number_of_arguments():
    with pytest.raises(CompileError, match="missing 1 required positional argument"):
        trace(Loop(), ())


def test_unsupported_dtype_names_the_argument():
    with pytest.raises(CompileError) as e:
        trace(torch.nn.Identity(), (torch.ones(3, dtype=torch.complex128),))
    assert "complex128" in str(e.value)


def test_quantised_modules_are_refused():
    class Packed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.held = torch.classes.quantized.LinearPackedParamsBase.__new__(torch.ScriptObject)

        def forward(self, x):
            return x

    with pytest.raises(CompileError, match=r"module 'inner\.1' \(Packed\)") as e:
        trace(Outer(Packed()), (torch.ones(3),))
    assert e.value.code == "unsupported-model"


def test_model_state_is_left_as_it_was():
    model = Outer(torch.nn.Dropout(0.5)).train()
    model.inner[0].eval()
    modes = [m.training for m in model.modules()]
    graph = trace(model, (torch.ones(3),)).graph
    assert [m.training for m in model.modules()] == modes
    assert len(graph) == 0
    counter = Counter()
    with pytest.raises(CompileError):
        trace(counter, (torch.ones(3),))
    assert counter.seen == 0
