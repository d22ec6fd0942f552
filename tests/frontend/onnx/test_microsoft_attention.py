"""com.microsoft's attention and rotary embedding, against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

import moec
from moec.frontend.onnx import import_onnx
from moec.ir import CompileError

from .builders import agrees, helper, model, value

RNG = np.random.default_rng(0)
H, G, D = 4, 2, 16
BACKENDS = ("reference", "onnxruntime")


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def one(op: str, inputs: dict[str, Any], outputs: int, weights: dict[str, np.ndarray] | None = None,
        **attrs: Any) -> onnx.ModelProto:  # fmt: skip
    """Inputs by name: None is absent, a shape is f32, a pair (shape, dtype)."""
    names = [n if s is not None else "" for n, s in inputs.items()]
    node = helper.make_node(op, names, ["y", "keys", "values"][:outputs], domain="com.microsoft", **attrs)
    given = {n: s if isinstance(s, tuple) else (s, np.float32) for n, s in inputs.items() if s is not None}
    ins = [value(n, *s) for n, s in given.items() if n not in (weights or {})]
    outs = [helper.make_value_info(o, onnx.TypeProto()) for o in node.output]
    return model([node], ins, outs, weights, domains=["com.microsoft"])


CACHE = {"cos": np.cos(floats(32, D // 2)), "sin": np.sin(floats(32, D // 2))}


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("positions", [[1], ["B", "S"]])
@pytest.mark.parametrize("rank", [3, 4])
def test_rotary_embedding(rank, positions, interleaved):
    shape = ["B", "S", H * D] if rank == 3 else ["B", H, "S", D]
    inputs = {"x": shape, "p": (positions, np.int64), "cos": [32, D // 2], "sin": [32, D // 2]}
    proto = one("RotaryEmbedding", inputs, 1, CACHE, interleaved=interleaved)
    for backend in BACKENDS:
        compiled = moec.compile(proto, backend=backend)
        for b, s in ((2, 5), (1, 1)):
            x = floats(b, s, H * D) if rank == 3 else floats(b, H, s, D)
            p = np.array([3]) if len(positions) == 1 else RNG.integers(0, 32, (b, s))
            agrees(compiled, proto, {"x": x, "p": p}, 1e-5)


MULTI_HEAD = {
    "plain": {},
    "causal": {"unidirectional": 1},
    "bias and mask": {"bias": [3 * H * D], "padding": (["B", "T"], np.int32)},
    "added": {"added": [1, H, "S", "T"], "scale": 0.3},
}


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("name", MULTI_HEAD)
def test_multi_head_attention(name, past):
    case = dict(MULTI_HEAD[name])
    attrs = {k: case.pop(k) for k in ("unidirectional", "scale") if k in case}
    keys = "S" if "unidirectional" in attrs else "K"
    total = ("P + " if past else "") + keys
    inputs: dict[str, Any] = {"q": ["B", "S", H * D], "k": ["B", keys, H * D], "v": ["B", keys, H * D]}
    for n in ("bias", "padding", "added"):
        inputs[n] = case.get(n)
    if inputs["padding"] is not None:
        inputs["padding"] = (["B", total], np.int32)
    if inputs["added"] is not None:
        inputs["added"] = [1, H, "S", total]
    if past:
        inputs |= {"past_k": ["B", H, "P", D], "past_v": ["B", H, "P", D]}
    proto = one("MultiHeadAttention", inputs, 3 if past else 1, num_heads=H, **attrs)
    for backend in BACKENDS:
        compiled = moec.compile(proto, backend=backend)
        for b, s, k, p in ((2, 5, 5, 3), (1, 1, 1, 4)):
            t = k + (p if past else 0)
            feeds = {"q": floats(b, s, H * D), "k": floats(b, k, H * D), "v": floats(b, k, H * D)}
            if inputs["bias"] is not None:
                kept = np.ones((b, t), np.int32)
                kept[:, -1] = t == 1
                feeds |= {"bias": floats(3 * H * D), "padding": kept}
            if inputs["added"] is not None:
                feeds["added"] = floats(1, H, s, t)
            if past:
                feeds |= {"past_k": floats(b, H, p, D), "past_v": floats(b, H, p, D)}
            agrees(compiled, proto, feeds, 1e-4)


GROUPED = {
    "plain": {},
    "rotary": {"do_rotary": 1},
    "interleaved": {"do_rotary": 1, "rotary_interleaved": 1},
    "window": {"local_window_size": 3},
    "softcap": {"softcap": 2.0, "scale": 0.2},
}


@pytest.mark.parametrize("interleaved", [0, 1])
def test_half_of_each_head_may_be_rotated(interleaved):
    """As many of its elements as two rows of the caches have."""
    size = 2 * D  # the caches are for D
    inputs = {"q": ["B", "S", H * size], "k": ["B", "S", G * size], "v": ["B", "S", G * size], "past_k": None,
              "past_v": None, "last": (["B"], np.int32), "total": ([], np.int32), "cos": [32, D // 2],
              "sin": [32, D // 2]}  # fmt: skip
    proto = one("GroupQueryAttention", inputs, 3, CACHE, num_heads=H, kv_num_heads=G, do_rotary=1,
                rotary_interleaved=interleaved)  # fmt: skip
    feeds = {"q": floats(2, 6, H * size), "k": floats(2, 6, G * size), "v": floats(2, 6, G * size),
             "last": np.full(2, 5, np.int32), "total": np.array(6, np.int32)}  # fmt: skip
    for backend in BACKENDS:
        agrees(moec.compile(proto, backend=backend), proto, feeds, 1e-4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", GROUPED)
def test_group_query_attention_of_prompts(name, packed):
    width = (H + 2 * G) * D if packed else H * D
    side = None if packed else ["B", "S", G * D]
    inputs = {"q": ["B", "S", width], "k": side, "v": side, "past_k": None, "past_v": None,
              "last": (["B"], np.int32), "total": ([], np.int32)}  # fmt: skip
    weights = CACHE if "do_rotary" in GROUPED[name] else None
    inputs |= {"cos": [32, D // 2], "sin": [32, D // 2]} if weights else {}
    proto = one("GroupQueryAttention", inputs, 3, weights, num_heads=H, kv_num_heads=G, **GROUPED[name])
    for backend in BACKENDS:
        compiled = moec.compile(proto, backend=backend)
        for b, s in ((2, 6), (1, 1)):
            feeds = {"q": floats(b, s, width)}
            feeds |= {} if packed else {"k": floats(b, s, G * D), "v": floats(b, s, G * D)}
            feeds |= {"last": np.full(b, s - 1, np.int32), "total": np.array(s, np.int32)}
            agrees(compiled, proto, feeds, 1e-4)


@pytest.mark.parametrize("name", GROUPED)
def test_group_query_attention_with_a_cache(name):
    """One token for each row; the last row has fewer keys in its cache than the others."""
    side, past = ["B", "S", G * D], ["B", G, "P", D]
    inputs = {"q": ["B", "S", H * D], "k": side, "v": side, "past_k": past, "past_v": past,
              "last": (["B"], np.int32), "total": ([], np.int32)}  # fmt: skip
    weights = CACHE if "do_rotary" in GROUPED[name] else None
    inputs |= {"cos": [32, D // 2], "sin": [32, D // 2]} if weights else {}
    proto = one("GroupQueryAttention", inputs, 1, weights, num_heads=H, kv_num_heads=G, **GROUPED[name])
    # ONNX Runtime wants the present ones; what lies behind a row's last key in them is not defined
    proto.graph.node[0].output.extend(["keys", "values"])
    for backend in BACKENDS:
        compiled = moec.compile(proto, backend=backend)
        for b, p, fewer in ((2, 5, 2), (1, 3, 0)):
            cache = {"past_k": floats(b, G, p, D), "past_v": floats(b, G, p, D)}
            new = {"q": floats(b, 1, H * D), "k": floats(b, 1, G * D), "v": floats(b, 1, G * D)}
            last = np.full(b, p, np.int32)
            last[-1] -= fewer
            agrees(compiled, proto, {**new, **cache, "last": last, "total": np.array(p + 1, np.int32)}, 1e-4)


def test_what_is_not_taken_is_said():
    inputs = {"q": ["B", "S", 3 * H * D]}
    with pytest.raises(CompileError, match=r"com.microsoft.MultiHeadAttention: of packed or unequal operands"):
        import_onnx(one("MultiHeadAttention", inputs, 1, num_heads=H))
