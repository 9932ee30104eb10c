"""Every field that the trainers inherit is honoured, refused by name, or without effect for a reason that is written
here: a field that TRL or transformers add must be looked at, not slipped past."""

from dataclasses import fields
from importlib.metadata import version

import pytest
from transformers import TrainingArguments
from trl import GRPOConfig

from attn_trainers import AttnPOConfig, AttnRLConfig, RhythmConfig
from tests.helpers import ROOT


CONFIGS = {"AttnRL": AttnRLConfig, "AttnPO": AttnPOConfig, "Rhythm": RhythmConfig}

# Of GRPOConfig: works in all three trainers as TRL documents it.
HONOURED = [
    "model_init_kwargs",
    "trust_remote_code",
    "router_aux_loss_coef",
    "disable_dropout",
    "cast_lm_head_to_fp32",
    "num_generations_eval",
    "ds3_gather_for_generation",
    "shuffle_dataset",
    "generation_batch_size",
    "steps_per_generation",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "generation_kwargs",
    "chat_template_kwargs",
    "repetition_penalty",
    "cache_implementation",
    "use_vllm",
    "vllm_mode",
    "vllm_model_impl",
    "vllm_enable_sleep_mode",
    "vllm_gpu_memory_utilization",
    "vllm_max_model_length",
    "vllm_tensor_parallel_size",
    "beta",
    "num_iterations",
    "epsilon",
    "delta",
    "epsilon_high",
    "sapo_temperature_neg",
    "sapo_temperature_pos",
    "importance_sampling_level",
    "reward_weights",
    "loss_type",
    "mask_truncated_completions",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "top_entropy_quantile",
    "entropy_coef",
    "use_adaptive_entropy",
    "entropy_coef_min",
    "entropy_coef_max",
    "entropy_coef_delta",
    "entropy_target",
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_cap",
    "off_policy_mask_threshold",
    "use_bias_correction_kl",
    "log_completions",
    "num_completions_to_print",
    "log_unique_prompts",
    "log_completions_hub_repo",
    "max_completion_length",
    "num_generations",
    "multi_objective_aggregation",
    "scale_rewards",
    "vllm_structured_outputs_regex",
    "pad_to_multiple_of",
    "use_transformers_continuous_batching",
    "transformers_continuous_batching_config",
    "use_transformers_paged",
    "vllm_server_base_url",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_timeout",
    "vllm_group_port",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
]

# Of GRPOConfig: without effect in all three.
INERT = {
    "log_multimodal": "a data set with images is refused by name",
    "max_tool_calling_iterations": "tools are refused by name",
}

# Honoured by TRL, but refused by name here: a value, and how the error begins.
REFUSED = {
    "AttnRL": {
        "num_generations": (8, "num_generations=8"),
        "max_completion_length": (None, "max_completion_length=None"),
        "scale_rewards": ("group", "scale_rewards='group'"),
        "multi_objective_aggregation": ("normalize_then_sum", "multi_objective_aggregation='normalize_then_sum'"),
        "pad_to_multiple_of": (8, "pad_to_multiple_of=8"),
        "vllm_structured_outputs_regex": ("a+", "vllm_structured_outputs_regex='a\\+'"),
        "use_transformers_continuous_batching": (True, "use_transformers_continuous_batching=True"),
        "use_transformers_paged": (True, "use_transformers_continuous_batching=True"),
        "loss_type": ("vespo", "loss_type='vespo'"),
        "importance_sampling_level": ("sequence", "importance_sampling_level='sequence'"),
    },
    "AttnPO": {
        "scale_rewards": ("group", "scale_rewards='group'"),
        "multi_objective_aggregation": ("normalize_then_sum", "multi_objective_aggregation='normalize_then_sum'"),
        "loss_type": ("vespo", "loss_type='vespo'"),
        "importance_sampling_level": ("sequence", "importance_sampling_level='sequence'"),
    },
    "Rhythm": {
        "loss_type": ("vespo", "loss_type='vespo'"),
        "importance_sampling_level": ("sequence", "importance_sampling_level='sequence'"),
    },
}

# Honoured by TRL, without effect here.
WITHOUT_EFFECT = {
    "AttnRL": {
        **dict.fromkeys(
            ["vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"], "loss_type='vespo' is refused"
        ),
        "transformers_continuous_batching_config": "use_transformers_continuous_batching is refused",
    },
    "AttnPO": dict.fromkeys(
        ["vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"], "loss_type='vespo' is refused"
    ),
    "Rhythm": {},  # with scheme='none' and rewards of whole completions, every loss goes
}

# Of TrainingArguments: the loop of transformers honours them, whatever the method.
LOOP = [
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "bf16_full_eval",
    "ddp_backend",
    "ddp_broadcast_buffers",
    "ddp_bucket_cap_mb",
    "ddp_find_unused_parameters",
    "ddp_static_graph",
    "ddp_timeout",
    "debug",
    "deepspeed",
    "disable_tqdm",
    "do_eval",
    "do_predict",
    "do_train",
    "eval_accumulation_steps",
    "eval_delay",
    "eval_do_concat_batches",
    "eval_on_start",
    "eval_steps",
    "eval_strategy",
    "eval_use_gather_object",
    "fp16",
    "fp16_full_eval",
    "fsdp",
    "fsdp_config",
    "full_determinism",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "greater_is_better",
    "hub_always_push",
    "hub_model_id",
    "hub_private_repo",
    "hub_revision",
    "hub_strategy",
    "hub_token",
    "learning_rate",
    "liger_kernel_config",
    "load_best_model_at_end",
    "local_rank",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "logging_first_step",
    "logging_nan_inf_filter",
    "logging_steps",
    "logging_strategy",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_grad_norm",
    "max_steps",
    "metric_for_best_model",
    "neftune_noise_alpha",
    "num_train_epochs",
    "optim",
    "optim_args",
    "optim_target_modules",
    "output_dir",
    "per_device_eval_batch_size",
    "per_device_train_batch_size",
    "project",
    "push_to_hub",
    "report_to",
    "restore_callback_states_from_checkpoint",
    "resume_from_checkpoint",
    "run_name",
    "save_on_each_node",
    "save_only_model",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "seed",
    "skip_memory_metrics",
    "tf32",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "torch_empty_cache_steps",
    "trackio_bucket_id",
    "trackio_space_id",
    "trackio_static_space_id",
    "use_cache",
    "use_cpu",
    "use_liger_kernel",
    "warmup_steps",
    "weight_decay",
    "prediction_loss_only",
]

# Of TrainingArguments: without effect in GRPO, and so here.
LOOP_INERT = {
    "average_tokens_across_devices": "GRPO counts the tokens of its loss itself",
    "batch_eval_metrics": "evaluation generates; it has no compute_metrics",
    "include_for_metrics": "evaluation generates; it has no compute_metrics",
    "include_num_input_tokens_seen": "GRPO counts tokens itself, always",
    "label_names": "GRPO has no labels",
    "label_smoothing_factor": "GRPO has no labels",
    "length_column_name": "GRPO does not group by length",
    "remove_unused_columns": "GRPO's default is False: reward functions get all columns",
    "train_sampling_strategy": "GRPO has a sampler of its own",
    "data_seed": "GRPO's sampler, and AttnRL's stream of prompts, take seed",
}

# Of TrainingArguments: about the data loader, from which AttnRL takes nothing but the beat of its steps.
LOADER = [
    "accelerator_config",
    "dataloader_drop_last",
    "dataloader_in_order",
    "dataloader_multiprocessing_context",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "ignore_data_skip",
]

# Refused by name in all three, by TRL or here.
LOOP_REFUSED = {
    "auto_find_batch_size": (True, "auto_find_batch_size is not supported"),
    "parallelism_config": (None, ""),  # TRL refuses context and sequence parallelism; a None is no value to refuse
    "enable_jit_checkpoint": (None, ""),  # refused by the trainer: tests/base/test_interruption.py
}

# Of TrainingArguments in other versions that setup.cfg admits: names of, or beside, what stands above.
OTHER_VERSIONS = ["activation_checkpointing", "activation_checkpointing_kwargs", "logging_dir", "warmup_ratio"]


def make(config_class, folder, **kwargs):
    settings = {"per_device_train_batch_size": 30, "use_cpu": True, "bf16": False, "report_to": "none"}
    return config_class(str(folder), save_strategy="no", **(settings | kwargs))


def test_every_field_of_trl_is_known():
    inherited = {f.name for f in fields(TrainingArguments)}
    own = {f.name for f in fields(GRPOConfig)} - inherited
    assert own == set(HONOURED) | INERT.keys()
    assert not set(HONOURED) & INERT.keys()
    for name in CONFIGS:
        assert REFUSED[name].keys() | WITHOUT_EFFECT[name].keys() <= set(HONOURED)
        assert not REFUSED[name].keys() & WITHOUT_EFFECT[name].keys()


def test_every_field_of_transformers_is_known():
    known = [*LOOP, *LOOP_INERT, *LOADER, *LOOP_REFUSED]
    assert len(set(known)) == len(known)
    installed = {f.name for f in fields(TrainingArguments)}
    assert installed <= {*known, *OTHER_VERSIONS}
    if f"transformers=={version('transformers')}\n" in (ROOT / "requirements" / "constraints.txt").read_text():
        assert installed == set(known)


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name, refused in REFUSED.items() for field in refused], ids="-".join
)
def test_what_a_method_cannot_honour_is_refused_by_name(tmp_path, name, field):
    value, message = REFUSED[name][field]
    rows = 30 if name == "AttnRL" else 8
    with pytest.raises(ValueError, match=message):
        make(CONFIGS[name], tmp_path, per_device_train_batch_size=rows, **{field: value})


@pytest.mark.parametrize("config_class", CONFIGS.values())
def test_what_trl_refuses_stays_refused(tmp_path, config_class):
    with pytest.raises(ValueError, match="auto_find_batch_size is not supported"):
        make(config_class, tmp_path, auto_find_batch_size=True)


@pytest.mark.parametrize("epsilon_high", [None, 0.28, 1.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_cispo_needs_a_bound_of_the_ratio_itself(tmp_path, name, epsilon_high):
    rows = 30 if name == "AttnRL" else 8
    settings = {"loss_type": "cispo", "per_device_train_batch_size": rows}
    with pytest.raises(ValueError, match=f"epsilon_high={epsilon_high} is the bound of the ratio itself"):
        make(CONFIGS[name], tmp_path, epsilon_high=epsilon_high, **settings)
    assert make(CONFIGS[name], tmp_path, epsilon_high=5.0, **settings).epsilon_high == 5.0


@pytest.mark.parametrize("key", ["n", "max_tokens", "seed", "structured_outputs", "max_new_tokens"])
def test_generation_kwargs_that_each_request_has_of_its_own_are_refused(tmp_path, key):
    with pytest.raises(ValueError, match=f"generation_kwargs has '{key}', but .*; leave it out"):
        make(AttnRLConfig, tmp_path, generation_kwargs={key: 1})


def test_other_generation_kwargs_are_passed_on(tmp_path):
    kwargs = {"num_beams": 2, "stop": ["."]}
    assert make(AttnRLConfig, tmp_path, generation_kwargs=kwargs).generation_kwargs == kwargs
