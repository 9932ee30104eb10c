"""A LoRA that goes to a server as an adapter, against a small server of the tests."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from attn_trainers.sampling import server as client_module
from attn_trainers.sampling.server import ServerError
from attn_trainers.tiny.arithmetic import build_model
from tests.fake_server import REQUESTS, FakeServer, build_engine, logps_of


pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.fixture
def fake():
    server = FakeServer()
    server.lora = {"max_lora_rank": 8, "target_modules": None}
    yield server
    server.stop()


@pytest.fixture
def model(tiny_tokenizer):
    model = build_model(tiny_tokenizer, 64, 2)
    return get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))


def adapter_sum(model) -> float:
    return sum(float(tensor.double().sum()) for tensor in get_peft_model_state_dict(model).values())


def move(model) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.25)


@pytest.fixture
def make_engine(fake, tmp_path, model):
    def make(**settings):
        return build_engine(fake.url, tmp_path, model, lambda tokens: logps_of(adapter_sum(model), tokens), **settings)

    return make


def draw(engine):
    samples = engine.collect(engine.submit(REQUESTS))
    return [sample.token_ids for sample in samples], {sample.weight_version for sample in samples}


def expected(weights):
    """Samples of weights of a sum."""
    other = FakeServer()
    other.weights = weights
    bodies = [{"model": "fake", "prompt": r.prompt_ids, "n": 1, "max_tokens": 4, "seed": r.seed} for r in REQUESTS]
    tokens = [other.answer("/v1/completions", body)[1]["choices"][0]["token_ids"] for body in bodies]
    other.stop()
    return tokens


@pytest.mark.parametrize("lora_sync", ["auto", "adapter"])
def test_only_the_adapter_is_pushed_and_each_request_names_its_version(make_engine, fake, model, tmp_path, lora_sync):
    engine = make_engine(lora_sync=lora_sync)
    first, versions = draw(engine)
    assert first == expected(adapter_sum(model))
    assert versions == {engine.version} == {fake.version} == set(fake.adapters)
    move(model)
    engine.sync_weights()
    second, later = draw(engine)
    assert second == expected(adapter_sum(model)) != first
    assert later == {engine.version} == set(fake.adapters) != versions  # the former one is gone
    assert not fake.paths("/collective_rpc") and engine.pushes == 2
    sampled = [body["model"] for body in fake.paths("/v1/completions") if "prompt_logprobs" not in body]
    assert sampled == [*versions] * 6 + [*later] * 6
    assert not any((tmp_path / "weights").iterdir())


def test_what_the_adapter_of_before_still_samples_ends_before_the_new_one_comes(make_engine, fake):
    engine = make_engine()
    engine.sync_weights()
    seen = len(fake.seen)
    engine.sync_weights()
    order = [path for path, _ in fake.seen[seen:] if path in ("/abort_requests", *client_module._SAYS_SO_IN_WORDS)]
    assert order == ["/v1/unload_lora_adapter", "/abort_requests", "/v1/load_lora_adapter"]


def restart(fake):
    fake.restart()


def foreign_version(fake):
    fake.version = "someone-1"


def lost_adapter(fake):
    fake.adapters.clear()


@pytest.mark.parametrize("change", [restart, foreign_version, lost_adapter])
@pytest.mark.parametrize("amid", [False, True])
def test_a_server_without_the_adapter_gets_it_again(make_engine, fake, model, change, amid):
    engine = make_engine()
    draw(engine)
    if amid:
        first = len(fake.paths("/v1/completions")) + 3  # after the probe, amid the samples

        def fails(path, number):
            if path == "/v1/completions" and number == first:
                change(fake)

        fake.fails = fails
    else:
        change(fake)
    samples, versions = draw(engine)
    assert samples == expected(adapter_sum(model)) and versions == {engine.version} == {fake.version}
    assert engine.pushes == 2


def test_samples_of_an_adapter_of_before_are_an_error(make_engine, fake, monkeypatch):
    engine = make_engine()
    draw(engine)
    answer = fake.answer

    def stale(path, body):
        status, given = answer(path, body)
        if path == "/v1/completions" and "prompt_logprobs" not in body:
            given["model"] = "older-1"
        return status, given

    monkeypatch.setattr(fake, "answer", stale)
    with pytest.raises(ServerError, match=f"{fake.url} sampled with 'older-1', not '.*-3'. That was attempt 3 of 3"):
        draw(engine)


def test_another_base_model_under_the_adapter_is_an_error_that_no_push_mends(make_engine, fake):
    engine = make_engine()
    draw(engine)
    fake.weights = 2.0
    with pytest.raises(ServerError, match=f"{fake.url} has another base model than before .*off by 5.*start it anew"):
        draw(engine)
    assert engine.version is None and fake.version.endswith("-incomplete")


def test_another_base_model_at_the_start_is_an_error(make_engine, fake):
    fake.weights = 2.0
    with pytest.raises(ServerError, match="off by .* from the trainer's after equal weights were pushed"):
        draw(make_engine())


def no_lora(fake):
    fake.lora = None


def low_rank(fake):
    fake.lora["max_lora_rank"] = 1


def parts(fake):
    fake.lora["target_modules"] = ["q_proj"]


@pytest.mark.parametrize(
    ("change", "settings", "reason"),
    [
        (no_lora, {}, "takes no adapters: start it with --enable-lora --max-lora-rank 8 and VLLM_ALLOW_RUNTIME_LORA"),
        (low_rank, {}, "takes adapters up to rank 1: start it with --max-lora-rank 8"),
        (parts, {}, "leaves out parts of it: start it without --lora-target-modules"),
        (None, {"lora_sync": "merged"}, None),
    ],
)
def test_where_no_adapter_is_taken_it_is_refused_by_name_or_goes_merged(
    make_engine, fake, model, caplog, change, settings, reason
):
    if change:
        change(fake)
        with pytest.raises(ServerError, match=f"lora_sync='adapter' cannot send an adapter .*{fake.url} {reason}"):
            make_engine(lora_sync="adapter")
    with caplog.at_level(logging.INFO):
        engine = make_engine(**settings)
    assert engine.by_adapter is False and (reason or "") in caplog.text
    engine._is_checked = True  # the log-probs of the fake trainer are of the adapter alone
    draw(engine)
    assert len(fake.paths("/collective_rpc")) == 1 and not fake.adapters


def test_nccl_moves_no_adapter(make_engine):
    with pytest.raises(ServerError, match="an adapter is read from a folder: set weight_sync='disk'"):
        make_engine(lora_sync="adapter", weight_sync="nccl")


def test_a_model_without_an_adapter_has_none_to_send(fake, tmp_path, tiny_tokenizer):
    model = build_model(tiny_tokenizer, 64, 2)
    with pytest.raises(ServerError, match="lora_sync='adapter' cannot send an adapter \\(the model has no adapter"):
        build_engine(fake.url, tmp_path, model, None, lora_sync="adapter")
    assert build_engine(fake.url, tmp_path, model, None).by_adapter is False


def test_a_server_that_comes_back_without_lora_ends_the_run(make_engine, fake):
    engine = make_engine()
    draw(engine)

    def fails(path, number):
        if path == "/v1/completions" and number > 10 and fake.lora:
            fake.restart()
            fake.lora = None
            raise ConnectionError

    fake.fails = fails
    with pytest.raises(
        ServerError, match="lora_sync='auto' cannot send an adapter .*takes no adapters.*else set it to"
    ):
        draw(engine)


def test_a_full_folder_ends_in_one_error_and_leaves_nothing(make_engine, fake, model, tmp_path, monkeypatch):
    engine = make_engine()
    draw(engine)

    def full(model, weights, folder):
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("attn_trainers.base.server.save_adapter", full)
    with pytest.raises(ServerError, match="weight_sync_dir=.*weights: .*No space left on device"):
        engine.sync_weights()
    assert not any((tmp_path / "weights").iterdir())


def test_a_folder_that_the_server_does_not_see_is_named(make_engine, fake):
    engine = make_engine()
    fake.fails = lambda path, number: 404 if path == "/v1/load_lora_adapter" else None
    with pytest.raises(ServerError, match=f"{fake.url} does not see the folder .*weights-.*-1"):
        engine.sync_weights()
