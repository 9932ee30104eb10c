"""Credit on trees: numbers worked out by hand, what is trained on with it, and what of it outlives a step."""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attn_trainers import AttnRLConfig, AttnRLTrainer
from attn_trainers.attention import RhythmObserver, RhythmProfile
from attn_trainers.attnpo import method as attnpo_method
from attn_trainers.attnpo.method import AttnPOCredit
from attn_trainers.attnpo.options import AttnPOOptions
from attn_trainers.attnrl.pipeline import Draw
from attn_trainers.attnrl.rollouts import PromptRollouts
from attn_trainers.base.credit import BatchCredit, CreditMethod
from attn_trainers.rhythm import method as rhythm_method
from attn_trainers.rhythm.method import RhythmCredit
from attn_trainers.rhythm.options import RhythmOptions
from attn_trainers.sampling.requests import GeneratedTokens
from tests.helpers import logged, make_continuation, make_rollout


EOS, CLOSE, BLANK = 1, 4, 5  # <eos>, </think> and the blank line of the arithmetic tokenizer
HEADS = [[0, 0], [1, 1]]


def odd_sum(completions, completion_ids, **kwargs):
    """Right and wrong completions in about equal shares, whatever the model writes."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def written(request, rng: random.Random) -> list[int]:
    """Numbers in paragraphs, an end of thinking where the head has none yet, an answer and the end."""
    tokens = [BLANK if i % 3 == 2 else rng.randint(13, 200) for i in range(rng.choice([6, 9, 12]))]
    if CLOSE not in request.prompt_ids:
        tokens.append(CLOSE)
    tokens += [rng.randint(13, 200) for _ in range(rng.randint(1, 3))] + [EOS]
    return tokens[: request.max_tokens]


class RecordingTrainer(AttnRLTrainer):
    """Keeps the micro-batches of each generation batch, and each loss."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches, self.losses = [], []

    def _training_micro_batches(self, prompts, num_drawn):
        updates = super()._training_micro_batches(prompts, num_drawn)
        self.batches.append([batch for update in updates for batch in update])
        return updates

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        self.losses.append(loss.item())
        return loss


class WritingTrainer(RecordingTrainer):
    """Writes completions with steps and an answer; they hang on torch's random state, as sampled ones do."""

    def generate_requests(self, requests):
        seeds = torch.randint(2**31, (len(requests),)).tolist()
        return [
            GeneratedTokens(written(request, random.Random(seed)))
            for request, seed in zip(requests, seeds, strict=True)
        ]


class Ones(CreditMethod):
    """Factors that change nothing, with or without a look at attention."""

    prefix = "ones"

    def __init__(self, observes: bool):
        self.observes, self.profiles = observes, []

    def observer(self, batch):
        return RhythmObserver(batch.attention_mask, batch.prompt_lengths, [0, 1]) if self.observes else None

    def factors(self, passes, advantages, facts, context):
        if self.observes:
            self.profiles += [profile for signal in passes for profile in signal.observer.result()]
        return BatchCredit(factors=[torch.ones_like(values) for values in advantages])


def attnpo(**options) -> AttnPOCredit:
    settings = {"heads": HEADS, "step_mode": "paragraphs", "min_step_chars": 0, "schedule_fraction": 0.0}
    return AttnPOCredit(AttnPOOptions(**(settings | options)))


def rhythm(**options) -> RhythmCredit:
    return RhythmCredit(RhythmOptions(**({"fai_min_distance": 2, "head_pool": "all"} | options)))


@pytest.fixture(scope="module")
def sharp_model_dir(build_sharp_model) -> Path:
    return build_sharp_model(hidden_size=64, num_layers=2)


@pytest.fixture
def make_trainer(tmp_path, sharp_model_dir, tiny_tokenizer, arithmetic_dataset):
    def make(credit=None, trainer_class=WritingTrainer, reward=odd_sum, **kwargs):
        settings = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 6,
            "steps_per_generation": 4,
            "gradient_accumulation_steps": 2,
            "num_rollouts": 4,
            "rollouts_per_branch": 1,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "max_completion_length": 24,
            "min_branch_spacing": 0,
            "influence_delta": 1,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
        }
        return trainer_class(
            str(sharp_model_dir),
            reward,
            AttnRLConfig(**(settings | kwargs)),
            train_dataset=arithmetic_dataset,
            processing_class=tiny_tokenizer,
            credit=credit,
        )

    return make


def weights(trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


# ---- a prompt of two trees, by hand ---------------------------------------------------------------------------------

# Prompt of 10 tokens. Tree 0: a correct rollout of 10 tokens, cut inside its first step at 3, where two wrong
# continuations begin. Tree 1: a correct rollout of 8 tokens, cut at 2, where a correct continuation begins that ends
# after 12. So 3 of 5 leaves are correct.
PROMPT = list(range(20, 30))
FIRST = [31, 32, 33, 34, BLANK, 35, BLANK, CLOSE, 36, EOS]  # steps (0, 5) and (5, 7), an answer of 2 tokens
WRONG = [[41, BLANK, 42, CLOSE, 43, EOS], [44, BLANK, 45, CLOSE, 46, EOS]]  # with their head (0, 5) and (5, 6)
SECOND = [51, 52, BLANK, 53, BLANK, CLOSE, 54, EOS]  # steps (0, 3) and (3, 5), an answer of 2
LONG = [61, 62, BLANK, 63, 64, BLANK, CLOSE, 65, 66, EOS]  # with its head steps (0, 5) and (5, 8), an answer of 3


def two_trees() -> PromptRollouts:
    rollouts = [
        make_rollout(FIRST, 1.0, [make_continuation(3, tokens, 0.0) for tokens in WRONG]),
        make_rollout(SECOND, 1.0, [make_continuation(2, LONG, 1.0)]),
    ]
    return PromptRollouts(Draw(0, 0), {}, PROMPT, rollouts)


LEAVES = {
    "first": FIRST,
    "wrong 0": FIRST[:3] + WRONG[0],
    "wrong 1": FIRST[:3] + WRONG[1],
    "second": SECOND,
    "long": SECOND[:2] + LONG,
}


def of_leaf(name: str) -> tuple[int, ...]:
    return tuple(LEAVES[name])


@dataclass
class Row:
    """What a trainer put into its micro-batches for one leaf."""

    advantages: list[float]
    credit: list[float] = field(default_factory=list)


def first_checkpoint(folder: Path) -> str:
    """The earliest checkpoint: a save waits for the end of its generation batch."""
    return str(min(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])))


def rows_by_leaf(trainer) -> dict[str, Row]:
    """The rows of the two trees as the trainer arranged them, by name of the leaf."""
    names = {tuple(tokens): name for name, tokens in LEAVES.items()}
    rows = {}
    for batch in sum(trainer._training_micro_batches([two_trees()], num_drawn=1), []):
        for i, length in enumerate(batch["completion_mask"].sum(dim=1).tolist()):
            if length:
                values = (batch[name][i, :length].tolist() for name in ("advantages", "credit"))
                rows[names[tuple(batch["completion_ids"][i, :length].tolist())]] = Row(*values)
            else:
                assert (batch["credit"][i] == 1).all()
    assert rows.keys() == LEAVES.keys()
    return rows


def test_attnpo_on_two_trees_by_hand(make_trainer, monkeypatch):
    scores = {
        of_leaf("first"): [0.072, 0.018],  # 2 S_base and S_base / 2, where S_base = 0.6² · 2 / 20 = 0.036
        of_leaf("second"): [0.02, 0.08],  # S_base / 2 and 2 S_base, where S_base = 0.6² · 2 / 18 = 0.04
        of_leaf("long"): [0.01, 0.1],  # S_base = 0.6² · 3 / 22 = 0.0490909
        of_leaf("wrong 0"): [0.5, 0.5],  # far above S_base under A < 0, which would spare them if they were right
        of_leaf("wrong 1"): [0.5, 0.5],
    }

    def result(observer):
        return [torch.tensor(scores.get(tuple(r.completion_ids), [])) for r in observer.responses]

    monkeypatch.setattr(attnpo_method.StepObserver, "result", result)
    trainer = make_trainer(attnpo(), per_device_train_batch_size=3)
    rows = rows_by_leaf(trainer)

    # The correct leaves have 10, 8 and 12 tokens: deviation √(8/3), (len - μ) / sd = 0, ∓1.2247449, whose sigmoid is
    # 0.5, 0.2271025, 0.7728975. Rewards 0.9, 0.9545795, 0.8454205; V(root) = 2.7 / 5.
    short, long, root = 0.9545795, 0.8454205, 0.54
    assert rows["first"].advantages == pytest.approx([2 * (0.3 - root) / 3**0.5] * 3 + [0.36 + 0.6] * 7, abs=1e-6)
    assert rows["wrong 0"].advantages == pytest.approx([-0.2771281] * 3 + [-0.54 - 0.3] * 6, abs=1e-6)
    assert rows["wrong 1"].advantages == rows["wrong 0"].advantages
    head = [0.36 * 2 / 2**0.5] * 2
    assert rows["second"].advantages == pytest.approx(head + [2 * short - root - 0.9] * 6, abs=1e-6)
    assert rows["long"].advantages == pytest.approx(head + [2 * long - root - 0.9] * 10, abs=1e-6)

    # The first step of "first", an essential one, changes sign at token 3: spared where A < 0, kept where A > 0.
    # γ of a redundant step under A > 0 is p² S / S_base + 1 - p²: 0.82 at S_base / 2.
    assert rows["first"].credit == pytest.approx([0.0] * 3 + [1.0] * 2 + [0.82] * 2 + [1.0] * 3)
    assert rows["second"].credit == pytest.approx([0.82] * 3 + [1.0] * 5)
    assert rows["long"].credit == pytest.approx([0.36 * 0.01 / 0.0490909091 + 0.64] * 5 + [1.0] * 7)
    assert rows["wrong 0"].credit == rows["wrong 1"].credit == [1.0] * 9

    by_leaf = {tuple(r.completion_ids): r for r in trainer.last_credit.details}
    first = by_leaf[of_leaf("first")]
    assert first.alignment.step_ranges == [(0, 5), (5, 7)] and first.accuracy == pytest.approx(0.6)
    assert first.positive_scales.tolist() == pytest.approx([1.0, 0.82])
    assert first.negative_scales.tolist() == [0.0, 1.0]
    assert by_leaf[of_leaf("second")].positive_scales.tolist() == pytest.approx([0.82, 1.0])
    assert by_leaf[of_leaf("second")].negative_scales.tolist() == [1.0, 0.0]
    metrics = trainer._metrics["train"]
    assert metrics["attnpo/accuracy"] == pytest.approx([0.6])
    assert metrics["attnpo/steps_attenuated"] == pytest.approx([3 / 6])  # of the steps of the three correct leaves
    assert metrics["attnpo/steps_protected"] == pytest.approx([1 / 6])


@pytest.mark.parametrize("gamma_sign", ["both", "pos", "neg"])
def test_rhythm_on_two_trees_by_hand(make_trainer, monkeypatch, gamma_sign):
    waad = {of_leaf("first"): [5.0, 1, 1, 1, 9, 9, 2, 2, 2, 2]}  # Δ = 4 0 0 8 0 7 0 0 0 0

    def result(observer):
        lengths = (observer.mask.sum(dim=1) - torch.tensor(observer.prompt_lengths)).tolist()
        ids = observer.completion_ids
        rows = [torch.tensor([waad.get(tuple(row), [0.0] * n)]) for row, n in zip(ids, lengths, strict=True)]
        return [RhythmProfile([(0, 0)], torch.zeros(1), row, torch.full_like(row, torch.nan)) for row in rows]

    def observer(credit, batch):
        made = rhythm_method.SignalObserver(batch.attention_mask, batch.prompt_lengths, credit.layers)
        made.mask, made.completion_ids = batch.attention_mask, batch.completion_ids
        return made

    monkeypatch.setattr(rhythm_method.SignalObserver, "result", result)
    monkeypatch.setattr(RhythmCredit, "observer", observer)
    trainer = make_trainer(rhythm(scheme="local", gamma_sign=gamma_sign), per_device_train_batch_size=3)
    rows = rows_by_leaf(trainer)

    # Rewards are those of the task: V(root) = 3 / 5, V of the heads 1 / 3 and 1.
    assert rows["first"].advantages == pytest.approx([2 * (1 / 3 - 0.6) / 3**0.5] * 3 + [0.4 + 2 / 3] * 7)
    assert rows["wrong 0"].advantages == pytest.approx([-0.3079201] * 3 + [-0.6 - 1 / 3] * 6)
    for name, tokens in (("second", 6), ("long", 10)):
        assert rows[name].advantages == pytest.approx([0.8 / 2**0.5] * 2 + [0.4] * tokens)

    # ⌊0.4 n + 0.5⌋ tokens of largest Δ, ties to the earlier one: of "first" 0, 1, 3 and 5, of which A < 0 at 0 and 1.
    negative, positive = gamma_sign != "pos", gamma_sign != "neg"
    a, b = (1.5 if negative else 1.0), (1.5 if positive else 1.0)
    assert rows["first"].credit == [a, a, 1.0, b, 1.0, b, 1.0, 1.0, 1.0, 1.0]
    assert rows["wrong 0"].credit == rows["wrong 1"].credit == [a] * 4 + [1.0] * 5  # the same head, another factor
    assert rows["second"].credit == [b] * 3 + [1.0] * 5
    assert rows["long"].credit == [b] * 5 + [1.0] * 7
    assert trainer._metrics["train"]["rhythm/amplified_share"] == pytest.approx([(4 + 4 + 4 + 3 + 5) / 48])


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observes", [False, True], ids=["unobserved", "observed"])
def test_factors_of_one_are_attnrl_to_the_bit(make_trainer, observes):
    settings = {"trainer_class": RecordingTrainer, "max_steps": 4, "max_completion_length": 12}
    plain = make_trainer(**settings)
    before = weights(plain)
    plain.train()
    ones = Ones(observes)
    ours = make_trainer(ones, **settings)
    assert differing(before, weights(ours)) == []
    ours.train()
    assert all("credit" in batch for batches in ours.batches for batch in batches)
    assert len(ones.profiles) == (sum(logged(ours, "attnrl/rows_trained")) if observes else 0)  # every row
    assert ours.losses == plain.losses and len(set(plain.losses)) > 2
    assert differing(weights(plain), weights(ours)) == []
    assert len(differing(before, weights(ours))) == len(before)


CREDITS = {
    "coupled": lambda: rhythm(scheme="coupled"),
    "coupled, heads per sequence": lambda: rhythm(scheme="coupled", head_scope="sequence"),
    "local": lambda: rhythm(scheme="local", gamma_sign="pos"),
    "random": lambda: rhythm(scheme="random"),
    "entropy": lambda: rhythm(scheme="entropy"),
    "attnpo": attnpo,
}


@pytest.mark.parametrize("name", CREDITS)
def test_trees_train_with_a_credit(make_trainer, name):
    credit = CREDITS[name]()
    trainer = make_trainer(credit)
    before = weights(trainer)
    trainer.train()
    factors = torch.cat([batch["credit"].flatten() for batch in trainer.batches[0]])
    assert (factors != 1).any() and (factors >= 0).all()
    for batch in trainer.batches[0]:
        assert batch["credit"].shape == batch["advantages"].shape
        assert (batch["credit"][batch["completion_mask"] == 0] == 1).all()
    assert len(differing(before, weights(trainer))) == len(before)
    names = {name for entry in trainer.state.log_history for name in entry}
    own = {"rhythm": "rhythm/mean_factor", "attnpo": "attnpo/score_to_baseline"}[credit.prefix]
    assert {own, f"{credit.prefix}/seconds/attention", "attnrl/rows_trained", "attnrl/influence/mean"} <= names


def test_the_loss_takes_tree_advantages_times_factors(make_trainer):
    trainer = make_trainer(rhythm(scheme="coupled"), max_steps=2)
    trainer.train()
    changed = 0
    for batch in trainer.batches[0]:
        plain = {name: value for name, value in batch.items() if name != "credit"}
        ours = trainer._compute_loss(trainer.model, batch)
        product = {**plain, "advantages": batch["advantages"] * batch["credit"]}
        assert torch.equal(ours, trainer._compute_loss(trainer.model, product))
        changed += not torch.equal(ours, trainer._compute_loss(trainer.model, plain))
    assert changed > 0


def test_a_signal_is_read_for_rows_that_need_no_fresh_log_probs(make_trainer):
    trainer = make_trainer(rhythm(scheme="coupled"), num_branch_points=0, num_rollouts=6)
    trainer.train()
    assert not any(batch["fresh_mask"].any() for batch in trainer.batches[0])
    assert any((batch["credit"] > 1).any() for batch in trainer.batches[0])


def test_a_completion_that_is_masked_out_is_shown_to_no_credit(make_trainer):
    shown = []

    class Watching(Ones):
        def observer(self, batch):
            shown.append(batch.completion_ids)
            return super().observer(batch)

    trainer = make_trainer(Watching(observes=True), mask_truncated_completions=True, max_completion_length=10)
    trainer.train()
    masked = [batch["completion_mask"].sum(dim=1) == 0 for batches in trainer.batches for batch in batches]
    assert 0 < sum(int(rows.sum()) for rows in masked) < sum(map(len, masked))
    for rows, completions in zip(masked, shown, strict=True):
        # Rows that fill a micro-batch up are added behind, when nobody observes any more.
        assert [not ids for ids in completions] == rows[: len(completions)].tolist()
        assert rows[len(completions) :].all()


def test_prompts_that_are_all_right_train_for_length_with_attnpo(make_trainer):
    def always_right(completions, **kwargs):
        return [1.0] * len(completions)

    trainer = make_trainer(attnpo(), reward=always_right, filter_easy_prompts=False, expansion="uniform")
    trainer.train()
    assert logged(trainer, "attnrl/solve_all_ratio") == [1.0]
    assert logged(trainer, "attnpo/accuracy") == [1.0]
    assert logged(trainer, "attnrl/rows_trained")[0] > 0
    for batch in trainer.batches[0]:
        assert torch.isfinite(batch["advantages"]).all()


# ---- card -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("credit", "rows", "left_out"),
    [
        (
            lambda: rhythm(scheme="local"),
            {"credit method": "RhythmCredit", "rhythm: scheme": "local", "rhythm: fai_min_distance": "2"},
            "rhythm: amplification",
        ),
        (
            attnpo,
            {"credit method": "AttnPOCredit", "attnpo: heads": "[[0, 0], [1, 1]]", "attnpo: min_step_chars": "0"},
            "attnpo: length_penalty",
        ),
    ],
)
def test_the_card_names_both_parts(make_trainer, tmp_path, credit, rows, left_out):
    method = credit()
    trainer = make_trainer(method)
    trainer.create_model_card("model")
    text = (tmp_path / "out" / "README.md").read_text()
    section = text[text.index("### Settings of AttnRL") : text.index("### Training")]
    cells = [[cell.strip(" `") for cell in line.split("|")[1:3]] for line in section.splitlines() if "`" in line]
    assert dict(cells).items() >= ({"num_rollouts": "4"} | rows).items()
    assert left_out not in dict(cells)  # a default
    metadata = text[: text.index("\n---", 3)]
    assert "- attnrl\n" in metadata and f"- {method.prefix}\n" in metadata


# ---- resume ---------------------------------------------------------------------------------------------------------


RESUMED = {
    "none": (lambda: None, RecordingTrainer),
    "rhythm, calibrated heads": (
        lambda: rhythm(scheme="coupled", head_scope="calibration", calibration_responses=45),
        RecordingTrainer,
    ),
    "rhythm, random": (lambda: rhythm(scheme="random"), RecordingTrainer),
    "attnpo": (lambda: attnpo(schedule_fraction=1.0), WritingTrainer),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_without_rollouts_in_flight_resumes_to_the_bit(make_trainer, tmp_path, name):
    credit, trainer_class = RESUMED[name]
    settings = {"trainer_class": trainer_class, "off_policy": False, "max_steps": 6}
    whole = make_trainer(credit(), save_strategy="steps", save_steps=4, **settings)
    whole.train()
    resumed = make_trainer(credit(), **settings)
    torch.manual_seed(99)  # the random state is the checkpoint's, whatever went before
    resumed.train(resume_from_checkpoint=first_checkpoint(tmp_path / "out"))
    assert resumed.losses == whole.losses[-len(resumed.losses) :] and resumed.losses
    assert differing(weights(whole), weights(resumed)) == []
    assert resumed.method_state() == whole.method_state()


def test_the_state_of_a_credit_is_saved_and_taken_up(make_trainer, tmp_path):
    settings = {"trainer_class": RecordingTrainer, "max_steps": 6}

    def credit():
        return rhythm(scheme="coupled", head_scope="calibration", calibration_responses=45)

    whole = make_trainer(credit(), save_strategy="steps", save_steps=2, **settings)
    whole.train()
    checkpoint = first_checkpoint(tmp_path / "out")
    saved = json.loads((Path(checkpoint) / "attnrl_state.json").read_text())["credit"]
    assert 0 < saved["batches"] < whole.credit.batches and saved["calibration"]["heads"] is None
    _, _, responses = saved["calibration"]["spans"]
    assert 0 < responses < 45  # a later batch completes the calibration

    # Rollouts in flight are sampled again by the policy of the checkpoint, so resumed runs equal each other.
    resumed = [make_trainer(credit(), **settings) for _ in range(2)]
    for trainer in resumed:
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.credit.batches > saved["batches"] and trainer.credit.calibration.heads is not None
    assert resumed[0].losses == resumed[1].losses
    assert differing(weights(resumed[0]), weights(resumed[1])) == []


def test_a_prolonged_run_keeps_attnpos_schedule(make_trainer, tmp_path):
    credit = attnpo(schedule_fraction=0.5)
    trainer = make_trainer(credit, save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    assert credit.schedule_steps == 1.0
    longer = attnpo(schedule_fraction=0.5)
    trainer = make_trainer(longer, max_steps=4)
    trainer.train(resume_from_checkpoint=first_checkpoint(tmp_path / "out"))
    assert longer.schedule_steps == 1.0


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_a_credit_that_needs_whole_groups_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"rhythm_lambda=0\.1 does not go with trees.*set it to 0"):
        make_trainer(rhythm(rhythm_lambda=0.1))


def test_heads_that_the_model_lacks_are_refused(make_trainer):
    with pytest.raises(ValueError, match=r"heads.*\[7, 0\]"):
        make_trainer(attnpo(heads=[[7, 0]]))
