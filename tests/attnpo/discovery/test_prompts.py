"""The prompts that head discovery samples from, and how far it samples."""

import json
import shutil

import pytest

from attn_trainers.attnpo.discovery.run import (
    DiscoveryArguments,
    check_output,
    find_candidates,
    prompt_ids_of,
    read_jsonl,
)
from attn_trainers.sampling.models import load_tokenizer


@pytest.fixture
def arguments(doubtful, problems, tmp_path):
    """Arguments for the model as if it were made for 30 tokens, with a template that can leave the thinking shut."""
    folder = tmp_path / "model"
    shutil.copytree(doubtful, folder)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 30}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template += "{% if enable_thinking is defined and not enable_thinking %}{{ '</think>' }}{% endif %}"
    tokenizer.save_pretrained(folder)
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps({"problem": p.text, "answer": p.answer}) + "\n" for p in problems))
    settings = {"prompt_template": "{problem}", "step_mode": "paragraphs", "backend": "transformers"}
    settings |= {"num_samples": 4, "min_accuracy": 0.0}
    return {"model": str(folder), "data": str(data), "output_dir": str(tmp_path / "out")} | settings


def test_template_arguments_reach_the_prompt(arguments, problems):
    tokenizer = load_tokenizer(arguments["model"])
    texts = []
    for kwargs in (None, '{"enable_thinking": false}', {"enable_thinking": True}):
        args = DiscoveryArguments(**arguments, chat_template_kwargs=kwargs)
        texts.append(tokenizer.decode(prompt_ids_of(args, tokenizer, problems[0].text)))
    thinking = problems[0].text + "<think>"
    assert texts == [thinking, thinking + "</think>", thinking]
    with pytest.raises(ValueError, match="chat_template_kwargs='off' is no JSON object"):
        DiscoveryArguments(**arguments, chat_template_kwargs="off")


def test_completions_end_with_the_models_positions(arguments, problems, capsys):
    args = DiscoveryArguments(**arguments, max_completion_length=100)
    tokenizer = load_tokenizer(args.model)
    output = check_output(args)
    find_candidates(args, tokenizer, output)
    assert "16 of 16 completions are limited by the model's positions to fewer than max_completion_length=100." in (
        capsys.readouterr().out
    )
    rooms = [30 - len(prompt_ids_of(args, tokenizer, p.text)) for p in problems]
    lengths = [(record["index"], len(record["completion_ids"])) for record in read_jsonl(output / "completions.jsonl")]
    assert len(lengths) == 16 and all(length <= rooms[index] for index, length in lengths)
    assert any(length == rooms[index] for index, length in lengths)
