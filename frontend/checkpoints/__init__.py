"""Checkpoints: config and lazy weights of a Hugging Face folder or a GGUF file."""

from moec.frontend.checkpoints.checkpoint import Checkpoint, is_checkpoint, open_folder

__all__ = ["Checkpoint", "is_checkpoint", "open_folder"]
