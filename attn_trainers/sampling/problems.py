"""Problems with checkable answers, and the prompts made of them."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase


STEP_BY_STEP = "{problem} Let's think step by step and output the final answer within \\boxed{}."
_FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
# Arguments of `apply_chat_template` that are not the template's own.
_NOT_OF_THE_TEMPLATE = ("conversation", "add_generation_prompt", "tokenize", "return_dict", "tools", "chat_template")

logger = logging.getLogger(__name__)


# Data sets -------------------------------------------------------------------------------------------


def is_file(source: str) -> bool:
    """Whether a data source is named as a local file (JSON lines, a JSON list, Parquet, CSV), not as a Hub id."""
    return Path(source).suffix in _FILE_TYPES


def read_rows(source: str, split: str = "train") -> list[tuple[str, dict]]:
    """Rows of a local file or a Hub data set, each with the name of its place ("line 3", "row 3"), from 1.

    JSON is read here and not by `datasets`, which takes no column of two types (an answer that is a text in one line
    and a list in another).

    Raises:
        ValueError: if there is nothing that can be read.
    """
    local = is_file(source)
    if local and not Path(source).is_file():
        raise ValueError(f"dataset={source!r} does not exist; give the path of a JSONL file or a Hub id.")
    fix = "check the id and dataset_split, or go online"
    try:
        if local and _FILE_TYPES[Path(source).suffix] == "json":
            fix = "check that each line is a JSON object"
            rows = _json_rows(Path(source).read_text(encoding="utf-8-sig"))
        else:
            fix = "check the file" if local else fix
            kind = _FILE_TYPES[Path(source).suffix] if local else source
            files = {"data_files": source, "split": "train"} if local else {"split": split}
            rows = [(f"row {i}", row) for i, row in enumerate(load_dataset(kind, **files), start=1)]
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"dataset={source!r} (dataset_split={split!r}) cannot be read: {reason}; {fix}.") from error
    if not rows:
        raise ValueError(f"dataset={source!r} holds no problems; check the file or the split {split!r}.")
    return rows


def _json_rows(content: str) -> list[tuple[str, dict]]:
    """Objects of a JSON list, or of JSON lines (blank ones are passed over)."""
    if content.lstrip().startswith("["):
        rows = [(f"row {number}", row) for number, row in enumerate(json.loads(content), start=1)]
    else:
        rows = []
        # Only line feeds end a line: a text may hold other separators as they are.
        for number, line in enumerate(content.split("\n"), start=1):
            try:
                if line.strip():
                    rows.append((f"line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(f"JSON parse error in line {number} ({error})") from None
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{place} is a {type(row).__name__}, no object")
    return rows


def load_problems(
    source: str, split: str = "train", problem_column: str = "problem", answer_column: str = "answer"
) -> Dataset:
    """Problems and answers of a Hub data set or a local file, as columns `problem` and `answer`.

    A column may lie within another one: `reward_model.ground_truth`, `prompt.0.content` (the first message's text).
    Numbers become texts; an answer is a text or a list of accepted texts. Rows without an answer are left out, and
    counted in a warning.

    Raises:
        ValueError: for what cannot be read, a missing column, a row without a problem, or a layout that is no text,
            with the column that is.
    """
    rows = read_rows(source, split)
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    for name, column in {"problem_column": problem_column, "answer_column": answer_column}.items():
        if column not in columns and column.split(".")[0] not in columns:
            raise ValueError(
                f"{name}={column!r} is no column of {source}, which has {', '.join(columns)}; set {name} to one of "
                "them."
            )
    problems, answers, unanswered = [], [], []
    for place, row in rows:
        where = f"{place} of {source}"
        problem = _as_text(_value_at(row, problem_column), "problem_column", problem_column, where)
        answer = _as_answer(_value_at(row, answer_column), answer_column, where)
        if problem is None:
            raise ValueError(f"problem_column={problem_column!r} is empty in {where}; fill it in or remove the row.")
        if answer is None:
            unanswered.append(place)
            continue
        problems.append(problem)
        answers.append(answer)
    if not problems:
        raise ValueError(
            f"answer_column={answer_column!r} is empty in every row of {source}; set it to one of "
            f"{', '.join(_text_paths(rows[0][1]))}."
        )
    if unanswered:
        logger.warning(
            "%s: %d of %d rows have no answer (the first: %s) and are left out.",
            source,
            len(unanswered),
            len(rows),
            unanswered[0],
        )
    if any(isinstance(answer, list) for answer in answers):
        answers = [answer if isinstance(answer, list) else [answer] for answer in answers]
    return Dataset.from_dict({"problem": problems, "answer": answers})


def _value_at(row: dict, column: str):
    """What a row holds under a name, or along a dotted path into objects and lists; `None` if there is nothing."""
    if column in row:
        return row[column]
    value = row
    for key in column.split("."):
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value


def _text_paths(value, path: str = "") -> list[str]:
    """Dotted paths to the texts and numbers within a value; of a conversation, to its last user message alone."""
    if isinstance(value, str | int | float):
        return [path]
    items = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
        messages = [(i, one) for i, one in items if isinstance(one, dict) and "content" in one]
        if messages and len(messages) == len(items):
            i, message = ([m for m in messages if m[1].get("role") == "user"] or messages)[-1]
            return _text_paths(message["content"], f"{path}.{i}.content")
    return [found for key, one in items for found in _text_paths(one, f"{path}.{key}" if path else str(key))]


def _as_text(value, field: str, column: str, where: str) -> str | None:
    """A text or a number as text, `None` for nothing.

    Raises:
        ValueError: for anything else, naming the paths to the texts in it.
    """
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, float):
        if value != value:  # NaN: how tables write nothing
            return None
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, int):
        return str(value)
    if value is None or value in ([], {}):
        return None
    kind = {dict: "an object", list: "a list"}.get(type(value), f"a {type(value).__name__}")
    paths = _text_paths(value, column)[:4]
    fix = f"set it to {' or '.join(map(repr, paths))}" if paths else "set it to a column of texts"
    raise ValueError(f"{field}={column!r} holds {kind}, no text, in {where}; {fix}.")


def _as_answer(value, column: str, where: str) -> str | list[str] | None:
    """An answer, or the accepted ones of a list; `None` for nothing."""
    if not isinstance(value, list) or any(isinstance(one, dict | list) for one in value):
        return _as_text(value, "answer_column", column, where)
    texts = [_as_text(one, "answer_column", column, where) for one in value]
    return [text for text in texts if text is not None] or None


# Prompts ---------------------------------------------------------------------------------------------


def parse_template_kwargs(value: dict | str | None) -> dict | None:
    """Arguments of a chat template, from a dict or a JSON object; `None` for none.

    Raises:
        ValueError: if it is no such object, or sets what the program sets.
    """
    if isinstance(value, str):
        with suppress(json.JSONDecodeError):  # refused below, as a text
            value = json.loads(value)
    if value is None or value == {}:
        return None
    if not isinstance(value, dict):
        raise ValueError(
            f"chat_template_kwargs={value!r} is no JSON object; set it to one like '{{\"enable_thinking\": false}}'."
        )
    for name in _NOT_OF_THE_TEMPLATE:
        if name in value:
            raise ValueError(f"chat_template_kwargs={value!r} sets {name}, which is no template's own; leave it out.")
    return value


def prompt_for(problem: str, template: str) -> list[dict[str, str]]:
    """The conversational prompt of a problem."""
    return [{"role": "user", "content": template.replace("{problem}", problem)}]


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    chat_template_kwargs: Mapping[str, object] | None = None,
) -> str:
    """The text that a model continues: messages through the chat template, or bare where there is none.

    Training, its length filter and preflight, evaluation, head discovery and inspection see this text.
    """
    if tokenizer.chat_template is None:
        return "\n".join(message["content"] for message in messages)
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, **(chat_template_kwargs or {})
    )


def prompt_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    problem: str,
    template: str,
    chat_template_kwargs: Mapping[str, object] | None = None,
) -> list[int]:
    """Tokens of a problem's prompt, as TRL makes them: special tokens come from the chat template where there is one,
    else from the tokenizer."""
    text = render_prompt(tokenizer, prompt_for(problem, template), chat_template_kwargs)
    return tokenizer(text, add_special_tokens=tokenizer.chat_template is None)["input_ids"]


def with_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_prompt_length: int,
    chat_template_kwargs: Mapping[str, object] | None = None,
) -> tuple[Dataset, int]:
    """Add the column `prompt` and leave out over-long prompts.

    Without a chat template the prompt is the text alone.

    Returns:
        The data set, and how many problems were left out.

    Raises:
        ValueError: if the template has no place for the problem, or nothing is left.
    """
    if "{problem}" not in template:
        raise ValueError(f"prompt_template={template!r} has no {{problem}}; add it where the problem goes.")

    def build(example: dict) -> dict:
        messages = prompt_for(example["problem"], template)
        length = len(prompt_token_ids(tokenizer, example["problem"], template, chat_template_kwargs))
        prompt = messages[0]["content"] if tokenizer.chat_template is None else messages
        return {"prompt": prompt, "prompt_tokens": length}

    built = dataset.map(build, desc="Prompts", load_from_cache_file=False)
    kept = built.filter(
        lambda n: n <= max_prompt_length, input_columns="prompt_tokens", load_from_cache_file=False
    ).remove_columns("prompt_tokens")
    if len(kept) == 0:
        raise ValueError(
            f"max_prompt_length={max_prompt_length} leaves out all {len(built)} problems; raise it, or check "
            "prompt_template."
        )
    return kept, len(built) - len(kept)


def request_seed(seed: int, name: str, problem: int, sample: int) -> int:
    """Seed of one completion to a problem of a data set, 62 bits of a hash of all four."""
    digest = hashlib.sha256(f"{seed}:{name}:{problem}:{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2
