"""Forwards without gradients: under the run's autocast, without dropout, and leaving the model as it was."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from attn_trainers import AttnPOConfig, AttnPOTrainer, AttnRLConfig, AttnRLTrainer, RhythmConfig, RhythmTrainer
from attn_trainers.attention.observers import BatchObserver
from attn_trainers.base.forwards import without_dropout
from tests.helpers import logged


def odd_sum(completions, completion_ids, **kwargs):
    return [float(sum(ids) % 2) for ids in completion_ids]


CASES = {
    "AttnRL": (AttnRLTrainer, AttnRLConfig, {"num_rollouts": 2, "num_branch_points": 1, "rollouts_per_branch": 1}),
    "AttnPO": (AttnPOTrainer, AttnPOConfig, {"heads": [[0, 0]], "step_mode": "paragraphs", "num_generations": 4}),
    "Rhythm": (RhythmTrainer, RhythmConfig, {"num_generations": 4}),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_is_read_in_bf16_where_the_run_computes_in_it(
    name, monkeypatch, tmp_path, tiny_model_dir, tiny_tokenizer, arithmetic_dataset
):
    seen = set()
    observe = BatchObserver.observe

    def record(self, layer):
        seen.add((layer.query.dtype, layer.key.dtype))
        observe(self, layer)

    monkeypatch.setattr(BatchObserver, "observe", record)
    trainer_class, config_class, options = CASES[name]
    args = config_class(
        str(tmp_path),
        per_device_train_batch_size=8,
        max_completion_length=12,
        max_steps=1,
        bf16=True,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        **options,
    )
    trainer = trainer_class(
        str(tiny_model_dir), odd_sum, args, train_dataset=arithmetic_dataset, processing_class=tiny_tokenizer
    )
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    trainer.train()
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    assert torch.tensor(logged(trainer, "loss")).isfinite().all()


def test_dropout_is_off_and_the_mode_comes_back(tiny_model_dir):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config).train()
    model.get_base_model().lm_head.eval()  # a part that is not in training mode stays so
    ids = torch.arange(12)[None]
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits)
        with without_dropout(model):
            first, second = model(ids).logits, model(ids).logits
    assert torch.equal(first, second)
    assert [module.training for module in model.modules()] == modes
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, first)
