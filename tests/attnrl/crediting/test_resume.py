"""The state of a credit method on trees: saved, taken up, prolonged."""

import json
from pathlib import Path

import pytest
import torch

from tests.attnrl.crediting.helpers import (
    RecordingTrainer,
    WritingTrainer,
    attnpo,
    differing,
    first_checkpoint,
    rhythm,
    weights,
)


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
