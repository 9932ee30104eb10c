"""What the recipes make of model and data before the preflight."""

import json
import shutil

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from attn_trainers import RhythmConfig
from attn_trainers.launch.recipe import MathScriptArguments, check_run
from attn_trainers.sampling.models import load_tokenizer
from attn_trainers.sampling.problems import prompt_token_ids
from attn_trainers.tiny.byte_model import build_byte_model


@pytest.fixture
def model(tmp_path):
    """A model whose chat template closes the thinking for `enable_thinking=False`, like Qwen3's."""
    folder = build_byte_model(tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template += (
        "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def check(model, tmp_path):
    """`check_run` on sums of one and two digits, which are the evaluation problems too."""
    data = tmp_path / "data.jsonl"
    rows = [{"problem": f"{n} + {n}", "answer": 2 * n} for n in range(6, 14)]

    def run(path=model, max_prompt_length=200, more_rows=(), eval_data=(str(data),), **settings):
        data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more_rows]))
        script = MathScriptArguments(
            str(data), prompt_template="{problem}", max_prompt_length=max_prompt_length, eval_data=list(eval_data)
        )
        base = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 32}
        base |= {"use_cpu": True, "bf16": False, "report_to": "none"}
        args = RhythmConfig(str(tmp_path / "out"), **(base | settings))
        return check_run(script, args, ModelConfig(path))

    return run


def test_template_arguments_reach_length_filter_evaluation_data_and_preflight(check, model, capsys):
    longest = len(prompt_token_ids(load_tokenizer(model), "13 + 13", "{problem}"))
    _, dataset, eval_dataset = check(max_prompt_length=longest)
    assert len(dataset) == len(eval_dataset["data"]) == 8
    assert "leaves <think> to the model" in capsys.readouterr().out
    # The two tags make each prompt two tokens longer; those of one digit have two to spare.
    settings = {"chat_template_kwargs": '{"enable_thinking": false}', "max_prompt_length": longest}
    _, dataset, eval_dataset = check(**settings)
    assert dataset["answer"][:] == eval_dataset["data"]["answer"][:] == ["12", "14", "16", "18"]
    printed = capsys.readouterr().out
    assert "closes <think> in the prompt" in printed and "4, 4 more left out" in printed


def test_a_problem_whose_answer_no_verifier_parses_is_not_trained_on(check, capsys):
    _, dataset, eval_dataset = check(more_rows=[{"problem": "?", "answer": "t(0,4]"}, {"problem": "1", "answer": "1"}])
    assert dataset["answer"][:] == ["12", "14", "16", "18", "20", "22", "24", "26", "1"]
    assert len(eval_dataset["data"]) == 10  # evaluation counts it: nothing is chosen by it
    assert "1 problems are left out: no verifier parses their answers, e.g. 't(0,4]'." in capsys.readouterr().out


def test_evaluation_files_of_one_name_are_refused(check, tmp_path):
    with pytest.raises(ValueError, match="^eval_data=.* has two files of one name; rename one.$"):
        check(eval_data=[str(tmp_path / "a" / "test.jsonl"), str(tmp_path / "b" / "test.jsonl")])


def test_template_arguments_that_are_none_are_refused(check):
    with pytest.raises(ValueError, match="chat_template_kwargs='thinking' is no JSON object"):
        check(chat_template_kwargs="thinking")


def test_an_adapter_is_no_model_to_train(check, model, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="model_name_or_path='.*adapter' is an adapter of '.*model', no model; "):
        check(str(tmp_path / "adapter"))
    shutil.rmtree(tmp_path / "adapter")
    with pytest.raises(ValueError, match="^model_name_or_path='.*adapter' cannot be read"):
        check(str(tmp_path / "adapter"))
