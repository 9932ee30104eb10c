"""What the criteria choose by: steps, their influence and token entropies of a rollout, from one forward."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attention import InfluenceObserver, observe_attention
from ..attnrl.exploration import CRITERIA, BranchPoints, choose_branch_points
from ..attnrl.steps import StepDelimiters, segment_steps


_ENTROPY_ROWS = 256


@dataclass(frozen=True)
class RolloutSignals:
    """What is known of a rollout of n tokens in m steps.

    Attributes:
        step_ranges: half-open token ranges of the steps, counted from the first completion token.
        influence: (m,) forward context influence of each step.
        entropies: (n,) entropy in nats of the distribution that each token was drawn from.
    """

    step_ranges: list[tuple[int, int]]
    influence: list[float]
    entropies: list[float]


def sampling_entropies(logits: Tensor, temperature: float) -> Tensor:
    """Entropies (n,) in nats, float32, of the distributions drawn from at a temperature, given (n, V) logits."""
    parts = []
    for rows in logits.split(_ENTROPY_ROWS):
        parts.append(torch.distributions.Categorical(logits=rows.float() / temperature, validate_args=False).entropy())
    return torch.cat(parts)


@torch.no_grad()
def read_rollout(
    model: nn.Module,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    delimiters: StepDelimiters,
    *,
    delta: int = 4,
    aggregation: str = "sum",
    temperature: float = 1.0,
) -> RolloutSignals:
    """Steps, influence and entropies of one rollout.

    Args:
        model: transformers decoder.
        prompt_ids, completion_ids: tokens without padding, at least one each.
        delimiters: of the tokenizer.
        delta, aggregation: of the influence, as in `forward_context_influence`.
        temperature: at which the completion was drawn.
    """
    prompt = len(prompt_ids)
    segmentation = segment_steps(prompt, completion_ids, delimiters)
    ids = torch.tensor([[*prompt_ids, *completion_ids]], device=next(model.parameters()).device)  # (1, N)
    mask = torch.ones_like(ids)
    observer = InfluenceObserver(mask, [segmentation.ranges], [segmentation.stop_step], delta, aggregation)
    with observe_attention(model, observer):
        kept = len(completion_ids) + 1
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits[0, :-1]
    return RolloutSignals(
        [(start - prompt, end - prompt) for start, end in segmentation.ranges[1:]],
        observer.result()[0][1:].tolist(),
        sampling_entropies(logits, temperature).tolist(),
    )


def points_of(
    criterion: str,
    signals: RolloutSignals,
    *,
    num_points: int,
    top_fraction: float,
    min_spacing: int,
    seed: int,
) -> BranchPoints:
    """Where a criterion branches a rollout.

    Args:
        criterion: a name of `CRITERIA` that asks for nothing but `RolloutSignals` and a random generator.
        signals: of the rollout.
        num_points, top_fraction, min_spacing: see `CriterionInput`.
        seed: of the random generator.
    """
    needs = CRITERIA[criterion].needs
    given = {"influence": signals.influence, "entropies": signals.entropies, "rng": random.Random(seed)}
    return choose_branch_points(
        criterion,
        step_ranges=signals.step_ranges,
        num_points=num_points,
        top_fraction=top_fraction,
        min_spacing=min_spacing,
        **({needs: given[needs]} if needs else {}),
    )
