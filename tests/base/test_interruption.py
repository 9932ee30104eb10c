"""Runs that end early, on real trainers: SIGTERM inside a generation batch, a full disk, resume."""

import inspect
import json
import os
import signal

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback

import attn_trainers
from attn_trainers.base.interruption import (
    SEAL,
    TrainingInterrupted,
    is_whole,
    last_whole_checkpoint,
    remove_old_checkpoints,
    seal_checkpoint,
)
from attn_trainers.sampling.models import load_tokenizer
from attn_trainers.tiny.byte_model import build_byte_model


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory):
    return build_byte_model(tmp_path_factory.mktemp("models") / "bytes")


@pytest.fixture
def build(byte_model, tmp_path):
    """A trainer whose generation batch takes two updates."""

    def make(method: str, **settings):
        config, trainer = (getattr(attn_trainers, f"{method}{kind}") for kind in ("Config", "Trainer"))
        if method == "AttnRL":
            settings |= {"num_rollouts": 2, "num_branch_points": 1, "rollouts_per_branch": 1, "min_branch_spacing": 0}
        elif method == "AttnPO":
            settings |= {"heads": [[0, 0], [1, 1]], "num_generations": 4}
        else:
            settings |= {"num_generations": 4}
        args = config(
            **{
                "output_dir": str(tmp_path / "run"),
                "per_device_train_batch_size": 4,
                "generation_batch_size": 8,
                "gradient_accumulation_steps": 1,
                "max_steps": 6,
                "max_completion_length": 8,
                "use_cpu": True,
                "bf16": False,
                "gradient_checkpointing": False,
                "save_steps": 2,
                "logging_steps": 1,
                "report_to": "none",
                "disable_tqdm": True,
            }
            | settings
        )
        return trainer(
            model=str(byte_model),
            reward_funcs=lambda completions, **kwargs: [float(len(c) % 2) for c in completions],
            args=args,
            train_dataset=Dataset.from_list([{"prompt": f"{i} + {i} ="} for i in range(8)]),
            processing_class=load_tokenizer(byte_model),
        )

    return make


class SignalAt(TrainerCallback):
    """Sends this process SIGTERM when a step is done."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_seal_tells_whole_from_torn(tmp_path):
    folder = tmp_path / "checkpoint-4"
    (folder / "part").mkdir(parents=True)
    (folder / "model.bin").write_bytes(b"12345")
    (folder / "part" / "rank1.bin").write_bytes(b"1")
    assert not is_whole(folder)
    seal_checkpoint(folder)
    assert is_whole(folder)
    assert json.loads((folder / SEAL).read_text())["files"] == {"model.bin": 5, "part/rank1.bin": 1}
    (folder / "notes.txt").write_text("added later")
    assert is_whole(folder)
    (folder / "model.bin").write_bytes(b"1234")
    assert not is_whole(folder)
    (folder / "model.bin").write_bytes(b"12345")
    (folder / "part" / "rank1.bin").unlink()
    assert not is_whole(folder)
    (folder / SEAL).write_text("{")
    assert not is_whole(folder)


def test_newest_whole_checkpoint(tmp_path, caplog):
    assert last_whole_checkpoint(tmp_path / "absent") is None
    assert last_whole_checkpoint(tmp_path) is None
    for step in (2, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.bin").write_bytes(b"1")
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(tmp_path) is None
    seal_checkpoint(tmp_path / "checkpoint-2")
    seal_checkpoint(tmp_path / "checkpoint-9")
    caplog.clear()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    assert [record.args for record in caplog.records] == [(tmp_path / "checkpoint-10",)]


def test_old_checkpoints_go_first_and_torn_ones_do_not_count(tmp_path):
    for time, step in enumerate([8, 2, 4, 6]):  # 8 is left from an earlier run
        (tmp_path / f"checkpoint-{step}").mkdir()
        seal_checkpoint(tmp_path / f"checkpoint-{step}")
        os.utime(tmp_path / f"checkpoint-{step}" / SEAL, (time, time))
    (tmp_path / "checkpoint-10").mkdir()

    def left():
        return sorted(int(path.name.split("-")[1]) for path in tmp_path.iterdir())

    remove_old_checkpoints(tmp_path, None, [])
    assert left() == [2, 4, 6, 8, 10]
    remove_old_checkpoints(tmp_path, 3, [tmp_path / "checkpoint-6", tmp_path / "checkpoint-8"])
    assert left() == [4, 6, 8, 10]
    remove_old_checkpoints(tmp_path, 1, [tmp_path / "checkpoint-6"])
    assert left() == [6, 10]


@pytest.mark.parametrize("method", ["AttnRL", "AttnPO", "Rhythm"])
def test_sigterm_inside_a_batch_stops_at_its_end_and_resumes(build, method, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer = build(method, save_strategy="no")
    trainer.add_callback(SignalAt(1))
    with pytest.raises(TrainingInterrupted) as interruption:
        trainer.train()
    assert (interruption.value.code, interruption.value.step, trainer.state.global_step) == (143, 2, 2)
    assert signal.getsignal(signal.SIGTERM) == before
    checkpoint = last_whole_checkpoint(tmp_path / "run")
    assert checkpoint == str(tmp_path / "run" / "checkpoint-2")

    resumed = build(method, save_strategy="no")
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 6
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 3, 4, 5, 6]


def test_sigterm_in_the_last_batch_changes_nothing(build):
    trainer = build("Rhythm", save_strategy="no", max_steps=2)
    trainer.add_callback(SignalAt(1))
    trainer.train()
    assert trainer.state.global_step == 2


def test_full_disk_leaves_the_checkpoint_before_it(build, tmp_path):
    torn = tmp_path / "run" / "checkpoint-4"
    torn.mkdir(parents=True)
    (torn / "trainer_state.json").symlink_to("/dev/full")  # every write to it: no space left on device
    trainer = build("AttnRL", save_total_limit=1)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert (torn / "optimizer.pt").exists()
    checkpoint = last_whole_checkpoint(tmp_path / "run")
    assert checkpoint == str(tmp_path / "run" / "checkpoint-2")

    (torn / "trainer_state.json").unlink()
    resumed = build("AttnRL", save_total_limit=1)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 6
    assert last_whole_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-6")
    assert not (tmp_path / "run" / "checkpoint-2").exists()
    assert is_whole(tmp_path / "run" / "checkpoint-6")


def test_saving_over_an_old_checkpoint_breaks_its_seal_first(build, tmp_path):
    trainer = build("Rhythm", max_steps=2)
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-2"
    assert is_whole(folder)
    (folder / "optimizer.pt").unlink()
    (folder / "optimizer.pt").symlink_to("/dev/full")
    with pytest.raises((OSError, RuntimeError)):
        trainer._save_checkpoint(trainer.model, trial=None)
    (folder / "optimizer.pt").unlink()
    torch.save({}, folder / "optimizer.pt")
    assert not is_whole(folder)


def test_checkpoints_at_any_moment_are_refused(build):
    with pytest.raises(ValueError, match="enable_jit_checkpoint=True"):
        build("Rhythm", enable_jit_checkpoint=True)


def test_hooks_of_the_parent_are_as_they_were_read():
    assert list(inspect.signature(Trainer._push_from_checkpoint).parameters) == ["self", "checkpoint_folder"]
    loop = " ".join(inspect.getsource(Trainer._inner_training_loop).split())
    assert (
        "self._run_epoch( model=model, epoch=epoch," in loop and "if self.control.should_training_stop: break" in loop
    )
