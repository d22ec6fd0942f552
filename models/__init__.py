"""`moec.models`: our own Mixture-of-Experts transformer, its named configs and its trained weights."""

from moec.models.checkpoint import trained
from moec.models.configs import CONFIGS, build, config
from moec.models.data import heldout_text
from moec.models.evaluate import bits_per_byte, expert_load, mtp_accept_rate
from moec.models.model_config import Llama3Rope, ModelConfig, Yarn
from moec.models.transformer import MoETransformer

__all__ = [
    "CONFIGS",
    "Llama3Rope",
    "MoETransformer",
    "ModelConfig",
    "Yarn",
    "bits_per_byte",
    "build",
    "config",
    "expert_load",
    "heldout_text",
    "mtp_accept_rate",
    "trained",
]
