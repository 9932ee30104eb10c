"""A real vLLM server that takes adapters: a LoRA goes to it alone, and a recipe starts and goes on against it."""

import json

import pytest
import requests
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast
from trl import GRPOTrainer

from attn_trainers.base.config import MethodConfig
from attn_trainers.base.generation import GenerationMixin
from attn_trainers.sampling.requests import GenerationRequest
from attn_trainers.tiny.arithmetic import MAX_VALUE, WarmStart, sample_problems, warm_start
from tests.helpers import ROOT, odd_sum
from tests.real_server import RealServer


pytestmark = pytest.mark.slow

OPERATIONS = 1


class Trainer(GenerationMixin, GRPOTrainer):
    pass


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Of a model that has learnt how a solution looks, and not what is right."""
    folder = tmp_path_factory.mktemp("served")
    start = WarmStart(num_operations=OPERATIONS, steps=150, batch_size=16, hidden_size=64, num_layers=2)
    server = RealServer(warm_start(start, folder), folder / "server.log", lora_rank=8)
    server.start()
    server.wait()
    yield server
    server.kill()


@pytest.fixture
def lora_trainer(server, tmp_path):
    args = MethodConfig(
        str(tmp_path / "out"),
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=16,
        max_steps=2,
        report_to="none",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=server.url,
        lora_sync="adapter",
        save_strategy="no",
    )
    return Trainer(
        str(server.model),
        odd_sum,
        args,
        train_dataset=Dataset.from_dict({"prompt": ["12 + 3", "45 - 6", "7 + 8", "90 - 1"]}),
        processing_class=PreTrainedTokenizerFast.from_pretrained(server.model),
        peft_config=LoraConfig(r=8, lora_alpha=64, target_modules="all-linear"),
    )


def differences(trainer, batch, results):
    """Between the server's log-probs of what it sampled and those of the trainer's own weights."""
    apart = []
    for request, result in zip(batch, results, strict=True):
        ids = torch.tensor([request.prompt_ids + result.token_ids])
        with torch.no_grad():
            logps = trainer.model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        apart.append((logps[len(request.prompt_ids) - 1 :] - torch.tensor(result.logps)).abs())
    return torch.cat(apart)


def move_lora(trainer) -> None:
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))


def ask(server, name: str) -> requests.Response:
    body = {"model": name, "prompt": [20, 30], "max_tokens": 1}
    return requests.post(f"{server.url}/v1/completions", json=body, timeout=30)


def test_a_server_follows_an_adapter_through_large_updates(server, lora_trainer):
    torch.manual_seed(0)
    engine = lora_trainer.vllm_generation
    assert engine.by_adapter
    batch = [GenerationRequest([20 + i, 30 + i], max_tokens=16, seed=i) for i in range(32)]
    before = differences(lora_trainer, batch, lora_trainer.generate_requests(batch))
    first = engine.version
    move_lora(lora_trainer)
    stale = differences(lora_trainer, batch, lora_trainer.generate_requests(batch))  # the step did not change
    assert engine.version == first and ask(server, first).json()["model"] == first
    lora_trainer._last_loaded_step = -1
    results = lora_trainer.generate_requests(batch)
    fresh = differences(lora_trainer, batch, results)
    noise = 3 * (before.var() / len(before) + fresh.var() / len(fresh)).sqrt()
    assert (fresh.mean() - before.mean()).abs() < noise + 1e-4  # both sides compute in float32
    assert stale.mean() > 10 * fresh.mean() and stale.mean() > 0.1
    assert {result.weight_version for result in results} == {engine.version} != {first}
    answer = ask(server, first)
    assert answer.status_code == 404 and f"The model `{first}` does not exist" in answer.text
    assert lora_trainer.generate_requests(batch) == results  # seeds make samples repeatable


def test_what_is_being_sampled_with_an_adapter_is_sampled_again_with_the_next(lora_trainer):
    engine = lora_trainer.vllm_generation
    batch = [GenerationRequest([20 + i, 30 + i], max_tokens=100, seed=i) for i in range(64)]
    pending = engine.submit(batch)
    move_lora(lora_trainer)
    engine.sync_weights()
    results = engine.collect(pending)
    assert {result.weight_version for result in results} == {engine.version}
    assert differences(lora_trainer, batch, results).mean() < 1e-4


def test_a_recipe_goes_on_where_it_was(server, launch, tmp_path):
    data = tmp_path / "problems.jsonl"
    answers = [str(number) for number in range(0, MAX_VALUE, 2)]  # about half of all guesses are right
    lines = [{"problem": problem.text, "answer": answers} for problem in sample_problems(32, 0, OPERATIONS)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "run"
    fixed = f"--model_name_or_path {server.model} --dataset {data} --output_dir {output} --report_to none "
    fixed += f"--use_vllm true --vllm_mode server --vllm_server_base_url {server.url} --weight_sync disk "
    fixed += f"--weight_sync_dir {tmp_path / 'weights'} --prompt_template {{problem}} --seeded_sampling true "
    fixed += "--num_rollouts 4 --num_branch_points 1 --rollouts_per_branch 1 --min_branch_spacing 0 "
    fixed += "--influence_delta 1 --max_completion_length 16 --learning_rate 1e-3 --logging_steps 1 --save_steps 2 "
    fixed += "--per_device_train_batch_size 8 --gradient_accumulation_steps 1 --generation_batch_size 32 "
    fixed += "--max_prompt_length 16 --gradient_checkpointing false --max_steps"

    def run(max_steps: int) -> dict:
        launch("cpu_ddp", ROOT / "recipes" / "attnrl_1p5b.py", *fixed.split(), max_steps)
        return json.loads((output / f"checkpoint-{max_steps}" / "trainer_state.json").read_text())

    first = run(4)
    assert first["global_step"] == 4
    second = run(8)
    assert second["global_step"] == 8
    # What the first launch logged, its times included, is what the second one began with.
    logs = second["log_history"]
    assert logs[: len(first["log_history"])] == first["log_history"]
    steps = [entry["step"] for entry in logs if "loss" in entry]
    assert steps == list(range(1, 9))
    assert all(entry["grad_norm"] > 0 for entry in logs if "loss" in entry)
    # The server held the last weights of the first launch; what it samples with are the checkpoint's, and later ones.
    assert max(entry.get("sampling/sampling_logp_difference/max", 0.0) for entry in logs) < 1e-4
    assert not any((tmp_path / "weights").iterdir())
