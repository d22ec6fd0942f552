"""Comparing backends: run, match values inside, judge, name the node to blame."""

from moec.comparing.compare_backends import compare
from moec.comparing.nodes import NodeResult
from moec.comparing.result import Comparison, Divergence, OutputResult
from moec.comparing.routing import RoutingFlip

__all__ = ["Comparison", "Divergence", "NodeResult", "OutputResult", "RoutingFlip", "compare"]
