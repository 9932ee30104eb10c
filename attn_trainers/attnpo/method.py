"""AttnPO as a credit method: steps of each response, the attention they get from its answer, factors per token."""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..attention import KeyFocusObserver, decoder_of
from ..base.credit import BatchCredit, CompletionBatch, CreditContext, CreditMethod, RowFacts, SignalPass
from ..base.exhibits import Page
from ..base.options import changed_settings
from ..base.report import Report
from ..thinking import EndOfThinking
from .alignment import exclusion_warning, reasoning_step_ranges
from .credit import baseline_score, length_penalised_rewards, rloo_advantages, step_scales, token_factors
from .heads import Head, model_fingerprint, resolve_heads
from .metrics import credit_totals, group_metrics
from .options import AttnPOOptions
from .page import most_scaled, page_of, write_report
from .responses import ScoredResponse
from .steps import Splitter


logger = logging.getLogger(__name__)


class StepObserver(KeyFocusObserver):
    """`KeyFocusObserver` of responses cut into steps; a response without usable steps is not read.

    Attributes:
        responses: one per row of the batch.
    """

    def __init__(self, batch: CompletionBatch, responses: Sequence[ScoredResponse], heads: Sequence[Head]):
        self.responses = responses
        ranges, starts = [], []
        for response in responses:
            offset, alignment = len(response.prompt_ids), response.alignment
            ranges.append([(offset + begin, offset + end) for begin, end in alignment.step_ranges])
            usable = alignment.reason is None
            starts.append(offset + alignment.answer_start if usable else response.sequence_length)
        super().__init__(batch.attention_mask, ranges, starts, heads)


class AttnPOCredit(CreditMethod):
    """
    Scales each step's advantage by how much the final answer attends to it ([AttnPO](
    https://huggingface.co/papers/2602.09953)): redundant steps of good responses lose credit, essential steps of long
    ones are spared. Correct responses are rewarded for being short among the correct ones of their prompt.

    On trees a prompt's completions are all its leaves, and each token's own advantage says which of the two scales it
    gets. No paper describes that combination.

    Args:
        options: its settings.

    Attributes:
        heads: key-focus heads that are read, pairs (layer, head).
    """

    prefix = "attnpo"
    line_fields = {"attnpo/accuracy": "  correct {:.0%}", "attnpo/tokens_attenuated": "  attenuated {:.0%}"}

    def __init__(self, options: AttnPOOptions):
        self.options = options
        self.heads: list[Head] = []
        self.splitter = Splitter.of(
            options.step_mode,
            options.phrases_file,
            min_step_chars=options.min_step_chars,
            min_rest_chars=options.min_rest_chars,
            compat=options.compat_steps,
        )
        self.schedule_steps: float | None = None  # optimizer steps over which attenuation opens; known once training
        self._accuracy_column = 0
        self._accuracy_name = ""
        self._next_report = 0
        self._warned = False

    def settings(self) -> dict[str, object]:
        heads = {"heads": [list(pair) for pair in self.heads]}  # as resolved
        return changed_settings(self.options, AttnPOOptions) | heads

    def preflight(self, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, report: Report) -> None:
        if self.options.scales_credit:
            found = self._resolve_heads(model_config)
            report.add("key-focus heads [layer, head]", ", ".join(str(list(head)) for head in found))

    def setup(self, model, tokenizer, reward_names, seed):
        if self.options.scales_credit:
            self.heads = self._resolve_heads(decoder_of(model).config)
        self._tokenizer = tokenizer
        self._thinking = EndOfThinking(tokenizer, self.options.end_of_thinking)
        name = self.options.accuracy_reward or reward_names[0]
        if name not in reward_names:
            raise ValueError(
                f"accuracy_reward={name!r} is no reward function of this trainer; set it to one of "
                f"{', '.join(reward_names)}."
            )
        self._accuracy_name, self._accuracy_column = name, reward_names.index(name)

    def _resolve_heads(self, config: PretrainedConfig) -> list[Head]:
        text = config.get_text_config()
        return resolve_heads(
            self.options.heads,
            config.name_or_path,
            text.num_hidden_layers,
            text.num_attention_heads,
            step_mode=self.options.step_mode,
            fingerprint=model_fingerprint(config),
        )

    # ---- rewards ----------------------------------------------------------------------------------------------------

    def judge(self, rewards_per_func: Tensor, weights: Tensor) -> Tensor:
        """Raises a ValueError for a correctness that is neither 0 nor 1."""
        correct = rewards_per_func[:, self._accuracy_column].clone()  # (N,)
        if not (correct.isnan() | (correct == 0) | (correct == 1)).all():
            raise ValueError(
                f"accuracy_reward={self._accuracy_name!r} returned other values than 0 and 1; set accuracy_reward to "
                "a reward function that says whether a response is correct, or threshold this one."
            )
        return correct

    def shape_rewards(self, rewards_per_func: Tensor, lengths: Tensor, groups: Tensor) -> Tensor:
        correct = rewards_per_func[:, self._accuracy_column]  # (N,)
        # A response of unknown correctness takes no part in its group's mean length, like a wrong one.
        judged = correct.nan_to_num(nan=0.0)
        shaped = rewards_per_func.clone()
        for rows in group_rows(groups):
            penalised = length_penalised_rewards(judged[rows], lengths[rows], self.options.length_penalty)
            shaped[rows, self._accuracy_column] = penalised.masked_fill(correct[rows].isnan(), torch.nan)
        return shaped

    def reward_metrics(self, correct: Tensor, lengths: Tensor, groups: Tensor) -> dict[str, float]:
        return group_metrics([(correct[rows], lengths[rows]) for rows in group_rows(groups)])

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        advantages = torch.empty_like(rewards)
        for rows in group_rows(groups):
            advantages[rows] = rloo_advantages(rewards[rows])
        return advantages

    # ---- credit -----------------------------------------------------------------------------------------------------

    def observer(self, batch: CompletionBatch) -> StepObserver | None:
        return StepObserver(batch, self._align(batch), self.heads) if self.options.scales_credit else None

    def _align(self, batch: CompletionBatch) -> list[ScoredResponse]:
        """Steps of each completion, on the sampled tokens."""
        responses = []
        for prompt_ids, completion_ids in zip(batch.prompt_ids, batch.completion_ids, strict=True):
            alignment = reasoning_step_ranges(
                self._tokenizer,
                completion_ids,
                splitter=self.splitter,
                end_of_thinking=self.options.end_of_thinking,
                answer=self.options.answer,
            )
            phrases = self.splitter.phrase_counts("".join(alignment.texts))
            responses.append(ScoredResponse(prompt_ids, completion_ids, alignment, phrases=phrases))
        return responses

    def factors(self, passes, advantages, facts, context: CreditContext) -> BatchCredit:
        if self.schedule_steps is None:
            self.schedule_steps = self.options.schedule_fraction * context.max_steps
        progress = (context.step + 1) / self.schedule_steps if self.schedule_steps else math.inf
        all_factors, all_responses = [], []
        for signal, values, known in zip(passes, advantages, facts, strict=True):
            responses = self._scored_responses(signal, values, known)
            factors = torch.ones(len(responses), signal.batch.completion_width)  # (B, T)
            for row, response in enumerate(responses):
                if response.scores is not None:
                    self._scale(response, progress)
                    factors[row, : len(response.completion_ids)] = response_factors(response)
            all_factors.append(factors)
            all_responses += responses
        self._warn_of_exclusions(all_responses)
        return BatchCredit(
            factors=all_factors,
            totals=credit_totals(all_responses),
            values={"progress": min(progress, 1.0)},
            details=all_responses,
        )

    def _warn_of_exclusions(self, responses: Sequence[ScoredResponse]) -> None:
        """Say once why most responses of a batch have no usable steps, and what to set."""
        seen = [response for response in responses if response.completion_ids]
        if self._warned or not seen:
            return
        warning = exclusion_warning(
            [response.alignment.reason for response in seen],
            [self._thinking.text(response.completion_ids) for response in seen],
            end_of_thinking=self.options.end_of_thinking,
            answer=self.options.answer,
        )
        if warning is not None:
            logger.warning(warning)
            self._warned = True

    def _scored_responses(self, signal: SignalPass, advantages: Tensor, facts: RowFacts) -> list[ScoredResponse]:
        """The responses of a pass with all that their scales depend on."""
        responses = signal.observer.responses if signal.observer else self._align(signal.batch)
        scores = signal.observer.result() if signal.observer else [None] * len(responses)
        known = zip(advantages.tolist(), facts.correct.tolist(), facts.accuracies.tolist(), strict=True)
        for response, score, (values, correct, accuracy) in zip(responses, scores, known, strict=True):
            length = len(response.completion_ids)
            response.correct, response.accuracy = correct == 1, accuracy
            response.advantages = values * max(length, 1) if len(values) == 1 else values[:length]
            if response.alignment.reason is None and score is not None:
                response.scores = score.cpu()
        return responses

    def _scale(self, response: ScoredResponse, progress: float) -> None:
        """Set the response's baseline and, if it is correct, the factors of its steps for both signs of advantage."""
        options = self.options
        of_sequence = options.baseline_length == "sequence"
        baseline = {
            "accuracy": response.accuracy,
            "answer_length": response.answer_length,
            "sequence_length": response.sequence_length if of_sequence else len(response.completion_ids),
            "baseline_power": options.baseline_power,
        }
        response.baseline = baseline_score(**baseline)
        if not response.correct:
            return
        response.positive_scales, response.negative_scales = (
            step_scales(
                response.scores,
                sign,
                **baseline,
                progress=progress,
                attenuation_power=options.attenuation_power,
                floor=options.attenuation_floor,
                attenuate_positive=options.attenuate_positive,
                protect_negative=options.protect_negative,
            )
            for sign in (1.0, -1.0)
        )

    def page(self, credit, title: str) -> Page | None:
        shown = most_scaled(credit.details or [])
        return None if shown is None else page_of(shown, self._tokenizer, title)

    def report(self, credit: BatchCredit, context: CreditContext) -> None:
        if not self.options.page_steps or context.step < self._next_report:
            return
        self._next_report = context.step + self.options.page_steps
        write_report(context.folder / "attnpo", context.step, credit.details, self._tokenizer, context.ranks)

    def state_dict(self) -> dict:
        return {"schedule_steps": self.schedule_steps, "heads": self.heads, "next_report": self._next_report}

    def load_state_dict(self, state: dict) -> None:
        # A run that is prolonged on resume keeps its schedule: prompts that are attenuated stay so.
        self.schedule_steps, self._next_report = state["schedule_steps"], state["next_report"]


def group_rows(groups: Tensor) -> list[Tensor]:
    """Indices of the rows of each group, in the order of the groups' indices.

    Args:
        groups: (N,) index of each row's group.
    """
    order = groups.argsort(stable=True)
    counts = groups.unique(return_counts=True)[1].tolist()
    return list(order.split(counts))


def response_factors(response: ScoredResponse) -> Tensor:
    """(n,) factors of a response's tokens: each token's own advantage chooses between the scales of the two signs.

    1 for tokens in no step, tokens without advantage, and all of a response that is not to be scaled.
    """
    length = len(response.completion_ids)
    if response.positive_scales is None:
        return torch.ones(length)
    ranges = response.alignment.step_ranges
    advantages = torch.tensor(response.advantages)  # (n,)
    positive, negative = (
        token_factors(scales, ranges, length) for scales in (response.positive_scales, response.negative_scales)
    )
    return torch.where(advantages > 0, positive, torch.where(advantages < 0, negative, torch.ones(length)))
