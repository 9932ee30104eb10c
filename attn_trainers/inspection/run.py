"""An inspection from problems to page: responses read or sampled, measured, on demand perturbed, and drawn.

What takes long is written to the output folder as it goes: a run that was cut off takes from `responses.jsonl` and
`perturbations.jsonl` what it had, as far as the model, the prompt and the settings are the same.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..attention.observers import INFLUENCE_AGGREGATIONS
from ..attnpo.heads import KNOWN_HEADS, model_fingerprint, resolve_heads
from ..attnpo.steps import STEP_MODES, Splitter
from ..attnrl.steps import STEP_MODES as BRANCHING_STEPS
from ..attnrl.steps import StepDelimiters
from ..base.options import check_choices
from ..evaluation.run import weights_digest
from ..jsonl import digest_of, read_jsonl, resumed
from ..rewards import math_accuracy
from ..sampling.models import end_token_ids, load_config, load_model, num_positions, tokenizer_of
from ..sampling.problems import parse_template_kwargs, prompt_token_ids
from ..sampling.requests import GenerationRequest, SamplingSettings, fit_positions
from ..sampling.transformers import sample_with_transformers
from ..thinking import ANSWERS, END_OF_THINKING
from .continuations import PerturbationSettings, perturb_response
from .measure import (
    ANALYSIS_DISTANCES,
    HEAD_POOLS,
    InspectedResponse,
    InspectionSettings,
    find_receiver_heads,
    inspect_response,
    summarise_couplings,
)
from .perturbation import Perturbation, PerturbedResponse
from .report import write_report


@dataclass
class InspectionArguments:
    """What is inspected."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id of a model or a LoRA adapter."})
    data: str | None = field(
        default=None,
        metadata={"help": "JSON lines with 'problem', and 'completion' and 'answer' where there are any."},
    )
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
    max_completion_length: int = field(default=1024, metadata={"help": "Tokens of a sampled response at most."})
    max_response_tokens: int = field(default=4096, metadata={"help": "A given response is cut after so many tokens."})
    temperature: float = field(default=0.7, metadata={"help": "Of sampled responses (the paper's analysis: 0.7)."})
    seed: int = field(default=0, metadata={"help": "Of sampled responses and of the bootstrap."})
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
    end_of_thinking: str = field(default=END_OF_THINKING, metadata={"help": "Text that ends the thinking part."})
    answer: str = field(
        default="tag", metadata={"help": "The answer begins behind the 'tag', or is 'last_boxed' or 'last_paragraph'."}
    )
    influence_steps: str = field(
        default="paragraphs", metadata={"help": "Steps of the influence: 'paragraphs', 'lines' or 'sentences'."}
    )
    influence_aggregation: str = field(
        default="sum", metadata={"help": "Influence is the 'sum' or the 'mean' over later steps."}
    )
    perturb: bool = field(
        default=False,
        metadata={"help": "Force other tokens where FAI is highest and lowest, and compare how the response goes on."},
    )
    perturb_positions: int = field(default=5, metadata={"help": "Positions of highest, and of lowest FAI."})
    perturb_candidates: int = field(default=3, metadata={"help": "Likeliest other tokens forced at each position."})
    perturb_max_tokens: int = field(default=512, metadata={"help": "Tokens of a continuation at most."})
    perturb_fai_from: int = field(
        default=10, metadata={"help": "Least distance of the FAI that positions are chosen by, 0 or 10 tokens."}
    )
    perturb_batch_size: int = field(default=16, metadata={"help": "Continuations generated together."})

    def __post_init__(self):
        self.chat_template_kwargs = parse_template_kwargs(self.chat_template_kwargs)
        choices = {
            "answer": ANSWERS,
            "influence_steps": BRANCHING_STEPS,
            "influence_aggregation": INFLUENCE_AGGREGATIONS,
        }
        choices |= {"step_mode": STEP_MODES, "head_pool": HEAD_POOLS, "perturb_fai_from": ANALYSIS_DISTANCES}
        check_choices(self, choices)
        counts = (
            "num_problems",
            "max_completion_length",
            "max_response_tokens",
            "perturb_positions",
            "perturb_candidates",
        )
        for name in (*counts, "perturb_max_tokens", "perturb_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1; raise it.")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} is negative; set it to 0 for greedy decoding.")
        if "{problem}" not in self.prompt_template:
            raise ValueError(f"prompt_template={self.prompt_template!r} has no {{problem}}; add it where it goes.")

    @property
    def perturbation(self) -> PerturbationSettings:
        return PerturbationSettings(
            positions=self.perturb_positions,
            candidates=self.perturb_candidates,
            max_tokens=self.perturb_max_tokens,
            batch_size=self.perturb_batch_size,
        )


@dataclass(frozen=True)
class Response:
    """A response to inspect.

    Attributes:
        problem: text of the problem.
        prompt_ids, completion_ids: tokens without padding.
        correct: whether the answer is right, where it is known.
        cut_off: whether a token limit ended it.
    """

    problem: str
    prompt_ids: list[int]
    completion_ids: list[int]
    correct: bool | None
    cut_off: bool


def run_inspection(args: InspectionArguments) -> str:
    """Inspect responses to problems, and write page, pictures and tables into the output folder.

    Returns:
        The tables as Markdown.

    Raises:
        ValueError: without a model or problems, for unusable ones, or where no response has a token.
    """
    if not args.model or not args.data:
        raise ValueError(f"model={args.model!r} and data={args.data!r}: set both.")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_of(args.model)
    responses = list(read_responses(args, tokenizer, folder / "responses.jsonl"))
    if not responses:
        raise ValueError(f"data={args.data!r} gave no response with a token; give one whose completions have text.")
    model = load_model(args.model, args.dtype).to("cuda" if torch.cuda.is_available() else "cpu")
    settings = inspection_settings(args, model)
    delimiters = StepDelimiters.from_tokenizer(tokenizer, args.end_of_thinking, args.influence_steps)
    inspected = [
        inspect_response(
            model,
            tokenizer,
            response.prompt_ids,
            response.completion_ids,
            settings,
            delimiters,
            problem=response.problem,
            correct=response.correct,
            cut_off=response.cut_off,
        )
        for response in tqdm(responses, desc="Inspected", unit="response")
    ]
    receivers = find_receiver_heads(inspected, settings.head_fraction)
    perturbed = None
    if args.perturb:
        perturbed = list(perturb_all(args, model, tokenizer, responses, inspected, folder / "perturbations.jsonl"))
    return write_report(
        folder,
        Path(args.model).name,
        facts_of(args, settings, inspected, len(receivers)),
        inspected,
        summarise_couplings(inspected, receivers, settings.peak_fraction),
        perturbed,
        num_shown=args.num_shown,
        seed=args.seed,
    )


# Responses -------------------------------------------------------------------------------------------


def read_problems(args: InspectionArguments) -> list[dict]:
    """The first records of the data file.

    Raises:
        ValueError: for a line without a problem, or a file without lines.
    """
    records = read_jsonl(args.data)[: args.num_problems]
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict) or not isinstance(record.get("problem"), str):
            raise ValueError(f"data={args.data!r} has no text 'problem' in record {number}; give one in each line.")
    if not records:
        raise ValueError(f"data={args.data!r} holds no problems; give JSON lines with a 'problem' each.")
    return records


def read_responses(args: InspectionArguments, tokenizer: PreTrainedTokenizerBase, path: Path) -> Iterator[Response]:
    """Each problem with its response, given or sampled; those without a token are left out."""
    records = read_problems(args)
    prompts = [
        prompt_token_ids(tokenizer, record["problem"], args.prompt_template, args.chat_template_kwargs)
        for record in records
    ]
    missing = [i for i, record in enumerate(records) if not record.get("completion")]
    sampled = dict(zip(missing, sample_responses(args, tokenizer, missing, prompts, path), strict=True))
    ends = end_token_ids(args.model, tokenizer)
    for i, record in enumerate(records):
        if i in sampled:
            ids = sampled[i]
            cut_off = ids[-1] not in ends
        else:
            given = tokenizer(record["completion"], add_special_tokens=False)["input_ids"]
            ids = given[: args.max_response_tokens]
            cut_off = len(given) > len(ids)
        if ids:
            text = tokenizer.decode(ids, skip_special_tokens=True)
            yield Response(record["problem"], prompts[i], ids, verdict(record, text), cut_off)


def sample_responses(
    args: InspectionArguments,
    tokenizer: PreTrainedTokenizerBase,
    indices: Sequence[int],
    prompts: Sequence[list[int]],
    path: Path,
) -> list[list[int]]:
    """Sampled tokens for the problems of these indices."""
    settings = SamplingSettings(temperature=args.temperature, seed=args.seed, dtype=args.dtype)
    model = weights_digest(args.model) or args.model
    requests = [GenerationRequest(prompts[i], args.max_completion_length, args.seed * 1_000_003 + i) for i in indices]
    requests, _ = fit_positions(requests, num_positions(load_config(args.model)))
    keys = [digest_of(model, asdict(settings), asdict(request)) for request in requests]

    def compute(missing: list[int]) -> Iterator[tuple[int, dict]]:
        drawn = sample_with_transformers(args.model, settings, tokenizer, [requests[m] for m in missing])
        for place, sample in tqdm(drawn, total=len(missing), desc="Sampled", unit="response"):
            ids = sample.token_ids
            yield missing[place], {"completion_ids": ids, "text": tokenizer.decode(ids)}

    return [record["completion_ids"] for record in resumed(path, keys, compute)]


def verdict(record: dict, text: str) -> bool | None:
    """Whether a response is right: as recorded, or by the recorded answer."""
    if "correct" in record:
        return bool(record["correct"])
    return math_accuracy(text, record["answer"]) == 1.0 if "answer" in record else None


# Measurements ----------------------------------------------------------------------------------------


def inspection_settings(args: InspectionArguments, model: PreTrainedModel) -> InspectionSettings:
    """What is measured, with the key-focus heads named by the arguments or known for the model, or none."""
    named, config = args.key_focus_heads, model.config
    heads = ()
    if named is not None or Path(args.model).name in KNOWN_HEADS:
        listed = json.loads(named) if named is not None and named.lstrip().startswith("[") else named
        heads = resolve_heads(
            listed,
            args.model,
            config.num_hidden_layers,
            config.num_attention_heads,
            step_mode=args.step_mode,
            fingerprint=model_fingerprint(config),
        )
    return InspectionSettings(
        head_pool=args.head_pool,
        influence_delta=args.influence_delta,
        key_focus_heads=tuple(heads),
        splitter=Splitter(args.step_mode),
        end_of_thinking=args.end_of_thinking,
        answer=args.answer,
        influence_aggregation=args.influence_aggregation,
    )


def perturb_all(
    args: InspectionArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    responses: Sequence[Response],
    inspected: Sequence[InspectedResponse],
    path: Path,
) -> Iterator[PerturbedResponse]:
    """The perturbations of each response, each stored as it is done."""
    settings, ends = args.perturbation, end_token_ids(args.model, tokenizer)
    facts = [weights_digest(args.model) or args.model, args.dtype, args.head_pool, args.perturb_fai_from]
    facts.append({name: value for name, value in asdict(settings).items() if name != "batch_size"})
    keys = [digest_of(*facts, r.prompt_ids, r.completion_ids, r.cut_off) for r in responses]

    def compute(missing: list[int]) -> Iterator[tuple[int, dict]]:
        for i in tqdm(missing, desc="Perturbed", unit="response"):
            fai = inspected[i].analysis_fai(args.perturb_fai_from)
            one = responses[i]
            tokens = (one.prompt_ids, one.completion_ids)
            yield i, asdict(perturb_response(model, tokenizer, *tokens, fai, settings, ends, cut_off=one.cut_off))

    for record in resumed(path, keys, compute):
        perturbations = [Perturbation(**perturbation) for perturbation in record["perturbations"]]
        yield PerturbedResponse(record["num_tokens"], perturbations)


def facts_of(
    args: InspectionArguments, settings: InspectionSettings, inspected: Sequence[InspectedResponse], receivers: int
) -> list[str]:
    """Lines that say what was measured, and on what."""
    lengths = sorted(len(response.tokens) for response in inspected)
    low, high = settings.horizon
    facts = [
        f"Model {Path(args.model).name}; {len(inspected)} responses of {lengths[0]} to {lengths[-1]} tokens (median "
        f"{lengths[len(lengths) // 2]}), {sum(response.cut_off for response in inspected)} of them cut off.",
        f"Heads ranked per response over {settings.head_pool} layers; {receivers} receiver heads. Curves: WAAD window "
        f"{settings.window}, FAI at distances {low} to {high}; couplings: FAI up to the end of the response.",
        f"Key-focus heads (layer, head): {', '.join(map(str, settings.key_focus_heads)) or 'none'}; influence counts "
        f"steps at least {settings.influence_delta} later.",
    ]
    empty = [response.key_focus.note for response in inspected if response.key_focus.note]
    if empty:
        facts.append(
            f"{len(empty)} of {len(inspected)} responses have no key-focus scores. Most often: "
            f"{max(empty, key=empty.count)}."
        )
    if args.perturb:
        facts.append(
            f"Perturbation: {args.perturb_positions} positions of highest and of lowest FAI (distance "
            f"{args.perturb_fai_from} to the end of the response), {args.perturb_candidates} other tokens each, "
            f"continued greedily for {args.perturb_max_tokens} tokens at most."
        )
    return facts
