"""Rhythm as a credit method: WAAD and FAI of each response, the heads behind them, factors, and the rhythm reward."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..attention import RhythmProfile, combine_heads, decoder_of
from ..attention.heads import HeadSets, middle_layers
from ..base.credit import (
    BatchCredit,
    CompletionBatch,
    CreditContext,
    CreditMethod,
    SignalPass,
    pad_rows,
)
from ..base.options import changed_settings
from ..base.ranks import Ranks
from ..base.report import Report
from . import metrics
from .advantages import combine_advantages
from .credit import Credit, CreditOptions, apply_sign, response_credit
from .heads import HeadCalibration, PooledSpans
from .observers import RewardObserver, SignalObserver
from .options import RhythmOptions
from .reward import RhythmReward, rhythm_reward
from .token_texts import TokenTexts


Signal = tuple[Tensor, Tensor]  # WAAD and FAI (n,) of one response, on the CPU


@dataclass
class RhythmDetails:
    """What was made of a generation batch.

    Attributes:
        heads: head sets of each row that credit was read from; `None` where none were, or while they are calibrated.
        factors: (n,) factors of each row, whatever the sign of its advantage.
        rewards: rhythm of each row, where it is rewarded.
    """

    heads: list[HeadSets] | None = None
    factors: list[Tensor] = field(default_factory=list)
    rewards: list[RhythmReward] = field(default_factory=list)


class RhythmCredit(CreditMethod):
    """
    Amplifies credit on preplan tokens, anchors or both ([Attention Illuminates LLM Reasoning](
    https://huggingface.co/papers/2510.13554)), and rewards the rhythm of attention, which the paper does not.

    On trees a shared prefix may get another factor in each leaf, since its future differs, and each token's own
    advantage decides by its sign. The rhythm reward compares whole groups and does not go with trees. No paper
    describes that combination.

    Args:
        options: its settings.

    Attributes:
        layers: layers whose heads are ranked.
        calibration: head sets that are fixed once.
        batches: generation batches that were given credit.
    """

    prefix = "rhythm"
    line_fields = {"rhythm/mean_factor": "  factor {:.2f}", "rhythm/amplified_share": "  amplified {:.0%}"}

    def __init__(self, options: RhythmOptions):
        self.options = options
        self.needs_entropies = options.scheme.startswith("entropy")
        self.success_threshold = options.success_threshold
        self.calibration = HeadCalibration(
            options.calibration_responses, options.calibration_refresh, options.head_fraction
        )
        self.layers: list[int] = []
        self.batches = 0
        self._heads_before: HeadSets | None = None  # to tell how much the sets change from batch to batch
        self._seed = 0

    def settings(self) -> dict[str, object]:
        return changed_settings(self.options, RhythmOptions)

    def preflight(self, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, report: Report) -> None:
        layers = self._layers_of(model_config.get_text_config())
        report.add("layers read", ", ".join(map(str, layers)))

    def check_trees(self) -> None:
        if self.options.rhythm_lambda > 0:
            raise ValueError(
                f"rhythm_lambda={self.options.rhythm_lambda} does not go with trees: the rhythm reward compares whole "
                "groups of independent completions; set it to 0, or use RhythmTrainer."
            )

    def setup(self, model, tokenizer, reward_names, seed):
        self.layers = self._layers_of(decoder_of(model).config)
        self.token_texts = TokenTexts(tokenizer)
        self._seed = seed

    def _layers_of(self, config: PretrainedConfig) -> list[int]:
        count = config.num_hidden_layers
        return middle_layers(count) if self.options.head_pool == "middle" else list(range(count))

    # ---- attention --------------------------------------------------------------------------------------------------

    def observer(self, batch: CompletionBatch) -> SignalObserver | None:
        options = self.options
        if not options.reads_attention:
            return None
        calibrated = options.reward_head_scope == "calibration" and self.calibration.heads is not None
        if options.rhythm_lambda > 0 and calibrated:
            return self._reward_observer(batch, [self.calibration.heads] * len(batch.input_ids))
        return SignalObserver(
            batch.attention_mask,
            batch.prompt_lengths,
            self.layers,
            window=options.waad_window,
            horizon=options.horizon,
            row_offset=options.row_offset,
            fai_tail=options.fai_tail,
        )

    def _reward_observer(self, batch: CompletionBatch, heads: list[HeadSets]) -> RewardObserver:
        return RewardObserver(
            batch.attention_mask,
            batch.prompt_lengths,
            self.layers,
            heads,
            sink_tokens=self.options.sink_tokens,
            window=self.options.waad_window,
            horizon=self.options.horizon,
            fai_tail=self.options.fai_tail,
        )

    def _heads(self, scope: str, profiles: Sequence[RhythmProfile], pooled: PooledSpans) -> list[HeadSets] | None:
        """Head sets of each row; `None` while a calibration is under way."""
        candidates, fraction = profiles[0].heads, self.options.head_fraction
        if scope == "sequence":
            return [PooledSpans.of([profile]).rank(candidates, fraction) for profile in profiles]
        heads = self.calibration.heads if scope == "calibration" else pooled.rank(candidates, fraction)
        return None if heads is None else [heads] * len(profiles)

    # ---- credit -----------------------------------------------------------------------------------------------------

    def factors(self, passes, advantages, facts, context: CreditContext) -> BatchCredit:
        options, credit = self.options, BatchCredit(details=RhythmDetails())
        if options.scheme == "none" and options.rhythm_lambda == 0:
            return credit
        profiles: list[RhythmProfile] = []
        pooled = None
        if options.reads_attention:
            profiles = [profile for signal in passes for profile in signal.observer.result()]
            pooled = pool_spans(profiles, context.ranks)
            if options.calibrates:
                self.calibration.update(pooled, profiles[0].heads)
                credit.values["calibrated"] = float(self.calibration.heads is not None)
        if options.rhythm_lambda > 0:
            credit.columns["reward"] = [None] * len(passes[0].batch.input_ids)
            self._reward_rhythm(credit, passes[0], advantages[0], facts[0], profiles, pooled, context)
        if options.scheme != "none":
            signs = advantages if credit.advantages is None else [_columns(credit.advantages[0])]
            self._set_factors(credit, passes, signs, facts, profiles, pooled)
        self.batches += 1
        return credit

    def _set_factors(self, credit: BatchCredit, passes, advantages, facts, profiles, pooled) -> None:
        options, details = self.options, credit.details
        completions = [ids for signal in passes for ids in signal.batch.completion_ids]
        signals = None
        if options.credit_reads_attention:
            details.heads = self._heads(options.head_scope, profiles, pooled)
            self._compare_heads(credit)
            heads = details.heads or self._heads("batch", profiles, pooled)
            signals = _signals(profiles, heads)
        keys = [key for known in facts for key in known.keys]
        entropies = [row for signal in passes for row in _entropy_rows(signal, self.needs_entropies)]
        rows = [
            self._response_credit(ids, key, entropy, None if signals is None else signals[row])
            for row, (ids, key, entropy) in enumerate(zip(completions, keys, entropies, strict=True))
        ]
        if signals is not None and details.heads is None:  # a calibration is under way
            rows = [replace(row, factors=torch.ones_like(row.factors)) for row in rows]
        details.factors = [row.factors for row in rows]
        credit.totals |= metrics.credit_totals(rows, signals)
        credit.factors, first = [], 0
        for signal, values in zip(passes, advantages, strict=True):
            own = details.factors[first : first + len(signal.batch.input_ids)]
            padded = pad_rows(own, signal.batch.completion_width, 1.0).to(values.device)  # (B, T)
            credit.factors.append(apply_sign(padded, values, options.gamma_sign))
            first += len(own)

    def _response_credit(self, ids: list[int], key: str, entropies: Tensor | None, signal: Signal | None) -> Credit:
        """Credit of one response; without a signal the scheme reads no attention."""
        waad, fai = signal or (torch.zeros(len(ids)), torch.full((len(ids),), torch.nan))
        # Seeded by what names the row, so that the draw does not depend on the number of ranks.
        seed = random.Random(f"{self._seed}/{self.batches}/{key}").getrandbits(63)
        return response_credit(
            waad,
            fai,
            self.options.scheme,
            CreditOptions.of(self.options),
            entropies=entropies,
            generator=torch.Generator().manual_seed(seed),
            eligible=self.token_texts.is_word(ids) if self.options.skip_punctuation else None,
        )

    def _compare_heads(self, credit: BatchCredit) -> None:
        """Tell how much the head sets changed since the batch before."""
        heads = credit.details.heads
        if self.options.head_scope != "sequence" and heads is not None:
            credit.values |= metrics.head_overlap(heads[0], self._heads_before)
        self._heads_before = heads[0] if heads else None

    # ---- rhythm reward ----------------------------------------------------------------------------------------------

    def _reward_rhythm(self, credit, signal: SignalPass, advantages, facts, profiles, pooled, context) -> None:
        options, observer = self.options, signal.observer
        if not isinstance(observer, RewardObserver):
            heads = self._heads(options.reward_head_scope, profiles, pooled)
            if heads is None:
                return
            # One more forward, for heads that were not known before the first.
            observer = self._reward_observer(signal.batch, heads)
            context.observe(signal.batch, observer)
            profiles = observer.result()
        signals = _signals(profiles, observer.heads)
        rewards = []
        for (waad, fai), measures, ids in zip(signals, observer.measures, signal.batch.completion_ids, strict=True):
            breadth, concentration = (torch.empty(0), torch.empty(0)) if measures is None else measures
            starts = self.token_texts.line_starts(ids) if options.reward_segment == "newline" else None
            rewards.append(rhythm_reward(waad, fai, breadth.cpu(), concentration.cpu(), options, line_starts=starts))
        credit.details.rewards = rewards
        credit.columns["reward"] = [reward.mean for reward in rewards]
        credit.totals |= metrics.measure_totals(observer.measures, [fai for _, fai in signals])
        self._combine(credit, signal.batch, advantages, rewards, context)

    def _combine(self, credit, batch: CompletionBatch, advantages: Tensor, rewards, context: CreditContext) -> None:
        """Put the rhythm into the advantages; groups may lie on several ranks, so all rows are gathered."""
        options, ranks, device = self.options, context.ranks, advantages.device
        mask = batch.attention_mask[:, -batch.completion_width :].bool()  # (B, T)
        columns = torch.tensor(
            [[reward.mean, len(reward.chunk_starts)] for reward in rewards], dtype=torch.float32, device=device
        )  # (B, 2)
        own = torch.cat([columns, mask.sum(dim=1, keepdim=True), advantages], dim=1)  # (B, 4)
        means, chunks, lengths, task = ranks.gather(own).unbind(dim=1)  # (ranks·B,) each
        unscored = context.rewards.isnan()
        correct = context.rewards.nan_to_num(nan=0.0) >= options.success_threshold
        values, all_masks = means, None
        if options.reward_mode == "token":
            per_token = pad_rows([reward.per_token for reward in rewards], mask.size(1), 0.0).to(device)
            both = torch.stack([per_token, mask.float()], dim=1)  # (B, 2, T)
            values, all_masks = ranks.gather_padded(both, dim=2).unbind(dim=1)
            all_masks = all_masks.bool()  # (ranks·B, widest T)
        combined = combine_advantages(
            task,
            values,
            context.group_size,
            options.rhythm_lambda,
            options.reward_mode,
            gate=options.reward_gate,
            correct=correct,
            task_rewards=context.rewards,
            mask=all_masks,
        )
        combined[unscored] = 0.0
        combined = combined[ranks.index * len(rewards) : (ranks.index + 1) * len(rewards)]
        credit.advantages = [combined[:, : mask.size(1)] if combined.dim() == 2 else combined]
        credit.values |= {"reward/mean": means.mean().item()}
        credit.values |= metrics.rhythm_metrics(means, correct, lengths, chunks)

    # ---- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        return {"batches": self.batches, "calibration": self.calibration.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.batches = state["batches"]
        self.calibration.load_state_dict(state["calibration"])


def pool_spans(profiles: Sequence[RhythmProfile], ranks: Ranks) -> PooledSpans:
    """Backward spans of all ranks' responses; a collective."""
    own = PooledSpans.of(profiles)
    counts = own.span_sum.new_tensor([own.tokens, own.responses])
    sums = ranks.sum(torch.cat([own.span_sum, counts]))  # (C + 2,)
    return PooledSpans(sums[:-2], int(sums[-2]), int(sums[-1]))


def _signals(profiles: Sequence[RhythmProfile], heads: Sequence[HeadSets]) -> list[Signal]:
    combined = [combine_heads(profile, *sets) for profile, sets in zip(profiles, heads, strict=True)]
    return [(signal.waad.cpu(), signal.fai.cpu()) for signal in combined]


def _entropy_rows(signal: SignalPass, wanted: bool) -> list[Tensor | None]:
    """(n,) entropies of each row of a pass."""
    lengths = map(len, signal.batch.completion_ids)
    if not wanted:
        return [None for _ in lengths]
    return [row[:length].float().cpu() for row, length in zip(signal.entropies, lengths, strict=True)]


def _columns(advantages: Tensor) -> Tensor:
    """(B, 1) or (B, T)."""
    return advantages[:, None] if advantages.dim() == 1 else advantages
