"""What tests of a trainer's parts share."""

import pytest

from attn_trainers.sampling import server


@pytest.fixture
def short_pauses(monkeypatch):
    """Between the tries of a request; and no key of whoever runs the tests."""
    monkeypatch.setattr(server, "PAUSE", 0.01)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
