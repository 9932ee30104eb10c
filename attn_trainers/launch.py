"""What the recipes share: command line, data, resume, saving and publishing.

A recipe states its settings as dataclass defaults and calls `train`. Any field can be set on the command line or in a
YAML file given by `--config`.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config, get_quantization_config

from .hub import CardNotes, publish
from .interruption import last_whole_checkpoint
from .modeling import build_byte_model, load_tokenizer
from .preflight import load_model_config, preflight


logger = logging.getLogger(__name__)

# Default of `bf16` in the recipes; its opposite is the default of `use_cpu`.
HAS_CUDA = torch.cuda.is_available()
STEP_BY_STEP = "{problem} Let's think step by step and output the final answer within \\boxed{}."


@dataclass
class MathScriptArguments:
    """Arguments of a recipe that trains on problems with checkable answers."""

    dataset: str = field(
        default="agentica-org/DeepScaleR-Preview-Dataset",
        metadata={"help": "Hub id of a data set, or a local JSONL file."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub data set."})
    problem_column: str = field(default="problem", metadata={"help": "Column of the problem texts."})
    answer_column: str = field(
        default="answer", metadata={"help": "Column of the answers: a text, or a list of accepted texts."}
    )
    prompt_template: str = field(
        default=STEP_BY_STEP, metadata={"help": "User message; {problem} stands for the problem."}
    )
    max_prompt_length: int = field(
        default=1024, metadata={"help": "Problems whose prompt has more tokens are left out (and counted)."}
    )
    eval_data: list[str] = field(
        default_factory=list, metadata={"help": "JSONL files that are evaluated on every eval_steps."}
    )
    tiny_model: bool = field(
        default=False,
        metadata={"help": "Train a small byte-level model made on the spot instead, to try the recipe on a CPU."},
    )
    preflight: bool = field(default=False, metadata={"help": "Check the settings, print the report and stop."})


def parse(script_class: type, config_class: type, model_class: type = ModelConfig) -> tuple:
    """Script, training and model arguments from the command line and `--config FILE`; unknown ones are refused."""
    with refusal_in_a_line():
        return TrlParser((script_class, config_class, model_class)).parse_args_and_config()


@contextmanager
def refusal_in_a_line() -> Iterator[None]:
    """End the process with one line, printed by the first rank, where settings are refused with a ValueError."""
    try:
        yield
    except ValueError as error:
        logger.debug("Refused", exc_info=True)
        raise SystemExit(1 if os.environ.get("RANK", "0") != "0" else f"Refused: {error}") from None


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


def set_model_init_kwargs(training_args: GRPOConfig, model_args: ModelConfig) -> None:
    """Hand the model settings of the command line to the trainer, which loads the model."""
    kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    training_args.model_init_kwargs = kwargs | (training_args.model_init_kwargs or {})


def check_run(
    script_args: MathScriptArguments, training_args: GRPOConfig, model_args: ModelConfig
) -> tuple[PreTrainedTokenizerBase, Dataset, dict[str, Dataset] | None]:
    """Tokenizer, training problems and evaluation problems by name, after all checks; prints the preflight's report.

    The first rank checks, the others learn the outcome.

    Raises:
        ValueError: for what cannot work, on every rank.
    """
    state = PartialState()
    if script_args.tiny_model:
        folder = Path(training_args.output_dir) / "_tiny-model"  # a name that is not pushed
        with state.main_process_first():
            model_args.model_name_or_path = str(build_byte_model(folder))
    config = load_model_config(model_args.model_name_or_path, model_args.model_revision)
    tokenizer = load_tokenizer(model_args.model_name_or_path, revision=model_args.model_revision)
    template, max_prompt_length = script_args.prompt_template, script_args.max_prompt_length
    problems = load_problems(
        script_args.dataset, script_args.dataset_split, script_args.problem_column, script_args.answer_column
    )
    dataset, num_long = with_prompts(problems, tokenizer, template, max_prompt_length)
    eval_dataset = {
        Path(source).stem: with_prompts(load_problems(source), tokenizer, template, max_prompt_length)[0]
        for source in script_args.eval_data
    }
    set_model_init_kwargs(training_args, model_args)
    refused = [None]
    if state.is_main_process:
        try:
            print(preflight(training_args, model_args, config, tokenizer, dataset, num_long, max_prompt_length))
        except ValueError as error:
            refused = [str(error)]
    broadcast_object_list(refused)
    if refused[0] is not None:
        raise ValueError(refused[0])
    return tokenizer, dataset, eval_dataset or None


def train(
    trainer_class: type[GRPOTrainer],
    reward_funcs: Callable | Sequence[Callable],
    script_args: MathScriptArguments,
    training_args: GRPOConfig,
    model_args: ModelConfig,
) -> GRPOTrainer | None:
    """Train as the recipe says: check, load, resume if there is something to resume, train, save, publish.

    Returns:
        The trainer, or `None` if only the preflight was asked for.

    Raises:
        SystemExit: for settings that cannot work, before anything is loaded on a GPU, with what to change; and after
            SIGTERM, when the checkpoint is written.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with refusal_in_a_line():
        tokenizer, dataset, eval_dataset = check_run(script_args, training_args, model_args)
    if script_args.preflight:
        return None
    trainer = trainer_class(
        model=model_args.model_name_or_path,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    trainer.card_notes = CardNotes(dataset=script_args.dataset)
    checkpoint = training_args.resume_from_checkpoint or last_whole_checkpoint(training_args.output_dir)
    if checkpoint:
        trainer.accelerator.print(f"Resuming from {checkpoint}.")
    trainer.train(resume_from_checkpoint=checkpoint)
    publish(trainer, trainer.card_notes)
    return trainer
