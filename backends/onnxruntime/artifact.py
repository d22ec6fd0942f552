"""What the backend writes to a folder, and what it checks before it reads it again."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import onnx as protobuf
import onnx_ir as onnx
import onnxruntime

from moec.backends.onnxruntime.errors import serialising
from moec.backends.onnxruntime.lower import Interface, Lowered
from moec.backends.onnxruntime.options import Options
from moec.ir import ArgumentValueError, ArtifactError

_LIST = 1 << 16  # bytes of a list of sizes
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


def read_options(folder: Path) -> Options:
    """The options that a model was lowered with. Raises ArtifactError where the file is damaged or not a plain file of
    its own."""
    try:
        found = json.loads(_plain_file(folder / OPTIONS).read_text())
        return Options.of(found if isinstance(found, dict) else {str(found): None})
    except (ValueError, TypeError) as error:
        reason = error.message if isinstance(error, ArgumentValueError) else str(error)
        raise ArtifactError(f"{folder / OPTIONS}: {reason}", code="artifact") from None


def inline_integers(folder: Path) -> None:
    """Move small integers from a model's data into the model itself: lists of sizes, which ONNX Runtime reads while it
    loads, and not from another file."""
    model = protobuf.load_model(folder / MODEL, load_external_data=False)
    moved = False
    for tensor in _tensors(model.graph):
        said = {entry.key: entry.value for entry in tensor.external_data}
        whole = tensor.data_type in (protobuf.TensorProto.INT64, protobuf.TensorProto.INT32)
        if not whole or tensor.data_location != protobuf.TensorProto.EXTERNAL or int(said["length"]) > _LIST:
            continue
        with (folder / DATA).open("rb") as data:
            data.seek(int(said.get("offset", 0)))
            tensor.raw_data = data.read(int(said["length"]))
        tensor.ClearField("external_data")
        tensor.data_location = protobuf.TensorProto.DEFAULT
        moved = True
    if moved:
        (folder / MODEL).write_bytes(model.SerializeToString())


def check_model(folder: Path) -> Path:
    """The path of a folder's model. Raises ArtifactError where a file is missing, is not a plain file of its own, or
    refers to data outside model.onnx.data."""
    path = _plain_file(folder / MODEL)
    try:
        model = protobuf.load_model(path, load_external_data=False)
        if not len(model.graph.output):
            raise ValueError("it has no outputs")
    except Exception as error:  # protobuf raises many kinds on a corrupt file
        raise ArtifactError(f"{path} is not an ONNX model: {error}", code="artifact") from None
    size = _plain_file(folder / DATA).stat().st_size if (folder / DATA).exists() else 0
    for tensor in _tensors(model.graph):
        if tensor.data_location != protobuf.TensorProto.EXTERNAL:
            continue
        said = {entry.key: entry.value for entry in tensor.external_data}
        if said.get("location") != DATA:
            raise ArtifactError(
                f"{path}: weight {tensor.name!r} lies in {said.get('location')!r}, not {DATA}", code="artifact"
            )
        try:
            need = math.prod(tensor.dims) * onnx.DataType(tensor.data_type).bitwidth
            need = -(-need // 8)
            start, length = int(said.get("offset", 0)), int(said.get("length", need))
        except ValueError as error:
            raise ArtifactError(f"{path}: weight {tensor.name!r}: {error}", code="artifact") from None
        if start < 0 or need < 0 or length != need or start + length > size:
            raise ArtifactError(
                f"{folder / DATA} has {size} bytes, weight {tensor.name!r} needs {need} from {start}", code="artifact"
            )
    return path


def _tensors(graph: protobuf.GraphProto) -> Iterator[protobuf.TensorProto]:
    """The initialisers of a graph and of the bodies in it."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == protobuf.AttributeProto.GRAPH:
                yield from _tensors(attribute.g)
            elif attribute.type == protobuf.AttributeProto.GRAPHS:
                for body in attribute.graphs:
                    yield from _tensors(body)


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
