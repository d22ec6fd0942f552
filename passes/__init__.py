"""Passes: graph in, graph out. Every pass and rule that ships, by name."""

from moec.passes.base import Analysis, Pass, Record, Refusal
from moec.passes.calibrate import expert_coactivation, expert_load
from moec.passes.clean.canonicalise import Canonicalise, DropBroadcasts, NormaliseAxes
from moec.passes.clean.cleanup import CommonSubexpressions, DeadCode, FoldConstants
from moec.passes.clean.fold_linear import FoldNormWeight, FoldScale, FoldScales
from moec.passes.clean.fold_scalars import FoldScalars
from moec.passes.clean.narrow_rows import NarrowRows
from moec.passes.clean.simplify_positions import SimplifyPositions
from moec.passes.clean.simplify_transposes import SimplifyTransposes
from moec.passes.clean.sink_transposes import SinkTransposes
from moec.passes.coverage import Coverage, quantized_coverage
from moec.passes.fuse.absorb_mla import AbsorbMLA
from moec.passes.fuse.deinterleave_rope import DeinterleaveRoPE
from moec.passes.fuse.fuse_attention import FuseAttention
from moec.passes.fuse.fuse_latent_attention import FuseLatentAttention
from moec.passes.fuse.fuse_mlp import FuseMLP, FuseSwiGLU
from moec.passes.fuse.fuse_norm import FuseNorm
from moec.passes.fuse.fuse_rope import FuseRoPE
from moec.passes.fuse.merge_linear import MergeLinears
from moec.passes.legalise import Legalise
from moec.passes.moe.merge_shared import AppendSharedExperts, MergeSharedExperts
from moec.passes.moe.raise_moe import RaiseMoE
from moec.passes.moe.raise_unrolled import RaiseUnrolledExperts
from moec.passes.pipeline import Phase, Pipeline, build_pipeline, default_pipeline, run_pass
from moec.passes.place import PlaceExperts
from moec.passes.placement import place_experts
from moec.passes.quantize import QuantizeWeights
from moec.passes.rewrite import Match, Rewrite, RuleSet
from moec.passes.rewriting.explain import explain
from moec.passes.spec import parse_pass, parse_passes, print_pass, print_passes
from moec.passes.stored_fp8 import UseStoredFP8

__all__ = [
    "AbsorbMLA",
    "Analysis",
    "AppendSharedExperts",
    "Canonicalise",
    "CommonSubexpressions",
    "Coverage",
    "DeadCode",
    "DeinterleaveRoPE",
    "DropBroadcasts",
    "FoldConstants",
    "FoldNormWeight",
    "FoldScalars",
    "FoldScale",
    "FoldScales",
    "FuseAttention",
    "FuseLatentAttention",
    "FuseMLP",
    "FuseNorm",
    "FuseRoPE",
    "FuseSwiGLU",
    "Legalise",
    "Match",
    "MergeLinears",
    "MergeSharedExperts",
    "NarrowRows",
    "NormaliseAxes",
    "Pass",
    "Phase",
    "Pipeline",
    "PlaceExperts",
    "QuantizeWeights",
    "RaiseMoE",
    "RaiseUnrolledExperts",
    "Record",
    "Refusal",
    "Rewrite",
    "RuleSet",
    "SimplifyPositions",
    "SimplifyTransposes",
    "SinkTransposes",
    "UseStoredFP8",
    "build_pipeline",
    "default_pipeline",
    "expert_coactivation",
    "expert_load",
    "explain",
    "parse_pass",
    "parse_passes",
    "place_experts",
    "print_pass",
    "print_passes",
    "quantized_coverage",
    "run_pass",
]
