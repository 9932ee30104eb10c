"""Trees forwarded as packed rows: the run is the one of plain rows, to rounding."""

import pytest
import torch
from peft import LoraConfig

from attn_trainers import AttnRLConfig, AttnRLTrainer
from attn_trainers.attnrl import packed
from attn_trainers.rhythm.method import RhythmCredit
from attn_trainers.rhythm.options import RhythmOptions
from tests.helpers import LOOKED_AT, logged, odd_sum


class Counted(AttnRLTrainer):
    """Counts the forwards over packed rows, those of the loss apart."""

    packed_forwards = packed_losses = 0

    def _forward_packed(self, *args):
        self.packed_forwards += 1
        self.packed_losses += torch.is_grad_enabled()
        return super()._forward_packed(*args)


@pytest.fixture
def train(tmp_path, tiny_model_dir, tiny_tokenizer, arithmetic_dataset):
    def run(pack_trees, peft=False, credit=None, **settings):
        args = AttnRLConfig(
            str(tmp_path / pack_trees),
            pack_trees=pack_trees,
            **{
                "per_device_train_batch_size": 15,
                "steps_per_generation": 4,
                "gradient_accumulation_steps": 2,
                "max_steps": 4,
                "learning_rate": 1e-2,
                "optim": "sgd",
                "max_grad_norm": 0.0,
                "max_completion_length": 16,
                "min_branch_spacing": 0,
                "influence_delta": 1,
                "filter_easy_prompts": False,
                **LOOKED_AT,
            }
            | settings,
        )
        trainer = Counted(
            str(tiny_model_dir),
            odd_sum,
            args,
            train_dataset=arithmetic_dataset,
            processing_class=tiny_tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear") if peft else None,
            credit=credit,
        )
        trainer.train()
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        return trainer, weights

    return run


@pytest.mark.parametrize(
    ("peft", "settings"),
    [
        (False, {"beta": 0.0}),
        (False, {"beta": 0.01, "gradient_checkpointing": True}),
        (True, {"beta": 0.01, "loss_type": "grpo"}),
        (False, {"beta": 0.0, "temperature": 0.7, "top_entropy_quantile": 0.5}),
    ],
    ids=["plain", "reference and checkpointing", "lora", "temperature and entropies"],
)
def test_packed_equals_rows(train, peft, settings):
    rows, row_weights = train("off", peft, **settings)
    trees, tree_weights = train("on", peft, **settings)
    assert rows.packed_forwards == 0 and trees.packed_losses > 2 and trees.packed_forwards > trees.packed_losses
    for name in ("loss", "grad_norm", "entropy"):
        assert logged(trees, name) == pytest.approx(logged(rows, name), rel=1e-4, abs=1e-6), name
    for name, weight in row_weights.items():
        torch.testing.assert_close(tree_weights[name], weight, rtol=1e-4, atol=1e-6)


def test_a_credit_reads_the_same_from_packed_rows(train):
    options = RhythmOptions(scheme="coupled", fai_min_distance=2)
    rows, _ = train("off", credit=RhythmCredit(options), max_steps=2)
    trees, _ = train("on", credit=RhythmCredit(options), max_steps=2)
    assert trees.packed_forwards > 0
    expected, found = rows.last_credit, trees.last_credit
    assert found.details.heads[0] == expected.details.heads[0]
    for one, other in zip(found.details.factors, expected.details.factors, strict=True):
        assert torch.equal(one, other)


def test_a_model_that_cannot_be_packed_is_refused_or_runs_as_rows(train, monkeypatch):
    monkeypatch.setattr(packed, "can_pack", lambda model: "its attention has sinks")
    with pytest.raises(ValueError, match="pack_trees='on' does not go with this model: its attention has sinks"):
        train("on")
    trainer, _ = train("auto", max_steps=2)
    assert trainer.packed_forwards == 0 and not trainer.packs_trees
