"""Random graphs, and the laws that each of them obeys."""

from moec.fuzzing.agreement import check_backend
from moec.fuzzing.laws import check_all, check_ir, check_passes, check_random
from moec.fuzzing.outcome import Broken, Outcome

__all__ = ["Broken", "Outcome", "check_all", "check_backend", "check_ir", "check_passes", "check_random"]
