"""Both credit methods on two trees whose factors are worked out by hand."""

from dataclasses import dataclass, field

import pytest
import torch

from attn_trainers.attention import RhythmProfile
from attn_trainers.attnpo import method as attnpo_method
from attn_trainers.attnrl.pipeline import Draw
from attn_trainers.attnrl.rollouts import PromptRollouts
from attn_trainers.rhythm import method as rhythm_method
from attn_trainers.rhythm.method import RhythmCredit
from tests.attnrl.crediting.helpers import BLANK, CLOSE, EOS, attnpo, rhythm
from tests.helpers import make_continuation, make_rollout


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
