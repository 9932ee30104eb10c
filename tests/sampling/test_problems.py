"""Data of many layouts, and prompts that are those of TRL."""

import json
import logging

import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from attn_trainers.sampling.problems import (
    STEP_BY_STEP,
    load_problems,
    parse_template_kwargs,
    prompt_for,
    prompt_token_ids,
    render_prompt,
    with_prompts,
)
from attn_trainers.tiny.byte_model import build_byte_model, build_byte_tokenizer


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1 = ?"}]
THINKING_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{{ 'assistant: ' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="module")
def hybrid():
    """A tokenizer whose chat template closes the thinking for `enable_thinking=False`, like Qwen3's."""
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = THINKING_TEMPLATE
    return tokenizer


# Layouts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"problem": "a", "answer": "2"}, {}, ("a", "2")),
        ({"problem": "a", "answer": 2}, {}, ("a", "2")),
        ({"problem": "a", "answer": 2.0}, {}, ("a", "2")),
        ({"problem": "a", "answer": 0.125}, {}, ("a", "0.125")),
        ({"problem": "a", "answer": -(10**30)}, {}, ("a", "-1" + "0" * 30)),
        ({"problem": "a", "answer": ["2", 2.5, None, ""]}, {}, ("a", ["2", "2.5"])),
        ({"question": "a", "target": "2"}, {"problem_column": "question", "answer_column": "target"}, ("a", "2")),
        (
            {"prompt": MESSAGES, "reward_model": {"ground_truth": "2", "style": "rule"}},
            {"problem_column": "prompt.1.content", "answer_column": "reward_model.ground_truth"},
            ("1 + 1 = ?", "2"),
        ),
        ({"problem": "a", "x.y": "2", "x": {"y": "3"}}, {"answer_column": "x.y"}, ("a", "2")),
        ({"problem": "a\u2028b", "answer": "é"}, {}, ("a\u2028b", "é")),  # a line separator that ends no JSON line
    ],
)
def test_layouts_that_are_read(write, row, columns, expected):
    dataset = load_problems(write(row), **columns)
    assert dataset.column_names == ["problem", "answer"]
    assert (dataset[0]["problem"], dataset[0]["answer"]) == expected


def test_answers_of_two_types_become_lists(write):
    dataset = load_problems(write({"problem": "a", "answer": "2"}, {"problem": "b", "answer": [3, "4"]}))
    assert dataset["answer"][:] == [["2"], ["3", "4"]]


def test_a_json_list_a_table_and_a_parquet_file_are_read(tmp_path):
    rows = [{"problem": "a", "answer": "2"}, {"problem": "b", "answer": "3/4"}]
    (tmp_path / "list.json").write_text("\ufeff" + json.dumps(rows, indent=2), encoding="utf-8")
    Dataset.from_list(rows).to_parquet(tmp_path / "table.parquet")
    Dataset.from_list(rows).to_csv(tmp_path / "table.csv")
    for name in ("list.json", "table.parquet", "table.csv"):
        assert load_problems(str(tmp_path / name)).to_list() == rows


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"problem": MESSAGES, "answer": "2"}, {}, "problem_column='problem' holds a list, no text, in line 2 of"),
        ({"problem": MESSAGES, "answer": "2"}, {}, r"; set it to 'problem\.1\.content'\.$"),
        ({"problem": "a", "answer": {"truth": "2", "style": "rule"}}, {}, r"'answer\.truth' or 'answer\.style'\.$"),
        ({"problem": "a", "answer": [{"value": "2"}]}, {}, r"holds a list, no text, .*; set it to 'answer\.0\.value'"),
        ({"problem": "a", "answer": [{}]}, {}, "set it to a column of texts"),
        ({"problem": None, "answer": "2"}, {}, "'problem' is empty in line 2 of .*; fill it in or remove"),
        ({"problem": " \n", "answer": "2"}, {}, "problem_column='problem' is empty in line 2"),
        ({"answer": "2"}, {}, "problem_column='problem' is empty in line 2"),
        (
            {"problem": "a", "answer": "2"},
            {"answer_column": "solution"},
            "answer_column='solution' is no column of .*, which has problem, answer; set",
        ),
        (
            {"problem": "a", "answer": "2"},
            {"answer_column": "answer.text"},
            "answer_column='answer.text' is empty in every row of .*; set it to one of problem, answer",
        ),
        (["problem", "a"], {}, "cannot be read: line 2 is a list, no object; check that each line is a JSON object"),
    ],
)
def test_layouts_that_are_refused_in_a_line(write, row, columns, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_problems(write({"problem": "1 + 1", "answer": "2"}, row), **columns)
    assert "\n" not in str(caught.value)


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"problem": "a", "answer": "1"}\n\n{"problem": "b", \n')
    with pytest.raises(ValueError, match="cannot be read: JSON parse error in line 3 .*; check that each line"):
        load_problems(str(path))
    path.write_bytes(b'{"problem": "\xff", "answer": "1"}\n')
    with pytest.raises(ValueError, match="cannot be read: 'utf-8' codec can't decode"):
        load_problems(str(path))


def test_rows_without_an_answer_are_left_out_and_counted(write, caplog):
    answers = ["2", None, "", [], [None], "3", float("nan")]
    source = write(*({"problem": f"p{i}", "answer": answer} for i, answer in enumerate(answers)))
    with caplog.at_level(logging.WARNING, "attn_trainers.sampling"):
        dataset = load_problems(source)
    assert dataset.to_list() == [{"problem": "p0", "answer": "2"}, {"problem": "p5", "answer": "3"}]
    (warning,) = caplog.messages
    assert warning.endswith(": 5 of 7 rows have no answer (the first: line 2) and are left out.")
    with pytest.raises(ValueError, match="answer_column='answer' is empty in every row of"):
        load_problems(write({"problem": "a", "answer": None}, {"problem": "b", "answer": ""}))


@pytest.mark.parametrize("name", ["aime24", "aime25", "amc23", "math500", "minerva", "olympiad", "gsm8k"])
def test_benchmark_files_are_read_whole(shared_dir, name):
    path = shared_dir / "data" / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    got = load_problems(str(path))
    assert got["problem"][:] == [row["problem"] for row in rows]
    wanted = [row["answer"] for row in rows]
    if any(isinstance(answer, list) for answer in wanted):
        wanted = [answer if isinstance(answer, list) else [answer] for answer in wanted]
    assert got["answer"][:] == wanted


# Prompts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [None, {"enable_thinking": False}, {"enable_thinking": True}])
@pytest.mark.parametrize("has_template", [True, False])
def test_prompt_tokens_are_those_of_trl(tmp_path, hybrid, kwargs, has_template):
    folder = build_byte_model(tmp_path / "model")
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = THINKING_TEMPLATE if has_template else None
    problems = Dataset.from_dict({"problem": [f"{n} + {n} = ?" for n in range(3)], "answer": ["0", "2", "4"]})
    dataset, _ = with_prompts(problems, tokenizer, STEP_BY_STEP, 1024, kwargs)
    trainer = GRPOTrainer(
        str(folder),
        lambda completions, **_: [0.0] * len(completions),
        GRPOConfig(str(tmp_path / "out"), chat_template_kwargs=kwargs, use_cpu=True, bf16=False, report_to="none"),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    expected, _, _ = trainer._tokenize_prompts(dataset["prompt"][:])
    got = [prompt_token_ids(tokenizer, problem, STEP_BY_STEP, kwargs) for problem in problems["problem"]]
    assert got == [list(ids) for ids in expected]
    closes = has_template and kwargs == {"enable_thinking": False}
    assert tokenizer.decode(got[0]).endswith("<think>\n\n</think>\n\n") == closes


def test_template_arguments_count_in_the_length_filter(hybrid):
    problems = Dataset.from_dict({"problem": ["1 + 1", "10 + 10"], "answer": ["2", "20"]})
    text = render_prompt(hybrid, prompt_for("10 + 10", "{problem}"), {"enable_thinking": False})
    assert text == "user: 10 + 10\nassistant: <think>\n\n</think>\n\n"
    length = len(prompt_token_ids(hybrid, "10 + 10", "{problem}", {"enable_thinking": False}))
    assert length == len(text) - len("<think></think>") + 2  # a token per byte and per tag
    kept, num_long = with_prompts(problems, hybrid, "{problem}", length - 1, {"enable_thinking": False})
    assert (kept["problem"][:], num_long) == (["1 + 1"], 1)
    assert with_prompts(problems, hybrid, "{problem}", length - 1)[1] == 0


def test_template_arguments_are_json_objects():
    assert parse_template_kwargs(None) is parse_template_kwargs("{}") is None
    assert parse_template_kwargs('{"enable_thinking": false}') == {"enable_thinking": False}
    assert parse_template_kwargs({"a": 1}) == {"a": 1}
    for value in ("enable_thinking=false", "[1]", "{"):
        with pytest.raises(ValueError, match="chat_template_kwargs=.* is no JSON object; set it to one like"):
            parse_template_kwargs(value)
    with pytest.raises(ValueError, match="sets add_generation_prompt, which is no template's own; leave it out"):
        parse_template_kwargs({"add_generation_prompt": False})
