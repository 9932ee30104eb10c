"""The preflight's report and refusals, on local models, without loading weights."""

import json
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import T5Config
from trl import ModelConfig
from trl.trainer.utils import RepeatSampler

from attn_trainers import AttnPOConfig, AttnRLConfig, RhythmConfig
from attn_trainers.launch.engine import check_sampling
from attn_trainers.launch.memory import GIB, ModelShape, Sharding, TrainingSetup
from attn_trainers.launch.preflight import (
    Device,
    Report,
    check_disk,
    check_memory,
    check_precision,
    check_vocabulary,
    leave_out,
    load_model_config,
    preflight,
    thinking_behaviour,
    training_setup,
    unreadable_answers,
)
from attn_trainers.launch.recipe import MathScriptArguments as Script
from attn_trainers.launch.recipe import check_run, set_model_init_kwargs
from attn_trainers.sampling.models import load_tokenizer
from attn_trainers.sampling.problems import load_problems, with_prompts
from attn_trainers.tiny.byte_model import build_byte_model
from tests.helpers import ROOT, refused_in_a_line


SMALL = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "generation_batch_size": 16,
    "max_completion_length": 100,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_steps": 4,
}
ATTNRL = SMALL | {"num_rollouts": 2, "num_branch_points": 1, "rollouts_per_branch": 1}


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory):
    return build_byte_model(tmp_path_factory.mktemp("models") / "bytes")


@pytest.fixture
def problems(tmp_path):
    def write(records, name="problems.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


@pytest.fixture
def run(byte_model, problems, tmp_path):
    """The preflight of a run on eight sums."""

    def check(config_class=AttnRLConfig, records=None, model=byte_model, max_prompt_length=200, lora=None, **settings):
        base = ATTNRL if config_class is AttnRLConfig else SMALL | {"num_generations": 4}
        args = config_class(str(tmp_path / "out"), **(base | settings))
        model_args = ModelConfig(str(model), use_peft=lora is not None, lora_r=4, lora_target_modules=lora)
        set_model_init_kwargs(args, model_args)
        tokenizer = load_tokenizer(model)
        source = problems(records or [{"problem": f"{i} + 1", "answer": str(i + 1)} for i in range(8)])
        dataset, num_long = with_prompts(load_problems(source), tokenizer, "{problem}", max_prompt_length)
        dataset, left_out = leave_out(dataset, unreadable_answers(dataset), num_long)
        config = load_model_config(str(model))
        return preflight(args, model_args, config, tokenizer, dataset, left_out, max_prompt_length)

    return check


def test_report(run):
    report = run(save_total_limit=2)
    values = dict(report.rows)
    assert values["layers x heads"] == "2 x 2"
    assert values["generation batch"] == "16 rows = 4 prompts x 4, trained on in 2 updates"
    assert values["rows per update"] == "8 = 4 per rank x 1 ranks x 2 accumulated"
    assert values["tokens per generation batch"] == "at most 1,600 sampled"
    assert values["tokens per row"] == "300 = 200 prompt + 100 completion"
    assert values["parameters"] == "115,776"
    assert values["weights"] == values["reference model"] == values["gradients"] == "0.4 MiB"
    assert values["optimizer"] == "0.9 MiB"
    assert values["KV cache"] == f"{16 * 300 * 2 * 2 * 2 * 32 * 4 / 2**20:.1f} MiB"
    assert values["problems"] == "8, 0 more left out for prompts over max_prompt_length"
    assert values["answers no verifier parses"] == "0"
    assert values["blank-line tokens"] == "0 (with a newline: 1)"
    assert values["'</think>'"] == "one token"
    assert report.warnings == ["no token holds a blank line: steps end at single newlines."]
    lines = str(report).splitlines()
    assert lines[0] == "Preflight" and lines[-1].startswith("Warning: no token holds")


def test_adapter_is_counted(run):
    values = dict(run(lora=["q_proj", "v_proj"]).rows)
    trained = 2 * 2 * 4 * (64 + 64)  # layers, maps, rank, width in and out
    assert values["parameters"] == f"115,776, of which {trained:,} in the adapter are trained"
    assert values["gradients"] == "0.0 MiB" and "reference model" not in values
    with pytest.raises(
        ValueError, match="lora_target_modules='q' .*; name linear layers of the model, or 'all-linear'"
    ):
        run(lora=["q"])


def test_attnrl_draws_from_few_problems_pass_after_pass(run):
    report = run(generation_batch_size=64)
    expected = "a generation batch takes 16 prompts, more than the 8 of the data: some come twice."
    assert expected in report.warnings


def test_long_prompts_are_counted(run):
    records = [{"problem": f"{i} + 1", "answer": "1"} for i in range(8)] + [{"problem": "1 +" * 60, "answer": "2"}]
    values = dict(run(records=records, max_prompt_length=100).rows)
    assert values["problems"] == "8, 1 more left out for prompts over max_prompt_length"


def test_answers_that_nothing_parses(run):
    good = [{"problem": f"{i} + 1", "answer": str(i)} for i in range(7)]
    report = run(records=[*good, {"problem": "?", "answer": "???"}])
    assert dict(report.rows)["answers no verifier parses"] == "1"
    assert "1 problems are left out: no verifier parses their answers, e.g. '???'." in report.warnings
    assert dict(report.rows)["problems"] == "7, 0 more left out for prompts over max_prompt_length"
    with pytest.raises(ValueError, match="answer_column holds no answer .* e.g. '[?]{3}'; set answer_column to"):
        run(records=[{"problem": str(i), "answer": "???"} for i in range(8)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"config_class": RhythmConfig, "generation_batch_size": 64, "save_steps": 8},
            "generation_batch_size=64 takes 16 prompts, .* at most 32",
        ),
        ({"max_completion_length": 4000}, "max_completion_length=4000 .* 4096 positions .* to 3896"),
        (
            {"use_vllm": True, "vllm_max_model_length": 299},
            "vllm_max_model_length=299 is less than .* raise it to 300",
        ),
        ({"use_vllm": True, "vllm_max_model_length": 5000}, "vllm_max_model_length=5000 is more .* lower it to 300"),
        (
            {"use_vllm": True, "vllm_tensor_parallel_size": 4},
            "vllm_tensor_parallel_size=4 does not divide the 2 heads",
        ),
        ({"hub_token": "hf_a"}, "hub_token is set: .* HF_TOKEN"),
    ],
)
def test_refusals_name_field_value_and_fix(run, settings, message):
    with pytest.raises(ValueError, match=message):
        run(**settings)


def test_a_server_has_a_length_of_its_own(run):
    settings = {"use_vllm": True, "vllm_mode": "server", "vllm_max_model_length": 299}
    assert dict(run(**settings).rows)["tokens per row"].startswith("300 = ")


def test_heads_within_the_model(run):
    values = dict(run(AttnPOConfig, heads=[[1, 0]]).rows)
    assert values["key-focus heads [layer, head]"] == "[1, 0]"
    with pytest.raises(ValueError, match=r"heads contain \[2, 0\], but .* has 2 layers of 2 heads"):
        run(AttnPOConfig, heads=[[2, 0]])
    with pytest.raises(ValueError, match="heads=None, but no key-focus heads are known"):
        run(AttnPOConfig)
    assert dict(run(RhythmConfig).rows)["layers read"] == "0, 1"


def test_memory_that_cannot_be_there_is_refused_and_what_may_not_fit_is_warned_of(byte_model, tmp_path):
    config = load_model_config(str(byte_model))
    args = AttnRLConfig(str(tmp_path), **ATTNRL)
    setup = TrainingSetup(Sharding(), 4, 300, 4, 4, has_reference=True)
    state = 20 * ModelShape.from_config(config).num_parameters
    with pytest.raises(ValueError, match="needs 2.2 MiB before the first token .* there are 2.2 MiB"):
        check_memory(args, setup, config, Device("machine", state - 1, is_gpu=False), Report())
    tight = Report()
    check_memory(args, setup, config, Device("machine", state + 1, is_gpu=False), tight)
    assert [w.split(" with")[0] for w in tight.warnings] == ["per_device_train_batch_size=4"]
    with pytest.raises(ValueError, match="needs 4.4 MiB"):
        check_memory(args, setup, config, Device("machine", state + 1, is_gpu=False, ranks=2), Report())
    roomy = Report()
    check_memory(args, setup, config, Device("machine", GIB, is_gpu=False), roomy)
    assert roomy.warnings == [] and dict(roomy.rows)["peak"].endswith(" of 1.0 GiB (machine)")


def test_vllm_cache_on_a_gpu(byte_model, tmp_path):
    config = load_model_config(str(byte_model))
    args = AttnRLConfig(str(tmp_path), vllm_max_model_length=300, vllm_gpu_memory_utilization=0.25, **ATTNRL)
    setup = TrainingSetup(Sharding(), 4, 300, 4, 4, vllm_share=0.25)
    report = Report()
    check_memory(args, setup, config, Device("card", 12 * GIB, is_gpu=True), report)
    tokens = (GIB - 2 * 115_776) // (4 * 2 * 64)  # layers x width of the keys
    values = dict(report.rows)
    assert values["KV cache"] == f"{tokens:,} tokens, {tokens // 300} full rows"
    assert (values["vLLM"], values["context and slack"]) == ("3.0 GiB", "2.0 GiB")
    with pytest.raises(ValueError, match=r"vllm_gpu_memory_utilization=0.25 of 8.0 GiB leaves room for 0 .* of 300 "):
        check_memory(args, setup, config, Device("card", 8 * GIB, is_gpu=True), Report())


def test_disk(byte_model, tmp_path):
    config = load_model_config(str(byte_model))
    args = AttnRLConfig(str(tmp_path / "not" / "yet"), **ATTNRL)
    setup = training_setup(args, ModelConfig(str(byte_model)), config, 300)
    report = Report()
    check_disk(args, setup, config, report)
    assert report.rows[0][1].startswith("1.3 MiB of ") and report.warnings == []


def test_what_the_chat_template_does_about_thinking(byte_model):
    tokenizer = load_tokenizer(byte_model)
    assert thinking_behaviour(tokenizer) == r"leaves <think> to the model (prompts end in '\nassistant: ')"
    tokenizer.chat_template = "{{ messages[0]['content'] }}<think>\n"
    assert thinking_behaviour(tokenizer) == "opens <think> in the prompt: completions start inside the thinking"
    tokenizer.chat_template = "{{ messages[0]['content'] }}<think>\n\n</think>\n\n"
    assert thinking_behaviour(tokenizer) == "closes <think> in the prompt: the model is asked not to think"
    tokenizer.chat_template = None
    assert thinking_behaviour(tokenizer) == "none; the prompt is the bare text"


def test_end_of_thinking_must_be_in_the_vocabulary(byte_model, tmp_path):
    from attn_trainers.tiny.arithmetic import build_tokenizer

    tokenizer = build_tokenizer()
    report = Report()
    args = AttnRLConfig(str(tmp_path), **ATTNRL)
    check_vocabulary(args, tokenizer, report)
    args.preflight(load_model_config(str(byte_model)), tokenizer, report)
    assert dict(report.rows)["blank-line tokens"] == "1 (with a newline: 2)" and report.warnings == []
    with pytest.raises(ValueError, match="end_of_thinking='<stop>' is not in the vocabulary"):
        check_vocabulary(AttnRLConfig(str(tmp_path), end_of_thinking="<stop>", **ATTNRL), tokenizer, Report())
    several = Report()
    args = AttnRLConfig(str(tmp_path), end_of_thinking="<stop>", **ATTNRL)
    check_vocabulary(args, load_tokenizer(byte_model), several)
    assert dict(several.rows)["'<stop>'"] == "6 tokens"


def test_models_that_cannot_be_read(tmp_path):
    with pytest.raises(
        ValueError, match="model_name_or_path='some/model' cannot be read: it is no folder, .*HF_HUB_OFFLINE is set"
    ):
        load_model_config("some/model")
    with pytest.raises(ValueError, match="the folder holds no model"):
        load_model_config(str(tmp_path))
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="t5' is a t5 model, which is no causal language model"):
        ModelShape.from_config(load_model_config(str(tmp_path / "t5")))
    with pytest.raises(ValueError, match="model_name_or_path=None names no model"):
        load_model_config(None)


def test_data_that_cannot_be_read(problems, tmp_path):
    with pytest.raises(ValueError, match="does not exist; give the path"):
        load_problems(str(tmp_path / "absent.jsonl"))
    with pytest.raises(ValueError, match="holds no problems; check the file"):
        load_problems(problems([], "empty.jsonl"))
    with pytest.raises(
        ValueError, match="answer_column='answer' is no column of .*, which has problem, solution; set"
    ):
        load_problems(problems([{"problem": "1", "solution": "1"}]))
    (tmp_path / "text.jsonl").write_text("no json\n")
    with pytest.raises(ValueError, match="cannot be read: JSON parse error.*; check that each line is a JSON object"):
        load_problems(str(tmp_path / "text.jsonl"))
    with pytest.raises(ValueError, match="dataset='some/where' .* cannot be read: .*; check the id"):
        load_problems("some/where")


def test_check_run_prints_the_report_and_makes_prompts(byte_model, problems, tmp_path, capsys):
    source = problems([{"q": f"{i} + 1", "a": str(i + 1)} for i in range(8)])
    script = Script(
        source, problem_column="q", answer_column="a", prompt_template="{problem} =", max_prompt_length=100
    )
    args = AttnRLConfig(str(tmp_path / "out"), **ATTNRL)
    tokenizer, dataset, eval_dataset = check_run(script, args, ModelConfig(str(byte_model)))
    assert capsys.readouterr().out.startswith("Preflight\n")
    assert dataset[2] == {"problem": "2 + 1", "answer": "3", "prompt": [{"role": "user", "content": "2 + 1 ="}]}
    assert eval_dataset is None and tokenizer.eos_token == "<|endoftext|>"


def test_preflight_alone_trains_nothing_and_a_refusal_is_one_line(problems, tmp_path, monkeypatch, capsys):
    recipe = str(ROOT / "recipes" / "attnrl_1p5b.py")
    source = problems([{"problem": f"{i} + 1", "answer": str(i)} for i in range(8)])
    command = f"{recipe} --preflight --tiny_model --dataset {source} --use_vllm false --max_completion_length 64 "
    command += f"--generation_batch_size 240 --save_steps 10 --output_dir {tmp_path / 'run'}"
    monkeypatch.setattr(sys, "argv", command.split())
    runpy.run_path(recipe, run_name="__main__")
    assert "Preflight\n" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["_tiny-model"]
    monkeypatch.setattr(sys, "argv", [*command.split(), "--branching", "best"])
    with refused_in_a_line(capsys, "^Refused: branching='best' is unknown; set it to one of attention"):
        runpy.run_path(recipe, run_name="__main__")
    monkeypatch.setattr(sys, "argv", [*command.split(), "--max_completion_length", "5000"])
    with refused_in_a_line(capsys, "^Refused: max_completion_length=5000"):
        runpy.run_path(recipe, run_name="__main__")


# Precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "capabilities", "is_gpu", "warned"),
    [
        ({"bf16": True}, {"avx2": True}, False, ["bf16=True"]),
        ({"bf16": True}, {"avx512_bf16": True}, False, []),
        ({"bf16": True}, {"avx2": True}, True, []),
        ({"bf16": False, "fp16": True}, {"avx512_bf16": True}, False, ["fp16=True"]),
        ({"bf16": False}, {"avx2": True}, False, []),
    ],
)
def test_precision_that_a_cpu_emulates_is_told(monkeypatch, settings, capabilities, is_gpu, warned):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    report = Report()
    args = SimpleNamespace(**({"fp16": False} | settings))
    check_precision(args, Device("it", GIB, is_gpu=is_gpu), report)
    assert [w.split(":")[0] for w in report.warnings] == warned


# vLLM -------------------------------------------------------------------------------------------------

VLLM = {"use_vllm": True, "vllm_max_model_length": 300}


def test_truncated_sampling_does_not_go_with_the_correction(run):
    def cut(**settings) -> list[str]:
        return [w.split(":")[0] for w in run(**VLLM, **settings).warnings if "scales the loss down" in w]

    assert cut() == []
    assert cut(top_p=0.9, min_p=0.05) == ["top_p=0.9, min_p=0.05"] and cut(top_k=20) == ["top_k=20"]
    assert cut(top_p=0.9, vllm_importance_sampling_correction=False) == []


def test_what_trl_lets_an_engine_compute_at_once(run, tmp_path):
    def step(**settings) -> tuple[str, list[str]]:
        report = run(RhythmConfig, use_vllm=True, save_steps=1, per_device_train_batch_size=4, **settings)
        return dict(report.rows)["tokens per engine step"], [w for w in report.warnings if "new prompts wait" in w]

    def batch(updates: int) -> dict[str, int]:
        return {"generation_batch_size": 4 * updates, "gradient_accumulation_steps": updates, "records": many}

    many = [{"problem": f"{i} + 1", "answer": str(i + 1)} for i in range(1025)]
    assert step(**batch(512)) == ("at most 4096, fixed by TRL", [])
    few = {"generation_batch_size": 8, "max_completion_length": 3896}
    assert step(**few) == ("at most 4096, fixed by TRL", [])
    report = Report()
    check_sampling(RhythmConfig(str(tmp_path), use_vllm=True, **(SMALL | {"max_completion_length": 8192})), 1, report)
    assert report.rows == [("tokens per engine step", "at most 4096, fixed by TRL; a prefix of 8193 is read in 3")]
    (warning,) = step(**batch(513))[1]
    assert warning.startswith("2052 sequences at once take most of the 4096 tokens")
    with pytest.raises(ValueError, match="=4 x steps_per_generation=1025 asks vLLM for 4100 sequences at once"):
        step(**batch(1025))


def test_a_prompt_batch_that_cannot_grow_does_not_fill_the_rows(run):
    def warned(**settings) -> list[str]:
        return [w for w in run(**settings).warnings if w.startswith("max_prompt_batch_factor=")]

    assert warned() == [] and warned(max_prompt_batch_factor=1.25) == []
    (warning,) = warned(max_prompt_batch_factor=1.0)
    assert "never more than 4 prompts come, which fill generation_batch_size=16 only where" in warning


def test_trl_draws_no_batch_that_is_not_whole():
    """What the refusal of a small data set says of TRL."""
    whole = RepeatSampler(range(8), mini_repeat_count=4, batch_size=8)
    assert sum(1 for _ in whole) == 32
    assert list(RepeatSampler(range(7), mini_repeat_count=4, batch_size=8)) == []
