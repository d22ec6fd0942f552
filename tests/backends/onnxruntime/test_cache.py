"""Sessions from optimised models on disk: the same outputs, found by content, and never what was damaged."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx_ir
import pytest
import torch

import moec
from moec.backends import get_backend
from moec.backends.onnxruntime import Emitter, artifact, cache_key, session
from moec.ir import Graph
from moec.ir.weight import ComputedSource, Weight

from .conftest import graph_of, typed, weight


def mlp(seed: int = 0, name: str = "w", width: int = 96) -> Graph:
    """Two products with weights that ONNX Runtime lays out anew."""
    g = torch.Generator().manual_seed(seed)
    up, down = torch.randn(width, 32, generator=g), torch.randn(32, width, generator=g)

    def build(b: Any, x: Any) -> Any:
        h = b.silu(b.op("linear.linear", [x, weight(b, f"{name}.up", up)]))
        return b.op("linear.linear", [h, weight(b, f"{name}.down", down)])

    return graph_of({"x": typed("f32", "T", 32)}, build)


def compiled(graph: Graph, cache: Path | None, threads: int = 1, **options: Any) -> Any:
    options |= {} if cache is None else {"cache": cache}
    return get_backend("onnxruntime").compile(graph, threads=threads, options=options)


def said(executable: Any) -> dict[str, Any]:
    found: dict[str, Any] = executable.stats["cache"]
    return found


def outputs(executable: Any) -> torch.Tensor:
    (y,) = executable.run([torch.linspace(-1, 1, 96).reshape(3, 32)])
    return torch.as_tensor(y)


def entry(cache: Path) -> Path:
    (found,) = cache.iterdir()
    return found


@pytest.mark.parametrize("memory", ["fast", "fp8", "mapped"])
def test_the_second_session_is_bit_equal(tmp_path: Path, memory: str):
    first = compiled(mlp(), tmp_path, memory=memory)
    assert (said(first)["result"], said(first)["why"]) == ("miss", "there is none yet")
    second = compiled(mlp(), tmp_path, threads=2, memory=memory)
    assert said(second)["result"] == "hit"
    assert set(said(second)["seconds"]) == {"key", "check", "load"}
    plain = outputs(compiled(mlp(), None, memory=memory))
    assert torch.equal(outputs(first), plain)
    assert torch.equal(outputs(second), plain)


def test_nothing_is_written_unless_asked_for(tmp_path: Path):
    assert "cache" not in compiled(mlp(), None).stats


@pytest.mark.parametrize(
    "other",
    [{"graph": mlp(seed=1)}, {"graph": mlp(name="v")}, {"graph": mlp(width=97)}, {"memory": "fp8"}, {"portable": True}],
    ids=str,
)
def test_what_differs_has_an_entry_of_its_own(tmp_path: Path, other: dict[str, Any]):
    compiled(mlp(), tmp_path)
    graph = other.pop("graph", None) or mlp()
    assert said(compiled(graph, tmp_path, **other))["result"] == "miss"
    assert said(compiled(mlp(), tmp_path))["result"] == "hit"


@pytest.mark.parametrize("what", ["_versions", "_code", "cpu_features"])
def test_other_versions_and_processors_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str):
    compiled(mlp(), tmp_path)
    monkeypatch.setattr(cache_key, what, lambda: ("other",) if what == "_versions" else "other")
    assert said(compiled(mlp(), tmp_path))["result"] == "miss"


def test_one_element_of_a_weight_counts(tmp_path: Path):
    compiled(mlp(), tmp_path)
    graph = mlp()
    stored = graph.weights["w.up"].weight
    assert stored is not None
    data = stored.load().clone()
    data[5, 7] = torch.nextafter(data[5, 7], torch.tensor(9.0))
    graph.bind_weights({"w.up": data})
    assert said(compiled(graph, tmp_path))["result"] == "miss"


def test_computed_weights_are_not_kept(tmp_path: Path):
    def fresh() -> tuple[Graph, ComputedSource]:
        graph = mlp()
        value = graph.weights["w.up"]
        source = ComputedSource(lambda: torch.ones(96, 32))
        value.weight = Weight("w.up", value.type, source)
        return graph, source

    for result in ("miss", "hit"):
        graph, source = fresh()
        assert said(compiled(graph, tmp_path))["result"] == result
        assert source._value is None


SAME = """
import sys
from tests.backends.onnxruntime.test_cache import compiled, mlp, outputs, said
from pathlib import Path
executable = compiled(mlp(), Path(sys.argv[1]))
print(said(executable)["result"], float(outputs(executable).sum()), said(executable).get("warning", ""))
"""


def process(cache: Path, **environment: str) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[3])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, **environment}
    command = [sys.executable, "-c", SAME, str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def answer(running: subprocess.Popen[str]) -> list[str]:
    out, err = running.communicate(timeout=300)
    assert running.returncode == 0, err
    return out.split()


def test_processes_share_it(tmp_path: Path):
    """Two at once, and one whose hashes are salted differently."""
    first = [process(tmp_path, PYTHONHASHSEED=str(i)) for i in range(2)]
    answers = [answer(p) for p in first]
    later = answer(process(tmp_path, PYTHONHASHSEED="7"))
    assert later[0] == "hit"
    assert {a[1] for a in answers} == {later[1]}
    assert all(len(a) == 2 for a in answers), "a warning"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", [artifact.MODEL, artifact.DATA, "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "truncate", "remove", "symlink", "fifo"])
def test_damage_is_noticed_and_mended(tmp_path: Path, name: str, how: str):
    cache = tmp_path / "cache"
    plain = outputs(compiled(mlp(), cache))
    path = entry(cache) / name
    if how == "flip":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif how == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.rename(tmp_path / "moved")
        if how == "symlink":
            path.symlink_to(tmp_path / "moved")
        elif how == "fifo":
            os.mkfifo(path)
    again = compiled(mlp(), cache)
    assert said(again)["result"] == "miss"
    assert name in said(again)["why"]
    assert torch.equal(outputs(again), plain)
    assert said(compiled(mlp(), cache))["result"] == "hit"


def test_what_onnxruntime_refuses_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Layouts that this processor's kernels do not make, as if nothing else had told."""
    plain = outputs(compiled(mlp(), tmp_path))
    path = entry(tmp_path) / artifact.DATA
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of the layouts, which come after a weight
    path.write_bytes(data)
    monkeypatch.setattr("moec.backends.cache.Cache._check", lambda self, at, key: None)
    again = compiled(mlp(), tmp_path)
    assert said(again)["result"] == "miss"
    assert "pre-packed" in said(again)["why"]
    assert torch.equal(outputs(again), plain)


def test_an_entry_whose_data_lies_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import onnx

    cache = tmp_path / "cache"
    compiled(mlp(), cache)
    path = entry(cache) / artifact.MODEL
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for item in tensor.external_data:
            item.value = "../../secret" if item.key == "location" else item.value
    path.write_bytes(model.SerializeToString())
    monkeypatch.setattr("moec.backends.cache.Cache._check", lambda self, at, key: None)
    assert "lies in '../../secret'" in said(compiled(mlp(), cache))["why"]


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file in its place; a disk that is full for us, or for ONNX Runtime."""
    plain = outputs(compiled(mlp(), None))
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "cache", Path("/proc/moec")):
        first = compiled(mlp(), folder)
        assert f"not kept in {folder}" in said(first)["warning"]
        assert torch.equal(outputs(first), plain)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("moec.backends.cache._write_manifest", full)
        second = compiled(mlp(), tmp_path / "cache")
    assert "No space left" in said(second)["warning"]
    assert torch.equal(outputs(second), plain)
    assert not list((tmp_path / "cache").iterdir())

    real = session.session_options

    def unwritable(*given: Any) -> Any:
        options = real(*given)
        if len(given) > 2 and given[2] is not None and given[2].write:
            options.optimized_model_filepath = "/proc/no/model.onnx"
        return options

    monkeypatch.setattr(session, "session_options", unwritable)
    third = compiled(mlp(), tmp_path / "cache")
    assert "warning" in said(third)
    assert torch.equal(outputs(third), plain)


def test_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The system refuses to make anything in it; root, who may write anywhere, is told the same."""
    plain, real = outputs(compiled(mlp(), None)), os.mkdir

    def refused(path: Any, *mode: Any, **at: Any) -> None:
        if Path(path).parent == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        real(path, *mode, **at)

    tmp_path.chmod(0o500)
    monkeypatch.setattr(os, "mkdir", refused)
    executable = compiled(mlp(), tmp_path)
    assert (said(executable)["result"], said(executable)["why"]) == ("miss", "there is none yet")
    assert f"not kept in {tmp_path}" in said(executable)["warning"]
    assert "Permission denied" in said(executable)["warning"]
    assert torch.equal(outputs(executable), plain)
    assert not list(tmp_path.iterdir())


def test_a_model_that_onnxruntime_refuses_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object, **__: object) -> None:
        raise ValueError("no such model")

    monkeypatch.setattr("onnxruntime.InferenceSession", broken)
    with pytest.raises(moec.CompileError, match="no such model"):
        compiled(mlp(), tmp_path)


def test_lowerings_of_others_are_told_apart_by_what_they_make(tmp_path: Path):
    """The same name and key, another transform."""
    backend = get_backend("onnxruntime")
    before = backend.lowerings["linear.linear"]
    results = []
    try:
        for factor in (1.0, 2.0, 2.0):

            @backend.lowers("linear.linear")
            def scaled(e: Emitter, node: Any, factor: float = factor) -> onnx_ir.Value:
                x, w, _ = node.operands
                n, k = w.shape
                return e.op("MatMul", e.value(x), e.weight(w, ".T", (k, n), lambda t: t.T * factor))

            results.append(compiled(mlp(), tmp_path))
    finally:
        backend.lowerings["linear.linear"] = before
    assert [said(r)["result"] for r in results] == ["miss", "miss", "hit"]
    assert not torch.equal(outputs(results[0]), outputs(results[1]))
    assert torch.equal(outputs(results[1]), outputs(results[2]))


def test_errors_of_a_cached_session_name_the_op(tmp_path: Path):
    def build(b: Any, x: Any, i: Any) -> Any:
        return b.gather(b.op("linear.linear", [x, weight(b, "w", torch.ones(64, 32))]), i)

    graph = graph_of({"x": typed("f32", "T", 32), "i": typed("i64", "N")}, build)
    compiled(graph, tmp_path)
    executable = compiled(graph, tmp_path)
    assert said(executable)["result"] == "hit"
    with pytest.raises(moec.CompileError, match=r"tensor\.gather failed while running"):
        executable.run([torch.ones(3, 32), torch.tensor([0, 9])])


# -- by the public interface --------------------------------------------------------------------------


def test_compile_save_and_load_share_entries(tmp_path: Path):
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.SiLU(), torch.nn.Linear(64, 32)).eval()
    x, cache = torch.linspace(-1, 1, 64).reshape(2, 32), tmp_path / "cache"
    first = moec.compile(model, (x,), backend="onnxruntime", cache=cache)
    assert any("cache miss: there is none yet" in note for note in first.report.notes())
    first.save(tmp_path / "saved")
    loaded = moec.load(tmp_path / "saved", cache=str(cache))
    assert any("cache hit" in note for note in loaded.report.notes())
    assert torch.equal(loaded(x), first(x))
    assert len(list(cache.iterdir())) == 1
    again = moec.load(tmp_path / "saved", cache=tmp_path / "other")  # filled from a saved model
    assert torch.equal(again(x), first(x))
    assert any(
        "cache hit" in n
        for n in moec.compile(model, (x,), backend="onnxruntime", cache=tmp_path / "other").report.notes()
    )


def test_what_is_no_folder():
    with pytest.raises(moec.ArgumentTypeError, match="cache must be a folder or None, got int"):
        moec.compile(torch.nn.Linear(2, 2), (torch.ones(1, 2),), cache=3)  # type: ignore[arg-type]


class Mixed(torch.nn.Module):
    """What ONNX Runtime lays out in ways of its own, and bodies of loops."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 32, 3)
        self.lstm = torch.nn.LSTM(32, 16, batch_first=True)
        self.table = torch.nn.Embedding(10, 16)

    def forward(self, image: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        h, _ = self.lstm(self.conv(image).relu().flatten(2).transpose(1, 2))
        return h @ self.table(ids).transpose(1, 2)


@pytest.mark.parametrize("memory", ["fast", "fp8", "mapped"])
def test_convolutions_loops_and_tables(tmp_path: Path, memory: str):
    torch.manual_seed(0)
    model, args = Mixed().eval(), (torch.randn(2, 3, 8, 8), torch.arange(6).reshape(2, 3))
    plain = moec.compile(model, args, backend="onnxruntime", memory=memory)(*args)
    for result in ("miss", "hit"):
        compiled = moec.compile(model, args, backend="onnxruntime", memory=memory, cache=tmp_path)
        assert any(f"cache {result}" in note for note in compiled.report.notes())
        assert torch.equal(compiled(*args), plain)


FORMS: list[dict[str, str]] = [{}, {"experts": "loop"}, {"memory": "fp8"}, {"memory": "mapped"}, {"experts": "moe"}]


@pytest.mark.parametrize(
    ("quantize", "options"),
    [(None, o) for o in FORMS]
    + [("fp8", o) for o in FORMS if o.get("experts") != "moe"]  # that operator rounds no activations
    + [(name, o) for name in ("fp8-weight-only", "int8", "int4") for o in FORMS],
    ids=str,
)
def test_forms_of_experts(tmp_path: Path, quantize: str | None, options: dict[str, str]):
    from moec.models import build
    from moec.passes import default_pipeline
    from moec.program import Settings, legalise

    graph = moec.trace(build("deepseek-v3-mini"), (torch.arange(8).reshape(1, 8),))
    after, _ = default_pipeline(quantize).run(graph)
    legal, _, _ = legalise(after, Settings(get_backend("onnxruntime"), default_pipeline()))
    ids = torch.arange(8).reshape(1, 8)
    (plain,) = compiled(legal, None, **options).run([ids])
    for result in ("miss", "hit"):
        executable = compiled(legal, tmp_path, **options)
        assert said(executable)["result"] == result
        assert "warning" not in said(executable)
        assert torch.equal(executable.run([ids])[0], plain)


def test_lists_of_sizes_are_in_the_model(tmp_path: Path):
    """One of an Int64 for each of many pieces, which ONNX Runtime makes of Gathers, and cannot read from a file."""

    def build(b: Any, x: Any) -> Any:
        h = b.op("linear.linear", [x, weight(b, "w", torch.ones(300, 32))])
        parts = [b.relu(b.slice(h, axis=1, start=i, end=i + 1)) for i in range(300)]
        return b.concat(*parts, axis=1)

    graph = graph_of({"x": typed("f32", "T", 32)}, build)
    plain = outputs(compiled(graph, None, memory="fp8"))
    for result in ("miss", "hit"):
        executable = compiled(graph, tmp_path, memory="fp8")
        assert said(executable)["result"] == result
        assert "warning" not in said(executable)
        assert torch.equal(outputs(executable), plain)


def test_what_is_refused_as_it_was_written_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain, real = outputs(compiled(mlp(), None)), session.open_session

    def refuses(*given: Any) -> Any:
        if given[4] is not None and not given[4].write:
            raise moec.CompileError("no", code="onnxruntime")
        return real(*given)

    monkeypatch.setattr("moec.backends.onnxruntime.warm.open_session", refuses)
    first, second = compiled(mlp(), tmp_path), compiled(mlp(), tmp_path)
    assert said(first)["warning"] == f"not kept in {tmp_path}: no"
    assert (said(second)["result"], said(second)["why"]) == ("miss", "no")
    assert "store" not in said(second)["seconds"]
    assert "warning" not in said(second)
    for executable in (first, second):
        assert torch.equal(outputs(executable), plain)
    assert sum(p.stat().st_size for p in entry(tmp_path).iterdir()) < 4096
