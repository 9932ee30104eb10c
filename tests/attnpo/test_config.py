import json

import pytest
from trl import TrlParser

from attn_trainers.attnpo.config import AttnPOConfig


SMALL = {"use_cpu": True, "bf16": False, "per_device_train_batch_size": 8}


def test_defaults_are_the_published_settings(tmp_path):
    config = AttnPOConfig(str(tmp_path), **SMALL)
    published = {
        "num_generations": 8,
        "max_completion_length": 16384,
        "learning_rate": 2e-6,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "epsilon": 0.2,
        "epsilon_high": None,
        "delta": 3.0,
        "beta": 0.0,
        "entropy_coef": 0.0,
        "num_iterations": 1,
        "loss_type": "dapo",
        "scale_rewards": "none",
        "length_penalty": 0.2,
        "baseline_power": 2.0,
        "attenuation_power": 2.0,
        "attenuation_floor": 0.0,
        "min_step_chars": 80,
        "min_rest_chars": 15,
    }
    assert {name: getattr(config, name) for name in published} == published
    assert config.heads is None and config.scales_credit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_mode": "lines"}, "step_mode='lines'.*phrases, paragraphs"),
        ({"baseline_length": "prompt"}, "baseline_length='prompt'.*sequence, response"),
        ({"length_penalty": 1.5}, r"length_penalty=1.5 is outside \[0, 1\]"),
        ({"attenuation_floor": -0.1}, r"attenuation_floor=-0.1 is outside \[0, 1\]"),
        ({"schedule_fraction": 1000}, r"schedule_fraction=1000 is outside \[0, 1\]"),
        ({"baseline_power": -1.0}, "baseline_power=-1.0 must not be negative"),
        ({"page_steps": -1}, "page_steps=-1 must not be negative"),
        ({"end_of_thinking": ""}, "end_of_thinking='' is empty"),
        ({"phrases_file": "p.json", "compat_steps": True}, "phrases_file='p.json'.*compat_steps=False"),
        ({"phrases_file": "p.json", "step_mode": "paragraphs"}, "phrases_file='p.json'.*step_mode='phrases'"),
        ({"scale_rewards": "group"}, "scale_rewards='group'.*set it to 'none'"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation.*'sum_then_normalize'"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence'.*'token'"),
        ({"loss_type": "luspo"}, "loss_type='luspo'.*dapo"),
        ({"loss_type": "vespo"}, "loss_type='vespo'.*dapo"),
        ({"heads": "[[1, 2"}, "heads=.*no list of pairs"),
        (
            {"save_steps": 3, "steps_per_generation": 4, "gradient_accumulation_steps": 2},
            "save_steps=3.*Set save",
        ),
    ],
)
def test_settings_that_cannot_work_name_field_value_and_fix(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        AttnPOConfig(str(tmp_path), **(SMALL | options))


def test_heads_from_the_command_line_and_from_yaml(tmp_path):
    parser = TrlParser(AttnPOConfig)
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    (from_text,) = parser.parse_args_and_config([*arguments, "--heads", "[[16,2],[20,9]]"])
    assert from_text.heads == [[16, 2], [20, 9]]
    (from_file,) = parser.parse_args_and_config([*arguments, "--heads", "runs/heads.json"])
    assert from_file.heads == "runs/heads.json"
    settings = tmp_path / "settings.yaml"
    settings.write_text(json.dumps({"heads": [[1, 0]], "schedule_fraction": 0.5}))
    (from_yaml,) = parser.parse_args_and_config([*arguments, "--config", str(settings)])
    assert from_yaml.heads == [[1, 0]] and from_yaml.schedule_fraction == 0.5
