"""What a model's attention says about its own responses, as one HTML page and pictures.

    python recipes/inspect_attention.py --model Qwen/Qwen3-4B-Base --data problems.jsonl --output_dir runs/inspection

The data are JSON lines with a `problem`; where a line has a `completion`, it is read as the response, otherwise one is
sampled. The page shows, for a few problems, WAAD and FAI over the tokens with preplan and anchor tokens, forward
context influence and key-focus scores over the steps, and over all problems the couplings of the rhythm paper's Table
2 with the densities of the peaks they are measured on. It is one file and needs no network. `--tiny true` inspects the
small model of the arithmetic recipes on their held-out problems, without `--model` and `--data`.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser, PreTrainedTokenizerBase

from attn_trainers.attnpo.heads import KNOWN_HEADS, resolve_heads
from attn_trainers.attnpo.steps import Splitter
from attn_trainers.attnrl.steps import StepDelimiters
from attn_trainers.inspection.measure import (
    InspectedResponse,
    InspectionSettings,
    find_receiver_heads,
    inspect_response,
    summarise_couplings,
)
from attn_trainers.inspection.page import STATISTIC_HEADER, page, plot_couplings, plot_response, statistic_rows
from attn_trainers.rewards import math_accuracy
from attn_trainers.sampling.models import load_config, load_model, num_positions, tokenizer_of
from attn_trainers.sampling.problems import parse_template_kwargs, prompt_token_ids
from attn_trainers.sampling.requests import GenerationRequest, SamplingSettings, fit_positions
from attn_trainers.sampling.transformers import sample_with_transformers
from attn_trainers.tables import markdown_table
from attn_trainers.tiny.arithmetic import sample_problems
from attn_trainers.tiny.runs import HELD_OUT_SEED, TinyArguments, prepare


logger = logging.getLogger(__name__)


@dataclass
class Arguments:
    """What is inspected."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id of a model or a LoRA adapter."})
    data: str | None = field(
        default=None,
        metadata={"help": "JSON lines with 'problem', and 'completion' and 'answer' where there are any."},
    )
    tiny: bool = field(default=False, metadata={"help": "Inspect the arithmetic recipes' model on their problems."})
    output_dir: str = field(default="runs/inspection", metadata={"help": "Where the page and the pictures go."})
    num_problems: int = field(default=64, metadata={"help": "Problems that are read, from the first on."})
    num_shown: int = field(default=4, metadata={"help": "Problems that are drawn."})
    prompt_template: str = field(
        default="{problem}\nPlease reason step by step, and put your final answer within \\boxed{}.",
        metadata={"help": "User message; {problem} stands for the problem."},
    )
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Arguments of the chat template as JSON, e.g. '{\"enable_thinking\": false}'."}
    )
    max_new_tokens: int = field(default=1024, metadata={"help": "Tokens of a sampled response at most."})
    max_response_tokens: int = field(default=4096, metadata={"help": "A given response is cut after so many tokens."})
    temperature: float = field(default=0.7, metadata={"help": "Of sampled responses (the paper's analysis: 0.7)."})
    seed: int = field(default=0, metadata={"help": "Of sampled responses."})
    dtype: str = field(default="auto", metadata={"help": "'auto' (as saved), 'float32' or 'bfloat16'."})
    head_pool: str = field(default="all", metadata={"help": "Layers whose heads are ranked: 'all' or 'middle'."})
    influence_delta: int = field(default=4, metadata={"help": "Influence counts steps at least so much later."})
    key_focus_heads: str | None = field(
        default=None,
        metadata={"help": "Heads file, or heads as JSON ([[layer, head], ...]). Default: those known for the model."},
    )
    step_mode: str = field(
        default="phrases", metadata={"help": "Thinking steps of the key-focus scores: 'phrases' or 'paragraphs'."}
    )

    def __post_init__(self):
        self.chat_template_kwargs = parse_template_kwargs(self.chat_template_kwargs)
        if self.step_mode not in ("phrases", "paragraphs"):
            raise ValueError(f"step_mode={self.step_mode!r} is unknown; set it to 'phrases' or 'paragraphs'.")
        if not self.tiny and not (self.model and self.data):
            raise ValueError(f"model={self.model} and data={self.data}: set both, or tiny=true.")
        if "{problem}" not in self.prompt_template:
            raise ValueError(f"prompt_template={self.prompt_template!r} has no {{problem}}; add it where it goes.")


def read_problems(args: Arguments) -> list[dict]:
    """The first records of the data file."""
    records = []
    for number, line in enumerate(Path(args.data).read_text(encoding="utf-8").splitlines(), start=1):
        record = json.loads(line)
        if not isinstance(record.get("problem"), str):
            raise ValueError(
                f"data={args.data!r}, line {number} has no text 'problem'; give JSON lines that have one."
            )
        records.append(record)
        if len(records) == args.num_problems:
            break
    return records


def responses(args: Arguments, tokenizer: PreTrainedTokenizerBase, records: list[dict]) -> Iterator[tuple]:
    """Each record with its prompt and response tokens, the response given or sampled."""
    prompts = [
        prompt_token_ids(tokenizer, record["problem"], args.prompt_template, args.chat_template_kwargs)
        for record in records
    ]
    missing = [i for i, record in enumerate(records) if not record.get("completion")]
    sampled = {}
    if missing:
        settings = SamplingSettings(temperature=args.temperature, seed=args.seed, dtype=args.dtype)
        requests = [GenerationRequest(prompts[i], args.max_new_tokens, args.seed * 1_000_003 + i) for i in missing]
        requests, _ = fit_positions(requests, num_positions(load_config(args.model)))
        drawn = sample_with_transformers(args.model, settings, tokenizer, requests)
        sampled = {missing[index]: sample.token_ids for index, sample in drawn}
    for i, record in enumerate(records):
        given = sampled.get(i)
        if given is None:
            given = tokenizer(record["completion"], add_special_tokens=False)["input_ids"][: args.max_response_tokens]
        if given:
            yield record, prompts[i], given


def key_focus_heads(args: Arguments, config) -> tuple:
    """Heads named by the arguments or known for the model; none otherwise."""
    named = args.key_focus_heads
    if named is None and Path(args.model).name not in KNOWN_HEADS:
        return ()
    if named is not None and named.lstrip().startswith("["):
        named = json.loads(named)
    return tuple(resolve_heads(named, args.model, config.num_hidden_layers, config.num_attention_heads))


def verdict(record: dict, text: str) -> bool | None:
    """Whether a response is right: as recorded, or by the recorded answer."""
    if "correct" in record:
        return bool(record["correct"])
    return math_accuracy(text, record["answer"]) == 1.0 if "answer" in record else None


def inspect_all(args: Arguments, records: list[dict]) -> tuple[list[InspectedResponse], InspectionSettings]:
    tokenizer = tokenizer_of(args.model)
    model = load_model(args.model, args.dtype).to("cuda" if torch.cuda.is_available() else "cpu")
    settings = InspectionSettings(
        head_pool=args.head_pool,
        influence_delta=args.influence_delta,
        key_focus_heads=key_focus_heads(args, model.config),
        splitter=Splitter(args.step_mode),
    )
    delimiters = StepDelimiters.from_tokenizer(tokenizer)
    inspected = []
    for record, prompt_ids, completion_ids in responses(args, tokenizer, records):
        text = tokenizer.decode(completion_ids, skip_special_tokens=True)
        inspected.append(
            inspect_response(
                model,
                tokenizer,
                prompt_ids,
                completion_ids,
                settings,
                delimiters,
                problem=record["problem"],
                correct=verdict(record, text),
            )
        )
        logger.info("%d of %d responses", len(inspected), len(records))
    return inspected, settings


def main(args: Arguments) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.tiny:
        args.model = args.model or str(prepare(TinyArguments())[0])
        args.prompt_template = "{problem}"
        problems = sample_problems(args.num_problems, HELD_OUT_SEED)
        records = [{"problem": p.text, "answer": p.answer} for p in problems]
    if args.data:
        records = read_problems(args)
    inspected, settings = inspect_all(args, records)
    if not inspected:
        raise ValueError(f"data={args.data!r} gave no response with a token; check num_problems and the file.")
    receivers = find_receiver_heads(inspected, settings.head_fraction)
    statistics = summarise_couplings(inspected, receivers, settings.peak_fraction)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    name = Path(args.model).name
    lengths = sorted(len(response.tokens) for response in inspected)
    facts = [
        f"Model {name}; {len(inspected)} responses of {lengths[0]} to {lengths[-1]} tokens (median "
        f"{lengths[len(lengths) // 2]}).",
        f"Heads ranked per response over {settings.head_pool} layers; {len(receivers)} receiver heads. Curves: WAAD "
        f"window {settings.window}, FAI at distances {settings.horizon[0]} to {settings.horizon[1]}; couplings: FAI "
        "up to the end of the response.",
        f"Key-focus heads (layer, head): {', '.join(map(str, settings.key_focus_heads)) or 'none'}; influence counts "
        f"steps at least {settings.influence_delta} later.",
    ]
    shown = inspected[: args.num_shown]
    (folder / "index.html").write_text(page(f"Attention of {name}", facts, statistics, shown), encoding="utf-8")
    for index, response in enumerate(shown, start=1):
        first_line = response.problem.splitlines()[0][:100].replace("$", r"\$")
        plot_response(response, folder / f"response_{index}.png", f"Response {index}: {first_line}")
    plot_couplings(statistics, folder / "couplings.png", f"Couplings, {name}")
    table = markdown_table(STATISTIC_HEADER, statistic_rows(statistics))
    (folder / "couplings.md").write_text("\n".join([*facts, "", table]) + "\n", encoding="utf-8")
    print(table)
    print(f"Page and pictures: {folder}")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
