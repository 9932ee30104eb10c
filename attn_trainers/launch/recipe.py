"""What the recipes share: command line, data, resume, saving and publishing.

A recipe states its settings as dataclass defaults and calls `train`. Any field can be set on the command line or in a
YAML file given by `--config`.
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config, get_quantization_config

from ..base.card import CardNotes, publish
from ..base.config import MethodConfig
from ..base.credit import CreditMethod
from ..base.interruption import last_whole_checkpoint
from ..sampling.models import load_tokenizer, refuse_adapter
from ..sampling.problems import STEP_BY_STEP, load_problems, parse_template_kwargs, with_prompts
from ..tiny.byte_model import build_byte_model
from .command import OneLineErrors, refusal_in_a_line, refuse
from .credits import build_credit, chosen_credit, credit_arguments
from .preflight import leave_out, load_model_config, preflight, unreadable_answers


logger = logging.getLogger(__name__)

# Default of `bf16` in the recipes; its opposite is the default of `use_cpu`.
HAS_CUDA = torch.cuda.is_available()


@dataclass
class MathScriptArguments:
    """Arguments of a recipe that trains on problems with checkable answers."""

    dataset: str = field(
        default="agentica-org/DeepScaleR-Preview-Dataset",
        metadata={"help": "Hub id of a data set, or a local file (JSONL, JSON, Parquet, CSV)."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub data set."})
    problem_column: str = field(
        default="problem", metadata={"help": "Column of the problem texts, also within another (prompt.0.content)."}
    )
    answer_column: str = field(
        default="answer",
        metadata={"help": "Column of the answers (a text, a number or a list), also within another."},
    )
    prompt_template: str = field(
        default=STEP_BY_STEP, metadata={"help": "User message; {problem} stands for the problem."}
    )
    max_prompt_length: int = field(
        default=1024, metadata={"help": "Problems whose prompt has more tokens are left out (and counted)."}
    )
    eval_data: list[str] = field(
        default_factory=list,
        metadata={"help": "Files with 'problem' and 'answer' that are evaluated on every eval_steps."},
    )
    tiny_model: bool = field(
        default=False,
        metadata={"help": "Train a small byte-level model made on the spot instead, to try the recipe on a CPU."},
    )
    preflight: bool = field(default=False, metadata={"help": "Check the settings, print the report and stop."})


class RecipeParser(OneLineErrors, TrlParser):
    """The command line of a recipe, with `--config FILE`."""

    def parse_args_and_config(self, args: Sequence[str] | None = None, **kwargs) -> tuple:
        """As TRL's; also `--config=FILE`, and a file without a name or without YAML in it is refused in a line."""
        given = sys.argv[1:] if args is None else args
        args = [part for one in given for part in _config_and_value(one)]
        if args[-1:] == ["--config"]:
            self.error("argument --config: expected one argument")
        try:
            return super().parse_args_and_config(args, **kwargs)
        except yaml.YAMLError as error:
            refuse(f"config is no YAML: {error}")


def _config_and_value(argument: str) -> list[str]:
    return argument.split("=", maxsplit=1) if argument.startswith("--config=") else [argument]


def parse(*classes: type) -> tuple:
    """An instance of each dataclass from the command line and `--config FILE`; unknown options are refused."""
    with refusal_in_a_line():
        return RecipeParser(classes, allow_abbrev=False).parse_args_and_config()


def parse_with_credit(script_class: type, config_class: type, model_class: type = ModelConfig) -> tuple:
    """As `parse`, with `--credit NAME` and that credit method's settings; the fourth value is the method or `None`."""
    with refusal_in_a_line():
        credit_class = credit_arguments(chosen_credit(), config_class)
        *parsed, credit_args = parse(script_class, config_class, model_class, credit_class)
        return *parsed, build_credit(credit_args, parsed[1])


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
    script_args: MathScriptArguments,
    training_args: MethodConfig,
    model_args: ModelConfig,
    credit: CreditMethod | None = None,
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
    elif model_args.model_name_or_path:
        refuse_adapter(model_args.model_name_or_path, "model_name_or_path")
    config = load_model_config(model_args.model_name_or_path, model_args.model_revision)
    tokenizer = load_tokenizer(model_args.model_name_or_path, revision=model_args.model_revision)
    template_kwargs = parse_template_kwargs(training_args.chat_template_kwargs)
    max_prompt_length = script_args.max_prompt_length

    def prompts_of(problems: Dataset) -> tuple[Dataset, int]:
        return with_prompts(problems, tokenizer, script_args.prompt_template, max_prompt_length, template_kwargs)

    problems = load_problems(
        script_args.dataset, script_args.dataset_split, script_args.problem_column, script_args.answer_column
    )
    dataset, num_long = prompts_of(problems)
    names = [Path(source).stem for source in script_args.eval_data]
    if len(set(names)) < len(names):
        raise ValueError(f"eval_data={script_args.eval_data} has two files of one name; rename one.")
    eval_dataset = {
        name: prompts_of(load_problems(source))[0] for name, source in zip(names, script_args.eval_data, strict=True)
    }
    set_model_init_kwargs(training_args, model_args)
    unreadable = on_first_rank(lambda: unreadable_answers(dataset))
    dataset, left_out = leave_out(dataset, unreadable, num_long)

    def report() -> None:
        print(preflight(training_args, model_args, config, tokenizer, dataset, left_out, max_prompt_length, credit))

    on_first_rank(report)
    return tokenizer, dataset, eval_dataset or None


def on_first_rank(check: Callable):
    """What `check` returns on the first rank, on every rank; so its ValueError."""
    outcome = [None, None]
    if PartialState().is_main_process:
        try:
            outcome = [check(), None]
        except ValueError as error:
            outcome = [None, str(error)]
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]


def train(
    trainer_class: type[GRPOTrainer],
    reward_funcs: Callable | Sequence[Callable],
    script_args: MathScriptArguments,
    training_args: MethodConfig,
    model_args: ModelConfig,
    credit: CreditMethod | None = None,
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
        tokenizer, dataset, eval_dataset = check_run(script_args, training_args, model_args, credit)
    if script_args.preflight:
        return None
    more = {} if credit is None else {"credit": credit}
    trainer = trainer_class(
        model=model_args.model_name_or_path,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
        **more,
    )
    trainer.card_notes = CardNotes(dataset=script_args.dataset)
    checkpoint = training_args.resume_from_checkpoint or last_whole_checkpoint(training_args.output_dir)
    if checkpoint:
        trainer.accelerator.print(f"Resuming from {checkpoint}.")
    trainer.train(resume_from_checkpoint=checkpoint)
    publish(trainer, trainer.card_notes)
    return trainer
