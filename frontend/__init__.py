"""Front ends: from models to the IR."""

from moec.frontend.aten.registry import lowers
from moec.frontend.signature import Signature
from moec.frontend.torch_export import Traced, trace

__all__ = ["Signature", "Traced", "lowers", "trace"]
