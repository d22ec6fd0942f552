"""Expert placement: load per expert and GPUs in, experts per slot out."""

from moec.passes.placement.place_experts import place_experts

__all__ = ["place_experts"]
