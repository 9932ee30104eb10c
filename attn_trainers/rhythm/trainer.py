"""Rhythm as a TRL trainer: preplan-and-anchor credit factors and the rhythm reward on top of GRPO."""

import random
import textwrap
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from trl.trainer.utils import get_config_model_id

from ..attention import RhythmProfile, combine_heads, decoder_of, middle_layers
from ..attention.heads import HeadSets
from ..base.checkpoints import read_state, write_state
from ..base.credit import AttentionCreditTrainer, CompletionBatch
from . import metrics
from .advantages import combine_advantages
from .config import RhythmConfig
from .credit import apply_sign, credit_factors
from .heads import HeadCalibration, PooledSpans
from .metrics import rhythm_metrics
from .observers import RewardObserver, SignalObserver
from .reward import RhythmReward, rhythm_reward
from .token_texts import TokenTexts


class RhythmTrainer(AttentionCreditTrainer):
    """
    Trainer for preplan-and-anchor credit and the rhythm reward.

    [Attention Illuminates LLM Reasoning](https://huggingface.co/papers/2510.13554) multiplies each token's advantage
    by a factor that is larger on preplan tokens (where the model looks far back), on anchors (to which later tokens
    attend), or on both, coupled. Which heads are asked follows from how far back they look on the current batch. The
    rhythm reward, which is not in the paper, adds to the advantage how well a response's attention alternates between
    the two.

    With `scheme="none"` and `rhythm_lambda=0` this is [`~trl.GRPOTrainer`] to the bit. So it is in evaluation.

    Args:
        model, reward_funcs, args, kwargs: as for [`~trl.GRPOTrainer`]; `args` is a [`RhythmConfig`]. Tools and
            environments are not supported.

    Raises:
        ValueError: for settings that do not work together, naming field, value and fix.
    """

    _tag_names = ["trl", "rhythm"]
    _name = "Rhythm"
    _paper = {
        "title": "Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained Policy "
        "Optimization",
        "id": "2510.13554",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{li2025attention,
                title        = {{Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables
                                 Fine-Grained Policy Optimization}},
                author       = {Yang Li and Zhichen Dong and Yuhan Sun and Weixun Wang and Shaopan Xiong and Yijia Luo
                                and Jiashun Liu and Han Lu and Jiamang Wang and Wenbo Su and Bo Zheng and Junchi Yan},
                year         = 2025,
                eprint       = {arXiv:2510.13554},
            }"""),
    }
    metric_prefix = "rhythm"

    def __init__(self, model, reward_funcs, args=None, **kwargs):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = RhythmConfig(f"{model_name.split('/')[-1]}-Rhythm")
        super().__init__(model, reward_funcs, args, **kwargs)
        self.needs_entropies = args.scheme.startswith("entropy")
        num_layers = decoder_of(self.model).config.num_hidden_layers
        self.layers = middle_layers(num_layers) if args.head_pool == "middle" else list(range(num_layers))
        self.calibration = HeadCalibration(args.calibration_responses, args.calibration_refresh, args.head_fraction)
        self.token_texts = TokenTexts(self._tokenizer)
        self.batches = 0  # generation batches that were given credit
        # Heads, factors and rewards of the last batch, to look at.
        self.credit_heads: list[HeadSets] | None = None
        self.last_factors: list[Tensor] = []
        self.last_rewards: list[RhythmReward] = []

    # ---- attention --------------------------------------------------------------------------------------------------

    def make_observer(self, batch: CompletionBatch) -> SignalObserver | None:
        if not self.args.reads_attention:
            return None
        if self.args.rhythm_lambda > 0 and self._calibrated_reward:
            return self._reward_observer(batch, [self.calibration.heads] * len(batch.input_ids))
        return SignalObserver(
            batch.attention_mask,
            batch.prompt_lengths,
            self.layers,
            window=self.args.waad_window,
            horizon=self.args.horizon,
            row_offset=self.args.row_offset,
            fai_tail=self.args.fai_tail,
        )

    @property
    def _calibrated_reward(self) -> bool:
        return self.args.reward_head_scope == "calibration" and self.calibration.heads is not None

    def _reward_observer(self, batch: CompletionBatch, heads: list[HeadSets]) -> RewardObserver:
        return RewardObserver(
            batch.attention_mask,
            batch.prompt_lengths,
            self.layers,
            heads,
            sink_tokens=self.args.sink_tokens,
            window=self.args.waad_window,
            horizon=self.args.horizon,
            fai_tail=self.args.fai_tail,
        )

    def _observe_again(self, batch: CompletionBatch, heads: list[HeadSets]) -> RewardObserver:
        """One more forward, for heads that were not known before the first."""
        start_time = time.perf_counter()
        observer = self._reward_observer(batch, heads)
        self.forward_for_signal(batch, observer)
        self.log_metric("seconds/second_forward", time.perf_counter() - start_time)
        return observer

    def _pool_spans(self, profiles: Sequence[RhythmProfile]) -> PooledSpans:
        """Backward spans of all ranks' responses; a collective."""
        own = PooledSpans.of(profiles)
        counts = own.span_sum.new_tensor([own.tokens, own.responses])
        sums = self.accelerator.reduce(torch.cat([own.span_sum, counts]), reduction="sum")  # (C + 2,)
        return PooledSpans(sums[:-2], int(sums[-2]), int(sums[-1]))

    def _heads(self, scope: str, profiles: Sequence[RhythmProfile], pooled: PooledSpans) -> list[HeadSets] | None:
        """Head sets of each row; `None` while a calibration is under way."""
        candidates, fraction = profiles[0].heads, self.args.head_fraction
        if scope == "sequence":
            return [PooledSpans.of([profile]).rank(candidates, fraction) for profile in profiles]
        heads = self.calibration.heads if scope == "calibration" else pooled.rank(candidates, fraction)
        return None if heads is None else [heads] * len(profiles)

    # ---- credit -----------------------------------------------------------------------------------------------------

    def assign_credit(self, output: dict[str, Tensor], batch: CompletionBatch, observer: SignalObserver | None):
        args = self.args
        if args.scheme == "none" and args.rhythm_lambda == 0:
            return
        profiles = pooled = None
        if observer is not None:
            profiles = observer.result()
            pooled = self._pool_spans(profiles)
            if args.calibrates:
                self.calibration.update(pooled, profiles[0].heads)
                self.log_metric("calibrated", float(self.calibration.heads is not None))
        if args.rhythm_lambda > 0:
            self._add_rhythm_reward(output, batch, observer, profiles, pooled)
        if args.scheme != "none":
            self._set_factors(output, batch, profiles if args.credit_reads_attention else None, pooled)
        self.batches += 1

    def _set_factors(self, output, batch: CompletionBatch, profiles, pooled: PooledSpans | None) -> None:
        args = self.args
        completions = batch.completion_ids
        signals = self._credit_signals(completions, profiles, pooled)
        eligible = [self.token_texts.is_word(ids) if args.skip_punctuation else None for ids in completions]
        first_row = self.accelerator.process_index * len(completions)
        options = args.credit_options()
        factors = []
        for row, ((waad, fai), words) in enumerate(zip(signals, eligible, strict=True)):
            # Seeded by the row among all ranks, so that the draw does not depend on their number.
            seed = random.Random(f"{args.seed}/{self.batches}/{first_row + row}").getrandbits(63)
            factors.append(
                credit_factors(
                    waad,
                    fai,
                    args.scheme,
                    entropies=self.entropies[row, : len(waad)].float().cpu() if self.needs_entropies else None,
                    generator=torch.Generator().manual_seed(seed),
                    eligible=words,
                    **vars(options),
                )
            )
        if profiles is not None and self.credit_heads is None:  # a calibration is under way
            factors = [torch.ones_like(row) for row in factors]
        self.last_factors = factors
        totals = metrics.factor_totals(factors)
        if profiles is not None:
            totals |= metrics.set_totals(signals, factors, eligible, args.scheme, options)
        self.log_means(totals)
        padded = _pad_rows(factors, batch.completion_width, 1.0).to(output["advantages"].device)  # (B, T)
        advantages = output["advantages"]
        advantages = advantages[:, None] if advantages.dim() == 1 else advantages
        output["credit"] = apply_sign(padded, advantages, args.gamma_sign)

    def _credit_signals(self, completions, profiles, pooled) -> list[tuple[Tensor, Tensor]]:
        """WAAD and FAI of each row, (n,) each, on the CPU; placeholders where the scheme reads no attention."""
        if profiles is None:
            return [(torch.zeros(len(ids)), torch.full((len(ids),), torch.nan)) for ids in completions]
        previous, self.credit_heads = self.credit_heads, self._heads(self.args.head_scope, profiles, pooled)
        if self.args.head_scope != "sequence" and self.credit_heads is not None:
            for name, value in metrics.head_overlap(self.credit_heads[0], previous and previous[0]).items():
                self.log_metric(name, value)
        heads = self.credit_heads or self._heads("batch", profiles, pooled)
        combined = [combine_heads(profile, *sets) for profile, sets in zip(profiles, heads, strict=True)]
        return [(signal.waad.cpu(), signal.fai.cpu()) for signal in combined]

    # ---- rhythm reward ----------------------------------------------------------------------------------------------

    def _add_rhythm_reward(self, output, batch: CompletionBatch, observer, profiles, pooled: PooledSpans) -> None:
        args = self.args
        if not isinstance(observer, RewardObserver):
            heads = self._heads(args.reward_head_scope, profiles, pooled)
            if heads is None:
                return
            observer = self._observe_again(batch, heads)
            profiles = observer.result()
        signals = [combine_heads(profile, *sets) for profile, sets in zip(profiles, observer.heads, strict=True)]
        rewards = []
        for signal, measures, ids in zip(signals, observer.measures, batch.completion_ids, strict=True):
            breadth, concentration = (torch.empty(0), torch.empty(0)) if measures is None else measures
            starts = self.token_texts.line_starts(ids) if args.reward_segment == "newline" else None
            waad, fai = signal.waad.cpu(), signal.fai.cpu()
            rewards.append(
                rhythm_reward(waad, fai, breadth.cpu(), concentration.cpu(), args.reward_options(), line_starts=starts)
            )
        self.last_rewards = rewards
        self.log_means(metrics.measure_totals(observer.measures, [signal.fai for signal in signals]))
        self._combine(output, rewards)

    def _combine(self, output: dict[str, Tensor], rewards: Sequence[RhythmReward]) -> None:
        """Put the rhythm into the advantages; groups may lie on several ranks, so all rows are gathered."""
        args, device = self.args, output["advantages"].device
        mask = output["completion_mask"].bool()  # (B, T)
        columns = torch.tensor(
            [[reward.mean, len(reward.chunk_starts)] for reward in rewards], dtype=torch.float32, device=device
        )  # (B, 2)
        own = torch.cat([columns, mask.sum(dim=1, keepdim=True), output["advantages"][:, None]], dim=1)  # (B, 4)
        means, chunks, lengths, task = self.accelerator.gather(own).unbind(dim=1)  # (ranks·B,) each
        unscored = self.rewards_per_func.isnan().all(dim=1)
        scores = (self.rewards_per_func * self.reward_weights.to(device)).nansum(dim=1)  # (ranks·B,)
        correct = scores >= args.success_threshold
        values, all_masks = means, None
        if args.reward_mode == "token":
            per_token = _pad_rows([reward.per_token for reward in rewards], mask.size(1), 0.0).to(device)
            both = self.accelerator.pad_across_processes(torch.stack([per_token, mask.float()]), dim=2)
            values, all_masks = self.accelerator.gather(both.transpose(0, 1).contiguous()).unbind(dim=1)
            all_masks = all_masks.bool()  # (ranks·B, widest T)
        advantages = combine_advantages(
            task,
            values,
            self.num_generations,
            args.rhythm_lambda,
            args.reward_mode,
            gate=args.reward_gate,
            correct=correct,
            task_rewards=scores.masked_fill(unscored, torch.nan),
            mask=all_masks,
        )
        advantages[unscored] = 0.0
        first = self.accelerator.process_index * len(rewards)
        output["advantages"] = advantages[first : first + len(rewards)]
        if advantages.dim() == 2:
            output["advantages"] = output["advantages"][:, : mask.size(1)]
        self.log_metric("reward/mean", means.mean().item())
        for name, value in rhythm_metrics(means, correct, lengths, chunks).items():
            self.log_metric(f"reward/{name.removeprefix('reward_')}", value)

    # ---- logs and checkpoints ---------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and self.args.reads_attention and self._metrics["train"]["step_time"]:
            logged = self._metrics["train"]
            share = sum(logged["rhythm/seconds/attention"]) / sum(logged["step_time"])
            logged["rhythm/seconds/attention_share"].append(share)
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = f"{self._get_output_dir(trial=trial)}/checkpoint-{self.state.global_step}"
            write_state(folder, "rhythm", {"batches": self.batches, "calibration": self.calibration.state_dict()})

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        state = read_state(checkpoint, "rhythm") if checkpoint is not None else None
        if state is not None:
            self.batches = state["batches"]
            self.calibration.load_state_dict(state["calibration"])


def _pad_rows(rows: Sequence[Tensor], width: int, value: float) -> Tensor:
    """(B, width) from rows of (n_i,)."""
    padded = torch.full((len(rows), width), value, dtype=torch.float32)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded
