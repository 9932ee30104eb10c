"""Do the attention signals find the steps that matter? On dependency arithmetic the truth is known.

    python benchmarks/signals_against_truth.py                       # warm-started model, its own solutions
    python benchmarks/signals_against_truth.py --model DIR --num_problems 200

The model solves problems, or reads the teacher's solutions (`--solutions teacher`); of every step the truth is read
from the text. Compared with it are: influence (which steps do others depend on), the key-focus score of each head and
the labels made without a judge (which steps does the answer need), and FAI at the tokens of results (which results are
used). Each setting (layer, head, Δ) is tried; the best one on the first half of the problems is reported on the second
half, with a bootstrap interval over problems. At equal places sum and mean over later steps order steps alike.

Writes `signals.md`, `signals.json` and `signals.png` into the output folder.
"""

import json
import random
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, HfArgumentParser, PreTrainedTokenizerFast

from attn_trainers.attention import InfluenceObserver, KeyFocusObserver, RhythmObserver, forward_for_attention
from attn_trainers.attnpo.alignment import StepAlignment
from attn_trainers.attnpo.discovery.labels import ESSENTIAL, REDUNDANT
from attn_trainers.attnpo.discovery.pairs import BASELINES, ScoredSteps, baseline_scores
from attn_trainers.attnpo.discovery.probing import Candidate, label_steps
from attn_trainers.attnpo.discovery.ranking import ranking_table
from attn_trainers.attnrl.steps import StepDelimiters, segment_steps
from attn_trainers.base.options import require_choice
from attn_trainers.plots import BLUE, INK
from attn_trainers.sampling.requests import GenerationRequest, SamplingSettings
from attn_trainers.sampling.transformers import sample_with_transformers
from attn_trainers.tables import markdown_table
from attn_trainers.tiny.dependencies import write_dependencies
from attn_trainers.tiny.matched_ranks import matched_correlation
from attn_trainers.tiny.runs import TinyArguments, exact_answer_reward, prepare, task_of
from attn_trainers.tiny.truth import StepTruth, read_truth


DELTAS = (1, 2, 4)
PUBLISHED = "all heads, Δ=4"
PROBE_SEED = 3  # problems of their own, neither trained on nor held out


@dataclass
class Arguments(TinyArguments):
    """What is measured, and where."""

    task: str = "dependencies"
    model: str = field(default="", metadata={"help": "A model of this task; default: the warm start."})
    solutions: str = field(default="model", metadata={"help": "Who writes solutions: 'model' or 'teacher'."})
    num_problems: int = field(default=100, metadata={"help": "Problems, one solution each."})
    num_labelled: int = field(default=40, metadata={"help": "Right solutions that are labelled without a judge."})
    max_tokens: int = field(default=352, metadata={"help": "Tokens of a solution at most."})
    output_dir: str = field(default="runs/signals_against_truth", metadata={"help": "Where results are written."})


@dataclass
class Solution:
    """A solution, its thinking steps and what is known of them.

    Attributes:
        ranges: half-open token ranges of the S thinking steps in prompt and completion; the first range is the prompt.
        answer_start: first token of the answer.
    """

    problem: object
    prompt_ids: list[int]
    completion_ids: list[int]
    ranges: list[tuple[int, int]]
    texts: list[str]
    answer_start: int
    truth: list[StepTruth]
    right: bool

    def of(self, name: str) -> Tensor:
        """(S,) float, one field of the truth."""
        return torch.tensor([float(getattr(truth, name)) for truth in self.truth])

    @property
    def parsed(self) -> Tensor:
        return torch.tensor([truth.name is not None for truth in self.truth])


class HeadInfluence(InfluenceObserver):
    """Influence of every head, kept apart: (layers · heads, S + 1) per row."""

    def __init__(self, *args):
        super().__init__(*args)
        self.by_head: list[list[Tensor]] = [[] for _ in self.steps]

    def observe_sequence(self, row: int, query: Tensor, key: Tensor, layer) -> None:
        columns, scores = self._columns[row], torch.zeros(query.shape[0], len(self.steps[row]))
        if columns:
            scores[:, columns.start : columns.stop] = self.of_heads(row, query, key, layer)
        self.by_head[row].append(scores)


def sample_solutions(
    args: Arguments, folder: str, tokenizer: PreTrainedTokenizerFast, problems: list
) -> list[Solution]:
    """Solutions that end their thinking and have at least four steps."""
    require_choice("solutions", args.solutions, ("model", "teacher"))
    delimiters = StepDelimiters.from_tokenizer(tokenizer)
    prompts = [tokenizer(problem.text + "<think>")["input_ids"] for problem in problems]
    requests = [GenerationRequest(ids, args.max_tokens, seed=i) for i, ids in enumerate(prompts)]
    settings = SamplingSettings(temperature=1.0, batch_size=50)
    end, solutions = tokenizer.convert_tokens_to_ids("</think>"), []
    if args.solutions == "teacher":
        rng, teacher = random.Random(PROBE_SEED), task_of(args).settings.teacher
        texts = [write_dependencies(problem, rng, teacher) + tokenizer.eos_token for problem in problems]
        sampled = enumerate(tokenizer(texts)["input_ids"])
    else:
        sampled = ((i, s.token_ids) for i, s in sample_with_transformers(folder, settings, tokenizer, requests))
    for index, token_ids in tqdm(sampled, total=len(requests), desc="Solutions"):
        ids, problem = list(token_ids), problems[index]
        steps = segment_steps(len(prompts[index]), ids, delimiters)
        if ids.count(end) != 1 or ids[-1] != tokenizer.eos_token_id or steps.stop_step < 5:
            continue
        offset, ranges = len(prompts[index]), steps.ranges[: steps.stop_step]
        texts = [tokenizer.decode(ids[start - offset : stop - offset]) for start, stop in ranges[1:]]
        reward = exact_answer_reward([tokenizer.decode(ids, skip_special_tokens=True)], [problem.answer])
        answer_start = offset + ids.index(end) + 1
        truth = read_truth(problem, texts)
        solutions.append(Solution(problem, prompts[index], ids, ranges, texts, answer_start, truth, reward == [1.0]))
    return solutions


def observe(model, solution: Solution, observer) -> object:
    ids = torch.tensor([solution.prompt_ids + solution.completion_ids])
    forward_for_attention(model, ids, torch.ones_like(ids), observer)
    return observer


def influences(model, solution: Solution) -> tuple[list[str], Tensor]:
    """Names of the settings, and (settings, S) influence: the maximum over all heads, each layer's, and each head."""
    mask = torch.ones(1, len(solution.prompt_ids) + len(solution.completion_ids))
    names, rows = [], []
    for delta in DELTAS:
        by_layer = observe(model, solution, HeadInfluence(mask, [solution.ranges], None, delta, "sum")).by_head[0]
        suffix = f", Δ={delta}"
        names.append("all heads" + suffix)
        rows.append(torch.cat(by_layer).amax(0))
        for layer, scores in enumerate(by_layer):
            names += [f"layer {layer}" + suffix] + [f"head {layer}.{h}" + suffix for h in range(len(scores))]
            rows += [scores.amax(0), *scores]
    return names, torch.stack(rows)[:, 1:]


def key_focus(model, solution: Solution) -> Tensor:
    """(layers · heads, S) attention of the answer to each step."""
    config = model.config
    heads = list(product(range(config.num_hidden_layers), range(config.num_attention_heads)))
    mask = torch.ones(1, len(solution.prompt_ids) + len(solution.completion_ids))
    return observe(
        model, solution, KeyFocusObserver(mask, [solution.ranges[1:]], [solution.answer_start], heads, average=False)
    ).result()[0]


def result_fai(model, solution: Solution) -> Tensor:
    """(layers · heads, S) future attention influence at the result of each step, the token before the blank line."""
    mask = torch.ones(1, len(solution.prompt_ids) + len(solution.completion_ids))
    layers = range(model.config.num_hidden_layers)
    observer = RhythmObserver(mask, [len(solution.prompt_ids)], layers, horizon=(10, None))
    fai = observe(model, solution, observer).result()[0].fai.nan_to_num()
    offset = len(solution.prompt_ids)
    return fai[:, [max(start, end - 2) - offset for start, end in solution.ranges[1:]]]


def scored(solution: Solution, scores: Tensor, positive: Tensor, negative: Tensor) -> ScoredSteps:
    lengths = torch.tensor([end - start for start, end in solution.ranges[1:]])
    return ScoredSteps(scores, positive, negative, lengths, solution.problem.text, len(lengths))


def ranking(responses: list[ScoredSteps], names: list[str], criterion: str) -> dict[str, list[float]]:
    """SRA with its interval of every row of scores, by name."""
    table = ranking_table(responses, criterion)
    if min(table.pairs_by_group) == 0:
        return {}
    lower, upper = table.interval(torch.Generator().manual_seed(0))
    return {n: [v.item(), a.item(), b.item()] for n, v, a, b in zip(names, table.mean(), lower, upper, strict=True)}


def best_on_other_half(measure, solutions: list[Solution]) -> tuple[str, list[float]]:
    """The setting that is best on the first half, and its value and interval on the second."""
    half = len(solutions) // 2
    first, second = measure(slice(0, half)), measure(slice(half, None))
    known = {name: values for name, values in first.items() if values[0] == values[0] and name in second}
    name = max(known, key=lambda name: known[name][0])
    return name, second[name]


def judge_influence(model, solutions: list[Solution]) -> dict[str, dict[str, list[float]]]:
    """Rank correlation with the descendants of a step, at equal places, of every setting."""
    found = [influences(model, solution) for solution in tqdm(solutions, desc="Influence")]
    names = found[0][0]
    truths = [solution.of("num_descendants") for solution in solutions]

    def measure(part: slice) -> dict[str, list[float]]:
        result = matched_correlation([scores for _, scores in found[part]], truths[part])
        columns = zip(names, result.values, result.lower, result.upper, strict=True)
        return {name: [value.item(), low.item(), high.item()] for name, value, low, high in columns}

    name, value = best_on_other_half(measure, solutions)
    everything = measure(slice(None))
    ordered = {f"published ({PUBLISHED})": everything[PUBLISHED], f"best: {name}": value}
    return ordered | {n: everything[n] for n in ("all heads, Δ=1", "all heads, Δ=2")}


def judge_heads(solutions: list[Solution], scores: list[Tensor], positive: str, criterion: str, heads_per_layer: int):
    """SRA of the best head (chosen on one half), and of scores that know nothing of attention."""
    responses = []
    for solution, rows in zip(solutions, scores, strict=True):
        truth, parsed = solution.of(positive) > 0, solution.parsed
        if positive == "num_users":
            parsed = parsed & (torch.arange(len(truth)) < len(truth) - 1)  # nothing can use the last result
        responses.append(scored(solution, rows, truth & parsed, ~truth & parsed))
    names = [f"head {i // heads_per_layer}.{i % heads_per_layer}" for i in range(len(scores[0]))]

    def measure(part: slice) -> dict[str, list[float]]:
        return ranking(responses[part], names, criterion)

    if not measure(slice(0, len(solutions) // 2)) or not measure(slice(len(solutions) // 2, None)):
        return {}
    name, value = best_on_other_half(measure, solutions)
    everything = measure(slice(None))
    middle = sorted(v[0] for v in everything.values())[len(everything) // 2]
    others = [r.with_scores(baseline_scores(r)) for r in responses]
    simple = ranking(others, list(BASELINES), criterion)
    means = ranking(
        [r.with_scores(r.scores.mean(0, keepdim=True)) for r in responses], ["mean of all heads"], criterion
    )
    return {f"best: {name}": value, "median head": [middle, middle, middle]} | means | simple


def judge_labels(model, solutions: list[Solution], count: int) -> dict[str, list[float]]:
    """Precision and recall of the labels made without a judge, on right solutions."""
    chosen = [solution for solution in solutions if solution.right][:count]
    hits = []  # per solution: labelled, true, both; for each label
    for solution in tqdm(chosen, desc="Labels"):
        offset = len(solution.prompt_ids)
        ranges = [(start - offset, end - offset) for start, end in solution.ranges[1:]]
        alignment = StepAlignment(ranges, ["forward"] * len(ranges), solution.texts, solution.answer_start - offset)
        candidate = Candidate(solution.problem.text, solution.problem.answer, solution.completion_ids, alignment)
        labels, _ = label_steps(model, solution.prompt_ids, candidate, batch_size=16)
        needed = solution.of("needed") > 0
        for_solution = []
        for label, truth in ((ESSENTIAL, needed), (REDUNDANT, ~needed)):
            given = torch.tensor([one == label for one in labels])
            for_solution.append([given.sum().item(), truth.sum().item(), (given & truth).sum().item()])
        hits.append(for_solution)
    if not hits:
        return {}
    table = torch.tensor(hits, dtype=torch.float64)  # (R, 2, 3)
    drawn = torch.randint(len(hits), (1000, len(hits)), generator=torch.Generator().manual_seed(0))
    sums = torch.cat([table.sum(0, keepdim=True), table[drawn].sum(1)])  # (1 + 1000, 2, 3)
    result = {}
    for place, label in enumerate((ESSENTIAL, REDUNDANT)):
        for name, divisor in (("precision", 0), ("recall", 1)):
            shares = sums[:, place, 2] / sums[:, place, divisor]
            ends = torch.nanquantile(shares[1:], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
            result[f"{label}, {name}"] = [shares[0].item(), *ends]
    share = sums[:, 0, 1] / (sums[:, 0, 1] + sums[:, 1, 1])
    return result | {"needed steps, share (precision of labelling all)": [share[0].item()] * 3}


def plot(results: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Every number with its interval, one panel a question."""
    shown = {name: rows for name, rows in results.items() if rows}
    heights = [len(rows) + 1.5 for rows in shown.values()]
    figure, axes = plt.subplots(
        len(shown), 1, figsize=(8, 0.32 * sum(heights) + 1), height_ratios=heights, squeeze=False
    )
    for axis, (title, rows) in zip(axes[:, 0], shown.items(), strict=True):
        for y, (value, low, high) in enumerate(rows.values()):
            axis.plot([low, high], [y, y], color=BLUE, linewidth=2, alpha=0.5)
            axis.plot(value, y, "o", color=BLUE, markersize=5)
        chance = 0.0 if "correlation" in title else 0.5 if "SRA" in title else None
        if chance is not None:
            axis.axvline(chance, color="grey", linestyle=":", linewidth=1)
        axis.set_yticks(range(len(rows)), list(rows), fontsize=7)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9, color=INK, loc="left")
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(args: Arguments) -> None:
    folder, tokenizer, _, _ = prepare(args) if not args.model else (args.model, None, None, None)
    tokenizer = tokenizer or PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    problems = task_of(args).problems(args.num_problems, PROBE_SEED)
    solutions = sample_solutions(args, str(folder), tokenizer, problems)
    heads = model.config.num_attention_heads
    right = [solution for solution in solutions if solution.right]
    focus = [key_focus(model, solution) for solution in tqdm(right, desc="Key focus")]
    fai = [result_fai(model, solution) for solution in tqdm(solutions, desc="FAI")]
    results = {
        "influence and descendants: rank correlation at equal places": judge_influence(model, solutions),
        "key-focus score and needed steps: SRA of pairs that stand close": judge_heads(
            right, focus, "needed", "matched", heads
        ),
        "key-focus score and needed steps: SRA of all pairs": judge_heads(right, focus, "needed", "all", heads),
        "labels without a judge": judge_labels(model, solutions, args.num_labelled),
        "FAI of results that are used and not used: SRA of pairs that stand close": judge_heads(
            solutions, fai, "num_users", "matched", heads
        ),
    }
    header = ["question", "score", "value", "95 % interval"]
    rows = [
        [question, name, f"{value:.3f}", f"{low:.3f} to {high:.3f}"]
        for question, values in results.items()
        for name, (value, low, high) in values.items()
    ]
    steps = sum(len(s.truth) for s in solutions)
    title = (
        f"{len(problems)} problems, {len(solutions)} solutions that end, {len(right)} of them right; "
        f"{steps / len(solutions):.1f} steps each, "
        f"{sum(s.of('needed').sum().item() for s in solutions) / steps:.0%} of them needed."
    )
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    (out / "signals.md").write_text(f"{title}\n\n{markdown_table(header, rows)}\n")
    (out / "signals.json").write_text(json.dumps({"title": title, "results": results}, indent=2))
    plot(results, out / "signals.png")
    print(f"{title}\n{markdown_table(header, rows)}\nTable, numbers and picture: {out}")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
