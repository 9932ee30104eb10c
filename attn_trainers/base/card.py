"""Model cards that say what was trained on what and how, and pushing to the Hub.

TRL writes a card with the method, its paper and the framework versions. `CardMixin` corrects what it says about local
base models and adapters, and adds settings, evaluation and the code that loads the model.
"""

import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig
from trl import GRPOConfig
from trl.trainer.utils import get_config_model_id

from ..sampling.models import GENERIC_TOKENIZERS
from ..tables import markdown_table
from .results import latest_evaluations, logged_results, set_results


_SNAPSHOT = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PACKAGES = ("attn_trainers", "trl", "transformers", "torch", "accelerate", "datasets", "tokenizers")
_GENERAL_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "max_grad_norm",
    "loss_type",
    "beta",
    "epsilon",
    "epsilon_high",
    "delta",
    "temperature",
    "top_p",
    "num_generations",
    "num_iterations",
    "generation_batch_size",
    "max_completion_length",
    "use_vllm",
    "bf16",
    "seed",
)


@dataclass
class CardNotes:
    """What the trainer cannot know of its run, for the card.

    Attributes:
        dataset: of the training problems: Hub id, file, or a description.
        evaluation: Markdown table of results; by default the last evaluation of the training log.
        evaluation_command: command that gave it.
        results: the same for the card's metadata, which the Hub shows; by default those of the training log.
    """

    dataset: str | None = None
    evaluation: str | None = None
    evaluation_command: str | None = None
    results: Sequence[EvalResult] = ()


@dataclass(frozen=True)
class Origin:
    """The model that was trained.

    Attributes:
        hub_id: its id on the Hub, `None` for a local model.
        ancestor: of a local model, the Hub model that its own card names as its base.
        name: folder name of a local model, else the id.
    """

    hub_id: str | None
    ancestor: str | None
    name: str

    @classmethod
    def of(cls, path: str) -> "Origin":
        """Origin of a model by its Hub id or folder; a folder of the Hub's cache has the id of its repository."""
        if snapshot := _SNAPSHOT.search(path):
            hub_id = snapshot[1].replace("--", "/")
            return cls(hub_id, None, hub_id)
        if not os.path.isdir(path):
            known = _HUB_ID.fullmatch(path) is not None
            return cls(path if known else None, None, Path(path).name)
        ancestor = None
        if (card := Path(path) / "README.md").exists():
            ancestor = ModelCard.load(card, ignore_metadata_errors=True).data.get("base_model")
        if not isinstance(ancestor, str) or os.path.isdir(ancestor) or not _HUB_ID.fullmatch(ancestor):
            ancestor = None
        return cls(None, ancestor, Path(path).resolve().name)

    def sentence(self, is_adapter: bool, dataset: str | None) -> str:
        """First sentence of the card."""
        kind = "a LoRA adapter for" if is_adapter else "a fine-tuned version of"
        if self.hub_id:
            base = _link(self.hub_id)
        else:
            base = f"a local model, `{self.name}`" if self.name else "a local model"
            base += f" (derived from {_link(self.ancestor)})" if self.ancestor else ""
        data = ""
        if dataset and is_hub_dataset(dataset):
            data = f", trained on [{dataset}](https://huggingface.co/datasets/{dataset})"
        elif dataset and " " not in dataset:
            data = f", trained on the local file `{Path(dataset).name}`"
        elif dataset:
            data = f", trained on {dataset}"
        return f"This model is {kind} {base}{data}."


def _link(hub_id: str) -> str:
    return f"[{hub_id}](https://huggingface.co/{hub_id})"


def is_hub_dataset(dataset: str) -> bool:
    """Whether a data set is named by a Hub id, rather than by a file or in words."""
    is_file = dataset.endswith((".json", ".jsonl")) or os.path.exists(dataset)
    return _HUB_ID.fullmatch(dataset) is not None and not is_file


def paper(title: str, arxiv_id: str, key: str, year: int, authors: str) -> dict[str, str]:
    """A trainer's `_paper`, from which TRL writes the citation of the card.

    Args:
        title: of the paper.
        arxiv_id: its number on arXiv.
        key: of the BibTeX entry.
        year: of publication.
        authors: joined by " and ".
    """
    entry = {"title": f"{{{{{title}}}}}", "author": f"{{{authors}}}", "year": year, "eprint": f"{{arXiv:{arxiv_id}}}"}
    lines = [f"    {name.ljust(12)} = {value}," for name, value in entry.items()]
    return {"title": title, "id": arxiv_id, "citation": "\n".join([f"@article{{{key},", *lines, "}"])}


def method_settings(config: GRPOConfig) -> dict[str, object]:
    """The fields of a method's config that `GRPOConfig` does not have, with their values."""
    common = {f.name for f in fields(GRPOConfig)}
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in common}


def replace_section(text: str, heading: str, body: str, before: str = "## Citations") -> str:
    """Put `body` under the Markdown heading in place of what is there, up to the next heading of its level or above.

    A heading that is not there is added before the heading `before`, or at the end.
    """
    lines, fenced = text.splitlines(), False
    level = len(heading) - len(heading.lstrip("#"))
    start = end = insert = len(lines)
    for number, line in enumerate(lines):
        if line.startswith("```"):
            fenced = not fenced
        if fenced or not re.match(r"#+ ", line):
            continue
        if start < number and end == len(lines) and len(line) - len(line.lstrip("#")) <= level:
            end = number
        if line == heading:
            start = number
        if line == before:
            insert = number
    if start == len(lines):
        start = end = insert
    section = [heading, "", *body.strip().splitlines(), ""]
    return "\n".join(lines[:start] + section + lines[end:]) + "\n"


def write_evaluation(folder: str | Path, table: str, command: str, results: Sequence[EvalResult] = ()) -> None:
    """Put an evaluation into the card of a model in a local folder, in place of an earlier one.

    Args:
        folder: of the model.
        table: Markdown table of the results.
        command: that gave them.
        results: the same for the card's metadata.

    Raises:
        ValueError: if the folder has no card.
    """
    path = Path(folder) / "README.md"
    if not path.exists():
        raise ValueError(f"folder={str(folder)!r} has no README.md; give the output folder of a trainer.")
    path.write_text(replace_section(path.read_text(), "## Evaluation", evaluation_body(table, command)))
    if results:
        card = ModelCard.load(path)
        set_results(card, results, Path(folder).resolve().name)
        card.save(path)


def evaluation_body(table: str, command: str) -> str:
    """The evaluation section: a table and the command it comes from."""
    return f"{table.strip()}\n\n```shell\n{command}\n```"


def public_command(launcher: str = "accelerate launch", argv: Sequence[str] | None = None) -> str:
    """The command line of this run as one may publish it: without tokens, and absolute paths by their last name."""
    argv = sys.argv if argv is None else argv
    shown, skip = [], False
    for argument in argv:
        if skip:
            skip = False
            continue
        if re.match(r"--(hub_)?token\b", argument):
            skip = "=" not in argument
            continue
        option, equals, value = argument.partition("=")
        if equals and os.path.isabs(value):
            argument = f"{option}={Path(value).name}"
        elif os.path.isabs(argument):
            argument = Path(argument).name
        shown.append(argument)
    return f"{launcher} {shlex.join(shown)}"


def _lora_settings(adapter: LoraConfig) -> dict[str, object]:
    modules = adapter.target_modules
    names = [modules] if isinstance(modules, str) else {name.rpartition(".")[2] for name in modules}
    return {
        "LoRA rank": adapter.r,
        "LoRA alpha": adapter.lora_alpha,
        "LoRA modules": ", ".join(sorted(names)),
    }


class CardMixin:
    """Cards with settings, evaluation and loading code, for a `GRPOTrainer` subclass (named before it in the bases).

    `card_notes` holds what the trainer cannot know; a recipe sets it.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.card_notes = CardNotes()
        if is_peft_model(self.model) and (hub_id := self._origin().hub_id):
            for adapter in self.model.peft_config.values():
                adapter.base_model_name_or_path = hub_id  # a folder of the Hub's cache means nothing elsewhere

    def card_settings(self) -> dict[str, object]:
        """Settings of the method, by name, for the card."""
        return method_settings(self.args)

    def card_sections(self, folder: Path) -> dict[str, str]:
        """Further sections of the card by heading; files that they show are written into the folder."""
        return {}

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        dataset = dataset_name or self.card_notes.dataset
        super().create_model_card(model_name, dataset if dataset and is_hub_dataset(dataset) else None, tags)
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir) / "README.md"
        card = ModelCard.load(path)
        self._correct_metadata(card)
        set_results(card, self.card_notes.results or logged_results(self.state.log_history), str(model_name))
        text = card.text
        sentence = self._origin().sentence(is_peft_model(self.model), dataset)
        text = re.sub(r"^This model is a fine-tuned version of .*$", lambda _: sentence, text, count=1, flags=re.M)
        text = replace_section(text, "## Quick start", self._loading_code(model_name))
        settings = {f"### Settings of {self._name}": self.card_settings(), "### Training": self._training_settings()}
        for heading, values in settings.items():
            text = replace_section(text, heading, _settings_table(values), before="### Framework versions")
        for heading, body in self.card_sections(path.parent).items():
            text = replace_section(text, heading, body)
        text = replace_section(text, "## Evaluation", self._evaluation(model_name))
        versions = "\n".join(f"- {name}: {number}" for name, number in self._versions().items())
        card.text = replace_section(text, "### Framework versions", versions)
        card.save(path)

    def _origin(self) -> Origin:
        return Origin.of(get_config_model_id(self.accelerator.unwrap_model(self.model).config))

    def _correct_metadata(self, card: ModelCard) -> None:
        is_adapter = is_peft_model(self.model)
        origin = self._origin()
        # An adapter fits the very model it was trained on, so an ancestor of that is not its base.
        base_model = origin.hub_id or (None if is_adapter else origin.ancestor)
        card.data.base_model = base_model
        if base_model:
            card.data.base_model_relation = "adapter" if is_adapter else "finetune"
        if is_adapter:
            card.data.library_name = "peft"

    def _training_settings(self) -> dict[str, object]:
        args, ranks = self.args, self.accelerator.num_processes
        settings: dict[str, object] = {name: getattr(args, name) for name in _GENERAL_SETTINGS}
        settings["lr_scheduler_type"] = str(args.lr_scheduler_type).rpartition(".")[2].lower()
        settings["rows per update"] = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks
        settings["updates"] = self.state.global_step
        settings["ranks"] = ranks
        settings["hardware"] = hardware(ranks)
        if is_peft_model(self.model):
            adapter = self.model.peft_config[self.model.active_adapter]
            settings["adapter"] = adapter.peft_type.value
            if isinstance(adapter, LoraConfig):
                settings |= _lora_settings(adapter)
        return settings

    def _versions(self) -> dict[str, str]:
        used = [*_PACKAGES]
        used += ["peft"] * is_peft_model(self.model) + ["vllm"] * self.use_vllm
        used += ["deepspeed"] * self.is_deepspeed_enabled
        return {name: _version(name) for name in used}

    def _evaluation(self, model_name: str | None) -> str:
        notes = self.card_notes
        if notes.evaluation:
            return evaluation_body(notes.evaluation, notes.evaluation_command or public_command())
        name = self.hub_model_id or model_name
        command = f"attn-trainers evaluate --model {name} --data FILE.jsonl"
        if table := evaluation_table(self.state.log_history):
            table = f"During training, after {self.state.global_step} updates at the latest.\n\n{table}"
            return evaluation_body(table, public_command())
        return f"Not evaluated yet.\n\n```shell\n{command}\n```"

    def _loading_code(self, model_name: str | None) -> str:
        name = self.hub_model_id or model_name
        is_generic = type(self.processing_class).__name__ in GENERIC_TOKENIZERS
        tokenizer = "PreTrainedTokenizerFast" if is_generic else "AutoTokenizer"
        example = next(iter(self.train_dataset))["prompt"]
        if is_peft_model(self.model):
            base = self._origin().hub_id or f"path of {self._origin().name}"
            load = [
                "from peft import PeftModel",
                f"from transformers import AutoModelForCausalLM, {tokenizer}",
                "",
                f'base = "{base}"',
                f'name = "{name}"  # this repository, or the path of its folder',
                f"tokenizer = {tokenizer}.from_pretrained(name)",
                'model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", device_map="auto")',
                "model = PeftModel.from_pretrained(model, name)",
            ]
        else:
            load = [
                f"from transformers import AutoModelForCausalLM, {tokenizer}",
                "",
                f'name = "{name}"  # this repository, or the path of its folder',
                f"tokenizer = {tokenizer}.from_pretrained(name)",
                'model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto")',
            ]
        if isinstance(example, str):
            encode = ["", f"inputs = tokenizer({example!r}, return_tensors='pt').to(model.device)"]
        else:
            template_kwargs = "".join(f", {name}={value!r}" for name, value in self.chat_template_kwargs.items())
            encode = [
                "",
                f"messages = {example!r}",
                "inputs = tokenizer.apply_chat_template(",
                f'    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True{template_kwargs}',
                ").to(model.device)",
            ]
        generate = [
            f"output = model.generate(**inputs, do_sample=True, max_new_tokens={self.args.max_completion_length})",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))',
        ]
        return "\n".join(["```python", *load, *encode, *generate, "```"])


def evaluation_table(log_history: Sequence[Mapping[str, float]]) -> str | None:
    """The last value of each data set's rewards, pass@k and lengths in a training log; `None` if none is there."""
    latest = latest_evaluations(log_history)
    if not latest:
        return None
    columns = sorted({column for values in latest.values() for column in values})
    rows = [[name, *(_number(values.get(column)) for column in columns)] for name, values in latest.items()]
    return markdown_table(["data", *columns], rows)


def hardware(ranks: int) -> str:
    """What the run's ranks computed on."""
    if torch.cuda.is_available():
        return f"{ranks} × {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _settings_table(settings: Mapping[str, object]) -> str:
    return markdown_table(["setting", "value"], [[name, f"`{value}`"] for name, value in settings.items()])


def _version(name: str) -> str:
    for distribution in (name, f"{name}-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "not installed"


def publish(trainer, notes: CardNotes) -> None:
    """Save the trained model, its tokenizer and its card, and push them if `push_to_hub` is set. Every rank calls it.

    Raises:
        RuntimeError: if the push fails; everything is saved by then, and the error names the command that uploads it.
    """
    args = trainer.args
    trainer.card_notes = notes
    trainer.save_model(args.output_dir, _internal_call=True)  # the other kind of call pushes on its own
    trainer.create_model_card(model_name=(args.hub_model_id or Path(args.output_dir).name).split("/")[-1])
    trainer.accelerator.print(f"Model and card saved to {args.output_dir}.")
    if not args.push_to_hub:
        return
    try:
        trainer.push_to_hub()
    except (HfHubHTTPError, OSError, RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"push_to_hub=True, but the upload to {trainer.hub_model_id} failed ({error}). The model and its card are "
            f"in {args.output_dir}; upload them with `hf upload {trainer.hub_model_id} {args.output_dir} . --exclude "
            '"checkpoint-*" --exclude "_*"`.'
        ) from error
    trainer.accelerator.print(f"Model pushed to the Hub as {trainer.hub_model_id}.")
