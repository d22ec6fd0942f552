"""`moe`: routing, grouped experts, replica choice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from moec.ir.errors import require
from moec.ir.literals import literal
from moec.ir.opdef import Attr, Operand, OptionalOperand, op
from moec.ir.ops.elementwise import check_limit, gelu
from moec.ir.ops.overflow import overflows
from moec.ir.types import DType, TensorType

if TYPE_CHECKING:
    from moec.ir.graph import Value

SCORINGS = ("softmax", "sigmoid", "sqrt_softplus", "topk_softmax", "topk_sigmoid")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@op("moe.route", results=2)
class Route:
    """Choose k of E experts per token: logits [T, E] → weights [T, k] (dtype of logits), experts i64[T, k],
    best first; ties: lower index.

    `scoring`: "softmax" over all experts (Mixtral, Qwen3-MoE, DeepSeek-V2), "sigmoid" (DeepSeek-V3),
    "sqrt_softplus" (√ln(1 + e^x), DeepSeek-V4), or select on the logits and then "topk_softmax": softmax over the
    chosen (GPT-OSS), "topk_sigmoid": sigmoid of each (Llama 4). `bias` [E] is added for the selection only
    (aux-loss-free balancing, Wang et al. 2024). With `n_group` > 1 only experts of the best
    `topk_group` groups can be chosen; a group scores its best expert ("max", DeepSeek-V2) or its two best
    ("top2_sum", DeepSeek-V3); experts of other groups score `masked_score`. `normalize` divides the chosen
    weights by max(their sum + `normalize_eps`, `normalize_min`), which "topk_softmax" has done already; then they
    are multiplied by `scale`.
    NaN logits rank above all others, as in a descending sort.
    """

    logits: Operand
    bias: OptionalOperand
    k: Attr[int]
    scoring: Attr[str] = "softmax"
    normalize: Attr[bool] = True
    normalize_eps: Attr[float] = 0.0
    normalize_min: Attr[float] = 0.0
    scale: Attr[float] = 1.0
    n_group: Attr[int] = 1
    topk_group: Attr[int] = 1
    group_score: Attr[str] = "top2_sum"
    masked_score: Attr[float] = float("-inf")

    def infer(self) -> tuple[TensorType, ...]:
        t = self.logits
        require(t.rank == 2 and t.dtype.is_wide_float, f"logits {t} must be floats of rank 2")
        e = t.shape[1]
        require(isinstance(e, int) and e > 0, f"the number of experts in {t} must be known")
        require(1 <= self.k <= e, f"k={self.k} of {e} experts")
        require(self.scoring in SCORINGS, f"scoring {self.scoring!r} is none of {SCORINGS}")
        require(self.bias is None or self.bias == TensorType(t.dtype, (e,)), f"bias {self.bias}, expected [{e}]")
        require(self.n_group >= 1 and e % self.n_group == 0, f"{e} experts in {self.n_group} groups")
        require(1 <= self.topk_group <= self.n_group, f"topk_group={self.topk_group} of {self.n_group} groups")
        require(self.group_score in ("max", "top2_sum"), f"group_score {self.group_score!r}")
        if self.n_group > 1:
            per_group = e // self.n_group
            require(self.group_score == "max" or per_group >= 2, "top2_sum needs two experts per group")
            require(self.k <= per_group * self.topk_group, f"k={self.k} of {per_group * self.topk_group} candidates")
        return t.with_shape((t.shape[0], self.k)), TensorType(DType.I64, (t.shape[0], self.k))

    def reference(self) -> tuple[torch.Tensor, ...]:
        scores = self.scores()
        experts = self.choose(scores)
        return self.weigh(scores, experts), experts

    def scores(self) -> torch.Tensor:
        """What the logits score before bias and groups, [T, E]."""
        x = self.logits
        return {
            "softmax": lambda: torch.softmax(x, -1),
            "sigmoid": lambda: torch.sigmoid(x),
            "sqrt_softplus": lambda: F.softplus(x, threshold=40.0).sqrt(),
        }.get(self.scoring, lambda: x)()

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """The experts of each token, i64[T, k]."""
        choice = scores if self.bias is None else scores + self.bias
        if self.n_group > 1:
            grouped = choice.reshape(choice.shape[0], self.n_group, choice.shape[1] // self.n_group)
            best = grouped.sort(dim=-1, descending=True, stable=True).values
            group = best[..., 0] if self.group_score == "max" else best[..., :2].sum(-1)
            chosen = group.sort(dim=-1, descending=True, stable=True).indices[:, : self.topk_group]
            keep = torch.zeros_like(group, dtype=torch.bool).scatter(1, chosen, True)
            choice = grouped.masked_fill(~keep[..., None], self.masked_score).reshape(choice.shape)
        return choice.sort(dim=-1, descending=True, stable=True).indices[:, : self.k]

    def weigh(self, scores: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """The weights of chosen experts, [T, k]."""
        weights = scores.gather(1, experts)
        if self.scoring == "topk_softmax":
            return torch.softmax(weights, -1) * self.scale
        if self.scoring == "topk_sigmoid":
            weights = torch.sigmoid(weights)
        if self.normalize:
            total = weights.sum(-1, keepdim=True) + self.normalize_eps
            weights = weights / (total.clamp(min=self.normalize_min) if self.normalize_min else total)
        return weights * self.scale

    def decompose(self, b: Any) -> Any:
        x, (tokens, num) = self.logits, self.logits.shape
        scores = x
        if self.scoring == "softmax":
            scores = b.softmax(x, axis=-1)
        elif self.scoring == "sigmoid":
            scores = b.sigmoid(x)
        elif self.scoring == "sqrt_softplus":
            scores = b.sqrt(b.softplus(x))
        choice = scores if self.bias is None else b.add(scores, self.bias)
        if self.n_group > 1:
            grouped = b.reshape(choice, shape=(tokens, self.n_group, num // self.n_group))
            best, _ = b.topk(grouped, k=1 if self.group_score == "max" else 2)
            _, chosen = b.topk(b.sum(best, axes=(-1,)), k=self.topk_group)
            hits = b.sum(b.one_hot(chosen, depth=self.n_group), axes=(-2,))
            keep = b.reshape(b.gt(hits, b.const(0, hits.dtype)), shape=(tokens, self.n_group, 1))
            choice = b.reshape(b.where(keep, grouped, b.const(self.masked_score, x.dtype)), shape=x.shape)
        _, experts = b.topk(choice, k=self.k)
        weights = b.gather_elements(scores, experts, axis=-1)
        if self.scoring == "topk_softmax":
            weights = b.softmax(weights, axis=-1)
        elif self.scoring == "topk_sigmoid":
            weights = b.sigmoid(weights)
        if self.normalize and self.scoring != "topk_softmax":
            total = b.sum(weights, axes=(-1,), keepdim=True)
            total = b.add(total, self.normalize_eps) if self.normalize_eps else total
            total = b.clamp(total, low=self.normalize_min) if self.normalize_min else total
            weights = b.div(weights, total)
        return weights if self.scale == 1.0 else b.mul(weights, self.scale), experts

    @staticmethod
    def samples(r: Any) -> Any:
        x = r.floats(r.n, 8)
        yield [x], {"k": 2}
        yield [x], {"k": 1, "normalize": False}
        yield [x], {"k": 8, "scoring": "topk_softmax"}
        yield [x.round()], {"k": 3}
        v3 = {"scoring": "sigmoid", "n_group": 4, "topk_group": 2, "scale": 2.5, "normalize_eps": 1e-20}
        yield [x, r.floats(8)], {"k": 3, **v3}
        yield [x, r.floats(8)], {"k": 2, "scoring": "sigmoid"}
        yield [x], {"k": 2, "n_group": 2, "topk_group": 1, "group_score": "max", "normalize": False, "scale": 16.0}
        yield [x, r.floats(8)], {"k": 3, **v3, "masked_score": 0.0}
        yield [x, r.floats(8)], {"k": 2, "scoring": "topk_sigmoid", "normalize": False}
        yield [x, r.floats(8)], {"k": 3, "scoring": "sqrt_softplus", "scale": 1.5}
        yield [x], {"k": 2, "normalize_min": 0.75}


def activate(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """The gated activation of an expert."""
    if activation == "silu":
        return F.silu(gate) * up
    if activation == "relu":
        return F.relu(gate) * up
    return gelu(gate, "tanh" if activation == "gelu_tanh" else "none") * up


def swiglu_clamped(
    gate: torch.Tensor, up: torch.Tensor, limit: float, alpha: float, up_offset: float = 1.0
) -> torch.Tensor:
    """min(gate, limit) · sigmoid(alpha · min(gate, limit)) · (clip(up, ±limit) + up_offset)."""
    limit = literal(limit, DType.of(gate.dtype))
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + up_offset)


@op("moe.experts")
class Experts:
    """Σ_j weights[t, j] · mlp_{experts[t, j]}(x[t]): x [T, d], weights [T, k], experts i64[T, k],
    gate_up [E, 2f, d], down [E, d, f], optional biases [E, 2f] and [E, d] → [T, d].

    The first f rows of gate_up are the gate, the last f the up projection; with `interleaved` they
    alternate. `activation`: "silu" (SwiGLU), "gelu", "gelu_tanh", "relu"; with `limit` the clamped SwiGLU of GPT-OSS
    (`alpha` 1.702, `up_offset` 1) and DeepSeek-V4 (1 and 0), see `math.glu`. The weighted sum runs over j in order,
    in the wider dtype of x and weights.
    """

    x: Operand
    weights: Operand
    experts: Operand
    gate_up: Operand
    down: Operand
    gate_up_bias: OptionalOperand
    down_bias: OptionalOperand
    activation: Attr[str] = "silu"
    interleaved: Attr[bool] = False
    limit: Attr[float | None] = None
    alpha: Attr[float] = 1.702
    up_offset: Attr[float] = 1.0

    def infer(self) -> TensorType:
        x, gu, dn = self.x, self.gate_up, self.down
        require(x.rank == 2 and x.dtype.is_wide_float, f"x {x} must be floats of rank 2")
        check_routing(x, self.weights, self.experts)
        require(gu.rank == 3 and dn.rank == 3, f"gate_up {gu} and down {dn} must have rank 3")
        require(gu.dtype == dn.dtype == x.dtype, f"dtypes of x {x.dtype}, gate_up {gu.dtype}, down {dn.dtype} differ")
        check_expert_shapes(x, gu.shape, dn.shape)
        check_expert_biases(x, gu.shape, self.gate_up_bias, self.down_bias)
        require(self.activation in ACTIVATIONS, f"activation {self.activation!r} is none of {ACTIVATIONS}")
        check_limit(self.limit)
        return x

    def reference(self) -> torch.Tensor:
        def mlp(e: int, rows: torch.Tensor) -> torch.Tensor:
            h = F.linear(rows, self.gate_up[e], None if self.gate_up_bias is None else self.gate_up_bias[e])
            gate, up = (h[..., 0::2], h[..., 1::2]) if self.interleaved else h.chunk(2, dim=-1)
            if self.limit is None:
                h = activate(gate, up, self.activation)
            else:
                h = swiglu_clamped(gate, up, self.limit, self.alpha, self.up_offset)
            return F.linear(h, self.down[e], None if self.down_bias is None else self.down_bias[e])

        return combine_experts(self.x, self.weights, self.experts, self.gate_up.shape[0], mlp)

    def undefined(self) -> bool:
        return overflows(self.x, self.weights, self.gate_up, self.down, self.gate_up_bias, self.down_bias)

    @staticmethod
    def samples(r: Any) -> Any:
        d, f, e, k = r.k, r.m, 5, 2
        x, w, idx = r.floats(r.n, d), r.floats(r.n, k, positive=True), r.ints(0, e, r.n, k)
        gu, dn = r.floats(e, 2 * f, d), r.floats(e, d, f)
        yield [x, w, idx, gu, dn], {}
        yield [x, w, torch.full_like(idx, 3), gu, dn], {"activation": "gelu"}
        yield [x, w, idx, gu, dn, r.floats(e, 2 * f), r.floats(e, d)], {"interleaved": True, "limit": 7.0}
        yield [x, w, idx, gu, dn], {"activation": "relu", "interleaved": True}
        yield [x, w, idx, gu, dn], {"limit": 0.5, "alpha": 1.0, "up_offset": 0.0}


def check_routing(x: TensorType, weights: TensorType, experts: TensorType) -> None:
    """Routing weights [T, k] floats and experts i64[T, k] for x [T, d]. Raises CompileError."""
    require(weights.rank == 2 and weights.shape[0] == x.shape[0], f"weights {weights} for x {x}")
    require(weights.dtype.is_wide_float, f"weights are {weights.dtype}")
    require(experts == TensorType(DType.I64, weights.shape), f"experts {experts}, expected i64 like weights {weights}")


def check_expert_shapes(x: TensorType, gate_up: tuple, down: tuple) -> None:
    """gate_up [E, 2f, d] and down [E, d, f] for x [T, d]. Raises CompileError."""
    e, two_f, d = gate_up
    require(d == x.shape[1], f"x has {x.shape[1]} channels, gate_up takes {d}")
    require(isinstance(two_f, int) and two_f % 2 == 0, f"gate_up has an odd number of rows: {two_f}")
    require(down == (e, d, two_f // 2), f"down {list(down)}, expected [{e}, {d}, {two_f // 2}]")


def check_expert_biases(x: TensorType, gate_up: tuple, first: TensorType | None, second: TensorType | None) -> None:
    """Biases [E, 2f] and [E, d], or None, in the dtype of x [T, d] for gate_up [E, 2f, d]. Raises CompileError."""
    for bias, size in ((first, gate_up[1]), (second, gate_up[2])):
        want = TensorType(x.dtype, (gate_up[0], size))
        require(bias is None or bias == want, f"bias {bias}, expected {want}")


def check_expert_ids(experts: torch.Tensor, num: int) -> None:
    """Raises ValueError unless all ids are in 0 … num − 1."""
    if experts.numel() and not bool(((experts >= 0) & (experts < num)).all()):
        raise ValueError(f"expert ids from {int(experts.min())} to {int(experts.max())}, there are {num} experts")


def routed(experts: Value | None, num: int) -> bool:
    """Whether ids come from an op that gives none outside 0 … num − 1."""
    producer = None if experts is None else experts.producer
    if producer is None:
        return False
    if producer.op == "moe.remap":  # of ids that are in the table
        table = producer.operand("table").weight
        if table is None or table.source is None or not routed(producer.operand("experts"), table.type.shape[0]):
            return False
        slots = table.load()
        return bool(((slots >= 0) & (slots < num)).all())
    return producer.op == "moe.route" and producer.operand("logits").shape[1] <= num


def combine_experts(x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, num: int, mlp: Any) -> torch.Tensor:
    """Run `mlp(e, rows)` for every used expert and add up the weighted results per token, j in order."""
    tokens, k = experts.shape
    flat = experts.reshape(-1)
    check_expert_ids(flat, num)
    rows = x.new_empty(tokens * k, x.shape[1])
    for e in flat.unique().tolist():
        at = (flat == e).nonzero()[:, 0]
        rows[at] = mlp(e, x[at // k])
    out = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, weights.dtype))
    for j, part in enumerate(rows.reshape(tokens, k, x.shape[1]).unbind(1)):
        out = out + part * weights[:, j, None]
    return out.to(x.dtype)


@op("moe.remap")
class Remap:
    """Logical → physical experts: experts i64[T, k], table i64[E, R], count i64[E] → i64[T, k].

    Expert e has count[e] ≥ 1 replicas at slots table[e, :count[e]]; assignment (t, j) takes replica
    t mod count[e], a function of token and expert only.
    """

    experts: Operand
    table: Operand
    count: Operand

    def infer(self) -> TensorType:
        e, t, c = self.experts, self.table, self.count
        require(e.rank == 2 and e.dtype is DType.I64, f"experts {e} must be i64 of rank 2")
        require(t.rank == 2 and t.dtype is DType.I64, f"table {t} must be i64 of rank 2")
        require(c == TensorType(DType.I64, t.shape[:1]), f"count {c}, expected i64[{t.shape[0]}]")
        return e

    def reference(self) -> torch.Tensor:
        token = torch.arange(self.experts.shape[0])[:, None]
        replica = token % self.count[self.experts]
        return self.table[self.experts, replica]

    def decompose(self, b: Any) -> Any:
        t, k = self.experts.shape
        token = b.expand(b.reshape(b.arange(end=t), shape=(t, 1)), shape=(t, k))
        replica = b.mod(token, b.gather(self.count, self.experts))
        width = self.table.shape[1]
        flat = b.reshape(self.table, shape=(self.table.shape[0] * width,))
        return b.gather(flat, b.add(b.mul(self.experts, width), replica))

    @staticmethod
    def samples(r: Any) -> Any:
        table = torch.tensor([[0, 0], [1, 4], [2, 2], [3, 5]])
        yield [r.ints(0, 4, r.n, 2), table, torch.tensor([1, 2, 1, 2])], {}
