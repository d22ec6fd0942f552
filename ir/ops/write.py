"""`tensor.write`: rows put into a buffer."""

from __future__ import annotations

from typing import Any

import torch

from moec.ir.errors import require
from moec.ir.opdef import Attr, Operand, op
from moec.ir.ops.reduction import normal_axis
from moec.ir.types import DType, TensorType


@op("tensor.write")
class Write:
    """x with its rows `at` … at + n − 1 along `axis` replaced by the n of `rows`: a cache that is kept in one buffer.

    x and rows have one shape but for `axis`; `at` is i64[], 0 ≤ at ≤ x's size − n.
    """

    x: Operand
    rows: Operand
    at: Operand
    axis: Attr[int]

    def infer(self) -> TensorType:
        x, rows = self.x, self.rows
        require(self.at == TensorType(DType.I64, ()), f"at is {self.at}, expected i64[]")
        require(x.dtype == rows.dtype and x.rank == rows.rank, f"x {x} and rows {rows} differ in dtype or rank")
        axis = normal_axis(self.axis, x.rank)
        same = all(a == b for i, (a, b) in enumerate(zip(x.shape, rows.shape, strict=True)) if i != axis)
        require(same, f"x {x} and rows {rows} differ on other axes than {axis}")
        n, room = rows.shape[axis], x.shape[axis]
        both = isinstance(n, int) and isinstance(room, int)
        require(not both or n <= room, f"{n} rows for {room}")
        return x

    def reference(self) -> torch.Tensor:
        out, n, at = self.x.clone(), self.rows.shape[self.axis], int(self.at)
        room = out.shape[self.axis]
        require(0 <= at <= room - n, f"{n} rows at {at} of {room}")
        out.narrow(self.axis, at, n).copy_(self.rows)
        return out

    def undefined(self) -> bool:
        return not 0 <= int(self.at) <= self.x.shape[self.axis] - self.rows.shape[self.axis]

    def decompose(self, b: Any) -> Any:
        rank = self.x.type.rank
        axis = normal_axis(self.axis, rank)
        index = b.add(b.arange(end=self.rows.shape[axis]), self.at)
        perm = (axis, *(i for i in range(rank) if i != axis))
        back = tuple(perm.index(i) for i in range(rank))
        x, rows = (b.transpose(v, perm=perm) if axis else v for v in (self.x, self.rows))
        y = b.index_put(x, index, rows)
        return b.transpose(y, perm=back) if axis else y

    @staticmethod
    def samples(r: Any) -> Any:
        n, k = r.n, r.k
        yield [r.floats(2, n + k, 3), r.floats(2, n, 3), torch.tensor(k)], {"axis": 1}
        yield [r.floats(n + 1, 2), r.floats(1, 2), torch.tensor(n)], {"axis": 0}
        yield [r.floats(2, 3, n + k, 2), r.floats(2, 3, n, 2), torch.tensor(0)], {"axis": -2}
        yield [r.ints(-9, 9, 2, n + k), r.ints(-9, 9, 2, n), torch.tensor(k)], {"axis": -1}
