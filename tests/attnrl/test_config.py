import pytest

from attn_trainers import AttnRLConfig


def make(tmp_path, **kwargs):
    settings = {"per_device_train_batch_size": 6, "steps_per_generation": 10, "save_strategy": "no"}
    return AttnRLConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **(settings | kwargs))


@pytest.mark.parametrize(
    ("settings", "leaf_budget"),
    [({}, 30), ({"num_branch_points": 0}, 6), ({"num_rollouts": 4, "num_branch_points": 1}, 12)],
)
def test_the_leaf_budget_is_derived(tmp_path, settings, leaf_budget):
    args = make(tmp_path, **settings)
    assert args.num_generations == leaf_budget
    assert args.generation_batch_size == 60


def test_published_defaults(tmp_path):
    args = make(tmp_path)
    values = {
        "beta": 0.001,
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "delta": 3.0,
        "loss_type": "dapo",
        "num_iterations": 1,
        "use_bias_correction_kl": False,
        "temperature": 1.0,
        "influence_delta": 4,
        "branch_top_fraction": 0.2,
        "min_branch_spacing": 512,
        "prompt_batch_smoothing": 0.9,
        "max_completion_length": 8192,
    }
    assert {name: getattr(args, name) for name in values} == values


def test_updates_per_batch(tmp_path):
    assert make(tmp_path, gradient_accumulation_steps=5).updates_per_batch == 2
    assert make(tmp_path, gradient_accumulation_steps=5, num_iterations=2).updates_per_batch == 4
    assert make(tmp_path, gradient_accumulation_steps=3).updates_per_batch == 4  # 18, 18, 18 and 6 rows at most


@pytest.mark.parametrize(
    ("rows", "accumulation", "leaf_settings", "expected"),
    [(8, 1, {}, 15), (8, 4, {}, 15), (8, 16, {}, 30), (30, 1, {}, 1), (7, 2, {"num_branch_points": 0}, 6)],
)
def test_the_default_generation_batch_holds_whole_prompts(tmp_path, rows, accumulation, leaf_settings, expected):
    args = make(
        tmp_path,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=None,
        **leaf_settings,
    )
    assert args.steps_per_generation == expected
    assert args.generation_batch_size == rows * expected
    assert args.generation_batch_size % args.num_generations == 0


def test_saves_need_not_fall_on_a_generation_boundary(tmp_path):
    assert make(tmp_path, save_strategy="steps", save_steps=7).save_steps == 7
    assert make(tmp_path, save_strategy="steps", save_steps=0.1).save_steps == 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"branching": "luck"}, "branching='luck' is unknown; set it to one of attention, entropy, random"),
        ({"expansion": "floor"}, "expansion='floor' is unknown; set it to one of ceil, round, uniform"),
        ({"prompt_batch_rounding": "up"}, "prompt_batch_rounding='up' is unknown"),
        ({"num_rollouts": 1}, "num_rollouts=1 is out of range; set it to at least 2"),
        ({"num_branch_points": -1}, "num_branch_points=-1 is out of range"),
        ({"rollouts_per_branch": 0}, "rollouts_per_branch=0 is out of range"),
        ({"influence_delta": 0}, "influence_delta=0 is out of range"),
        ({"branch_top_fraction": 0.0}, r"branch_top_fraction=0.0 is outside \(0, 1\]"),
        ({"prompt_batch_smoothing": 1.5}, r"prompt_batch_smoothing=1.5 is outside \[0, 1\]"),
        ({"num_generations": 8}, r"num_generations=8 is not the leaf budget .* = 30"),
        ({"loss_type": "vespo"}, "loss_type='vespo' does not take advantages per token"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence' does not go with"),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_enable_sleep_mode": True},
            "vllm_enable_sleep_mode=True is for an engine in the trainer's own process",
        ),
        ({"weight_sync": "mail"}, "weight_sync='mail' is unknown"),
        ({"vllm_server_request_timeout": 0.0}, "vllm_server_request_timeout=0.0 is out of range"),
        ({"use_transformers_continuous_batching": True}, "use_transformers_continuous_batching=True takes no length"),
        ({"gradient_accumulation_steps": 20}, "gradient_accumulation_steps=20 exceeds steps_per_generation=10"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_field_value_and_fix(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **settings)
