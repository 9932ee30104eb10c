"""AttnRL through vLLM colocate."""

import pytest

from attn_trainers import AttnRLConfig, AttnRLTrainer
from attn_trainers.attnrl.rollouts import branches_of


def odd_sum(completions, completion_ids, **kwargs):
    return [float(sum(ids) % 2) for ids in completion_ids]


@pytest.mark.slow
def test_training_through_vllm(tmp_path, tiny_model_dir, tiny_tokenizer, arithmetic_dataset):
    args = AttnRLConfig(
        str(tmp_path),
        per_device_train_batch_size=12,
        steps_per_generation=4,
        gradient_accumulation_steps=2,
        num_rollouts=4,
        rollouts_per_branch=1,
        max_steps=6,
        learning_rate=1e-2,
        max_completion_length=16,
        min_branch_spacing=0,
        influence_delta=1,
        seeded_sampling=True,
        use_vllm=True,
        vllm_max_model_length=64,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
    )
    trainer = AttnRLTrainer(
        str(tiny_model_dir), odd_sum, args, train_dataset=arithmetic_dataset, processing_class=tiny_tokenizer
    )
    draws = trainer.pipeline.stream.draws(0, 4)
    first, again = trainer._sample([], draws), trainer._sample([], draws)
    tokens = [[[r.tokens.tolist() for r in p.rollouts] for p in prompts] for prompts in (first, again)]
    assert tokens[0] == tokens[1]
    trainer._ahead = None
    trainer.keeps_prompts = True
    trainer.train()
    assert trainer.last_prompts
    for prompt in trainer.last_prompts:
        for rollout in prompt.rollouts:
            assert len(rollout.sampling_logps) == len(rollout.old_logps) == len(rollout.tokens) <= 16
            for branch in branches_of(rollout):
                assert branch.offset + len(branch.tokens) <= 16
                assert len(branch.sampling_logps) == len(branch.tokens)
    history = trainer.state.log_history
    differences = [e["sampling/sampling_logp_difference/mean"] for e in history if e.get("attnrl/rows_trained")]
    assert len(differences) >= 3
    # Each token's two log-probs belong to the same policy, after large updates too: the difference is that of sums in
    # another order.
    assert max(differences) < 1e-4
    assert all(e["attnrl/missing_sampling_logps"] == 0 for e in history if "attnrl/missing_sampling_logps" in e)
