"""What the backend writes to a folder, and what it checks before it reads it again."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import asdict
from pathlib import Path

import onnx_ir as onnx
import onnxruntime

from moec.backends.onnxruntime.errors import serialising
from moec.backends.onnxruntime.lower import Interface, Lowered
from moec.backends.onnxruntime.options import Options
from moec.ir import ArgumentValueError, ArtifactError

MODEL, DATA, OPTIONS = "model.onnx", "model.onnx.data", "onnxruntime.json"


def write_model(lowered: Lowered, folder: Path) -> Path:
    """model.onnx with its weights in model.onnx.data, which are read one after another."""
    with serialising():
        onnx.save(lowered.model, folder / MODEL, external_data=DATA, max_workers=1)
    lowered.forget_weights()
    return folder / MODEL


def write(lowered: Lowered, options: Options, folder: Path) -> None:
    """The model and the options it was lowered with; nothing is left behind where writing fails."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_model(lowered, folder)
        (folder / OPTIONS).write_text(json.dumps(asdict(options)))
    except BaseException:
        for name in (MODEL, DATA, OPTIONS):
            (folder / name).unlink(missing_ok=True)
        raise


def check(folder: Path) -> tuple[Path, Options]:
    """The model's path and options. Raises ArtifactError where a file is missing, is not a plain file of its
    own, or refers to data outside model.onnx.data."""
    _plain_file(folder / MODEL)
    try:
        found = json.loads(_plain_file(folder / OPTIONS).read_text())
        options = Options.of(found if isinstance(found, dict) else {str(found): None})
    except (ValueError, TypeError) as error:
        reason = error.message if isinstance(error, ArgumentValueError) else str(error)
        raise ArtifactError(f"{folder / OPTIONS}: {reason}", code="artifact") from None
    try:
        model = onnx.load(folder / MODEL)
        if not len(model.graph.outputs):
            raise ValueError("it has no outputs")
    except Exception as error:  # protobuf and onnx_ir raise many kinds on a corrupt file
        raise ArtifactError(f"{folder / MODEL} is not an ONNX model: {error}", code="artifact") from None
    size = _plain_file(folder / DATA).stat().st_size if (folder / DATA).exists() else 0
    for graph in (model.graph, *model.graph.subgraphs()):
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if not isinstance(tensor, onnx.ExternalTensor):
                continue
            if str(tensor.location) != DATA:
                raise ArtifactError(
                    f"{folder / MODEL}: weight {name!r} lies in {str(tensor.location)!r}, not {DATA}", code="artifact"
                )
            start, length = tensor.offset or 0, tensor.nbytes if tensor.length is None else tensor.length
            if start < 0 or length != tensor.nbytes or start + length > size:
                raise ArtifactError(
                    f"{folder / DATA} has {size} bytes, weight {name!r} needs {tensor.nbytes} from {start}",
                    code="artifact",
                )
    return folder / MODEL, options


def _plain_file(path: Path) -> Path:
    """Raises ArtifactError unless `path` is a regular file that no link leads to or from."""
    try:
        info = os.lstat(path)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}", code="artifact") from None
    if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
        raise ArtifactError(f"{path} is not a plain file of its own", code="artifact", hint="links are not followed")
    return path


def check_interface(session: onnxruntime.InferenceSession, interface: Interface) -> None:
    """Raises ArtifactError where the model is not that of the graph."""
    for what, got, want in (
        ("inputs", [v.name for v in session.get_inputs()], interface.inputs),
        ("outputs", [v.name for v in session.get_outputs()], interface.outputs),
    ):
        if got != want:
            raise ArtifactError(f"{MODEL} has {what} {got}, the graph has {want}", code="artifact")
