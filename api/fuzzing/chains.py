"""Chains of a random graph that rules look for (norms, rotary embedding, attention, gated MLPs, routers, experts), as
models write them, and near misses: the same with one thing changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moec.fuzzing.graphs import Grower
from moec.ir import Dim, DType, TensorType, Value

_WIDE = (DType.F32, DType.F32, DType.F32, DType.BF16, DType.F16, DType.F64)


def _miss(g: Grower, right: Any, *wrong: Any) -> Any:
    """What belongs there; one time in ten something else. What has to be built is given as a function."""
    chosen = g.d.pick(wrong) if g.d.chance(10) else right
    return chosen() if callable(chosen) else chosen


def _rows(g: Grower, width: int, rank: int = 2) -> Value:
    """Floats [..., width]."""
    dtype = g.d.pick(_WIDE)
    found = g.recent(lambda v: v.dtype in _WIDE and v.type.rank == rank and v.shape[-1] == width)
    if found is not None and g.d.chance(70):
        return found
    return g.fit(TensorType(dtype, (*(g.d.pick((*g.symbols, 3, 2, 1)) for _ in range(rank - 1)), width)))


def _eps(g: Grower) -> float:
    return g.d.pick((1e-6, 1e-5, 0.1, 0.0, 1e-12))


def rms(g: Grower) -> Any:
    b, x = g.b, _rows(g, g.d.pick((4, 2, 8, 1)), g.d.pick((2, 3, 1)))
    total = x
    if g.d.chance(40):
        total = b.add(x, g.fit(_miss(g, x.type, x.type.with_shape((*(1,) * (x.type.rank - 1), x.shape[-1])))))
    wide = b.cast(total, dtype="f32") if x.dtype in (DType.BF16, DType.F16) and g.d.chance(70) else total
    squares = _miss(g, lambda: b.mul(wide, wide), lambda: b.abs(wide), lambda: b.mul(wide, b.neg(wide)))
    mean = b.mean(squares, axes=(_miss(g, -1, 0),), keepdim=_miss(g, True, False))
    root = b.rsqrt(b.add(mean, _eps(g)))
    if g.d.chance(20):
        root = b.reciprocal(b.sqrt(b.add(mean, _eps(g))))
    y = b.mul(wide, root) if g.d.chance(70) else b.mul(root, wide)
    y = b.cast(y, dtype=_miss(g, x.dtype, DType.F32, DType.F16))
    y = b.mul(g.fit(TensorType(y.dtype, _miss(g, (x.shape[-1],), (1,), (1, x.shape[-1]))), "weight"), y)
    return [y, total]


def layer_norm(g: Grower) -> Any:
    b, x = g.b, _rows(g, g.d.pick((4, 2, 8)), g.d.pick((2, 3)))
    centred = b.sub(x, b.mean(x, axes=(-1,), keepdim=True))
    variance = b.mean(b.mul(centred, _miss(g, centred, x)), axes=(_miss(g, -1, -2),), keepdim=True)
    y = b.mul(centred, b.rsqrt(b.add(variance, _eps(g))))
    for apply in (b.mul, b.add):
        if g.d.chance(60):
            y = apply(y, g.fit(TensorType(y.dtype, _miss(g, (x.shape[-1],), x.shape, (1,))), "weight"))
    return y


def gated(g: Grower) -> Any:
    b, width = g.b, g.d.pick((2, 4, 3))
    x = _rows(g, 2 * width, g.d.pick((2, 3)))
    match g.d.pick(("halves", "linears", "apart", "interleaved")):
        case "halves":
            gate, up = b.split(x, axis=-1, sizes=_miss(g, (width, width), (2 * width - 1, 1)))
            gate, up = _miss(g, (gate, up), (up, gate), (gate, gate))
        case "linears":
            w, u = (g.fresh(TensorType(x.dtype, (width, 2 * width)), "w", weight=True) for _ in range(2))
            gate, up = b.linear(x, w), b.linear(x, u)
        case "interleaved":
            gate, up = (b.slice(x, axis=-1, start=s, end=2 * width, step=2) for s in (0, _miss(g, 1, 0)))
        case _:
            gate, up = x, g.fit(x.type)
    act = g.d.pick(("silu", "gelu", "relu", "sigmoid", "clamped", "tanh"))
    if act == "clamped":
        limit = g.d.pick((1.0, 7.0, 0.5))
        c = b.clamp(gate, high=_miss(g, limit, 2.0), low=_miss(g, None, -limit))
        u = b.clamp(up, low=-limit, high=_miss(g, limit, 3.0))
        y = b.mul(b.mul(c, b.sigmoid(b.mul(c, g.d.pick((1.702, 1.0))))), b.add(u, g.d.pick((1.0, 0.5))))
    elif act == "sigmoid":
        y = b.mul(b.mul(gate, b.sigmoid(_miss(g, gate, up))), up)
    else:
        unit = b.gelu(gate, approximate=g.d.pick(("none", "tanh"))) if act == "gelu" else getattr(b, act)(gate)
        y = b.mul(unit, up) if g.d.chance(60) else b.mul(up, unit)
    if g.d.chance(40):
        y = b.linear(y, g.fresh(TensorType(y.dtype, (4, y.shape[-1])), "down", weight=True))
    return y


def rope(g: Grower) -> Any:
    b, half = g.b, g.d.pick((2, 4, 1))
    x = g.fit(TensorType(g.d.pick(_WIDE), (g.d.pick((1, 2)), 2, g.d.pick((*g.symbols, 3)), 2 * half)))
    angle = g.fit(TensorType(x.dtype, (x.shape[2], half)), "angle")
    full = b.concat(angle, _miss(g, angle, lambda: b.neg(angle)), axis=-1)
    cos, sin = b.cos(full), b.sin(full)
    p, q = b.split(x, axis=-1, sizes=(half, half))
    first, second = _miss(g, (q, p), (p, q))
    turned = b.concat(_miss(g, lambda: b.neg(first), first), second, axis=-1)
    return b.add(b.mul(x, cos), b.mul(turned, _miss(g, sin, cos)))


def attention(g: Grower) -> Any:
    b, heads, groups = g.b, g.d.pick((1, 2)), g.d.pick((1, 2))
    batch, queries, keys = g.d.pick((1, 2)), *(g.d.pick((*g.symbols, 3, 4, 1)) for _ in range(2))
    width, out, dtype = g.d.pick((4, 2)), g.d.pick((4, 3)), g.d.pick(_WIDE)
    q = g.fit(TensorType(dtype, (batch, heads * groups, queries, width)), "q")
    k = g.fit(TensorType(dtype, (batch, heads, keys, width)), "k")
    v = g.fit(TensorType(dtype, (batch, heads, keys, out)), "v")
    if groups > 1:

        def repeated(x: Value) -> Value:
            five = (*x.shape[:2], 1, *x.shape[2:])
            rep = (*x.shape[:2], groups, *x.shape[2:])
            return b.reshape(b.expand(b.reshape(x, shape=five), shape=rep), shape=(batch, heads * groups, *x.shape[2:]))

        k, v = repeated(k), repeated(v)
    scores = b.matmul(q, b.transpose(k, perm=(0, 1, 3, 2)))
    match g.d.pick(("mul", "div", "none")):
        case "mul":
            scores = b.mul(scores, g.d.pick((0.5, 0.25, 1.0)))
        case "div":
            scores = b.div(scores, g.d.pick((2.0, 1.5)))
    if g.d.chance(20):
        cap = g.d.pick((2.0, 30.0))
        scores = b.mul(b.tanh(b.div(scores, cap)), _miss(g, cap, 3.0))
    match g.d.pick(("none", "bool", "float", "causal")):
        case "bool":
            keep = g.fit(TensorType(DType.BOOL, g.d.pick(((1, 1, queries, keys), (batch, 1, queries, keys)))), "mask")
            scores = b.where(keep, scores, _miss(g, float("-inf"), -1e4, 0.0))
        case "float":
            scores = b.add(scores, g.fit(TensorType(dtype, (1, 1, queries, keys)), "mask"))
        case "causal":
            rows = b.reshape(b.arange(end=queries), shape=(queries, 1))
            seen = getattr(b, _miss(g, "le", "lt"))(b.reshape(b.arange(end=keys), shape=(1, keys)), rows)
            scores = b.where(seen, scores, float("-inf"))
    narrow = dtype in (DType.BF16, DType.F16) and g.d.chance(60)
    weights = b.softmax(b.cast(scores, dtype="f32") if narrow else scores, axis=_miss(g, -1, -2))
    weights = b.cast(weights, dtype=dtype) if narrow else weights
    return b.matmul(weights, v)


def _route(g: Grower, x: Value, num: int, k: int) -> tuple[Value, Value]:
    """Weights and experts [T, k] for logits [T, num], in one of the forms that models have."""
    b = g.b
    form = g.d.pick(("op", "softmax", "topk_softmax", "sigmoid_bias"))
    if form == "op":
        bias = g.fresh(TensorType(x.dtype, (num,)), "bias", weight=True) if g.d.chance(40) else None
        scoring = g.d.pick(("softmax", "sigmoid", "sqrt_softplus", "topk_softmax", "topk_sigmoid"))
        return b.route(x, bias, k=k, scoring=scoring, normalize=g.d.chance(60), scale=g.d.pick((1.0, 2.5)))
    if form == "topk_softmax":
        weights, experts = b.topk(x, k=k)
        return b.softmax(weights, axis=_miss(g, -1, 0)), experts
    scores = b.softmax(x, axis=-1) if form == "softmax" else b.sigmoid(x)
    if form == "softmax":
        weights, experts = b.topk(scores, k=k)
    else:
        choice = b.add(scores, g.fresh(TensorType(x.dtype, (num,)), "bias", weight=True))
        _, experts = b.topk(choice, k=k, largest=_miss(g, True, False))
        weights = b.gather_elements(_miss(g, scores, choice), experts, axis=-1)
    if g.d.chance(60):
        total = b.sum(weights, axes=(-1,), keepdim=True)
        total = b.add(total, g.d.pick((1e-20, 1e-6))) if g.d.chance(40) else total
        weights = b.div(weights, total)
    return (b.mul(weights, g.d.pick((2.5, 16.0))) if g.d.chance(30) else weights), experts


def router(g: Grower) -> Any:
    num = g.d.pick((4, 8, 3))
    weights, experts = _route(g, _rows(g, num), num, g.d.pick((2, 1, 3)))
    return [weights, experts]


def experts(g: Grower) -> Any:
    """A layer of experts: the op, or sorted tokens with grouped products, or every token through every expert."""
    b, d, f, num, k = g.b, 4, g.d.pick((2, 3)), g.d.pick((3, 2, 4)), g.d.pick((2, 1))
    x = _rows(g, d)
    tokens = x.shape[0]
    weight = lambda name, *shape: g.fresh(TensorType(x.dtype, shape), name, weight=True)  # noqa: E731
    logits = b.linear(x, weight("router", num, d))
    weights, chosen = _route(g, logits, num, k)
    match g.d.pick(("op", "grouped", "dense", "batched", "unrolled")):
        case "op":
            bias = (weight("gub", num, 2 * f), weight("db", num, d)) if g.d.chance(30) else ()
            attrs: dict[str, Any] = {"activation": g.d.pick(("silu", "gelu", "gelu_tanh", "relu"))}
            attrs |= {"interleaved": g.d.chance(30)}
            attrs |= {"activation": "silu", "limit": g.d.pick((0.5, 7.0))} if g.d.chance(30) else {}
            gate_up, down = weight("gate_up", num, 2 * f, d), weight("down", num, d, f)
            return b.op("moe.experts", [x, weights, chosen, gate_up, down, *bias], attrs)
        case "grouped":
            flat = b.reshape(chosen, shape=(tokens * k,))
            ids, order = b.sort(flat, axis=-1)
            rows = b.gather(x, b.floordiv(order, _miss(g, k, k + 1)))
            counts = b.histc(_miss(g, ids, flat), bins=num)
            ends = b.cast(b.cumsum(counts, axis=0), dtype="i32")
            h = b.grouped_matmul(rows, weight("gate_up", num, d, 2 * f), ends)
            gate, up = b.split(h, axis=-1, sizes=(f, f))
            y = b.grouped_matmul(b.mul(b.silu(gate), up), weight("down", num, f, d), ends)
            factors = b.gather(b.reshape(weights, shape=(tokens * k,)), order)
            y = b.mul(y, b.reshape(factors, shape=(tokens * k, 1)))
            back = _miss(g, lambda: b.sort(order, axis=-1)[1], order)
            return b.sum(b.reshape(b.gather(y, back), shape=(tokens, k, d)), axes=(1,))
        case "batched":
            flat = b.reshape(chosen, shape=(tokens * k,))
            rows = b.reshape(
                b.expand(b.reshape(x, shape=(tokens, 1, d)), shape=(tokens, k, d)), shape=(tokens * k, d, 1)
            )
            h = b.matmul(b.gather(weight("gate_up", num, 2 * f, d), flat), rows)
            gate, up = b.split(b.reshape(h, shape=(tokens * k, 2 * f)), axis=-1, sizes=(f, f))
            act = b.reshape(b.mul(b.silu(_miss(g, gate, up)), up), shape=(tokens * k, f, 1))
            y = b.reshape(b.matmul(b.gather(weight("down", num, d, f), flat), act), shape=(tokens, k, d))
            return b.sum(b.mul(y, b.reshape(weights, shape=(tokens, k, 1))), axes=(-2,))
    hits = b.cast(b.one_hot(chosen, depth=num), dtype=x.dtype)
    matrix = b.sum(b.mul(hits, b.reshape(weights, shape=(tokens, k, 1))), axes=(1,))
    if g.d.chance(50):
        h = b.matmul(b.expand(b.reshape(x, shape=(1, tokens, d)), shape=(num, tokens, d)), weight("gu", num, d, 2 * f))
        gate, up = b.split(h, axis=-1, sizes=(f, f))
        y = b.matmul(b.mul(b.silu(gate), up), weight("down", num, f, d))
        return b.sum(b.mul(y, b.reshape(b.transpose(matrix, perm=(1, 0)), shape=(num, tokens, 1))), axes=(0,))
    total = None
    for e in range(num):
        column = b.slice(matrix, axis=1, start=e, end=e + 1)
        unit = b.mul(b.silu(b.linear(x, weight("gate", f, d))), b.linear(x, weight("up", f, d)))
        y = b.mul(b.linear(unit, weight("down", d, f)), column)
        total = y if total is None else b.add(total, y)
    return total


def identities(g: Grower) -> Any:
    """What cleaning up removes, and what only looks like it."""
    b, x = g.b, g.recent()
    if x is None:
        return None
    wide = x.dtype in (DType.F32, DType.F64, DType.BF16, DType.F16)
    match g.d.pick(("number", "casts", "reshapes", "transposes", "parts", "negations", "clamps", "wheres", "scales")):
        case "number" if wide or x.dtype.is_integer:
            name, value = g.d.pick(
                (("add", 0), ("mul", 1), ("mul", 0), ("sub", 0), ("mul", -1), ("add", -0.0), ("pow", 2))
            )
            if name == "pow" and not wide:
                return None
            value = float(value) if wide else int(value)
            shape = _miss(
                g, (), (1,) * g.d.number(0, 4), x.shape if x.type.is_static and int(str(x.type.numel)) <= 8 else ()
            )
            count = 1
            for s in shape:
                count *= int(s)
            return b.op(f"math.{name}", [x, b.const((value,) * count, x.dtype, shape)])
        case "casts":
            other = g.d.pick((DType.F64, DType.F32, DType.BF16, DType.F16))
            return g.cast(g.cast(x, other), x.dtype) if x.dtype.bits > 8 or x.dtype is DType.BOOL else None
        case "reshapes":
            return b.reshape(b.reshape(x, shape=(x.type.numel,)), shape=_miss(g, x.shape, (1, *x.shape)))
        case "transposes" if x.type.rank > 1:
            perm = tuple(g.d.shuffled(range(x.type.rank)))
            back = tuple(perm.index(i) for i in range(len(perm)))
            return b.transpose(b.transpose(x, perm=perm), perm=_miss(g, back, perm))
        case "parts" if x.type.rank and isinstance(x.shape[-1], int) and x.shape[-1] > 1:
            one, two = b.split(x, axis=-1, sizes=(1, x.shape[-1] - 1))
            return b.concat(*_miss(g, (one, two), (two, one), (one, one)), axis=-1)
        case "negations" if wide:
            return b.sub(_miss(g, lambda: b.neg(b.neg(x)), lambda: b.neg(x)), _miss(g, x, lambda: b.neg(x)))
        case "clamps" if wide:
            return b.clamp(b.clamp(x, low=g.d.pick((-1.0, 0.5)), high=g.d.pick((1.0, 0.25))), high=0.75, low=0.0)
        case "wheres" if wide:
            keep = b.gt(x, 0.0)
            return b.where(b.not_(keep) if g.d.chance(50) else keep, x, b.mul(x, 0.5))
        case "scales" if wide:
            return b.mul(b.mul(x, g.d.pick((2.0, 0.1))), g.d.pick((0.5, 3.0)))
    return b.transpose(b.reshape(x, shape=(1, x.type.numel)), perm=(1, 0))


def masks(g: Grower) -> Any:
    """What positions prove: comparisons of ranges, counts, running sums."""
    b = g.b
    n: int | Dim = g.d.pick((*g.symbols, 4, 3))
    i = b.reshape(b.arange(end=n), shape=(n, 1))
    j = b.reshape(b.arange(end=n), shape=(1, n))
    near = getattr(b, g.d.pick(("le", "lt", "ge", "eq")))(j, _miss(g, i, lambda: b.add(i, 1)))
    if g.d.chance(40):
        near = b.and_(near, b.gt(b.sub(i, j), g.d.pick((1, -1, 0))))
    if g.d.chance(40):
        ids = g.fit(TensorType(DType.I64, (n,)), "position_ids")
        near = b.and_(near, b.eq(b.reshape(ids, shape=(n, 1)), b.reshape(ids, shape=(1, n))))
    return near


_ALL: tuple[Callable[[Grower], Any], ...] = (
    identities, identities, identities, rms, rms, layer_norm, gated, rope, attention, router, experts, masks,
)  # fmt: skip


def chain(g: Grower) -> Any:
    """One of them."""
    return g.d.pick(_ALL)(g)
