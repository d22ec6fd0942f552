"""Models whose results have as many elements as their values say."""

from __future__ import annotations

import pytest
import torch

import moec
from moec.frontend import trace
from moec.ir import run


class Rows(torch.nn.Module):
    def forward(self, x, keep):
        return x[keep], torch.nonzero(keep), torch.masked_select(x, x > 0), x[:, keep[:3]].sum(0)


@pytest.mark.parametrize("backend", ["reference", "onnxruntime"])
def test_masks_select_other_numbers_of_rows_than_at_tracing(backend: str):
    x, keep = torch.randn(5, 3), torch.tensor([True, False, True, True, False])
    compiled = moec.compile(Rows(), (x, keep), backend=backend)
    for mask in (keep, ~keep, torch.zeros(5, dtype=torch.bool), torch.ones(5, dtype=torch.bool)):
        y = torch.randn(5, 3)
        for want, got in zip(Rows()(y, mask), compiled(y, mask), strict=True):
            assert want.shape == got.shape
            torch.testing.assert_close(got, want)


class Written(torch.nn.Module):
    """Values written where a mask over an axis holds, a place each."""

    def __init__(self, axis: int):
        super().__init__()
        self.axis = axis

    def forward(self, x, values):
        y, mask = x.clone(), x.select(1 - self.axis, 0) > 0
        y[(slice(None),) * self.axis + (mask,)] = values
        return y


@pytest.mark.parametrize("backend", ["reference", "onnxruntime"])
@pytest.mark.parametrize(
    ("axis", "shape", "counted"),
    [(0, (2, 4), True), (0, (2, 1), True), (1, (5, 2), True), (1, (2,), True), (0, (1, 4), False), (1, (), False)],
)
def test_values_are_written_where_a_mask_holds(backend: str, axis: int, shape: tuple[int, ...], counted: bool):
    x, values = torch.full((5, 4), -1.0), torch.randn(shape)
    x.select(1 - axis, 0)[::3] = 1  # at two places
    compiled = moec.compile(Written(axis), (x, values), backend=backend, threads=1)
    torch.testing.assert_close(compiled(x, values), Written(axis)(x, values))
    x.select(1 - axis, 0)[1] = 1
    if counted:  # a place more than there are values
        with pytest.raises(moec.CompileError, match=r"nonzero|Reshape"):
            compiled(x, values)
    else:
        torch.testing.assert_close(compiled(x, values), Written(axis)(x, values))


def test_batch_norm_in_training_uses_the_batch_and_never_old_statistics():
    class Norm(torch.nn.Module):
        def __init__(self, running: bool):
            super().__init__()
            self.running = running

        def forward(self, x):
            stats = (torch.zeros(3), torch.ones(3)) if self.running else (None, None)
            return torch.nn.functional.batch_norm(x, *stats, training=True)

    x = torch.randn(4, 3, 2)
    torch.testing.assert_close(run(trace(Norm(False), (x,)).graph, [x])[0], Norm(False)(x))
    with pytest.raises(moec.CompileError, match="running statistics"):
        trace(Norm(True), (x,))


def test_variance_with_a_correction_that_is_no_whole_number():
    class Variance(torch.nn.Module):
        def forward(self, x):
            return torch.var(x, dim=1, correction=0.5), torch.var(x, dim=1, correction=9)

    x = torch.randn(4, 5)
    for got, want in zip(run(trace(Variance(), (x,)).graph, [x]), Variance()(x), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)
