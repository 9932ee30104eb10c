"""The client of a vLLM server, against a small server of the tests."""

import math
import subprocess
import sys
import threading
import time

import pytest

from attn_trainers.sampling import server as module
from attn_trainers.sampling.requests import GenerationRequest
from attn_trainers.sampling.server import ServerError, ServerFault, TokenGate, VLLMServer, group_requests
from tests.fake_server import FakeServer
from tests.helpers import ROOT


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.01)


@pytest.fixture
def fake():
    server = FakeServer()
    yield server
    server.stop()


@pytest.fixture
def client(fake):
    client = VLLMServer(fake.url, start_seconds=1.0, request_seconds=5.0)
    client.connect()
    return client


SETTINGS = {"temperature": 0.9, "logprobs": 0}


def test_equal_requests_without_seeds_go_together():
    requests = [
        GenerationRequest([1, 2], 4),
        GenerationRequest([1, 2], 5),
        GenerationRequest([1, 2], 4),
        GenerationRequest([1, 2], 4, seed=7),
        GenerationRequest([1, 2], 4, seed=7),
        GenerationRequest([3], 4),
    ]
    assert group_requests(requests) == [[0, 2], [1], [3], [4], [5]]


def test_samples_come_in_the_order_of_the_requests_with_limits_and_seeds(client, fake):
    requests = [GenerationRequest([i % 3 + 1], 2 + i % 2, seed) for i in range(12) for seed in (None, i)]
    samples = client.submit(requests, SETTINGS, "v1").wait()
    assert [len(sample.token_ids) for sample in samples] == [request.max_tokens for request in requests]
    assert {sample.weight_version for sample in samples} == {"v1"}
    bodies = fake.paths("/v1/completions")
    assert len(bodies) == 6 + 12  # as many prompts and limits without a seed, and one POST per seed
    assert sorted(body["n"] for body in bodies) == [1] * 12 + [2] * 6
    assert sorted(body["seed"] for body in bodies if "seed" in body) == list(range(12))
    assert all(body["temperature"] == 0.9 and body["model"] == "fake" for body in bodies)
    for sample in samples:
        assert math.isnan(sample.logps[0])  # a log-prob that JSON has none for
        assert sample.logps[1:] == [-float(token) for token in sample.token_ids[1:]]


def test_a_passing_fault_is_tried_again(client, fake):
    fake.fails = lambda path, number: 500 if path == "/v1/completions" and number <= 2 else None
    assert len(client.submit([GenerationRequest([1], 3)], SETTINGS, None).wait()[0].token_ids) == 3
    assert len(fake.paths("/v1/completions")) == 3


def test_a_lasting_fault_names_server_status_and_path(client, fake):
    fake.fails = lambda path, number: 500 if path == "/v1/completions" else None
    with pytest.raises(ServerFault, match=f"{fake.url} answered 500 to /v1/completions: .*told to fail"):
        client.submit([GenerationRequest([1], 3)], SETTINGS, None).wait()
    assert len(fake.paths("/v1/completions")) == module.TRIES


def test_a_request_that_is_wrong_is_not_tried_again(client, fake):
    with pytest.raises(ServerError, match="answered 400 .*Token id 99 is out of vocabulary") as caught:
        client.submit([GenerationRequest([99], 3)], SETTINGS, None).wait()
    assert not isinstance(caught.value, ServerFault)
    assert len(fake.paths("/v1/completions")) == 1


def test_a_slow_server_is_a_fault(client, fake):
    client.request_seconds = 0.05
    fake.fails = lambda path, number: time.sleep(0.5) if path == "/v1/completions" else None
    with pytest.raises(ServerFault, match="did not answer /v1/completions within 0.05 s"):
        client.submit([GenerationRequest([1], 3)], SETTINGS, None).wait()


def test_a_dropped_connection_is_a_fault(client, fake):
    def drop(path, number):
        raise ConnectionError

    fake.fails = drop
    with pytest.raises(ServerFault, match=f"{fake.url} is away"):
        client.submit([GenerationRequest([1], 3)], SETTINGS, None).wait()


def test_a_server_that_is_not_there_is_named():
    fake = FakeServer()
    fake.stop()
    with pytest.raises(ServerError, match=f"{fake.url} did not answer for vllm_server_timeout=0.05 s"):
        VLLMServer(fake.url, start_seconds=0.05, request_seconds=1.0).connect()


@pytest.mark.parametrize("path", ["/server_info", "/weight_info"])
def test_missing_development_endpoints_are_named(fake, path):
    fake.fails = lambda asked, number: 404 if asked == path else None
    client = VLLMServer(fake.url, start_seconds=1.0, request_seconds=1.0)
    with pytest.raises(ServerError, match=f"has no {path}; start it with VLLM_SERVER_DEV_MODE=1"):
        client.connect()
        client.weight_version()


@pytest.mark.parametrize("key", ["secret", None, "wrong"])
def test_the_api_key_of_the_environment_is_sent(monkeypatch, key):
    fake = FakeServer(api_key="secret")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("VLLM_API_KEY", key)
    client = VLLMServer(fake.url, start_seconds=1.0, request_seconds=1.0)
    if key == "secret":
        client.connect()
        assert client.model == "fake"
    else:
        with pytest.raises(ServerError, match=r"refused /v1/models \(401\); set VLLM_API_KEY"):
            client.connect()
    fake.stop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_token_ids": [2]}, "sampled something else"),
        ({"token_ids": [1] * 9}, "sampled something else"),
        ({"finish_reason": "abort"}, "ended a sample by 'abort'"),
        ({"logprobs": {"tokens": ["token_id:49"], "token_logprobs": [0.0]}}, "log-probs of other tokens"),
    ],
)
def test_answers_are_checked(client, fake, monkeypatch, change, message):
    original = fake.answer

    def answer(path, body):
        status, content = original(path, body)
        if path == "/v1/completions":
            content["choices"][0] |= change
        return status, content

    monkeypatch.setattr(fake, "answer", answer)
    with pytest.raises(ServerError, match=message):
        client.submit([GenerationRequest([1], 3)], SETTINGS, None).wait()


def test_a_gate_holds_back_what_exceeds_its_room():
    gate, order = TokenGate(10), []

    def go():
        with gate.passed(6):
            order.append("second")

    with gate.passed(6):
        thread = threading.Thread(target=go)
        thread.start()
        time.sleep(0.05)
        order.append("first")
    thread.join()
    with gate.passed(50):  # alone, whatever its size
        order.append("large")
    assert order == ["first", "second", "large"]


def test_a_server_that_hangs_does_not_hold_the_process(fake):
    """A process that gives up while a request is out ends before there is an answer."""
    release = threading.Event()
    fake.fails = lambda path, number: 500 if path == "/v1/completions" and not release.wait(300) else None
    script = (
        "from attn_trainers.sampling.server import VLLMServer\n"
        "from attn_trainers.sampling.requests import GenerationRequest\n"
        f"client = VLLMServer({fake.url!r}, 5.0, 600.0)\n"
        "client.connect()\n"
        "client.submit([GenerationRequest([1], 3)], {}, None)\n"
        "print('given up', flush=True)"
    )
    # It would wait for the answer, which comes after it has ended.
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert done.returncode == 0 and done.stdout == "given up\n", done.stderr[-2000:]
    release.set()


def test_progress_tells_of_each_sample_as_it_comes(client, fake):
    fake.fails = lambda path, number: time.sleep(0.3) if path == "/v1/completions" and number == 1 else None
    seen = []

    def progress(items, what, total):
        assert (what, total) == ("Sampling", 4)
        for index, sample in items:
            seen.append(index)
            yield index, sample

    requests = [GenerationRequest([1], 3), GenerationRequest([2], 3, seed=1)] * 2
    samples = client.submit(requests, {"temperature": 0.9}, None).wait(progress)
    assert sorted(seen) == [0, 1, 2, 3] and abs(seen.index(0) - seen.index(2)) == 1  # one POST for both
    assert samples == client.submit(requests, {"temperature": 0.9}, None).wait()
