"""Generation with a limit per request, and the weight sync, on both backends."""

import gc
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOTrainer

from attn_trainers.base.adapter_sync import takes_adapter
from attn_trainers.base.config import MethodConfig
from attn_trainers.base.generation import GenerationMixin, vllm_generate
from attn_trainers.base.sync_check import PROBE_TOKENS
from attn_trainers.sampling.requests import GenerationRequest
from attn_trainers.sampling.vllm import Admission
from attn_trainers.tiny.arithmetic import build_model


class Trainer(GenerationMixin, GRPOTrainer):
    pass


def build_experts(tokenizer):
    """A small Qwen3 mixture of experts."""
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3MoeForCausalLM(config)


def token_sum(completions, completion_ids, **kwargs):
    return [float(sum(ids) % 7) for ids in completion_ids]


@pytest.fixture
def make_trainer(tmp_path, tiny_tokenizer):
    engines = []

    def make(kind="untied", peft_config=None, **kwargs):
        engines.extend([kind] * kwargs.get("use_vllm", False))
        torch.manual_seed(0)
        folder = tmp_path / "model"
        if kind == "experts":
            model = build_experts(tiny_tokenizer)
        else:
            model = build_model(tiny_tokenizer, 64, 2, tie_word_embeddings=kind == "tied")
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        settings = {
            "per_device_train_batch_size": 8,
            "num_generations": 8,
            "max_completion_length": 16,
            "max_steps": 3,
            "learning_rate": 1e-2,
            "max_grad_norm": 100.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
        }
        return Trainer(
            str(folder),
            token_sum,
            MethodConfig(str(tmp_path / "out"), **(settings | kwargs)),
            train_dataset=Dataset.from_dict({"prompt": ["12 + 3", "45 - 6", "7 + 8", "90 - 1"]}),
            processing_class=tiny_tokenizer,
            peft_config=peft_config,
        )

    yield make
    if engines:
        gc.collect()  # an engine that dies while the next one starts would take its process group along


def test_one_sleep_bracket_surrounds_each_generation(make_trainer, monkeypatch):
    # Sleep mode needs a GPU; what matters here is the order of the engine's calls.
    calls = []
    trainer = make_trainer()
    llm = SimpleNamespace(
        wake_up=lambda tags: calls.append(f"wake {tags[0]}"),
        sleep=lambda level: calls.append(f"sleep {level}"),
    )
    trainer.use_vllm, trainer._last_loaded_step, trainer._sync_is_checked = True, -1, True
    trainer.vllm_generation = SimpleNamespace(
        mode="colocate", enable_sleep_mode=True, _llm_weights_sleeping=True, llm=llm
    )

    def sync(engine):
        engine.llm.wake_up(["weights"])
        engine._llm_weights_sleeping = False
        calls.append("sync")

    monkeypatch.setattr("attn_trainers.base.generation.sync_vllm_weights", sync)
    monkeypatch.setattr(
        "attn_trainers.base.generation.vllm_generate",
        lambda engine, requests, progress: calls.append("generate") or [],
    )
    trainer.generate_requests([])
    bracket = ["wake weights", "sync", "wake kv_cache", "generate", "sleep 2"]
    assert calls == bracket
    trainer.generate_requests([])  # the weights did not change, but sleeping discarded them
    assert calls == bracket * 2


def test_a_second_run_pushes_weights_though_its_step_is_that_of_the_latest_push(make_trainer, monkeypatch):
    trainer, pushed_at = make_trainer(), []
    trainer._last_loaded_step = trainer.state.global_step
    monkeypatch.setattr(GRPOTrainer, "train", lambda self: pushed_at.append(self._last_loaded_step))
    trainer.train()
    assert pushed_at == [-1]


def test_transformers_generation_honours_each_limit_and_the_order(make_trainer):
    trainer = make_trainer(generation_kwargs={"do_sample": False}, per_device_train_batch_size=8)
    eos = trainer.processing_class.eos_token_id
    requests = [GenerationRequest([20 + i] * (1 + i % 4), max_tokens=1 + i) for i in range(11)]  # two chunks
    results = trainer.generate_requests(requests)
    for request, result in zip(requests, results, strict=True):
        ids = torch.tensor([request.prompt_ids])
        for _ in range(request.max_tokens):
            logits = trainer.model(ids).logits[0, -1]
            ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
        alone = ids[0, len(request.prompt_ids) :].tolist()
        alone = alone[: alone.index(eos) + 1] if eos in alone else alone
        assert result.token_ids == alone
        assert result.logps is None


def test_seeds_make_samples_of_transformers_repeatable_in_any_batch(make_trainer):
    trainer = make_trainer(temperature=0.9, top_p=0.95, repetition_penalty=1.1)
    requests = [GenerationRequest([20 + i] * (1 + i % 4), max_tokens=2 + i, seed=100 + i) for i in range(11)]
    results = trainer.generate_requests(requests)
    torch.manual_seed(1)
    assert trainer.generate_requests(requests[::-1])[::-1] == results
    assert trainer.generate_requests(requests[3:4]) == results[3:4]
    others = [GenerationRequest(r.prompt_ids, r.max_tokens, r.seed + 1) for r in requests]
    assert trainer.generate_requests(others) != results


def test_a_request_without_room_is_refused(make_trainer):
    with pytest.raises(ValueError, match="max_tokens=0 leaves nothing to generate"):
        make_trainer().generate_requests([GenerationRequest([20], max_tokens=0)])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_what_an_engine_is_compared_with_knows_no_temperature(make_trainer, lora):
    trainer = make_trainer(temperature=0.7, peft_config=LoraConfig(r=2) if lora else None)
    tokens = trainer._probe
    assert len(tokens) == PROBE_TOKENS
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logits = trainer.model(input_ids=ids).logits[0, :-1]  # (T - 1, V)
    targets = ids[0, 1:, None]
    expected = logits.log_softmax(-1).gather(-1, targets)[:, 0]
    assert trainer._sequence_logps(tokens) == pytest.approx(expected.tolist(), rel=1e-5)
    tempered = (logits / 0.7).log_softmax(-1).gather(-1, targets).T
    with torch.no_grad():
        trained, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, torch.ones_like(ids), len(tokens) - 1
        )
    torch.testing.assert_close(trained, tempered)  # the head of the loss is back in its place


def trainer_logps(trainer, request, token_ids):
    """Log-probs of sampled tokens under the trainer's weights."""
    ids = torch.tensor([request.prompt_ids + token_ids])
    with torch.no_grad():
        logps = trainer.model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    return logps[len(request.prompt_ids) - 1 :]


def differences(trainer, requests, results):
    return torch.cat(
        [
            (trainer_logps(trainer, request, result.token_ids) - torch.tensor(result.logps)).abs()
            for request, result in zip(requests, results, strict=True)
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "lora_sync"),
    [("untied", None), ("tied", None), ("experts", None)]
    + [(kind, lora_sync) for kind in ("untied", "tied") for lora_sync in ("merged", "adapter")],
)
def test_vllm_follows_the_weights_through_large_updates(make_trainer, monkeypatch, kind, lora_sync):
    peft_config = LoraConfig(r=8, lora_alpha=64, target_modules="all-linear") if lora_sync else None
    trainer = make_trainer(
        kind,
        peft_config,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=64,
        lora_sync=lora_sync or "auto",
    )
    assert takes_adapter(trainer.vllm_generation) is (lora_sync == "adapter")
    requests = [GenerationRequest([20 + i, 30 + i], max_tokens=1 + i, seed=i) for i in range(16)]
    if kind == "experts":
        with monkeypatch.context() as patch:  # kernels that are kept take weights for packed ones: refused at start
            patch.setattr("attn_trainers.base.cpu_reload.kernels_made_anew", lambda model: nullcontext())
            with pytest.raises(ValueError, match="use_vllm=True does not go with Qwen3MoeForCausalLM: after a push"):
                trainer.generate_requests(requests)
        trainer._last_loaded_step = -1
    results = trainer.generate_requests(requests)
    assert [len(r.token_ids) for r in results if r.token_ids[-1] != trainer.processing_class.eos_token_id] == [
        request.max_tokens
        for request, r in zip(requests, results, strict=True)
        if r.token_ids[-1] != trainer.processing_class.eos_token_id
    ]
    assert trainer.generate_requests(requests) == results  # seeds make samples repeatable
    with monkeypatch.context() as patch:  # ... however few are taken at once
        patch.setattr("attn_trainers.sampling.vllm.admission_of", lambda *_: Admission(4, 16, 6))
        for held_back, result in zip(trainer.generate_requests(requests), results, strict=True):
            assert held_back.token_ids == result.token_ids
            assert held_back.logps == pytest.approx(result.logps, abs=1e-4)  # sums in another order
    before = differences(trainer, requests, results)
    trainer.train()
    trainer._last_loaded_step = trainer.state.global_step  # an engine that missed the last updates ...
    stale = differences(trainer, requests, trainer.generate_requests(requests))
    trainer._last_loaded_step = -1  # ... and one that got them
    fresh = differences(trainer, requests, trainer.generate_requests(requests))
    assert before.max() < 1e-4 and fresh.max() < 1e-4  # the engine computes in float32, as the trainer does
    assert stale.mean() > 0.01
    trainer.model.zero_grad()


@pytest.mark.parametrize(("error", "right"), [(1e-4, True), (0.5, False), (float("nan"), False)])
def test_a_first_push_that_changes_what_the_engine_computes_ends_the_run(make_trainer, monkeypatch, error, right):
    trainer = make_trainer()
    trainer.use_vllm, trainer._last_loaded_step = True, -1
    trainer.vllm_generation = SimpleNamespace(
        mode="colocate", enable_sleep_mode=False, _llm_weights_sleeping=False, llm=None, max_model_length=64
    )
    pushes = []
    monkeypatch.setattr("attn_trainers.base.generation.sync_vllm_weights", pushes.append)

    def logps(llm, tokens):
        return trainer_logps(trainer, GenerationRequest(tokens[:1], 1), tokens[1:]) + (error if pushes else 1e-4)

    monkeypatch.setattr("attn_trainers.base.generation.engine_logps", logps)
    if right:
        trainer._sync_vllm_if_stale()
        trainer._last_loaded_step = -1
        error = 0.5  # a later push is not looked at
        trainer._sync_vllm_if_stale()
        assert len(pushes) == 2
    else:
        with pytest.raises(ValueError, match="use_vllm=True does not go with Qwen2ForCausalLM: after a push"):
            trainer._sync_vllm_if_stale()


@pytest.mark.parametrize(("checked", "kind"), [(False, ValueError), (True, RuntimeError)])
def test_weights_that_an_engine_does_not_take_end_the_run_at_its_start_in_one_line(
    make_trainer, monkeypatch, checked, kind
):
    trainer = make_trainer()
    trainer._last_loaded_step, trainer._sync_is_checked = -1, checked
    trainer.vllm_generation = SimpleNamespace(mode="colocate", enable_sleep_mode=False, llm=None, max_model_length=64)
    monkeypatch.setattr("attn_trainers.base.generation.engine_logps", lambda llm, tokens: torch.zeros(47))

    def sync(engine):
        raise RuntimeError("size 128 is not 96\nmore")

    monkeypatch.setattr("attn_trainers.base.generation.sync_vllm_weights", sync)
    with pytest.raises(kind) as error:
        trainer._sync_vllm_if_stale()
    if not checked:
        assert str(error.value) == (
            "use_vllm=True does not go with Qwen2ForCausalLM: vLLM cannot take the trainer's weights (size 128 is not "
            "96); set use_vllm to False, or use another model."
        )


@pytest.fixture
def fake_engine(monkeypatch):
    """An engine that keeps the settings it is asked to sample by, and what else happened in their order."""
    seen = []
    monkeypatch.setattr(
        "attn_trainers.base.generation.run_requests",
        lambda llm, requests, settings, on_cpu: seen.append(settings) or enumerate([None] * len(requests)),
    )

    def make(**kwargs):
        sampling = dict.fromkeys(["repetition_penalty", "temperature", "top_p", "top_k", "min_p", "logprobs"], 0)
        accelerator = SimpleNamespace(device=torch.device("cpu"), local_process_index=3)
        engine = {"tensor_parallel_size": 1, "generation_kwargs": {}, "accelerator": accelerator, "llm": None}
        return SimpleNamespace(**(sampling | engine | kwargs)), seen

    return make


@pytest.mark.parametrize(("kwargs", "detokenize"), [({}, False), ({"stop": ["."]}, True)])
def test_text_is_made_where_stop_strings_are_looked_for(fake_engine, kwargs, detokenize):
    engine, seen = fake_engine(generation_kwargs=kwargs)
    vllm_generate(engine, [GenerationRequest([1], max_tokens=1)])
    assert seen[0]["detokenize"] is detokenize
    assert seen[0].get("stop") == kwargs.get("stop")


@pytest.mark.parametrize("requests", [[], [GenerationRequest([1], max_tokens=1)]])
@pytest.mark.parametrize("is_adapter", [False, True])
def test_ranks_wait_for_each_other_before_an_adapters_engine_exchanges(fake_engine, monkeypatch, is_adapter, requests):
    engine, seen = fake_engine(tensor_parallel_size=2, tp_group=None, model=None)
    monkeypatch.setattr("attn_trainers.base.generation.is_peft_model", lambda model: is_adapter)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)
    monkeypatch.setattr(torch.distributed, "barrier", lambda device_ids: seen.append(device_ids))
    monkeypatch.setattr(
        torch.distributed,
        "all_gather_object",
        lambda gathered, own, group: gathered.__setitem__(slice(None), [own, own]),
    )
    shown = []

    def progress(items, what, total):
        shown.append((what, total))
        return items

    assert len(vllm_generate(engine, requests, progress)) == len(requests)
    assert shown == [("Sampling", 2)] * bool(requests)  # a rank samples what its group wants
    # A group without requests waits too: the barrier is over all ranks.
    assert seen[: int(is_adapter)] == [[3]] * is_adapter
    assert len(seen) == is_adapter + bool(requests)
