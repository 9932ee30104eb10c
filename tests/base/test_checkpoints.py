import pytest
from trl import GRPOConfig

from attn_trainers.base.checkpoints import check_save_interval, read_state, steps_between_generations, write_state


def make_args(tmp_path, **kwargs):
    settings = {"per_device_train_batch_size": 4, "num_generations": 4, "report_to": "none"}
    return GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **(settings | kwargs))


@pytest.mark.parametrize(
    ("steps_per_generation", "num_iterations", "accumulation", "expected"),
    [(1, 1, 1, 1), (10, 1, 2, 5), (4, 2, 4, 2), (4, 1, 8, 1), (3, 1, 2, 3), (4, 1, 6, 2)],
)
def test_steps_between_generations(tmp_path, steps_per_generation, num_iterations, accumulation, expected):
    args = make_args(
        tmp_path,
        steps_per_generation=steps_per_generation,
        num_iterations=num_iterations,
        gradient_accumulation_steps=accumulation,
    )
    assert steps_between_generations(args) == expected


def test_a_save_interval_off_the_boundary_is_refused_with_the_next_valid_value(tmp_path):
    args = make_args(tmp_path, steps_per_generation=10, gradient_accumulation_steps=2, save_steps=7)
    with pytest.raises(ValueError, match=r"save_steps=7 .* Set save_steps to 10 or another multiple of 5"):
        check_save_interval(args)


@pytest.mark.parametrize("settings", [{"save_steps": 10}, {"save_steps": 7, "save_strategy": "no"}])
def test_a_save_interval_on_the_boundary_or_none_is_accepted(tmp_path, settings):
    check_save_interval(make_args(tmp_path, steps_per_generation=10, gradient_accumulation_steps=2, **settings))


def test_a_share_of_the_run_is_refused(tmp_path):
    args = make_args(tmp_path, steps_per_generation=10, gradient_accumulation_steps=2, save_steps=0.25)
    with pytest.raises(ValueError, match=r"save_steps=0.25 is a share of the run"):
        check_save_interval(args)


def test_state_round_trip(tmp_path):
    state = {"batches_trained": 3, "in_flight": [4, 5], "mean": 0.25}
    write_state(tmp_path, "attnrl", state)
    assert read_state(tmp_path, "attnrl") == state
    assert read_state(tmp_path, "other") is None
    assert [path.name for path in tmp_path.iterdir()] == ["attnrl_state.json"]
