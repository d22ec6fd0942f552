"""A backend with a fault: the reference, but one op's results are changed."""

from __future__ import annotations

import dataclasses

from moec.backends.reference.backend import ReferenceBackend, ReferenceExecutable
from moec.ir import DType, run


@dataclasses.dataclass(eq=False)
class FaultyExecutable(ReferenceExecutable):
    """The reference with one op's first result changed."""

    op: str = ""
    change: object = None

    def values(self, inputs):
        seen = {}

        def tap(value, tensor):
            if value.producer is not None and value.producer.op == self.op:
                tensor = self.change(value, tensor)
            seen[value] = tensor
            return tensor

        return run(self.graph, inputs, tap=tap), seen

    def run(self, inputs):
        return self.values(inputs)[0]

    def tap(self, inputs, values):
        seen = self.values(inputs)[1]
        return {v: seen[v] for v in values if v in seen}


class FaultyBackend(ReferenceBackend):
    def __init__(self, op, change):
        super().__init__("faulty", dtypes=frozenset(DType))
        self.op, self.change = op, change

    def compile(self, graph, *, threads=None, options=None):
        return FaultyExecutable(graph, self.op, self.change)


def scaled(factor):
    return lambda value, tensor: tensor * factor if value.index == 0 and tensor.is_floating_point() else tensor
