"""Signatures of the TRL hooks that the trainers override or call; a change in TRL must be looked at, not slipped
past."""

import inspect

import pytest
import trl
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration


HOOKS = {
    "_prepare_inputs": ["self", "generation_batch"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_generate_single_turn": [
        "self",
        "prompt_ids",
        "images",
        "multimodal_fields",
        "num_generations",
        "has_tool_images",
    ],
    "_tokenize_prompts": ["self", "prompts"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_compute_loss": ["self", "model", "inputs"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "evaluate": ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
    "log": ["self", "logs", "start_time"],
    "create_model_card": ["self", "model_name", "dataset_name", "tags"],
}


def test_the_version_is_the_one_that_was_read():
    assert trl.__version__.startswith("1.16.")


@pytest.mark.parametrize("name", HOOKS)
def test_signature_of_a_hook(name):
    assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == HOOKS[name]


def test_signature_of_the_log_prob_forward():
    parameters = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    assert parameters[:8] == [
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
    ]


def test_evaluation_metrics_have_one_prefix_whatever_the_data_set():
    assert 'metrics = {f"eval_{key}": val for key, val in metrics.items()}' in inspect.getsource(GRPOTrainer.log)


def test_the_loss_takes_advantages_per_token():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert "if advantages.dim() == 1:" in source
    for key in ("old_per_token_logps", "importance_sampling_ratio", "ref_per_token_logps", "num_items_in_batch"):
        assert f'inputs["{key}"]' in source or f'inputs.get("{key}")' in source


@pytest.mark.parametrize("name", ["_iter_named_params", "sync_weights"])
def test_signature_of_the_weight_sync(name):
    assert list(inspect.signature(getattr(VLLMGeneration, name)).parameters) == ["self"]


def test_old_log_probs_are_made_under_the_condition_that_the_credit_trainers_repeat():
    source = " ".join(inspect.getsource(GRPOTrainer._generate_and_score_completions).split())
    condition = (
        "if self.args.gradient_accumulation_steps % generate_every != 0 or ( self.use_vllm and "
        "self.vllm_importance_sampling_correction ): old_per_token_logps, _, _ = "
        "self._get_per_token_logps_and_entropies( self.model,"
    )
    assert condition in source
