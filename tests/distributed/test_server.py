"""A real vLLM server on loopback: two ranks equal one, runs resume, and a killed server is got over."""

import threading

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from attn_trainers import AttnRLConfig, AttnRLTrainer
from attn_trainers.sampling.requests import GenerationRequest
from tests.helpers import logged, odd_sum
from tests.real_server import RealServer


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_tokenizer):
    """Of a model with a tied output head, of which vLLM keeps a packed copy on a CPU."""
    from attn_trainers.tiny.arithmetic import build_model

    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    build_model(tiny_tokenizer, 64, 2, tie_word_embeddings=True).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    server = RealServer(folder, folder / "server.log")
    server.start()
    server.wait()
    yield server
    server.kill()


@pytest.fixture
def make_trainer(server, tmp_path, arithmetic_dataset):
    def make(**kwargs):
        settings = {
            "per_device_train_batch_size": 12,
            "steps_per_generation": 2,
            "num_rollouts": 4,
            "rollouts_per_branch": 1,
            "max_completion_length": 16,
            "min_branch_spacing": 0,
            "influence_delta": 1,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": "none",
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
            "seeded_sampling": True,
            "use_vllm": True,
            "vllm_mode": "server",
            "vllm_server_base_url": server.url,
            "save_strategy": "no",
        }
        return AttnRLTrainer(
            str(server.model),
            odd_sum,
            AttnRLConfig(str(tmp_path / "out"), **(settings | kwargs)),
            train_dataset=arithmetic_dataset,
            processing_class=PreTrainedTokenizerFast.from_pretrained(server.model),
        )

    return make


def test_two_ranks_equal_one(run_ranks, server, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_SERVER_URL", server.url)
    (tmp_path / "one").mkdir()
    one, weights = run_ranks("run_attnrl.py", "cpu", 1, server.model, tmp_path / "one", "vllm")
    two, two_weights = run_ranks("run_attnrl.py", "cpu_ddp", 2, server.model, tmp_path, "vllm")
    assert two["batches"] == one["batches"] and len(one["batches"]) >= 3
    for name, weight in weights.items():
        torch.testing.assert_close(two_weights[name], weight, rtol=1e-3, atol=1e-5)
    first, second = two["work"]
    assert first == second


def test_a_run_is_the_same_with_and_without_overlap(make_trainer):
    runs = []
    for overlaps in (True, False):
        trainer = make_trainer(max_steps=6, overlap_sampling=overlaps)
        trainer.train()
        runs.append([logged(trainer, name) for name in ("loss", "grad_norm", "attnrl/policy_lag_initial")])
    assert runs[0] == runs[1]
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-4


def test_a_run_goes_on_from_a_checkpoint(make_trainer):
    trainer = make_trainer(max_steps=4, save_strategy="steps", save_steps=1)
    trainer.train()
    resumed = make_trainer(max_steps=8, save_strategy="steps", save_steps=1)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    # The server held other weights when it was resumed; what it sampled with are the checkpoint's.
    assert max(logged(resumed, "sampling/sampling_logp_difference/max")) < 1e-4


def test_a_server_that_is_killed_while_it_samples_is_waited_for_and_pushed_again(make_trainer, server):
    trainer = make_trainer(vllm_server_timeout=300.0)
    engine = trainer.vllm_generation
    requests = [GenerationRequest([20 + i, 30 + i], max_tokens=100, seed=i) for i in range(32)]
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    before = trainer.generate_requests(requests)
    pending = engine.submit(requests)
    assert engine.pushes == 1
    server.kill()
    threading.Timer(1.0, server.start).start()
    after = engine.collect(pending)
    assert engine.pushes == 2
    assert [sample.token_ids for sample in after] == [sample.token_ids for sample in before]
    assert {sample.weight_version for sample in after} == {engine.version} != {before[0].weight_version}
