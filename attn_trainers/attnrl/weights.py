"""How the parts of an update weigh in its loss, so that it is one mean over the update's own rows or tokens.

TRL takes a mean over each micro-batch on each rank and divides by the number of micro-batches, or divides by tokens
that it spreads evenly over micro-batches: right where all are full. Here parts hold unequal rows, or none.
"""

from collections.abc import Callable
from dataclasses import dataclass

from .batches import Update
from .rows import TrainingRow


# Losses that are a mean over rows, each a mean over tokens or their sum over a constant.
_ROW_MEANS = ("grpo", "sapo", "dr_grpo")


@dataclass(frozen=True)
class PartWeight:
    """How one rank's rows of one micro-batch weigh in the loss of their update.

    Attributes:
        num_rows: rows of the tensors, the same on all ranks: those of the fullest, at least 1.
        steps: what TRL's loss is to divide by in place of the number of micro-batches.
        num_items: what it is to take for the tokens of the generation batch.
        token_share: share of the update's tokens that lie here, times the number of ranks, by whose mean gradients are
            reduced; weighs what is a mean over tokens whatever the loss: the entropy bonus.
        metric_scale: factor that makes TRL's mean of `policy_loss` over ranks one over rows (or over parts with rows).
    """

    num_rows: int
    steps: float
    num_items: float
    token_share: float
    metric_scale: float


def part_weights(
    update: Update,
    rank: int,
    loss_type: str,
    steps_per_generation: int,
    num_tokens: Callable[[TrainingRow], int],
) -> list[PartWeight]:
    """Weights of a rank's part of each micro-batch.

    Args:
        update: micro-batches of an update.
        rank: index of the rank.
        loss_type: of `GRPOConfig`.
        steps_per_generation: of `GRPOConfig`, by which TRL divides the tokens of a generation batch.
        num_tokens: tokens of a row that the loss counts.
    """
    ranks = len(update[0])
    tokens = [[sum(map(num_tokens, part)) for part in micro_batch] for micro_batch in update]
    total = sum(map(sum, tokens))
    all_rows = sum(len(part) for micro_batch in update for part in micro_batch)
    filled = [sum(count > 0 for count in counts) for counts in tokens]
    weights = []
    for micro_batch, counts, parts in zip(update, tokens, filled, strict=True):
        lengths = [len(part) for part in micro_batch]
        num_rows = max(1, *lengths)
        steps, scale = float(len(update)), 1.0
        if loss_type in _ROW_MEANS:
            steps, scale = all_rows / (ranks * num_rows), ranks * num_rows / sum(lengths)
        elif loss_type == "bnpo":
            steps, scale = max(1, sum(filled)) / ranks, ranks / max(1, parts)
        weights.append(
            PartWeight(
                num_rows=num_rows,
                steps=steps,
                num_items=total * steps_per_generation / steps,
                token_share=ranks * counts[rank] / total if total else 0.0,
                metric_scale=scale,
            )
        )
    return weights
