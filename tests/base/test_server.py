"""Pushes, versions and faults of sampling from a server, against a small server of the tests."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from attn_trainers.base import server as module
from attn_trainers.base import weight_files
from attn_trainers.base.weight_files import write_weights
from attn_trainers.sampling.requests import GenerationRequest
from attn_trainers.sampling.server import ServerError
from tests.fake_server import REQUESTS, FakeServer, build_engine, logps_of


VOCABULARY = 50
pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.fixture
def fake():
    server = FakeServer(VOCABULARY)
    yield server
    server.stop()


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(tie_word_embeddings=False)
        self.first, self.second = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(3))

    @property
    def sum(self) -> float:
        return sum(float(p.detach().sum()) for p in self.parameters())

    def move(self, by: float) -> None:
        with torch.no_grad():
            self.second[0] += by


@pytest.fixture
def make_engine(fake, tmp_path):
    def make(trainer_logps=None, model=None, url=fake.url, **kwargs):
        model = model or Model()
        logps = trainer_logps or (lambda tokens: logps_of(model.sum, tokens))
        return build_engine(url, tmp_path, model, logps, **kwargs)

    return make


def draw(engine):
    return engine.collect(engine.submit(REQUESTS))


def expected(fake, weights):
    """Samples of given weights."""
    other = FakeServer(VOCABULARY)
    other.weights = weights
    bodies = [
        {"model": "fake", "prompt": r.prompt_ids, "n": 1, "max_tokens": r.max_tokens, "seed": r.seed} for r in REQUESTS
    ]
    tokens = [other.answer("/v1/completions", body)[1]["choices"][0]["token_ids"] for body in bodies]
    other.stop()
    return tokens


def tokens_of(samples):
    return [sample.token_ids for sample in samples]


def test_weights_are_pushed_before_anything_is_sampled_and_the_samples_carry_their_version(
    make_engine, fake, tmp_path
):
    engine = make_engine()
    assert not fake.paths("/v1/completions")
    samples = draw(engine)
    assert fake.weights == engine.model.sum == 7.0
    assert {s.weight_version for s in samples} == {fake.version} == {engine.version}
    assert tokens_of(samples) == expected(fake, 7.0)
    draw(engine)
    assert engine.pushes == 1  # the same weights are not pushed again
    assert not any((tmp_path / "weights").iterdir())
    engine.model.move(2.0)
    engine.sync_weights()
    assert tokens_of(draw(engine)) == expected(fake, 9.0)
    assert engine.pushes == 2 and len(fake.paths("/reset_prefix_cache")) == 2


def test_samples_are_shown_where_they_are_waited_for(make_engine):
    shown, threads = [], set()

    def progress(items, what, total):
        shown.append((what, total))
        for item in items:
            threads.add(threading.current_thread())
            yield item

    engine = make_engine(progress=progress)
    pending = engine.submit(REQUESTS)
    assert not shown
    engine.collect(pending)
    assert shown == [("Sampling", len(REQUESTS))] and threads == {threading.current_thread()}


def restart(fake):
    fake.restart()


def foreign_push(fake):
    fake.weights, fake.version = 3.0, "someone-1"


def silent_push(fake):
    fake.weights = 3.0


@pytest.mark.parametrize("change", [restart, foreign_push, silent_push])
def test_other_weights_between_steps_are_replaced_before_sampling(make_engine, fake, change):
    engine = make_engine()
    draw(engine)
    change(fake)
    assert tokens_of(draw(engine)) == expected(fake, 7.0)
    assert engine.pushes == 2


@pytest.mark.parametrize("change", [restart, foreign_push, silent_push])
def test_other_weights_while_sampling_cost_all_samples(make_engine, fake, change):
    engine = make_engine()
    draw(engine)
    first = len(fake.paths("/v1/completions")) + 3  # after the probe, amid the samples

    def fails(path, number):
        if path == "/v1/completions" and number == first:
            change(fake)

    fake.fails = fails
    samples = draw(engine)
    assert tokens_of(samples) == expected(fake, 7.0)
    assert {s.weight_version for s in samples} == {fake.version}
    assert engine.pushes == 2


def test_a_server_that_dies_while_it_samples_and_comes_back_is_pushed_again(make_engine, fake):
    engine = make_engine()
    draw(engine)
    first = len(fake.paths("/v1/completions")) + 3
    dead = {"left": 0}

    def fails(path, number):
        if path == "/v1/completions" and number == first:
            restart(fake)
            dead["left"] = 12
        if dead["left"]:
            dead["left"] -= 1
            raise ConnectionError

    fake.fails = fails
    assert tokens_of(draw(engine)) == expected(fake, 7.0)
    assert engine.pushes == 2


# A reload is tried once in each push, other requests three times.
@pytest.mark.parametrize(
    ("path", "failures"), [("/collective_rpc", 1), ("/reset_prefix_cache", 3), ("/update_weight_version", 3)]
)
def test_a_server_that_fails_in_a_push_gets_it_again(make_engine, fake, path, failures):
    engine = make_engine()
    fake.fails = lambda asked, number: 500 if asked == path and number <= failures else None
    assert tokens_of(draw(engine)) == expected(fake, 7.0)
    assert engine.pushes == 2


def test_a_push_that_was_cut_off_leaves_no_version_to_sample_by(make_engine, fake):
    engine = make_engine()
    draw(engine)
    engine.model.move(1.0)
    fake.fails = lambda path, number: 500 if path == "/collective_rpc" else None
    with pytest.raises(ServerError):
        engine.sync_weights()
    assert engine.version is None and fake.version.endswith("-incomplete")


def test_a_lasting_fault_ends_in_one_error_with_url_and_checkpoint(make_engine, fake, monkeypatch):
    engine = make_engine()
    draw(engine)
    monkeypatch.setattr(module, "last_whole_checkpoint", lambda folder: "out/checkpoint-4")
    fake.fails = lambda path, number: 500 if path == "/v1/completions" else None
    with pytest.raises(ServerError) as caught:
        draw(engine)
    text = str(caught.value)
    assert fake.url in text and "answered 500" in text and f"attempt {module.ATTEMPTS} of {module.ATTEMPTS}" in text
    assert "The last whole checkpoint is out/checkpoint-4" in text


def test_a_server_that_stays_away_is_waited_for_and_named(make_engine, fake):
    engine = make_engine()
    draw(engine)
    fake.stop()
    engine.server.session.close()  # a kept connection would still be served
    with pytest.raises(ServerError, match=f"{fake.url} did not answer for vllm_server_timeout=1 s.*No checkpoint"):
        draw(engine)


def test_a_server_that_is_not_there_at_the_start_is_named(make_engine):
    gone = FakeServer()
    gone.stop()
    with pytest.raises(ServerError, match=f"{gone.url} did not answer .*Start it, or correct vllm_server_base_url"):
        make_engine(url=gone.url)


def test_a_server_without_room_for_a_completion_is_refused_at_the_start(make_engine, fake):
    fake.max_model_len = 16  # as max_completion_length
    with pytest.raises(ServerError, match=f"{fake.url} has --max-model-len 16, .* beside max_completion_length=16"):
        make_engine()


def test_a_server_that_will_cut_completions_is_told_of_once(make_engine, fake, caplog):
    fake.max_model_len = 17
    engine = make_engine()
    draw(engine)
    assert "max-model-len" not in caplog.text
    for _ in range(2):
        engine.collect(engine.submit([GenerationRequest([1, 2], 16), GenerationRequest([1], 16)]))
    assert caplog.text.count("has --max-model-len 17, and ends completions there") == 1
    assert "with at least 18." in caplog.text


def test_a_smaller_vocabulary_is_refused(make_engine):
    with pytest.raises(ServerError, match="out of vocabulary"):
        draw(make_engine(probe=lambda: [1, 2, 499]))


def test_another_model_is_refused_by_its_log_probs(make_engine):
    with pytest.raises(ServerError, match="off by 2 from the trainer's after equal weights were pushed"):
        draw(make_engine(trainer_logps=lambda tokens: [logp + 2.0 for logp in logps_of(7.0, tokens)]))


def test_a_full_folder_ends_in_one_error_and_leaves_nothing(make_engine, fake, tmp_path, monkeypatch):
    engine = make_engine()
    draw(engine)

    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(weight_files, "save_file", full)
    engine.model.move(1.0)
    with pytest.raises(ServerError, match="weight_sync_dir=.*weights: .*No space left on device"):
        engine.sync_weights()
    assert fake.weights == 7.0  # what the server had
    assert not any((tmp_path / "weights").iterdir())


def test_files_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / "weights-old.partial").mkdir()
    (tmp_path / "weights-older").mkdir()
    whole, problem = write_weights(tmp_path, "new", iter([("w", torch.ones(3))]), torch.bfloat16)
    assert problem is None and [path.name for path in tmp_path.iterdir()] == [whole.name] == ["weights-new"]


def test_weights_are_written_in_shards_of_the_servers_dtype(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.setattr(weight_files, "SHARD_BYTES", 8)
    weights = {"a": torch.ones(4), "b": torch.arange(3), "c": torch.full((2, 2), 0.1)}
    whole, _ = write_weights(tmp_path, "new", weights.items(), torch.bfloat16)
    files = sorted(whole.iterdir())
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) == 3
    assert read["a"].dtype == torch.bfloat16 and read["b"].dtype == torch.int64
    assert torch.equal(read["c"], weights["c"].bfloat16())


def test_a_rank_that_does_not_write_goes_through_the_weights(tmp_path):
    seen = []
    weights = ((name, torch.ones(1)) for name in "abc" if seen.append(name) is None)
    write_weights(tmp_path / "none", "new", weights, torch.float32, writes=False)
    assert seen == ["a", "b", "c"] and not (tmp_path / "none").exists()


def test_trls_own_call_draws_groups_together(make_engine, fake):
    engine = make_engine()
    prompts = [[1], [1], [1], [2], [2], [2]]
    returned, tokens, logps, ids = engine.generate(prompts, None, 3)
    bodies = [body for body in fake.paths("/v1/completions") if "prompt_logprobs" not in body]
    assert sorted((body["prompt"][0], body["n"], body["max_tokens"]) for body in bodies) == [(1, 3, 16), (2, 3, 16)]
    assert returned == prompts and [len(t) for t in tokens] == [16] * 6
    assert logps[0][0] == [None] and ids[0] == [[token] for token in tokens[0]]


class TwoRanks:
    """Two ranks as threads of one process: what they gather and broadcast goes through a barrier."""

    def __init__(self, monkeypatch):
        self._here, self._barrier = threading.local(), threading.Barrier(2, timeout=30)
        self._slots = [None, None]
        monkeypatch.setattr(module, "gather_object", self.gather)
        monkeypatch.setattr(module, "broadcast_object_list", self.broadcast)

    def _exchange(self, value):
        self._slots[self._here.rank] = value
        self._barrier.wait()
        values = list(self._slots)
        self._barrier.wait()
        return values

    def gather(self, values):
        return [item for part in self._exchange(values) for item in part]

    def broadcast(self, values, from_process):
        values[:] = self._exchange(list(values))[from_process]

    def run(self, act):
        """What `act(accelerator, rank)` gives on each rank, or raises there."""

        def on_rank(rank):
            self._here.rank = rank
            accelerator = Rank(Accelerator(cpu=True), rank)
            try:
                return act(accelerator, rank)
            except ServerError as error:
                return error

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(on_rank, range(2)))


class Rank:
    """An accelerator that says it is one of two."""

    def __init__(self, accelerator, rank):
        self._accelerator = accelerator
        self.process_index, self.num_processes, self.is_main_process = rank, 2, rank == 0

    def __getattr__(self, name):
        return getattr(self._accelerator, name)


@pytest.mark.parametrize("change", [None, restart])
def test_each_of_two_ranks_gets_its_own_samples_of_one_server(make_engine, fake, monkeypatch, change):
    parts = [REQUESTS[:4], REQUESTS[4:]]

    def act(accelerator, rank):
        engine = make_engine(accelerator=accelerator)
        engine.collect(engine.submit([]))  # nobody has a request
        first = engine.collect(engine.submit(parts[rank]))
        if change and rank == 0:
            change(fake)
        nothing_on_one = engine.collect(engine.submit(parts[rank] if rank else []))
        return tokens_of(first), tokens_of(nothing_on_one), engine.version, engine.pushes

    (first, first_none, *state), (second, second_again, *other) = TwoRanks(monkeypatch).run(act)
    assert first + second == expected(fake, 7.0)
    assert first_none == [] and second_again == second
    assert state == other and state[1] == (2 if change else 1)


@pytest.mark.parametrize("path", ["/v1/completions", "/collective_rpc", "/health"])
def test_two_ranks_end_with_the_same_error(make_engine, fake, monkeypatch, path):
    fake.fails = lambda asked, number: 500 if asked == path else None

    def act(accelerator, rank):
        engine = make_engine(accelerator=accelerator)
        return engine.collect(engine.submit(REQUESTS))

    first, second = TwoRanks(monkeypatch).run(act)
    assert isinstance(first, ServerError) and str(first) == str(second) and fake.url in str(first)
