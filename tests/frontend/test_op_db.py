"""A slice of torch's op database on the reference and on ONNX Runtime; bench/judge_op_db.py runs all of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moec.frontend import trace
from moec.ir import CompileError


def _load() -> ModuleType:
    path = Path(__file__).parents[2] / "bench" / "op_db.py"
    spec = importlib.util.spec_from_file_location("moec_bench_op_db", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


op_db = _load()
OPS = {o.full_name: o for o in op_db.ops()}

# op#sample: one for each class of op, and each sample that was wrong once
BOTH = [
    "add#0", "var_mean#14", "std_mean.unbiased#3", "item#1", "broadcast_shapes#5", "conj_physical#0", "complex#4",
    "fft.irfft#2", "as_strided#0", "as_strided_scatter#2", "unfold#6", "diagonal_scatter#1",
    "nn.functional.pad.circular#7", "cumprod#2", "cummax#0", "logcumsumexp#4", "kthvalue#6", "median#8",
    "nanmedian#4", "searchsorted#9", "index_reduce.mean#5", "scatter_reduce.amax#3", "put#18",
    "nn.functional.conv2d#9", "nn.functional.max_pool2d#154", "nn.functional.avg_pool2d#2", "linalg.solve#15",
    "lgamma#1", "special.erfcx#1", "special.bessel_j1#0",
    "special.scaled_modified_bessel_k0#1", "polygamma.polygamma_n_2#2", "copysign#8", "hypot#4", "heaviside#2",
    "round.decimals_3#1", "addbmm#4", "nn.functional.bilinear#4", "dist#22", "fmax#2",
]  # fmt: skip
# what ONNX Runtime refuses: torch has no ONNX form of it, nor has moec
REFUSED = {"linalg.svd#0": "linalg_svd", "frexp#1": "frexp"}


def verdicts(name: str) -> dict[str, tuple[str, str]]:
    op, _, index = name.rpartition("#")
    (sample,) = [s for s in op_db.samples(OPS[op], None) if s.index == int(index)]
    return {v.backend: (v.status, v.reason) for v in op_db.judge(sample)}


@pytest.mark.parametrize("name", BOTH)
def test_sample_agrees_with_torch(name: str):
    assert verdicts(name) == {"reference": ("passed", ""), "onnxruntime": ("passed", "")}


@pytest.mark.parametrize("name", REFUSED)
def test_sample_is_refused_by_name(name: str):
    found = verdicts(name)
    assert found["reference"] == ("passed", "")
    status, reason = found["onnxruntime"]
    assert status == "refused"
    assert REFUSED[name] in reason


NEITHER = {
    "rand_like#0": "random numbers",
    "native_layer_norm#7": "eps is -0.5",
    "nn.functional.batch_norm#8": "changes the running statistics",
}


@pytest.mark.parametrize("name", NEITHER)
def test_sample_is_refused_by_name_on_both(name: str):
    for status, reason in verdicts(name).values():
        assert status == "refused"
        assert NEITHER[name] in reason


def test_judge_sees_one_percent_and_one_element():
    (sample,) = op_db.samples(OPS["sin"], 1)
    model = op_db.OneOp(sample)
    graph = trace(model, model.fresh()).graph
    want = torch.linspace(0.5, 1, 20)
    assert op_db.compare(want, want.clone(), sample.op, graph, model.tensors) is None
    for other in (want * 1.01, want.double(), want[:5], torch.cat([want[:-1], torch.tensor([torch.nan])]), [want]):
        if isinstance(other, list):
            other = [*other, want]
        assert op_db.compare(want, other, sample.op, graph, model.tensors)
    assert op_db.compare(torch.tensor([1, 2]), torch.tensor([1, 3]), sample.op, graph, model.tensors)


def test_judge_asks_for_the_name_of_the_op():
    op = OPS["addbmm"]
    assert op_db.names_op(CompileError("no lowering for the op aten::addbmm"), op)
    assert op_db.names_op(CompileError("extern.aten_svd cannot run"), op)
    assert not op_db.names_op(CompileError("this is not supported"), op)


def test_samples_do_not_depend_on_how_many_are_drawn():
    few, all_ = op_db.samples(OPS["addmm"], 2), op_db.samples(OPS["addmm"], None)
    for s in few:
        same = all_[s.index]
        assert torch.equal(s.input, same.input)
