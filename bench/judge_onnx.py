"""The ONNX backend test suite, through moec and through ONNX Runtime alone.

    python bench/judge_onnx.py [--suite onnx_node|onnx_other] [--only NAME …] [--workers 2]

A case passes on a backend where its outputs are those that the suite ships, within the suite's own tolerances, both
with the default passes and without any. Cases run in worker processes, so that one that crashes or hangs ends neither
the run nor other cases. Results go to build/judges.json: every failure with its reason, and how many passed in terms of
our op families alone ("native") and with operators that came in as themselves ("extern").
"""

from __future__ import annotations

import argparse
import ctypes
import math
import multiprocessing
import os
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from judges import Tally, record
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner, _normalize_tensor

from moec.frontend.onnx import import_onnx
from moec.ir import CompileError
from moec.onnx_backend import PreparedModel
from moec.passes.pipeline import Pipeline

BACKENDS = ("reference", "onnxruntime", "plain-onnxruntime")
PLAIN_ONLY = False
SECONDS = 60  # for one case on all backends
UNKNOWN_TO_NUMPY = {16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26}  # bfloat16, FP8, and types below 8 bits
KINDS = {"onnx_node": ["node"], "onnx_other": ["simple", "pytorch-converted", "pytorch-operator", "real"]}


@dataclass
class Result:
    """One case: per backend None where it passed, else why not; `extern`: operators that came in as themselves."""

    name: str
    reasons: dict[str, str | None] = field(default_factory=dict)
    extern: list[str] = field(default_factory=list)
    skip: str | None = None


def cases(suite: str) -> list[Any]:
    return [t for kind in KINDS[suite] for t in load_model_tests(kind=kind)]


def data_of(case: Any) -> tuple[onnx.ModelProto, list[tuple[list[Any], list[Any]]]]:
    """The model, and pairs of inputs and expected outputs."""
    if case.model is not None:
        sets = [([_normalize_tensor(x) for x in i], [_normalize_tensor(x) for x in o]) for i, o in case.data_sets]
        return case.model, sets
    folder = Path(case.model_dir)
    model = onnx.load(folder / "model.onnx")
    sets = []
    for data in sorted(folder.glob("test_data_set_*")):
        pair = []
        for what, values in (("input", model.graph.input), ("output", model.graph.output)):
            files = sorted(data.glob(f"{what}_*.pb"), key=lambda p: int(p.stem.split("_")[1]))
            pair.append([read(p, v.type) for p, v in zip(files, values, strict=False)])
        sets.append((pair[0], pair[1]))
    return model, sets


def read(path: Path, type: onnx.TypeProto) -> Any:
    kind = type.WhichOneof("value")
    if kind == "sequence_type":
        return onnx.numpy_helper.to_list(onnx.SequenceProto.FromString(path.read_bytes()))
    if kind == "optional_type":
        return onnx.numpy_helper.to_optional(onnx.OptionalProto.FromString(path.read_bytes()))
    return onnx.numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))


# -- one case -----------------------------------------------------------------------------------------------


def run_case(case: Any) -> Result:
    result = Result(case.name)
    if case.model is None and case.model_dir is None:
        result.skip = "the model does not ship with the onnx package"
        return result
    model, sets = data_of(case)
    result.reasons["plain-onnxruntime"] = attempt(lambda: plain(model), case, sets)
    if PLAIN_ONLY:
        return result
    try:
        imported = import_onnx(model)
    except CompileError as e:
        why = f"refused: {general(e.message)}"
    except Exception as e:
        why = f"import: {type(e).__name__}: {general(str(e))}"
    else:
        result.extern = sorted(imported.extern)
        for backend in BACKENDS[:2]:
            why_not = None
            for passes in (Pipeline(()), None):
                why_not = why_not or attempt(
                    lambda b=backend, p=passes: PreparedModel(imported, b, p, 1).run, case, sets
                )
                if why_not is not None:
                    why_not = why_not if passes is not None else f"with the default passes: {why_not}"
                    break
            result.reasons[backend] = why_not
        return result
    result.reasons |= dict.fromkeys(BACKENDS[:2], why)
    return result


def attempt(prepare: Any, case: Any, sets: Any) -> str | None:
    """Why a case does not pass, or None."""
    try:
        run = prepare()
        for inputs, expected in sets:
            got = run(inputs)
            if any(isinstance(x, list) for x in got) != any(isinstance(x, list) for x in expected):
                return "wrong result: sequence against tensor"
            Runner.assert_similar_outputs(expected, got, rtol=case.rtol, atol=case.atol)
    except AssertionError as e:
        return f"wrong result: {general(str(e))}"
    except CompileError as e:
        return f"{e.code}: {general(e.message)}"
    except Exception as e:
        return f"{type(e).__name__}: {general(str(e))}"
    return None


def plain(model: onnx.ModelProto) -> Any:
    """ONNX Runtime on the model as it is."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    types = [v.type for v in model.graph.input]
    made = [v.type for v in model.graph.output]
    special = any(t.WhichOneof("value") == "tensor_type" and t.tensor_type.elem_type in UNKNOWN_TO_NUMPY
                  for t in (*types, *made))  # fmt: skip

    def run(inputs: list[Any]) -> list[Any]:
        names = [v.name for v in session.get_inputs()]
        if not special:
            return session.run(None, dict(zip(names, map(plain_array, inputs), strict=False)))
        feeds = {n: ort_value(x, t.tensor_type.elem_type) for n, x, t in zip(names, inputs, types, strict=False)}
        found = session.run_with_ort_values(None, feeds)
        return [array_of(v, t.tensor_type.elem_type) for v, t in zip(found, made, strict=True)]

    return run


def plain_array(x: Any) -> Any:
    return np.asarray(x) if isinstance(x, np.generic) else x


def ort_value(x: Any, kind: int) -> onnxruntime.OrtValue:
    """An input of an element type that NumPy lacks, by its number; types below 8 bits are packed."""
    x = np.asarray(x)
    if kind not in UNKNOWN_TO_NUMPY:
        return onnxruntime.OrtValue.ortvalue_from_numpy(x)
    packed = onnx.numpy_helper.from_array(x).raw_data
    value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(x.shape), kind)
    ctypes.memmove(value.data_ptr(), packed, len(packed))
    return value


def array_of(value: onnxruntime.OrtValue, kind: int) -> np.ndarray:
    """The elements of a result, of types that NumPy lacks too."""
    if kind not in UNKNOWN_TO_NUMPY:
        return value.numpy()
    shape = value.shape()
    bits = 4 if kind in (21, 22, 23) else 2 if kind in (25, 26) else 16 if kind == onnx.TensorProto.BFLOAT16 else 8
    raw = ctypes.string_at(value.data_ptr(), -(-math.prod(shape) * bits // 8))
    return onnx.numpy_helper.to_array(onnx.TensorProto(data_type=kind, dims=shape, raw_data=raw))


def general(text: str) -> str:
    """The first lines of a message without what differs from case to case."""
    text = " ".join(text.replace("[ONNXRuntimeError] : ", "").split())
    text = re.sub(r"(/[\w.-]+)+/", "", text)
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "…", text)
    text = re.sub(r"[\w./-]*(extern|graph|node|test)[\w./:-]*", "…", text)
    return re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "N", text)[:140]


# -- workers --------------------------------------------------------------------------------------------------


def work(todo: list[Any], end: Connection) -> None:
    """In a child: run cases by number until there are no more."""
    onnxruntime.set_default_logger_severity(4)
    while (i := end.recv()) is not None:
        end.send(run_case(todo[i]))


def run_all(todo: list[Any], workers: int) -> Iterator[Result]:
    """Results as they come. A case whose worker dies or takes too long fails with that reason, and the others go on."""
    context = multiprocessing.get_context("fork")
    waiting = list(range(len(todo)))[::-1]
    busy: dict[Connection, tuple[Any, int, float]] = {}

    def start() -> None:
        mine, theirs = context.Pipe()
        child = context.Process(target=work, args=(todo, theirs), daemon=True)
        child.start()
        theirs.close()
        give(mine, child)

    def give(end: Connection, child: Any) -> None:
        number = waiting.pop() if waiting else None
        end.send(number)
        if number is None:
            child.join()
        else:
            busy[end] = child, number, time.monotonic()

    for _ in range(workers):
        start()
    while busy:
        ready = wait(list(busy), timeout=1)
        for end in [e for e in busy if e in ready]:
            child, number, _ = busy.pop(end)
            try:
                result = end.recv()
            except EOFError:
                child.join()
                yield lost(todo[number], f"crash: exit code {child.exitcode}")
                if waiting:
                    start()
                continue
            yield result
            give(end, child)
        for end, (child, number, since) in list(busy.items()):
            if time.monotonic() - since > SECONDS:
                child.kill()
                busy.pop(end)
                yield lost(todo[number], f"no result within {SECONDS} s")
                if waiting:
                    start()


def lost(case: Any, why: str) -> Result:
    return Result(case.name, dict.fromkeys(BACKENDS, why))


# -- reports --------------------------------------------------------------------------------------------------


def tally(results: list[Result]) -> dict[str, Tally]:
    found = {b: Tally() for b in BACKENDS}
    for b, t in found.items():
        native = 0
        beyond_plain = 0
        for r in results:
            if r.skip is not None:
                t.skip(r.name, r.skip)
            elif r.reasons.get(b) is None:
                t.passes()
                native += not r.extern
                beyond_plain += r.reasons.get("plain-onnxruntime") is not None
            else:
                t.fails(r.name, str(r.reasons[b]))
        if b != "plain-onnxruntime":
            both = sum(1 for r in results if r.skip is None and not any(r.reasons.get(x) for x in (b, BACKENDS[2])))
            plain_passed = sum(1 for r in results if r.skip is None and not r.reasons.get(BACKENDS[2]))
            t.notes = {
                "native": native,
                "extern": t.passed - native,
                "of what plain ONNX Runtime passes": f"{both}/{plain_passed} ({both / max(1, plain_passed):.1%})",
                "that plain ONNX Runtime does not pass": beyond_plain,
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=list(KINDS), action="append")
    parser.add_argument("--only", nargs="*", help="names of cases; nothing is recorded")
    parser.add_argument("--plain", action="store_true", help="ONNX Runtime alone; nothing is recorded")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    os.environ["ALLOW_RELEASED_ONNX_OPSET_ONLY"] = "0"  # plain ONNX Runtime refuses the newest opsets otherwise
    warnings.simplefilter("ignore")  # the suite divides by zero and overflows on purpose
    torch.set_num_threads(1)
    global PLAIN_ONLY
    PLAIN_ONLY = given.plain
    for suite in given.suite or list(KINDS):
        began = time.monotonic()
        todo = cases(suite)
        if given.only:
            todo = [t for t in todo if t.name in given.only]
        results = list(run_all(todo, given.workers))
        for backend, t in tally(results).items():
            print(f"{suite} {backend}: {t.passed} passed, {t.failed} failed, {t.skipped} skipped {t.notes}")
            if not given.only and not given.plain:
                record(suite, backend, t)
            for reason, names in sorted(t.failures.items(), key=lambda item: -len(item[1])):
                if given.plain == (backend == "plain-onnxruntime"):
                    print(f"    {len(names):4} {reason}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}")
        print(f"{suite}: {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
