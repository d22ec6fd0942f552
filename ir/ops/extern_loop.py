"""Loop for ONNX's reference evaluator, whose own joins the collected rows end to end; ONNX stacks them."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx.reference.ops import op_loop


class Loop(op_loop.Loop):  # the evaluator finds it by its name
    """body(iteration, condition, states…) → (condition, states…, rows…): the last states, and all rows, [n, …] each."""

    op_domain = ""

    def _run(self, M: Any, cond: Any, *states: Any, context: Any = None, body: Any = None, attributes: Any = None,
             bindings: Any = None) -> tuple[Any, ...]:  # fmt: skip
        names = self.body.input_names  # type: ignore[attr-defined]  # set from the attributes
        going: Any = True if cond is None else cond
        known = dict(context or {})
        current = list(states)
        rows: list[list[Any]] = [[] for _ in range(self.K)]
        iteration = 0
        while going and (M is None or iteration < M):
            inputs = known | dict(zip(names[2:], current, strict=True))
            inputs |= {names[0]: np.array(iteration, np.int64), names[1]: np.asarray(going)}
            results = self._run_body(inputs, attributes=attributes, bindings=bindings)  # type: ignore[attr-defined]  # of the base
            going, current = results[0], list(results[1 : 1 + self.N])
            for kept, row in zip(rows, results[1 + self.N :], strict=True):
                kept.append(row)
            iteration += 1
        return tuple(current) + tuple(np.stack(r) if r else np.empty((0,)) for r in rows)
