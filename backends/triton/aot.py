"""Ahead-of-time compilation to sm_90 (Hopper), on any machine, and a look at the machine code that comes out.

Nothing here needs a GPU: Triton compiles to a cubin for a named target, and the disassembler ships in its wheel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from moec.backends.triton.backend import backend
from moec.backends.triton.codegen import program
from moec.backends.triton.kernels.elementwise import elementwise
from moec.backends.triton.launch import FP_FUSION, Launch, interpreted, record_launches
from moec.ir import Node

SHARED_LIMIT = 232_448
"""Bytes of shared memory a block may use on sm_90 (CUDA C++ Programming Guide, compute capability 9.0: 227 KiB)."""

TARGET = GPUTarget("cuda", 90, 32)

WATCHED = ("QGMMA", "HGMMA", "HMMA", "FFMA", "UTMALDG", "LDGSTS", "STL", "LDL")
"""SASS instructions worth counting: warp-group products in FP8 and in 16 bits, older tensor-core products, plain
multiply-adds, bulk tensor copies, asynchronous copies, and stores to and loads from spilled registers."""

_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5", torch.bool: "i1", torch.uint8: "u8",
    torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class KernelReport:
    """What became of one kernel: counts of the `WATCHED` instructions present, and the resources of a block.

    `expected` is the tensor-core instruction it should use, None where that does not matter.
    """

    kernel: str
    instructions: dict[str, int]
    registers: int
    shared_bytes: int
    warps: int
    expected: str | None = None

    @property
    def spills(self) -> int:
        """Stores to plus loads from local memory, which registers are spilled to."""
        return self.instructions.get("STL", 0) + self.instructions.get("LDL", 0)

    @property
    def tensor_core(self) -> str | None:
        """The fastest tensor-core instruction present: QGMMA (FP8), HGMMA (16 bits), HMMA, or None."""
        return next((name for name in ("QGMMA", "HGMMA", "HMMA") if name in self.instructions), None)

    @property
    def fits(self) -> bool:
        """No spills, and shared memory within the limit."""
        return self.spills == 0 and self.shared_bytes <= SHARED_LIMIT

    @property
    def ok(self) -> bool:
        """`fits`, and the tensor-core instruction that was expected is there."""
        return self.fits and (self.expected is None or self.tensor_core == self.expected)


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """(types, constants, attributes) that Triton would specialise this launch to.

    As its launcher does: None and 1 become constants; integers divisible by 16 and pointers are marked so (tensors
    from torch's allocators are aligned to at least 64 bytes).
    """
    kernel = launch.kernel
    assert isinstance(kernel, JITFunction)
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    values = {p.name: p.default for p in kernel.params if p.has_default}
    values |= dict(zip(kernel.arg_names, launch.args, strict=False)) | launch.constexprs
    for index, name in enumerate(kernel.arg_names):
        value = values[name]
        if kernel.params[index].is_constexpr or value is None or (type(value) is int and value == 1):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name] = "*" + _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def compile_launch(launch: Launch) -> Any:
    """Compile one recorded launch for sm_90; the result's `asm` holds every stage down to the cubin.

    Raises RuntimeError in a process where triton interprets.
    """
    if interpreted():
        raise RuntimeError("ahead-of-time compilation needs a process that was started without TRITON_INTERPRET=1")
    types, constants, attributes = signature(launch)
    source = ASTSource(launch.kernel, types, constants, attributes)
    return triton.compile(
        source, target=TARGET, options={"num_warps": launch.num_warps, "num_stages": launch.num_stages} | FP_FUSION
    )


def disassemble(cubin: bytes) -> str:
    """The SASS of a cubin, by the nvdisasm in Triton's wheel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.nvdisasm.path, "--print-code", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _registers(cubin: bytes) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+)", text)
    return int(found.group(1)) if found else 0


def inspect_launch(launch: Launch, name: str | None = None, expected: str | None = None) -> KernelReport:
    """Compile one recorded launch for sm_90 and report on its machine code."""
    compiled = compile_launch(launch)
    cubin = compiled.asm["cubin"]
    opcodes = Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", disassemble(cubin), re.M))
    counts = {opcode: opcodes[opcode] for opcode in WATCHED if opcodes[opcode]}
    shared = compiled.metadata.shared
    return KernelReport(name or launch.kernel.__name__, counts, _registers(cubin), shared, launch.num_warps, expected)


def lowering_launches(node: Node) -> list[Launch]:
    """The launches that running an IR node with sizes in numbers would make on a GPU, none where torch runs it.

    Raises what the node's lowering raises, which gets tensors without values (on the meta device).
    """
    operands = [
        None if v is None else torch.empty([int(s) for s in v.shape], dtype=v.dtype.torch, device="meta")
        for v in node.operands
    ]
    if not node.opdef.elementwise:
        return launches_of(lambda: backend.lowerings[node.op](node.opdef.instance(operands, node.attrs)))
    values = [v for v in node.operands if v is not None]
    made = program([node], values, {}, node.results)
    shape = tuple(int(s) for s in node.result.shape)
    return launches_of(lambda: elementwise(made.body, made.outputs, shape, *(x for x in operands if x is not None)))


@dataclass(frozen=True)
class Case:
    """A production-size call of a wrapper, and the tensor-core instruction its kernels must use, by kernel."""

    name: str
    call: Callable[[], object]
    expect: Mapping[str, str]


def launches_of(call: Callable[[], object]) -> list[Launch]:
    """The launches that `call` would make on a GPU; give its wrappers tensors on the meta device."""
    with record_launches() as launches:
        call()
    return launches


def report(cases: Iterable[Case] | None = None) -> list[KernelReport]:
    """Compile and inspect every kernel of `cases` (default: `aot_cases.production_cases()`), each once.

    About three seconds a kernel the first time; Triton's cache answers later. Raises RuntimeError in a process where
    triton interprets.
    """
    from moec.backends.triton.aot_cases import production_cases

    entries, seen = [], set()
    for case in production_cases() if cases is None else cases:
        for launch in launches_of(case.call):
            key = (launch.kernel.__name__, str(signature(launch)), launch.num_warps, launch.num_stages)
            if key not in seen:
                seen.add(key)
                expected = case.expect.get(launch.kernel.__name__)
                entries.append(inspect_launch(launch, f"{case.name}: {launch.kernel.__name__}", expected))
    return entries
