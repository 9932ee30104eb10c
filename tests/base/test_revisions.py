"""Checkpoints on branches: what arrives, and what is told of what does not. A whole run does it in test_card.py."""

import logging
import threading
from http.server import ThreadingHTTPServer

import pytest
from huggingface_hub import HfApi, constants

from attn_trainers.base.revisions import RevisionPushes, add_card
from tests.base.run_pushes import Hub


@pytest.fixture
def pushes(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name, value in {"files": {"me/m": {}}, "objects": {}, "tokens": set(), "refuses_commits": False}.items():
        monkeypatch.setattr(Hub, name, value)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield RevisionPushes(HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token="hf_x"), "me/m")
    server.shutdown()


def checkpoint(folder, step: int):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    for name in (
        "config.json",
        "model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "trainer_state.json",
        "seal.json",
    ):
        (path / name).write_text(f"{name} {step}")
    return path


def test_each_checkpoint_goes_to_its_branch_without_what_only_resumes(pushes, tmp_path):
    (tmp_path / "README.md").write_text("card")
    for step in (2, 4):
        path = checkpoint(tmp_path, step)
        add_card(tmp_path, path)
        pushes.start(path, step)
        assert set(pushes.folders) <= {tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"}
    pushes.finish()
    for step in (2, 4):
        files = {"README.md": b"card"}
        files |= {name: f"{name} {step}".encode() for name in ("config.json", "model.safetensors")}
        assert Hub.files[f"me/m@step-{step}"] == files
    assert Hub.files["me/m"] == {} and pushes.folders == []


def test_an_upload_that_fails_is_told_with_what_makes_up_for_it(pushes, tmp_path, caplog):
    Hub.refuses_commits = True
    path = checkpoint(tmp_path, 2)
    with caplog.at_level(logging.WARNING):
        pushes.start(path, 2)
        pushes.finish()
    assert f"`hf upload me/m {path} . --revision step-2` makes up for it" in caplog.text
    assert "storage quota exceeded" in caplog.text and Hub.files["me/m@step-2"] == {}
