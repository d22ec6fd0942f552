"""The bugs: mistakes that backends make, each as a wrong lowering, kernel or executable."""

from __future__ import annotations

from . import planted_layers, planted_moe, planted_others

BUGS = [*planted_layers.BUGS, *planted_moe.BUGS, *planted_others.BUGS]
