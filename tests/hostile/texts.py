"""Texts of graphs, written from their rows."""

from __future__ import annotations

SILU = "%0: f32[T, 4] = math.silu(%x)"


def text(*rows: str, inputs: str = "%x: f32[T, 4]", outputs: str = "%y: f32[T, 4]", result: str = "%0") -> str:
    body = "".join(f"  {row}\n" for row in rows)
    return f"graph({inputs}) -> ({outputs}) {{\n{body}  return {result}\n}}\n"


def chain(n: int, *ops: str) -> str:
    """`n` nodes, each on the one before."""
    rows = [f"%{i}: f32[T, 4] = {ops[i % len(ops)].format(f'%{i - 1}' if i else '%x')}" for i in range(n)]
    return text("weight @w: f32[4]", *rows, result=f"%{n - 1}")


def function(name: str, *rows: str) -> str:
    return text(*rows).replace("graph(", f"function @{name}(", 1)
