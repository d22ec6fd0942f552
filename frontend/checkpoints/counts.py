"""How many layers and experts there are: what a config counts, the tensors have to show."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from moec.frontend.checkpoints.errors import Problems

_LAYER = re.compile(r"(?:model\.layers|blk)\.(\d{1,9})\.")
_EXPERT = re.compile(r".*(?:\.experts|\.ffn_(?:gate|up|down)_exps)\.(\d{1,9})\.")
_WIDEST = 1 << 16  # elements of a head: its rotary frequencies are computed while the model is built
_FEW = 64  # layers or experts that may be listed whatever is there
_STACK = re.compile(r".*\.experts\.(gate_up_proj|down_proj)")


def check_counts(fields: dict[str, Any], names: Iterable[str], problems: Problems) -> None:
    """Take MTP layers out of the `fields` of a config where there are none: converted checkpoints leave out what
    decoding does not use, and keep their number. Raises CompileError for far more layers or experts than there are
    tensors of, and heads wider than any: building a model of them, and listing all that it lacks, may take any time and
    memory. Where only some are missing, all that lacks is listed later."""
    names = list(names)
    layers = {int(m[1]) for m in map(_LAYER.match, names) if m}
    count, mtp = fields["num_layers"], fields.get("num_mtp_layers", 0)
    if mtp and not any(count <= i < count + mtp for i in layers):
        fields["num_mtp_layers"] = mtp = 0
    _compare("layer", count + mtp, layers, problems)
    experts = fields.get("num_experts", 0) if fields.get("first_k_dense", 0) < count else 0
    if experts and not any(map(_STACK.fullmatch, names)):
        _compare("expert", experts, {int(m[1]) for m in map(_EXPERT.match, names) if m}, problems)
    for name in ("head_dim", "qk_rope_head_dim"):
        if fields.get(name, 0) > _WIDEST:
            problems.add(f"the config has heads of {name} {fields[name]}, expected at most {_WIDEST}")
            problems.stop()


def _compare(what: str, count: int, there: set[int], problems: Problems) -> None:
    missing = next(i for i in range(len(there) + 1) if i not in there)
    if count > max(_FEW, 4 * len(there)):
        problems.add(f"the config has {count} {what}s, and no tensor of {what} {missing} is there")
        problems.stop()
