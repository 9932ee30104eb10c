"""Credit methods on trees: what they are shown, and what the loss makes of it."""

import pytest
import torch

from tests.attnrl.crediting.helpers import Ones, RecordingTrainer, attnpo, differing, rhythm, weights
from tests.helpers import logged


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


@pytest.mark.parametrize("name", CREDITS)
def test_a_batch_that_no_reward_could_score_is_passed_over(make_trainer, name):
    def judge(completions, completion_ids, **kwargs):  # is down for the first batches
        scored.append(len(completions))
        return [None] * len(completions) if len(scored) <= 3 else [float(sum(ids) % 2) for ids in completion_ids]

    scored = []
    trainer = make_trainer(CREDITS[name](), reward=judge, max_steps=1)
    before = weights(trainer)
    trainer.train()
    assert trainer.pipeline.empty_batches >= 1 and trainer.state.global_step == 1
    assert len(differing(before, weights(trainer))) == len(before)


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


def test_a_credit_that_needs_whole_groups_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"rhythm_lambda=0\.1 does not go with trees.*set it to 0"):
        make_trainer(rhythm(rhythm_lambda=0.1))


def test_heads_that_the_model_lacks_are_refused(make_trainer):
    with pytest.raises(ValueError, match=r"heads.*\[7, 0\]"):
        make_trainer(attnpo(heads=[[7, 0]]))
