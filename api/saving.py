"""Writing a saved model, whole or not at all; its files are listed in artifact.py."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from moec.files import Folder, digest_file, exchange
from moec.ir import (
    ArtifactError,
)
from moec.ir.arrays import copied, packed
from moec.ir.weight import digest as digest_tensor
from moec.manifest import FORMAT, MANIFEST, TOKENIZER, WEIGHTS, manifest_digest, read_manifest
from moec.program import Program

if TYPE_CHECKING:
    from moec.compiled import CompiledModel


def save(compiled: CompiledModel, folder: Path) -> None:
    """Write `compiled` to `folder`, whole or not at all. Raises ArtifactError where something else is there."""
    from moec.backends import BACKENDS

    if compiled.backend not in BACKENDS:
        raise ArtifactError(
            f"a model on the custom backend {compiled.backend!r} cannot be loaded again", code="artifact"
        )
    programs = _programs(compiled)
    try:
        _check_target(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    except ArtifactError:
        raise
    except (OSError, ValueError) as e:  # a name that no file can have is a ValueError
        raise ArtifactError(f"cannot write beside {folder}: {e}", code="artifact") from e
    try:
        _write(compiled, programs, work)
        work.chmod(0o755)
        _put(work, folder)
    except (OSError, SafetensorError) as e:
        raise ArtifactError(f"cannot write {folder}: {e}", code="artifact") from e
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _programs(compiled: CompiledModel) -> dict[str, Program]:
    programs = {}
    if compiled.signature is not None:
        programs["forward"] = compiled.program
    if compiled.can_generate:
        programs |= compiled.generator.programs
    if compiled.can_speculate:
        programs["speculative"] = compiled.speculator.program
    return programs


def _check_target(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ArtifactError(f"{folder} exists and is no folder", code="artifact")
    while (seen := _seen(folder)) is not None:
        try:
            with Folder(folder) as files:
                read_manifest(files, MANIFEST)
            return
        except ArtifactError:
            if _seen(folder) == seen:
                raise ArtifactError(
                    f"{folder} is not empty and holds no saved model", code="artifact", hint="choose another folder"
                ) from None
            # else another save has put its model here, and removed what was being read


def _seen(folder: Path) -> tuple[int, ...] | None:
    """What tells one folder of files under a name from the next; None where there is none, or nothing in it."""
    try:
        status = folder.stat()
        return (status.st_dev, status.st_ino, status.st_ctime_ns) if any(folder.iterdir()) else None
    except FileNotFoundError:
        return None


def _put(work: Path, folder: Path) -> None:
    """Move the finished folder into place, and a saved model that was there to where `work` was. At each moment there
    is a whole model under the name, whoever else saves to it, where the file system can exchange two folders."""
    while True:
        try:
            os.rename(work, folder)  # onto nothing, or an empty folder
            break
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        try:
            if not exchange(work, folder):
                _put_aside(work, folder)
            break
        except FileNotFoundError:  # the other one has gone
            continue
    if any(work.parent.glob(work.name)):
        try:
            _check_target(work)
        except ArtifactError as e:  # it came while this one was written
            exchange(work, folder)
            e.args = (f"{folder} is not empty and holds no saved model",)
            e.message = e.args[0]
            raise
    _sync(folder.parent)


def _put_aside(work: Path, folder: Path) -> None:
    """The same by two renames; what was there is restored if the second fails."""
    old = work.with_suffix(".old")
    os.replace(folder, old)
    try:
        os.replace(work, folder)
    except BaseException:
        os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write(compiled: CompiledModel, programs: Mapping[str, Program], work: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    keys: dict[str, str] = {}  # digest → key in the safetensors file
    entries = {}
    for name, program in programs.items():
        names = {}
        for weight_name, value in program.graph.weights.items():
            assert value.weight is not None
            tensor = value.weight.load()
            found = digest_tensor(tensor)
            if found not in keys:
                key, i = weight_name, 1
                while key in tensors:
                    i += 1
                    key = f"{weight_name}#{i}"
                keys[found] = key
                tensors[key] = copied(packed(tensor.detach().cpu()))
            if keys[found] != weight_name:
                names[weight_name] = keys[found]
        (work / f"{name}.ir").write_text(str(program.graph), "utf-8")
        (work / name).mkdir()
        program.executable.save(work / name)
        entries[name] = {"legal_sha256": program.legal_digest, "weights": names, "limits": program.limits.to_dict()}
    if compiled.tokenizer_json is not None:
        (work / TOKENIZER).write_bytes(compiled.tokenizer_json)
    save_file(tensors, work / WEIGHTS)
    # the library makes it private; it is as readable as its neighbours
    shutil.copymode(next(work.glob("*.ir")), work / WEIGHTS)
    files = {}
    for path in sorted(p for p in work.rglob("*") if p.is_file()):
        files[path.relative_to(work).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest_file(path)}
        _sync(path)
    manifest = {
        "format": FORMAT,
        "kind": "moec",
        "versions": _versions(),
        "name": compiled.name,
        "backend": compiled.backend,
        "threads": compiled.settings.threads,
        "fallback": compiled.settings.fallback,
        "signature": None if compiled.signature is None else compiled.signature.to_dict(),
        "stops": _stops_json(compiled),
        "ops": _foreign_ops(programs),
        "programs": entries,
        "tensors": {key: digest for digest, key in keys.items()},
        "files": files,
    }
    manifest["sha256"] = manifest_digest(manifest)
    (work / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False), "utf-8")
    for path in (work / MANIFEST, *(p for p in work.rglob("*") if p.is_dir()), work):
        _sync(path)


def _foreign_ops(programs: Mapping[str, Program]) -> dict[str, str]:
    """Ops that moec does not ship, with the modules that declare them."""
    graphs = [g for p in programs.values() for g in (p.graph, *p.graph.functions.values())]
    used = {node.opdef for g in graphs for node in g.nodes}
    return {o.name: o.cls.__module__ for o in used if o.cls.__module__.split(".")[0] != "moec"}


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("moec", "torch", "onnxruntime", "triton", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _stops_json(compiled: CompiledModel) -> dict[str, Any] | None:
    if not compiled.can_generate:
        return None
    stops = compiled.generator.stops
    return {
        "eos": list(stops.eos),
        "pad": stops.pad,
        "positions": stops.positions,
        "least_prompt": compiled.generator.least,
        "past": compiled.generator.past,
    }
