"""AttnPO as a TRL trainer: length-penalised rewards, leave-one-out advantages, and step scales under TRL's loss."""

import math
import textwrap
import time
from pathlib import Path

import torch
from torch import Tensor
from trl.trainer.utils import get_config_model_id

from ..attention import KeyFocusObserver, decoder_of
from ..base.checkpoints import read_state, write_state
from ..base.credit import AttentionCreditTrainer, CompletionBatch
from .alignment import reasoning_step_ranges
from .config import AttnPOConfig
from .credit import baseline_score, length_penalised_rewards, rloo_advantages, step_scales, token_factors
from .heads import Head, resolve_heads
from .metrics import credit_totals, group_metrics
from .page import write_response_page, write_responses
from .responses import ScoredResponse
from .steps import Splitter


class AttnPOTrainer(AttentionCreditTrainer):
    """
    Trainer for AttnPO, which shortens reasoning by scaling each step's credit by the final answer's attention to it.

    [AttnPO](https://huggingface.co/papers/2602.09953) rewards correct responses for being short among the correct ones
    of their prompt, takes leave-one-out advantages, and scales them per reasoning step by the attention that a few
    key-focus heads pay from the final answer to the step: redundant steps of good responses lose credit, essential
    steps of long ones are spared. Wrong responses are not scaled. Evaluation is plain accuracy.

    Several reward functions combine as in [`~trl.GRPOTrainer`]; the one that is the correctness
    (`args.accuracy_reward`) must return 1 or 0, or `None` for a response it cannot score, and enters training with the
    length penalty.

    Args:
        model, reward_funcs, args, kwargs: as for [`~trl.GRPOTrainer`]; `args` is an [`AttnPOConfig`]. Tools and
            environments are not supported.

    Attributes:
        heads: key-focus heads that are read, pairs (layer, head).
        last_responses: this rank's responses of the latest generation batch with steps, scores and factors.

    Raises:
        ValueError: for settings that cannot be honoured; for a model without known heads, naming the command that
            finds them; in training, for a correctness that is neither 0 nor 1.
    """

    _tag_names = ["trl", "attnpo"]
    _name = "AttnPO"
    _paper = {
        "title": "AttnPO: Attention-Guided Process Supervision for Efficient Reasoning",
        "id": "2602.09953",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{nie2026attnpo,
                title        = {{AttnPO: Attention-Guided Process Supervision for Efficient Reasoning}},
                author       = {Shuaiyi Nie and Siyu Ding and Wenyuan Zhang and Linhao Yu and Tianmeng Yang and
                                Yao Chen and Weichong Yin and Yu Sun and Hua Wu and Tingwen Liu},
                year         = 2026,
                eprint       = {arXiv:2602.09953},
            }"""),
    }
    metric_prefix = "attnpo"

    def __init__(self, model, reward_funcs, args=None, **kwargs):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = AttnPOConfig(f"{model_name.split('/')[-1]}-AttnPO")
        super().__init__(model, reward_funcs, args=args, **kwargs)
        self.heads: list[Head] = self._find_heads() if args.scales_credit else []
        self.splitter = self._make_splitter()
        self.last_responses: list[ScoredResponse] = []
        self.schedule_steps: float | None = None  # optimizer steps over which attenuation opens; known once training
        self._accuracy_column = self._find_accuracy_column()
        self._correct: Tensor | None = None  # (ranks·B,), NaN where it could not be said
        self._pending: list[ScoredResponse] = []
        self._next_report = 0

    def card_settings(self) -> dict[str, object]:
        return super().card_settings() | {"heads": [list(pair) for pair in self.heads]}

    def _find_heads(self) -> list[Head]:
        config = decoder_of(self.model).config
        name = get_config_model_id(self.accelerator.unwrap_model(self.model).config)
        return resolve_heads(self.args.heads, name, config.num_hidden_layers, config.num_attention_heads)

    def _make_splitter(self):
        args = self.args
        return Splitter.of(
            args.step_mode,
            args.phrases_file,
            min_step_chars=args.min_step_chars,
            min_rest_chars=args.min_rest_chars,
            compat=args.compat_steps,
        )

    def _find_accuracy_column(self) -> int:
        name = self.args.accuracy_reward
        if name is None:
            return 0
        if name not in self.reward_func_names:
            raise ValueError(
                f"accuracy_reward={name!r} is no reward function of this trainer; set it to one of "
                f"{', '.join(self.reward_func_names)}."
            )
        return self.reward_func_names.index(name)

    # ---- reward -----------------------------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # (ranks·B, F)
        if not self.model.training:
            return rewards
        lengths = torch.tensor([len(ids) for ids in completion_ids_list], device=rewards.device)
        lengths = self.accelerator.gather(lengths).view(-1, self.num_generations)  # (P, G)
        self._correct = rewards[:, self._accuracy_column].clone()
        correct = self._correct.view(-1, self.num_generations)  # (P, G)
        unknown = correct.isnan()
        if not (unknown | (correct == 0) | (correct == 1)).all():
            name = self.reward_func_names[self._accuracy_column]
            raise ValueError(
                f"accuracy_reward={name!r} returned other values than 0 and 1; set accuracy_reward to a reward "
                "function that says whether a response is correct, or threshold this one."
            )
        # A response of unknown correctness takes no part in its group's mean length, like a wrong one.
        penalised = length_penalised_rewards(correct.nan_to_num(nan=0.0), lengths, self.args.length_penalty)
        rewards[:, self._accuracy_column] = penalised.masked_fill(unknown, torch.nan).view(-1)
        self.rewards_per_func = rewards
        for name, value in group_metrics(correct, lengths).items():
            self.log_metric(name, value)
        return rewards

    def _combined_advantages(self) -> Tensor:
        """(ranks·B,) leave-one-out advantages of the weighted sum of the rewards, as TRL sums them."""
        rewards = self.rewards_per_func
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        total[rewards.isnan().all(dim=1)] = torch.nan
        return rloo_advantages(total.view(-1, self.num_generations)).view(-1)

    # ---- credit -----------------------------------------------------------------------------------------------------

    def make_observer(self, batch: CompletionBatch) -> KeyFocusObserver | None:
        start = time.perf_counter()
        self._pending = self._align(batch)
        self.log_metric("seconds/alignment", time.perf_counter() - start)
        if not self.args.scales_credit:
            return None
        ranges, starts = [], []
        for response in self._pending:
            offset = len(response.prompt_ids)
            alignment = response.alignment
            ranges.append([(offset + begin, offset + end) for begin, end in alignment.step_ranges])
            usable = alignment.reason is None
            starts.append(offset + alignment.answer_start if usable else response.sequence_length)
        return KeyFocusObserver(batch.attention_mask, ranges, starts, self.heads)

    def _align(self, batch: CompletionBatch) -> list[ScoredResponse]:
        """Steps of each completion, on the sampled tokens."""
        width = batch.input_ids.size(1) - batch.completion_width
        responses = []
        for ids, length, completion in zip(
            batch.input_ids.tolist(), batch.prompt_lengths, batch.completion_ids, strict=True
        ):
            alignment = reasoning_step_ranges(
                self._tokenizer, completion, splitter=self.splitter, end_of_thinking=self.args.end_of_thinking
            )
            response = ScoredResponse(ids[width - length : width], completion, alignment)
            if self.args.step_mode == "phrases":
                response.phrases = self.splitter.phrase_counts("".join(alignment.texts))
            responses.append(response)
        return responses

    def assign_credit(self, output: dict[str, Tensor], batch: CompletionBatch, observer: KeyFocusObserver | None):
        rank, rows = self.accelerator.process_index, output["completion_ids"].size(0)
        local = slice(rank * rows, (rank + 1) * rows)
        advantages = self._combined_advantages()
        output["advantages"] = advantages[local]  # (B,)
        self._logs["advantages"].extend(advantages.tolist())  # in place of the group-mean ones just logged
        correct = self._correct.view(-1, self.num_generations)  # (P, G)
        accuracies = correct.nanmean(dim=1).nan_to_num(nan=0.0).repeat_interleave(self.num_generations)[local].tolist()
        scores = observer.result() if observer is not None else [None] * rows
        is_correct = (self._correct[local] == 1).tolist()
        own_advantages = output["advantages"].tolist()
        credit = torch.ones_like(output["completion_ids"], dtype=torch.float32)  # (B, T)
        for row, response in enumerate(self._pending):
            response.correct, response.accuracy = is_correct[row], accuracies[row]
            response.advantage = own_advantages[row]
            if response.alignment.reason is None and scores[row] is not None:
                response.scores = scores[row].cpu()
                self._scale(response, credit[row])
        output["credit"] = credit
        self.last_responses, self._pending = self._pending, []
        self.log_metric("progress", min(self._progress(), 1.0))
        self.log_means(credit_totals(self.last_responses))
        self._report()

    def _scale(self, response: ScoredResponse, credit: Tensor) -> None:
        """Set the response's baseline and factors, and the factors of its tokens in `credit`, (T,)."""
        args = self.args
        lengths = {
            "answer_length": response.answer_length,
            "sequence_length": (
                response.sequence_length if args.baseline_length == "sequence" else len(response.completion_ids)
            ),
        }
        powers = {"accuracy": response.accuracy, "baseline_power": args.baseline_power}
        response.baseline = baseline_score(**powers, **lengths)
        if not response.correct:
            return
        response.scales = step_scales(
            response.scores,
            response.advantage,
            **powers,
            **lengths,
            progress=self._progress(),
            attenuation_power=args.attenuation_power,
            floor=args.attenuation_floor,
            attenuate_positive=args.attenuate_positive,
            protect_negative=args.protect_negative,
        )
        length = len(response.completion_ids)
        credit[:length] = token_factors(response.scales, response.alignment.step_ranges, length)

    def _progress(self) -> float:
        """Optimizer steps done, the present one counted, over the length of the schedule."""
        if self.schedule_steps is None:
            self.schedule_steps = self.args.schedule_fraction * self.state.max_steps
        return (self.state.global_step + 1) / self.schedule_steps if self.schedule_steps else math.inf

    def _report(self) -> None:
        if not self.args.page_steps or self.state.global_step < self._next_report:
            return
        self._next_report = self.state.global_step + self.args.page_steps
        folder = Path(self.args.output_dir) / "attnpo"
        name = f"step-{self.state.global_step:06d}"
        if self.accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            shown = max(self.last_responses, key=lambda r: (int(r.scaled.sum()), len(r.alignment.kinds)))
            write_response_page(
                folder / f"{name}.html", shown, self._tokenizer, title=f"Step {self.state.global_step}"
            )
        write_responses(folder / f"{name}.jsonl", self.last_responses, self._tokenizer, self.accelerator)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = f"{self._get_output_dir(trial=trial)}/checkpoint-{self.state.global_step}"
            state = {"schedule_steps": self.schedule_steps, "heads": self.heads, "next_report": self._next_report}
            write_state(folder, "attnpo", state)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        state = read_state(checkpoint, "attnpo") if checkpoint is not None else None
        if state is not None:
            # A run that is prolonged on resume keeps its schedule: prompts that are attenuated stay so.
            self.schedule_steps, self._next_report = state["schedule_steps"], state["next_report"]
