"""The base of all trainers here: TRL's `GRPOTrainer` with what a long run needs around any method."""

from trl import GRPOTrainer

from .card import CardMixin
from .evaluation import EvaluationMixin
from .generation import GenerationMixin
from .interruption import SafeExitMixin


class BaseTrainer(CardMixin, SafeExitMixin, EvaluationMixin, GenerationMixin, GRPOTrainer):
    """
    `GRPOTrainer` that generates with a limit per request and syncs vLLM right on any device (`GenerationMixin`), logs
    pass@k in evaluation (`EvaluationMixin`), leaves only whole checkpoints, one of them on SIGTERM (`SafeExitMixin`),
    and writes a card that tells method and settings (`CardMixin`).
    """
