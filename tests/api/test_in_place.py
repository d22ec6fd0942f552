"""Caches in buffers: the program means what the one that joins caches means, whatever lies behind the filled rows."""

from __future__ import annotations

import functools
import json
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moec
from moec import steps
from moec.backends import get_backend
from moec.in_place import SLOT, in_place
from moec.ir import ArtifactError, Dim, DType, parse, run
from moec.passes.pipeline import default_pipeline

from .. import model_matrix
from .samples import TinyLM, greedy


def family(name):
    torch.manual_seed(0)
    known = model_matrix.FAMILIES[name]
    model = model_matrix.build(
        model_matrix.Entry(name, known.attention[0], "grouped_mm" if known.experts else None)
    ).eval()
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return model


@functools.cache
def programs(name):
    """Of a stored graph with a cache: (the program that joins, the one with buffers)."""
    joins, _ = default_pipeline().run(model_matrix.load(name))
    return joins, in_place(joins)


@pytest.mark.parametrize("name", model_matrix.graphs("*.decode*"))
def test_which_models_have_buffers(name):
    """Every family's keys and values; a state of fixed size stays one."""
    joins, found = programs(name)
    assert found is not None
    assert found.past == "P"
    grows = [Dim("P") in v.shape for v in joins.inputs[2:]]
    assert [Dim("C") in v.shape for v in found.graph.inputs[3:]] == grows
    assert any(grows)
    assert all(grows) == (not name.startswith(("granitemoehybrid_mamba", "qwen3_next")))


@pytest.fixture(scope="module")
def mixtral():
    """(the model, compiled for ONNX Runtime)"""
    model = family("mixtral")
    return model, moec.compile(model, backend="onnxruntime", threads=1)


def wide(rows, axis, capacity, garbage):
    """A buffer that starts with rows; what follows has no meaning."""
    shape = list(rows.shape)
    shape[axis] = capacity
    buffer = torch.full(shape, garbage)
    buffer.narrow(axis, 0, rows.shape[axis]).copy_(rows)
    return buffer


@pytest.mark.parametrize("name", ["own_deepseek_v3.sdpa", "deepseek_v3.sdpa.grouped", "mixtral.sdpa.grouped"])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_means_what_joined_caches_mean(name, data):
    joins, found = programs(f"{name}.decode")
    buffers = found.graph
    batch, new, past, more = (data.draw(st.integers(*r)) for r in ((1, 3), (1, 4), (0, 6), (0, 5)))
    r = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    end = past + new
    ids = torch.randint(3, 20, (batch, new), generator=r)
    mask = torch.ones(batch, end, dtype=torch.int64)
    mask[0, : min(past, 2)] = 0
    caches = [
        torch.randn([{"B": batch, "P": past}.get(str(n), n) for n in v.shape], generator=r) for v in joins.inputs[2:]
    ]
    want = run(joins, [ids, mask, *caches])
    axes = [v.shape.index(Dim("P")) for v in joins.inputs[2:]]
    filled = [wide(t, a, end + more, data.draw(st.sampled_from([0.0, 1e3]))) for t, a in zip(caches, axes, strict=True)]
    got = run(buffers, [ids, torch.nn.functional.pad(mask, (0, more)), torch.tensor(past), *filled])
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-4)
    for g, w, a, t in zip(got[1:], want[1:], axes, filled, strict=True):
        torch.testing.assert_close(g.narrow(a, 0, end), w, rtol=1e-4, atol=1e-4)
        assert torch.equal(g.narrow(a, end, more), t.narrow(a, end, more))  # nothing else is written


STEP = """graph(%input_ids: i64[B, S], %attention_mask: i64[B, P + S], %past: f32[B, 1, P, 4])
    -> (%logits: f32[B, 1, S, 4], %cache: f32[B, 1, P + S, 4]) {{
  %q: f32[B, S] = math.cast(%input_ids) {{dtype=f32}}
  %r: f32[B, 1, S, 1] = tensor.reshape(%q) {{shape=[B, 1, S, 1]}}
  %new: f32[B, 1, S, 4] = tensor.expand(%r) {{shape=[B, 1, S, 4]}}
  %all: f32[B, 1, P + S, 4] = tensor.concat(%past, %new) {{axis=2}}
  %m: bool[B, P + S] = math.cast(%attention_mask) {{dtype=bool}}
  %mask: bool[B, 1, 1, P + S] = tensor.reshape(%m) {{shape=[B, 1, 1, P + S]}}
{body}
  return %out, %all
}}"""


def bodies(text: str) -> dict[str, str]:
    """name → nodes, of texts under `== name`."""
    return dict(part.split("\n", 1) for part in text.split("== ")[1:])


ACCEPTED = bodies("""
== causal
  %out: f32[B, 1, S, 4] = attention.sdpa(%new, %all, %all, %mask, _) {scale=1.0, causal=true}
== no mask
  %out: f32[B, 1, S, 4] = attention.sdpa(%new, %all, %all, _, _) {scale=1.0}
== no mask, causal
  %out: f32[B, 1, S, 4] = attention.sdpa(%new, %all, %all, _, _) {scale=1.0, causal=true}
== a mask of queries
  %n: i64[B, S] = tensor.slice(%attention_mask) {axis=1, start=P, end=P + S}
  %w: bool[B, S] = math.cast(%n) {dtype=bool}
  %x: bool[B, 1, S, 1] = tensor.reshape(%w) {shape=[B, 1, S, 1]}
  %out: f32[B, 1, S, 4] = attention.sdpa(%new, %all, %all, %x, _) {scale=1.0}
== the mask turned around
  %w: bool[B, 1, 1, P + S] = math.not(%mask)
  %out: f32[B, 1, S, 4] = attention.sdpa(%new, %all, %all, %w, _) {scale=1.0}
== a mask that is added
  %w: f32[B, P + S] = math.cast(%attention_mask) {dtype=f32}
  %x: f32[B, 1, 1, P + S] = tensor.reshape(%w) {shape=[B, 1, 1, P + S]}
  %out: f32[B, 1, S, 4] = attention.sdpa(%new, %all, %all, %x, _) {scale=1.0, causal=true}
== a window
  %j: i64[P + S] = tensor.arange() {end=P + S}
  %i: i64[S] = tensor.arange() {start=P, end=P + S}
  %k: i64[S, 1] = tensor.reshape(%i) {shape=[S, 1]}
  %two: i64[] = tensor.constant() {value=[2], type=i64[]}
  %l: i64[S, 1] = math.sub(%k, %two)
  %w: bool[S, P + S] = math.gt(%j, %l)
  %both: bool[B, 1, S, P + S] = math.and(%mask, %w)
  %out: f32[B, 1, S, 4] = attention.sdpa(%new, %all, %all, %both, _) {scale=1.0}
== positions
  %c: i64[B, P + S] = math.cumsum(%attention_mask) {axis=1}
  %n: i64[B, S] = tensor.slice(%c) {axis=1, start=P, end=P + S}
  %f: f32[B, S] = math.cast(%n) {dtype=f32}
  %g: f32[B, 1, S, 1] = tensor.reshape(%f) {shape=[B, 1, S, 1]}
  %h: f32[B, 1, S, 4] = math.mul(%new, %g)
  %out: f32[B, 1, S, 4] = attention.sdpa(%h, %all, %all, %mask, _) {scale=0.1, causal=true}
== how many there are
  %c: i64[B] = math.sum(%attention_mask) {axes=[1]}
  %f: f32[B] = math.cast(%c) {dtype=f32}
  %g: f32[B, 1, 1, 1] = tensor.reshape(%f) {shape=[B, 1, 1, 1]}
  %d: i64[] = tensor.dim() {value=P + S}
  %e: f32[] = math.cast(%d) {dtype=f32}
  %h: f32[B, 1, 1, 1] = math.mul(%g, %e)
  %o: f32[B, 1, S, 4] = math.mul(%new, %h)
  %out: f32[B, 1, S, 4] = attention.sdpa(%o, %all, %all, %mask, _) {scale=0.01}
== keys that are the same
  %k: f32[B, 1, P + S, 4] = tensor.full() {shape=[B, 1, P + S, 4], value=1.0, dtype=f32}
  %out: f32[B, 1, S, 4] = attention.sdpa(%new, %k, %all, _, _) {scale=1.0}
== rows changed one by one
  %t: f32[B, 1, P + S, 4] = norm.rms(%all, _)
  %u: f32[B, 1, P + S, 4] = math.silu(%t)
  %v: f32[B, 1, 4, P + S] = tensor.transpose(%u) {perm=[0, 1, 3, 2]}
  %w: f32[B, 1, P + S, 4] = tensor.transpose(%v) {perm=[0, 1, 3, 2]}
  %out: f32[B, 1, S, 4] = attention.sdpa(%new, %w, %all, %mask, _) {scale=1.0}
""")
REFUSED = bodies("""
== a sum over all rows
  %s: f32[B, 1, 1, 4] = math.sum(%all) {axes=[2], keepdim=true}
  %out: f32[B, 1, S, 4] = math.mul(%new, %s)
== the past rows alone
  %a: f32[B, 1, P, 4] = tensor.slice(%all) {axis=2, end=P}
  %s: f32[B, 1, 1, 4] = math.amax(%a) {axes=[2], keepdim=true}
  %out: f32[B, 1, S, 4] = math.mul(%new, %s)
== past rows read besides
  %a: f32[B, 1, P, 4] = math.neg(%past)
  %s: f32[B, 1, 1, 4] = math.sum(%a) {axes=[2], keepdim=true}
  %out: f32[B, 1, S, 4] = math.mul(%new, %s)
== a product over rows
  %t: f32[B, 1, 4, P + S] = tensor.transpose(%all) {perm=[0, 1, 3, 2]}
  %g: f32[B, 1, 4, 4] = linear.matmul(%t, %all)
  %out: f32[B, 1, S, 4] = linear.matmul(%new, %g)
== how many are masked
  %o: bool[B, P + S] = math.not(%m)
  %c: i64[B, P + S] = math.cast(%o) {dtype=i64}
  %d: i64[B] = math.sum(%c) {axes=[1]}
  %f: f32[B] = math.cast(%d) {dtype=f32}
  %s: f32[B, 1, 1, 1] = tensor.reshape(%f) {shape=[B, 1, 1, 1]}
  %out: f32[B, 1, S, 4] = math.mul(%new, %s)
== the mean of the mask
  %f: f32[B, P + S] = math.cast(%attention_mask) {dtype=f32}
  %g: f32[B] = math.mean(%f) {axes=[1]}
  %s: f32[B, 1, 1, 1] = tensor.reshape(%g) {shape=[B, 1, 1, 1]}
  %out: f32[B, 1, S, 4] = math.mul(%new, %s)
== the last row
  %j: i64[P + S] = tensor.arange() {end=P + S}
  %l: i64[1] = tensor.constant() {value=[-1], type=i64[1]}
  %n: i64[1] = tensor.gather(%j, %l)
  %s: f32[1] = math.cast(%n) {dtype=f32}
  %out: f32[B, 1, S, 4] = math.mul(%new, %s)
== keys in front of the cache
  %p: f32[B, 1, 2, 4] = tensor.full() {shape=[B, 1, 2, 4], value=1.0, dtype=f32}
  %k: f32[B, 1, P + S + 2, 4] = tensor.concat(%p, %all) {axis=2}
  %out: f32[B, 1, S, 4] = attention.sdpa(%new, %k, %k, _, _) {scale=1.0, causal=true}
== queries of the cache
  %a: f32[B, 1, P + S, 4] = attention.sdpa(%all, %all, %all, %mask, _) {scale=1.0}
  %out: f32[B, 1, S, 4] = tensor.slice(%a) {axis=2, start=P, end=P + S}
== softmax over rows
  %k: f32[B, 1, P + S, 4] = math.softmax(%all) {axis=2}
  %out: f32[B, 1, S, 4] = attention.sdpa(%new, %k, %all, %mask, _) {scale=1.0}
== rows taken for columns
  %t: f32[B, 1, 4, P + S] = tensor.reshape(%all) {shape=[B, 1, 4, P + S]}
  %k: f32[B, 1, P + S, 4] = tensor.transpose(%t) {perm=[0, 1, 3, 2]}
  %out: f32[B, 1, S, 4] = attention.sdpa(%new, %k, %all, %mask, _) {scale=1.0}
== rows side by side
  %t: f32[B, 4*P + 4*S] = tensor.reshape(%all) {shape=[B, 4*P + 4*S]}
  %g: f32[B] = math.amax(%t) {axes=[1]}
  %s: f32[B, 1, 1, 1] = tensor.reshape(%g) {shape=[B, 1, 1, 1]}
  %out: f32[B, 1, S, 4] = math.mul(%new, %s)
""")


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_can_be_in_buffers(name):
    joins = parse(STEP.format(body=ACCEPTED[name]))
    joins.verify()
    found = in_place(joins)
    assert found is not None
    r = torch.Generator().manual_seed(0)
    for batch, new, past, more in ((2, 1, 4, 3), (2, 3, 2, 0), (1, 2, 0, 4), (2, 4, 5, 1)):
        ids = torch.randint(0, 9, (batch, new), generator=r)
        mask = torch.ones(batch, past + new, dtype=torch.int64)
        mask[0, : min(past, 2)] = 0
        rows = torch.randn(batch, 1, past, 4, generator=r)
        out, cache = run(joins, [ids, mask, rows])
        slot, padded = torch.tensor(past), torch.nn.functional.pad(mask, (0, more))
        got, buffer = run(found.graph, [ids, padded, slot, wide(rows, 2, past + new + more, 7.0)])
        torch.testing.assert_close(got, out)
        torch.testing.assert_close(buffer[:, :, : past + new], cache)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot(name):
    graph = parse(STEP.format(body=REFUSED[name]))
    graph.verify()
    assert in_place(graph) is None


def test_one_buffer_serves_all_steps(mixtral, monkeypatch):
    """ONNX Runtime writes the new rows into the tensors that it is given, and copies nothing else."""
    model, compiled = mixtral
    executable = compiled.generator.program.executable
    seen = []
    original = executable.run_into

    def watched(inputs, into):
        given = [t for t in into if t is not None]
        before = [t.clone() for t in given]
        found = original(inputs, into)
        slot, new = int(inputs[2]), inputs[0].shape[1]
        for t, was, out in zip(given, before, found[1:], strict=True):
            assert out is t
            changed = (t != was).nonzero()[:, 2].unique().tolist()
            assert changed == list(range(slot, slot + new))
        seen.append([t.data_ptr() for t in given])
        return found

    monkeypatch.setattr(executable, "run_into", watched)
    ids = torch.tensor([[3, 9, 27, 1]])
    out = compiled.generate(ids, max_new_tokens=12, eos_token_id=None)
    assert out[0, 4:].tolist() == greedy(model, ids[0], 12)
    assert len({tuple(p) for p in seen[1:]}) == 1  # one set of buffers after the prompt


def test_buffers_grow(mixtral, monkeypatch):
    """More tokens than the first room holds, with padding, against the model itself, which joins."""
    monkeypatch.setattr(steps, "LEAST_ROOM", 5)
    model, fast = mixtral
    ids = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    count = 40
    assert fast.generator.past is not None
    got = fast.generate(ids, mask, max_new_tokens=count, eos_token_id=None)
    plain = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = model.generate(ids, attention_mask=mask, **plain)
    assert got.tolist() == want.tolist()


def test_generations_do_not_share_buffers(mixtral):
    model, compiled = mixtral
    compiled.generator  # noqa: B018  (compiled once)
    prompts = [torch.randint(3, 29, (1, n), generator=torch.Generator().manual_seed(n)) for n in range(1, 9)]
    found = {}

    def one(i):
        found[i] = compiled.generate(prompts[i], max_new_tokens=20, eos_token_id=None)[
            0, prompts[i].shape[1] :
        ].tolist()

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(prompts))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, prompt in enumerate(prompts):
        assert found[i] == greedy(model, prompt[0], 20)


def test_what_a_step_gave_stays(mixtral):
    """The next step binds again what ONNX Runtime allocates, and whatever lies elsewhere by then."""
    _, compiled = mixtral
    program = compiled.generator.program
    graph, executable = program.graph, program.executable
    r = torch.Generator().manual_seed(0)

    def buffers(room):
        shapes = [[room if n == Dim("C") else 2 if n == Dim("B") else n for n in v.shape] for v in graph.inputs[3:]]
        return [torch.zeros(shape) for shape in shapes]

    kept, given = [], buffers(8)
    for slot, new, room in ((0, 4, 8), (4, 1, 8), (5, 1, 8), (6, 1, 11), (7, 2, 11)):
        ids = torch.randint(3, 29, (2, new), generator=r)
        mask = (torch.arange(room) < slot + new).to(torch.int64).expand(2, room).contiguous()
        if given[0].shape[2] != room:
            given = [torch.cat([t, u[:, :, t.shape[2] :]], 2) for t, u in zip(given, buffers(room), strict=True)]
        inputs = [ids, mask, torch.tensor(slot), *given]
        want = executable.run([t.clone() for t in inputs])
        logits, *rows = executable.run_into(inputs, [None, *given])
        assert all(map(torch.equal, [logits, *rows], want))
        kept.append((logits, want[0]))
    assert all(torch.equal(a, b) for a, b in kept)
    with pytest.raises(moec.CompileError):
        executable.run_into([torch.full((2, 1), 10**6), *inputs[1:]], [None, *given])
    assert torch.equal(executable.run_into(inputs, [None, *given])[0], want[0])


def test_half_precision_keeps_its_dtype():
    model = family("mixtral").to(torch.bfloat16)
    compiled = moec.compile(model, backend="onnxruntime", threads=1)
    assert {v.dtype for v in compiled.generator.program.graph.inputs[3:]} == {DType.BF16}
    ids = torch.tensor([[3, 9, 27, 1]])
    joins = moec.compile(model, backend="reference")
    assert torch.equal(
        compiled.generate(ids, max_new_tokens=6, eos_token_id=None),
        joins.generate(ids, max_new_tokens=6, eos_token_id=None),
    )


def test_saved_programs_know_their_buffers(mixtral, tmp_path):
    _, compiled = mixtral
    ids = torch.tensor([[3, 9, 27, 1]])
    want = compiled.generate(ids, max_new_tokens=9)
    compiled.save(tmp_path / "m")
    loaded = moec.load(tmp_path / "m")
    assert loaded.generator.past == compiled.generator.past
    assert [v.name for v in loaded.generator.program.graph.inputs][2] == SLOT
    assert torch.equal(loaded.generate(ids, max_new_tokens=9), want)
    path = tmp_path / "m" / "manifest.json"
    manifest = json.loads(path.read_text())
    for wrong in (None, 3, "no symbol"):
        manifest["stops"]["past"] = wrong
        path.write_text(json.dumps(manifest))
        with pytest.raises(ArtifactError):
            moec.load(tmp_path / "m")


def test_other_backends_join():
    assert not get_backend("reference").in_place
    assert not get_backend("triton").in_place


def test_attention_that_is_no_operator_joins():
    """A model whose softmax stays one: the buffers' free rows could count."""
    compiled = moec.compile(TinyLM().eval(), backend="onnxruntime", threads=1)
    assert compiled.generator.past is None
