"""Finding the key-focus heads of a model: completions, labels of their steps, scores of all heads, the ranking.

AttnPO (arXiv 2602.09953) has the steps of easy, correct responses labelled by three judge models. Without a judge, a
step is redundant here if it comes after the correct answer was first derived, or if the answer is as likely without
it; essential are the steps without which it becomes least likely.

That likelihood is teacher-forced: log p of the response's own answer tokens, with and without the step, all else kept.
It takes one forward per step and has no sampling noise. Resampling what follows a removed step would let the model
write the step again, so that hardly any would look essential. Steps after the first derivation are cut off before,
since with a repetition behind it no derivation would look needed.

Every stage writes into the output folder as it goes, and a run that was cut off goes on where it stopped.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...attention import decoder_of
from ...rewards import math_accuracy_reward
from ...sampling.backends import BACKENDS, sample_completions
from ...sampling.models import load_config, load_model, num_positions, tokenizer_of
from ...sampling.problems import STEP_BY_STEP, parse_template_kwargs, prompt_token_ids, request_seed
from ...sampling.requests import GenerationRequest, SamplingSettings, fit_positions
from ..alignment import StepAlignment, reasoning_step_ranges
from ..heads import KeyFocusHeads, save_heads
from ..steps import STEP_MODES, Splitter
from .labels import ESSENTIAL, REDUNDANT, LabelledCompletion, read_labels
from .probing import Candidate, label_steps, score_all_heads
from .ranking import HeadReport, ScoredSteps, build_report, ranking_table


@dataclass
class DiscoveryArguments:
    """What to probe, with what, and how heads are chosen."""

    model: str = field(metadata={"help": "Model folder, Hub id or LoRA adapter."})
    data: str = field(
        metadata={
            "help": "JSONL file with, per line: problem, completion and labels ('essential', 'redundant' or null per "
            "step); or problem, answer and completion, to be labelled; or problem and answer, to be solved first."
        }
    )
    output: str = field(default="runs/heads", metadata={"help": "Folder for everything that is found."})
    num_heads: int = field(default=3, metadata={"help": "Heads to choose."})
    selection: str = field(
        default="top_k", metadata={"help": "'top_k' (best single heads) or 'greedy' (best together)."}
    )
    average: str = field(default="macro", metadata={"help": "'macro' weighs responses alike, 'micro' pairs of steps."})
    held_out: float = field(
        default=0.3, metadata={"help": "Share of the problems that only measures the chosen heads; 0: none."}
    )
    num_samples: int = field(default=4, metadata={"help": "Completions per problem, where they are generated."})
    min_accuracy: float = field(
        default=0.8, metadata={"help": "Problems solved less often are left out: their responses say less."}
    )
    max_responses: int = field(default=500, metadata={"help": "Responses to label and score at most."})
    prompt_template: str = field(default=STEP_BY_STEP, metadata={"help": "User message with {problem}."})
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Arguments of the chat template as JSON, e.g. '{\"enable_thinking\": false}'."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Of the generation."})
    max_new_tokens: int = field(default=16384, metadata={"help": "Tokens per completion at most."})
    backend: str = field(default="auto", metadata={"help": "'vllm', 'transformers' or 'auto'."})
    batch_size: int = field(default=8, metadata={"help": "Sequences per forward."})
    dtype: str = field(default="auto", metadata={"help": "Of the weights."})
    step_mode: str = field(default="phrases", metadata={"help": "'phrases' or 'paragraphs', as in training."})
    phrases_file: str | None = field(default=None, metadata={"help": "JSON file with the phrases that open steps."})
    end_of_thinking: str = field(default="</think>", metadata={"help": "Text that ends the thinking part."})
    seed: int = field(default=0, metadata={"help": "Of the generation, the split and the bootstrap."})

    def __post_init__(self):
        self.chat_template_kwargs = parse_template_kwargs(self.chat_template_kwargs)
        choices = {
            "selection": ("top_k", "greedy"),
            "average": ("macro", "micro"),
            "step_mode": STEP_MODES,
            "backend": BACKENDS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; set it to one of {', '.join(allowed)}.")
        for name in ("num_heads", "num_samples", "max_responses", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0.0 <= self.held_out < 1.0:
            raise ValueError(f"held_out={self.held_out} must lie in [0, 1): some problems must choose the heads.")

    @property
    def splitter(self) -> Splitter:
        return Splitter.of(self.step_mode, self.phrases_file)


@dataclass
class HeldOutReport:
    """SRA on problems that had no part in choosing the heads.

    Attributes:
        num_responses: Responses with both kinds of step.
        chosen: SRA of the chosen heads together (mean score).
        lower: Lower end of its bootstrap interval (95 %, over responses).
        upper: Upper end.
        best_single: SRA of the head that ranked first.
        median: SRA of the median head.
        share_below: Share of the heads whose SRA is below that of the chosen ones together.
    """

    num_responses: int
    chosen: float
    lower: float
    upper: float
    best_single: float
    median: float
    share_below: float


# Files ---------------------------------------------------------------------------------------------------------------


def read_jsonl(path: str | Path, *, repair: bool = False) -> list[dict]:
    """Objects of a JSONL file.

    Args:
        path: The file; none if it does not exist and `repair` is set.
        repair: Remove a last line that a crash cut off, so that the next one starts on a line of its own.

    Raises:
        ValueError: A line is malformed; the message names it.
    """
    path = Path(path)
    if repair:
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            path.write_bytes(whole)
        lines = whole.decode().splitlines()
    else:
        lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is no JSON object ({error}); correct or remove it.") from error
    return records


def append_jsonl(path: Path, record: dict) -> None:
    """Add one line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def check_output(args: DiscoveryArguments) -> Path:
    """The output folder, refused where it holds a discovery with other settings."""
    output = Path(args.output)
    path = output / "settings.json"
    free = {"output", "num_heads", "selection", "average", "held_out", "batch_size"}  # what a repeated run may change
    settings = {name: value for name, value in asdict(args).items() if name not in free}
    settings["data_digest"] = hashlib.sha256(Path(args.data).read_bytes()).hexdigest()
    if path.exists():
        earlier = json.loads(path.read_text())
        changed = sorted(name for name in settings if settings[name] != earlier.get(name))
        if changed:
            raise ValueError(
                f"output={args.output!r} holds a discovery with other settings ({', '.join(changed)}); choose another "
                "folder, or the settings in its settings.json."
            )
    (output / "scores").mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n")
    return output


# Responses -----------------------------------------------------------------------------------------------------------


def find_candidates(args: DiscoveryArguments, tokenizer: PreTrainedTokenizerBase, output: Path) -> list[Candidate]:
    """Responses with usable steps, from the data or generated; at most `args.max_responses`.

    Raises:
        ValueError: The data has not the columns it needs, or no response is usable.
    """
    records = read_jsonl(args.data)
    if not records or not all("problem" in record for record in records):
        raise ValueError(f"data={args.data!r} needs lines with a problem; give problem, completion and labels.")
    if all("completion" in record for record in records):
        candidates = [_candidate(args, tokenizer, record) for record in records if record.get("correct", True)]
    elif all("answer" in record for record in records):
        candidates = _generated_candidates(args, tokenizer, records, output)
    else:
        raise ValueError(f"data={args.data!r} has lines without answer; give problem and answer, or completions too.")
    usable = [one for one in candidates if one.alignment.reason is None][: args.max_responses]
    if not usable:
        reasons = sorted({str(one.alignment.reason) for one in candidates})
        raise ValueError(
            f"data={args.data!r}: none of {len(candidates)} correct responses has usable steps "
            f"({', '.join(reasons)}); give easier problems, or set step_mode='paragraphs'."
        )
    return usable


def prompt_ids_of(args: DiscoveryArguments, tokenizer: PreTrainedTokenizerBase, problem: str) -> list[int]:
    """Tokens of a problem's prompt."""
    return prompt_token_ids(tokenizer, problem, args.prompt_template, args.chat_template_kwargs)


def _align(args: DiscoveryArguments, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> StepAlignment:
    return reasoning_step_ranges(tokenizer, ids, splitter=args.splitter, end_of_thinking=args.end_of_thinking)


def _candidate(args: DiscoveryArguments, tokenizer: PreTrainedTokenizerBase, record: dict) -> Candidate:
    """A response given as text or as sampled ids, with labels or without."""
    ids = record.get("completion_ids")
    if ids is None:
        ids = tokenizer(record["completion"], add_special_tokens=False)["input_ids"]
        if ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)  # the answer's last row, as in a sampled response
    alignment = _align(args, tokenizer, ids)
    labels = record.get("labels")
    if labels is None and "answer" not in record:
        raise ValueError(f"data={args.data!r} has a completion with neither labels nor answer; add one of them.")
    if labels is not None and alignment.reason is None and len(labels) != len(alignment.kinds):
        raise ValueError(
            f"data={args.data!r}: {len(labels)} labels for the {len(alignment.kinds)} steps of "
            f"{record['completion'][:60]!r}...; give one label per step as step_mode={args.step_mode!r} cuts them."
        )
    return Candidate(record["problem"], str(record.get("answer", "")), ids, alignment, labels)


def _generated_candidates(
    args: DiscoveryArguments, tokenizer: PreTrainedTokenizerBase, records: list[dict], output: Path
) -> list[Candidate]:
    """Correct responses to the problems that the model solves often."""
    path = output / "completions.jsonl"
    done = read_jsonl(path, repair=True)
    seen = {(record["index"], record["sample"]) for record in done}
    missing = [
        (index, sample)
        for index in range(len(records))
        for sample in range(args.num_samples)
        if (index, sample) not in seen
    ]
    prompts = {index: prompt_ids_of(args, tokenizer, records[index]["problem"]) for index, _ in missing}
    requests = [
        GenerationRequest(prompts[index], args.max_new_tokens, request_seed(args.seed, "probing", index, sample))
        for index, sample in missing
    ]
    requests, num_cut = fit_positions(requests, num_positions(load_config(args.model)))
    if num_cut:
        print(
            f"{num_cut} of {len(requests)} completions are limited by the model's positions to fewer than "
            f"max_new_tokens={args.max_new_tokens}."
        )
    settings = SamplingSettings(temperature=args.temperature, dtype=args.dtype, batch_size=args.batch_size)
    progress = tqdm(total=len(requests) + len(done), initial=len(done), desc="Completions", unit="response")
    for position, drawn in sample_completions(args.backend, args.model, settings, tokenizer, requests):
        index, sample = missing[position]
        record = {"index": index, "sample": sample, "completion_ids": drawn.token_ids}
        append_jsonl(path, record)
        done.append(record)
        progress.update()
    progress.close()
    done.sort(key=lambda record: (record["index"], record["sample"]))
    texts = tokenizer.batch_decode([record["completion_ids"] for record in done], skip_special_tokens=True)
    correct = math_accuracy_reward(texts, [records[record["index"]]["answer"] for record in done])
    solved: dict[int, list[float]] = {}
    for record, right in zip(done, correct, strict=True):
        solved.setdefault(record["index"], []).append(right)
    easy = {index for index, rights in solved.items() if sum(rights) / len(rights) >= args.min_accuracy}
    print(f"{len(easy)} of {len(records)} problems are solved in at least {args.min_accuracy:.0%} of the samples.")
    return [
        Candidate(
            records[record["index"]]["problem"],
            str(records[record["index"]]["answer"]),
            record["completion_ids"],
            _align(args, tokenizer, record["completion_ids"]),
        )
        for record, right in zip(done, correct, strict=True)
        if right and record["index"] in easy
    ]


# Labels --------------------------------------------------------------------------------------------------------------


def label_candidates(
    args: DiscoveryArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    candidates: Sequence[Candidate],
    output: Path,
) -> list[LabelledCompletion]:
    """Label every candidate, in order; those in `labels.jsonl` from an earlier run are taken as they are."""
    path = output / "labels.jsonl"
    read_jsonl(path, repair=True)
    labelled = list(read_labels(path)) if path.exists() else []
    for candidate in tqdm(candidates[len(labelled) :], desc="Labels", unit="response"):
        labels = candidate.labels
        if labels is None:
            prompt_ids = prompt_ids_of(args, tokenizer, candidate.problem)
            labels = label_steps(model, prompt_ids, candidate, args.batch_size)
        record = LabelledCompletion(
            problem=candidate.problem,
            answer=candidate.answer,
            completion=tokenizer.decode(candidate.completion_ids),
            completion_ids=candidate.completion_ids,
            step_ranges=candidate.alignment.step_ranges,
            step_texts=candidate.alignment.texts,
            labels=labels,
        )
        append_jsonl(path, asdict(record))
        labelled.append(record)
    return labelled


# Scores --------------------------------------------------------------------------------------------------------------


def score_responses(
    args: DiscoveryArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    labelled: Sequence[LabelledCompletion],
    output: Path,
) -> Iterator[tuple[str, ScoredSteps]]:
    """Problem and scores of each response that has both kinds of step; scores of an earlier run are read."""
    for index, response in enumerate(tqdm(labelled, desc="Scores", unit="response")):
        if ESSENTIAL not in response.labels or REDUNDANT not in response.labels:
            continue
        path = output / "scores" / f"{index:05d}.pt"
        if not path.exists():
            prompt_ids = prompt_ids_of(args, tokenizer, response.problem)
            answer_start = _align(args, tokenizer, response.completion_ids).answer_start
            scores = score_all_heads(model, prompt_ids, response, answer_start)
            partial_path = path.with_suffix(".partial")
            torch.save(scores, partial_path)
            partial_path.replace(path)
        scores = torch.load(path, weights_only=True)
        yield response.problem, ScoredSteps(scores, response.essential, response.redundant)


# The run -------------------------------------------------------------------------------------------------------------


def is_held_out(problem: str, share: float, seed: int) -> bool:
    """Whether a problem belongs to the held-out share, by a hash of its text."""
    digest = hashlib.sha256(f"{seed}:{problem}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def measure_held_out(
    responses: Sequence[ScoredSteps], chosen: Sequence[int], average: str, generator: torch.Generator
) -> HeldOutReport | None:
    """SRA of the chosen heads (flat indices, best first) and of all single heads on held-out responses.

    None if no held-out response has both kinds of step.
    """
    usable = [one for one in responses if one.num_pairs > 0]
    if not usable:
        return None
    single = ranking_table(usable).mean(average)  # (H,)
    together = [
        ScoredSteps(one.scores[list(chosen)].double().mean(0, keepdim=True), one.essential, one.redundant)
        for one in usable
    ]
    table = ranking_table(together)
    value = table.mean(average).item()
    lower, upper = (end.item() for end in table.interval(generator, average=average))
    return HeldOutReport(
        num_responses=len(usable),
        chosen=value,
        lower=lower,
        upper=upper,
        best_single=single[chosen[0]].item(),
        median=single.median().item(),
        share_below=(single < value).double().mean().item(),
    )


def discover_heads(args: DiscoveryArguments) -> tuple[KeyFocusHeads, HeadReport, HeldOutReport | None]:
    """Run all stages and write `heads.json`, `report.json` and what the stages keep into `args.output`.

    Raises:
        ValueError: The settings or the data cannot work, or the folder holds a discovery with other settings.
    """
    output = check_output(args)
    tokenizer = tokenizer_of(args.model)
    candidates = find_candidates(args, tokenizer, output)
    model = load_model(args.model, args.dtype).to("cuda" if torch.cuda.is_available() else "cpu")
    labelled = label_candidates(args, model, tokenizer, candidates, output)
    scored = list(score_responses(args, model, tokenizer, labelled, output))
    choosing = [one for problem, one in scored if not is_held_out(problem, args.held_out, args.seed)]
    measuring = [one for problem, one in scored if is_held_out(problem, args.held_out, args.seed)]
    config = decoder_of(model).config
    generator = torch.Generator().manual_seed(args.seed)
    report = build_report(
        choosing,
        model_name=args.model,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        generator=generator,
        average=args.average,
    )
    order = report.ranking if args.selection == "top_k" else report.greedy_heads
    heads = [tuple(pair) for pair in order[: args.num_heads]]
    flat = [layer * report.num_heads + head for layer, head in heads]
    held_out = measure_held_out(measuring, flat, args.average, generator)
    found = KeyFocusHeads(
        model_name=args.model,
        heads=tuple(heads),
        sra=tuple(report.sra[index] for index in flat),
        settings={
            name: getattr(args, name) for name in ("selection", "average", "step_mode", "held_out", "max_responses")
        },
    )
    save_heads(output / "heads.json", found)
    content = report.to_dict() | {"held_out": asdict(held_out) if held_out else None}
    (output / "report.json").write_text(json.dumps(content, indent=2) + "\n")
    return found, report, held_out
