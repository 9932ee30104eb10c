"""Problems with checkable answers, and the prompts made of them."""

import hashlib
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase


STEP_BY_STEP = "{problem} Let's think step by step and output the final answer within \\boxed{}."


def load_problems(
    source: str, split: str = "train", problem_column: str = "problem", answer_column: str = "answer"
) -> Dataset:
    """Problems and answers of a Hub data set or a local JSONL file, as columns `problem` and `answer`.

    Raises:
        ValueError: for a missing file, a missing column or an empty data set.
    """
    local = source.endswith((".jsonl", ".json"))
    if local and not Path(source).exists():
        raise ValueError(f"dataset={source!r} does not exist; give the path of a JSONL file or a Hub id.")
    if local and Path(source).stat().st_size == 0:
        raise ValueError(f"dataset={source!r} holds no problems; check the file.")
    try:
        dataset = (
            load_dataset("json", data_files=source, split="train") if local else load_dataset(source, split=split)
        )
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        fix = "check that each line is a JSON object" if local else "check the id and dataset_split, or go online"
        raise ValueError(f"dataset={source!r} (dataset_split={split!r}) cannot be read: {reason}; {fix}.") from error
    for name, column in {"problem_column": problem_column, "answer_column": answer_column}.items():
        if column not in dataset.column_names:
            raise ValueError(
                f"{name}={column!r} is no column of {source}, which has {', '.join(dataset.column_names)}; set {name} "
                "to one of them."
            )
    if len(dataset) == 0:
        raise ValueError(f"dataset={source!r} holds no problems; check the file or the split {split!r}.")
    dataset = dataset.select_columns([problem_column, answer_column])
    return dataset.rename_columns({problem_column: "problem", answer_column: "answer"})


def prompt_for(problem: str, template: str) -> list[dict[str, str]]:
    """The conversational prompt of a problem."""
    return [{"role": "user", "content": template.replace("{problem}", problem)}]


def with_prompts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, template: str, max_prompt_length: int
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
        if tokenizer.chat_template is None:
            text = messages[0]["content"]
            return {"prompt": text, "prompt_tokens": len(tokenizer(text)["input_ids"])}
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        return {"prompt": messages, "prompt_tokens": len(ids["input_ids"])}

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


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, problem: str, template: str) -> list[int]:
    """Tokens of a problem's prompt, through the chat template where there is one."""
    messages = prompt_for(problem, template)
    if tokenizer.chat_template is None:
        return tokenizer(messages[0]["content"])["input_ids"]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]
