"""Errors of ONNX Runtime as CompileErrors that name the IR op."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import onnx_ir as onnx

from moec.ir import CompileError, Node
from moec.ir.printer import excerpt


def wrapped(error: Exception, sources: Mapping[str, Node], doing: str) -> CompileError:
    """`error` as a CompileError (code "onnxruntime"), located at the IR node whose ONNX node it names."""
    text = str(error)
    node = next((n for n in map(sources.get, _paths(text)) if n is not None), None)
    reason = re.sub(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", "", text).strip()
    what = f"{node.op} failed" if node is not None else "failed"
    return CompileError(
        f"{what} while {doing} in ONNX Runtime: {reason}",
        code="onnxruntime",
        location=node.location if node is not None else None,
        excerpt=excerpt(node) if node is not None else None,
        hint=_hint(node, text),
    )


def _hint(node: Node | None, text: str) -> str | None:
    """What is wrong with the values that a node was given, as far as its operator's complaint tells."""
    if node is None or node.op not in ("moe.experts", "quant.scaled_experts") or "out of data bounds" not in text:
        return None
    return f"expert ids must be in 0 … {int(node.operand('gate_up').shape[0]) - 1}"


@contextmanager
def serialising() -> Iterator[None]:
    """Within: an error of reading a weight comes out as itself, not as onnx_ir's wrappings of it."""
    try:
        yield
    except onnx.serde.SerdeError as error:
        cause: BaseException = error
        while isinstance(cause, onnx.serde.SerdeError) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise cause from None


def _paths(text: str) -> list[str]:
    """What stands before the colon in names such as `layers.3.mlp/moe.experts_12:MatMul`."""
    return re.findall(r"([^\s'\"()]+_\d+):[A-Z][A-Za-z]+", text)
