"""Bars of the long steps: that they are there, with the right totals, and gone where nobody wants them."""

import io
from types import SimpleNamespace

import pytest

from attn_trainers import AttnPOConfig, AttnPOTrainer, AttnRLConfig, AttnRLTrainer
from attn_trainers.base.progress import ProgressMixin
from attn_trainers.rewards import math_accuracy_reward
from tests.helpers import odd_sum


def algebra(completions, **kwargs):
    """What only the grading workers can compare: a batch of as many requests."""
    answers = [f"\\frac{{x}}{{{i}}}+y" for i in range(2, 2 + len(completions))]
    return math_accuracy_reward([f"\\boxed{{y+x/{i}}}" for i in range(2, 2 + len(completions))], answers)


@pytest.fixture
def make_trainer(tmp_path, tiny_model_dir, tiny_tokenizer, arithmetic_dataset):
    def make(trainer_class, config_class, **kwargs):
        settings = {
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_completion_length": 12,
            "max_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
            "disable_tqdm": False,
        }
        return trainer_class(
            str(tiny_model_dir),
            [odd_sum, algebra],
            config_class(str(tmp_path), **(settings | kwargs)),
            train_dataset=arithmetic_dataset,
            eval_dataset=arithmetic_dataset.select(range(2)),
            processing_class=tiny_tokenizer,
        )

    return make


ATTNRL = {
    "num_rollouts": 2,
    "num_branch_points": 1,
    "rollouts_per_branch": 1,
    "min_branch_spacing": 0,
    "influence_delta": 1,
    "per_device_train_batch_size": 10,
    "filter_easy_prompts": False,
}
ATTNPO = {"heads": [[0, 0]], "step_mode": "paragraphs", "num_generations": 4, "num_generations_eval": 2}


def told(bars) -> list[tuple[str, int, int]]:
    return [(bar.desc, bar.n, bar.total) for bar in bars]


def test_sampling_grading_and_forwards_of_trees(make_trainer, bars):
    trainer = make_trainer(AttnRLTrainer, AttnRLConfig, **ATTNRL)
    trainer.train()
    counters = trainer.pipeline.counters
    seen = told(bars)
    assert all(n == total for _, n, total in seen) and not any(bar.leave for bar in bars)
    assert {"Sampling", "Grading", "Reward functions", "Attention of rollouts", "Old log-probs"} <= {
        w for w, *_ in seen
    }
    totals = {what: [total for w, _, total in seen if w == what] for what, *_ in seen}
    # The initial rollouts of the first batch, then its continuations.
    assert len(totals["Sampling"]) == 2 and sum(totals["Sampling"]) == counters["samples"] > totals["Sampling"][0]
    assert totals["Grading"] == totals["Sampling"]
    assert totals["Reward functions"] == [2, 2]
    assert callable(trainer.reward_funcs[0])


def test_sampling_and_grading_of_groups_and_of_evaluation(make_trainer, bars):
    trainer = make_trainer(AttnPOTrainer, AttnPOConfig, **ATTNPO)
    trainer.train()
    expected = [("Grading", 4, 4), ("Reward functions", 2, 2), ("Attention", 1, 1)]
    assert sorted(one for one in told(bars) if one[0] != "Sampling") == sorted(expected)
    (sampling,) = [bar for bar in bars if bar.desc == "Sampling"]
    assert sampling.total == 12 and 1 <= sampling.n <= 12 and sampling.unit == "token"
    assert not trainer.model._forward_hooks
    bars.clear()
    trainer.evaluate()
    assert [one for one in told(bars) if one[0] != "Sampling"] == [("Reward functions", 2, 2), ("Grading", 4, 4)]


@pytest.mark.parametrize(
    ("trainer_class", "config_class", "options"),
    [(AttnRLTrainer, AttnRLConfig, ATTNRL), (AttnPOTrainer, AttnPOConfig, ATTNPO)],
)
def test_no_bar_where_they_are_disabled(make_trainer, bars, trainer_class, config_class, options):
    trainer = make_trainer(trainer_class, config_class, **options, disable_tqdm=True)
    trainer.train()
    trainer.evaluate()
    assert not bars


@pytest.mark.parametrize(
    ("is_first", "disabled", "terminal", "shown"),
    [(True, False, True, 1), (False, False, True, 0), (True, True, True, 0), (True, False, False, 0)],
)
def test_bars_are_for_the_terminal_of_the_first_rank(bars, monkeypatch, is_first, disabled, terminal, shown):
    if not terminal:
        monkeypatch.setattr("attn_trainers.base.progress.sys", SimpleNamespace(stderr=io.StringIO()))
    mixin = ProgressMixin()
    mixin.accelerator, mixin.args = SimpleNamespace(is_main_process=is_first), SimpleNamespace(disable_tqdm=disabled)
    assert list(mixin.progress(range(3), "Three")) == [0, 1, 2]
    assert told(bars) == [("Three", 3, 3)] * shown


class Engine:
    """Draws its bar as vLLM's `LLM` does."""

    def generate(self, prompts, sampling_params=None, use_tqdm=True):
        list(use_tqdm(prompts, desc="Rendering prompts"))
        bar = use_tqdm(total=len(prompts), desc="Processed prompts", dynamic_ncols=True, postfix="est. speed")
        for _ in prompts:
            assert bar.format_dict["elapsed"] > 0
            bar.update(1)
        bar.close()


def test_the_engine_that_trl_calls_shows_one_bar(bars):
    mixin, engine = ProgressMixin(), Engine()
    mixin.accelerator, mixin.args = SimpleNamespace(is_main_process=True), SimpleNamespace(disable_tqdm=False)
    with mixin._showing_requests(engine):
        engine.generate(["a", "b", "c"], sampling_params=None, use_tqdm=False)
    assert told(bars) == [("Sampling", 3, 3)]
    assert "generate" not in vars(engine)
