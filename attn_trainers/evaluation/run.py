r"""Evaluation of a model on benchmark files: prompts, sampling by vLLM or transformers, grading, resume, report.

Each completion has a seed of its own, derived from the run's seed, the problem and the sample: a run that was cut off
draws what is missing and ends as an uninterrupted one would, up to how a backend's floats depend on the other rows of
a batch.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from statistics import fmean

from huggingface_hub import snapshot_download
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..jsonl import append_jsonl, drop_torn_line, read_jsonl
from ..rewards import math_accuracy_reward
from ..rewards.pool import showing_grading
from ..sampling.backends import BACKENDS, resolve_backend, sample_completions
from ..sampling.models import end_token_ids, load_config, num_positions, tokenizer_of
from ..sampling.problems import (
    STEP_BY_STEP,
    is_file,
    load_problems,
    parse_template_kwargs,
    prompt_token_ids,
    request_seed,
)
from ..sampling.requests import (
    GeneratedTokens,
    GenerationRequest,
    SamplingSettings,
    fit_positions,
)
from ..thinking import EndOfThinking
from .statistics import (
    Comparison,
    CompletionRecord,
    Summary,
    accuracy_per_problem,
    by_problem,
    default_num_samples,
    paired_bootstrap,
    summarize,
    summary_table,
)


_GRADED_TOGETHER = 64  # completions that wait for grading; as many are drawn again after a crash
_SETTINGS_FILE = "settings.json"
MAX_COMPLETION_LENGTH = 32768

logger = logging.getLogger(__name__)


@dataclass
class EvaluationArguments:
    """What to evaluate, and how."""

    model: str | None = field(default=None, metadata={"help": "Local folder or Hub id of a model or a LoRA adapter."})
    revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a Hub model; by default its main branch."}
    )
    data: list[str] = field(
        default_factory=list,
        metadata={"help": "Files (JSONL, JSON, Parquet, CSV) or Hub data sets (id or id:split; else split test)."},
    )
    output_dir: str = field(default="runs/evaluation", metadata={"help": "Folder of completions and report."})
    compare: list[str] = field(
        default_factory=list, metadata={"help": "Compare two finished output folders instead of evaluating."}
    )
    num_samples: int | None = field(
        default=None,
        metadata={"help": "Completions per problem; by default 32 for aime24, aime25 and amc23, 4 for the others."},
    )
    pass_at: list[int] | None = field(
        default=None, metadata={"help": "Values of k for pass@k; by default powers of two up to num_samples."}
    )
    backend: str = field(
        default="auto",
        metadata={
            "help": "vllm, transformers, or auto (vllm where it is installed).",
            "choices": list(BACKENDS),
        },
    )
    temperature: float = field(default=0.6, metadata={"help": "Sampling temperature; 0 decodes greedily."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling threshold."})
    max_completion_length: int | None = field(
        default=None,
        metadata={
            "help": "Token limit of a completion; by default 32768, or what the prompt leaves of the positions."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of sampling and bootstrap."})
    prompt_template: str = field(
        default=STEP_BY_STEP, metadata={"help": "User message; {problem} stands for the problem."}
    )
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Arguments of the chat template as JSON, e.g. '{\"enable_thinking\": false}'."}
    )
    end_of_thinking: str = field(default="</think>", metadata={"help": "Text that ends the thinking part."})
    problem_column: str = field(
        default="problem", metadata={"help": "Column of the problem texts, also within another (prompt.0.content)."}
    )
    answer_column: str = field(default="answer", metadata={"help": "Column of the answers, also within another."})
    dtype: str = field(default="auto", metadata={"help": "auto (as saved), float32, bfloat16 or float16."})
    batch_size: int = field(default=16, metadata={"help": "Completions per batch (transformers only)."})
    gpu_memory_utilization: float = field(default=0.9, metadata={"help": "Share of GPU memory that vLLM takes."})
    tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that vLLM spreads the model over."})

    def __post_init__(self):
        self.chat_template_kwargs = parse_template_kwargs(self.chat_template_kwargs)
        if self.compare:
            if len(self.compare) != 2:
                raise ValueError(f"compare={self.compare} names {len(self.compare)} folders; give two.")
            return
        if not self.model or not self.data:
            raise ValueError(f"model={self.model!r}, data={self.data}: set both, or compare two output folders.")
        if self.revision is not None and Path(self.model).is_dir():
            raise ValueError(f"revision={self.revision!r} is set, but {self.model} is a local folder; remove it.")
        names = [data_name(source) for source in self.data]
        if len(set(names)) < len(names):
            raise ValueError(f"data={self.data} has two sources of one name; rename a file.")
        if "{problem}" not in self.prompt_template:
            raise ValueError(f"prompt_template={self.prompt_template!r} has no {{problem}}; add it for the problem.")
        for name in ("max_completion_length", "batch_size", "num_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1; raise it.")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} is negative; use 0 for greedy decoding.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is outside (0, 1]; use 1.0 to keep all tokens.")
        for source in self.data:
            for k in self.pass_at or []:
                if not 1 <= k <= self.samples_of(source):
                    raise ValueError(
                        f"pass_at={k} is outside 1..{self.samples_of(source)}, the samples per problem of "
                        f"{data_name(source)}; raise num_samples or lower pass_at."
                    )

    @property
    def token_limit(self) -> int:
        return MAX_COMPLETION_LENGTH if self.max_completion_length is None else self.max_completion_length

    @property
    def sampling(self) -> SamplingSettings:
        return SamplingSettings(**{f.name: getattr(self, f.name) for f in fields(SamplingSettings)})

    def samples_of(self, source: str) -> int:
        return self.num_samples if self.num_samples is not None else default_num_samples(data_name(source))


def data_name(source: str) -> str:
    """Name of a data source in file names and tables: the file's stem, or the Hub id's last part without the split."""
    return Path(source if is_file(source) else source.split(":")[0]).stem


# Files and resume ------------------------------------------------------------------------------------


def read_records(path: Path) -> tuple[list[CompletionRecord], int]:
    """Records of a JSONL file, and how many unfinished last lines (0 or 1) were dropped.

    A line that a crash cut off is also removed from the file, so that the next one starts on a line of its own.

    Raises:
        ValueError: if another line than the last cannot be read.
    """
    dropped = int(drop_torn_line(path))
    records = []
    for number, record in enumerate(read_jsonl(path, repair=True), start=1):
        try:
            records.append(CompletionRecord(**record))
        except TypeError as error:
            raise ValueError(f"{path}, line {number} is no completion ({error}); remove the line.") from error
    return records, dropped


def weights_digest(model: str) -> str | None:
    """Digest of a local model's weight files (sizes, first and last MiB); `None` for a Hub id."""
    if not Path(model).is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(model).iterdir() if p.suffix in (".safetensors", ".bin")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()


def check_settings(output: Path, settings: dict) -> None:
    """Write the settings of a new run, or refuse to go on with one of other settings.

    Raises:
        ValueError: naming each setting that differs.
    """
    path = output / _SETTINGS_FILE
    if path.exists():
        earlier = json.loads(path.read_text())
        data = earlier["data"] | settings["data"]
        changed = [key for key in settings if key != "data" and settings[key] != earlier.get(key)]
        changed += [f"data {name}" for name in settings["data"] if data[name] != earlier["data"].get(name, data[name])]
        if changed:
            raise ValueError(
                f"output_dir={str(output)!r} holds a run with other settings ({', '.join(changed)}); choose another "
                f"folder, or the settings in its {_SETTINGS_FILE}."
            )
        settings = settings | {"data": data}
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n")


def run_settings(args: EvaluationArguments, problems: dict[str, list[dict]]) -> dict:
    """All that a completion depends on; the number of samples is not among it, so a run can be extended."""
    names = ("model", "revision", "temperature", "top_p", "seed", "prompt_template", "dtype", "end_of_thinking")
    digests = {
        name: hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest() for name, rows in problems.items()
    }
    return {name: getattr(args, name) for name in names} | {
        "max_completion_length": args.token_limit,
        "chat_template_kwargs": args.chat_template_kwargs,
        "backend": resolve_backend(args.backend),
        "weights": weights_digest(args.model),
        "data": digests,
    }


# The run ---------------------------------------------------------------------------------------------


def load_sources(args: EvaluationArguments) -> dict[str, list[dict]]:
    """Problems of each data source by its name."""
    problems = {}
    for source in args.data:
        path, split = source, "test"
        if ":" in source and not is_file(source):
            path, split = source.split(":", maxsplit=1)
        problems[data_name(source)] = load_problems(path, split, args.problem_column, args.answer_column).to_list()
    return problems


@dataclass(frozen=True)
class Draw:
    """A completion to draw: of which data set, problem and sample it is, and the request for it."""

    name: str
    problem: int
    sample: int
    request: GenerationRequest


def plan_draws(
    args: EvaluationArguments,
    tokenizer: PreTrainedTokenizerBase,
    problems: dict[str, list[dict]],
    positions: int | None,
) -> tuple[list[Draw], str]:
    """Every completion of the evaluation, and a line on those that the model's positions cut short ("" for none).

    Args:
        args: of the evaluation.
        tokenizer: of the model.
        problems: by the name of their data set.
        positions: of the model, `None` without a limit.

    Raises:
        ValueError: if `max_completion_length` was set to more than the positions leave.
    """
    places, requests = [], []
    for source in args.data:
        name = data_name(source)
        for problem, row in enumerate(problems[name]):
            ids = prompt_token_ids(tokenizer, row["problem"], args.prompt_template, args.chat_template_kwargs)
            for sample in range(args.samples_of(source)):
                places.append((name, problem, sample))
                seed = request_seed(args.seed, name, problem, sample)
                requests.append(GenerationRequest(ids, args.token_limit, seed))
    fitting, num_cut = fit_positions(requests, positions)
    note = ""
    if num_cut:
        least = min(request.max_tokens for request in fitting)
        if args.max_completion_length is not None:
            raise ValueError(
                f"max_completion_length={args.max_completion_length} and a prompt of {positions - least} tokens "
                f"exceed the {positions} positions of the model; set max_completion_length to at most {least}, or "
                "leave it out to use what each prompt leaves."
            )
        note = (
            f"{num_cut} of {len(fitting)} completions are limited by the {positions} positions of the model: to "
            f"{least} new tokens or more instead of {args.token_limit}."
        )
    return [Draw(*place, request) for place, request in zip(places, fitting, strict=True)], note


def evaluate(args: EvaluationArguments) -> list[Summary]:
    """Draw and grade what is missing, then write `report.md`, `report.json` and `report.png` into the output folder.

    Raises:
        ValueError: for unusable settings or an output folder of a run with other settings.
    """
    output = Path(args.output_dir)
    problems = load_sources(args)
    settings = run_settings(args, problems)
    if args.revision is not None:
        args = replace(args, model=snapshot_download(args.model, revision=args.revision), revision=None)
    positions = num_positions(load_config(args.model))
    tokenizer = tokenizer_of(args.model)
    draws, note = plan_draws(args, tokenizer, problems, positions)
    check_settings(output, settings)
    if note:
        logger.warning(note)
    done: set[tuple[str, int, int]] = set()
    for name in problems:
        records, dropped = read_records(output / f"{name}.jsonl")
        if records or dropped:
            logger.info("%s: %d completions exist, %d unfinished lines dropped.", name, len(records), dropped)
        done |= {(name, r.problem, r.sample) for r in records}
    draw_and_grade(args, tokenizer, problems, [d for d in draws if (d.name, d.problem, d.sample) not in done])
    summaries = []
    for source in args.data:
        records, _ = read_records(output / f"{data_name(source)}.jsonl")
        wanted = [r for r in records if r.sample < args.samples_of(source)]
        summaries.append(summarize(data_name(source), wanted, args.pass_at, args.seed))
    write_report(output, summaries, note)
    return summaries


def draw_and_grade(
    args: EvaluationArguments,
    tokenizer: PreTrainedTokenizerBase,
    problems: dict[str, list[dict]],
    draws: Sequence[Draw],
) -> None:
    """Sample completions and append them, graded, to the JSONL files."""
    if not draws:
        return
    ends, thinking = end_token_ids(args.model, tokenizer), EndOfThinking(tokenizer, args.end_of_thinking)
    requests = [draw.request for draw in draws]
    waiting: list[tuple[Draw, GeneratedTokens]] = []
    grading = partial(tqdm, desc="Grading", leave=False, disable=None)
    with tqdm(total=len(draws), desc="Completions", unit="completion") as progress, showing_grading(grading):
        for index, sampled in sample_completions(args.backend, args.model, args.sampling, tokenizer, requests):
            waiting.append((draws[index], sampled))
            progress.update()
            if len(waiting) == _GRADED_TOGETHER:
                _grade_and_append(Path(args.output_dir), thinking, ends, problems, waiting)
                waiting = []
        _grade_and_append(Path(args.output_dir), thinking, ends, problems, waiting)


def _grade_and_append(
    output: Path, thinking: EndOfThinking, ends, problems, drawn: Sequence[tuple[Draw, GeneratedTokens]]
) -> None:
    texts = [thinking.text(sampled.token_ids) for _, sampled in drawn]
    answers = [problems[draw.name][draw.problem]["answer"] for draw, _ in drawn]
    rewards = math_accuracy_reward(texts, answers, end_of_thinking=thinking.tags.end)
    for (draw, sampled), text, answer, correct in zip(drawn, texts, answers, rewards, strict=True):
        ids = sampled.token_ids
        stopped = bool(ids) and ids[-1] in ends
        record = CompletionRecord(
            problem=draw.problem,
            sample=draw.sample,
            completion=text,
            answer=answer,
            correct=correct,
            num_tokens=len(ids),
            num_thinking_tokens=thinking.count_tokens(draw.request.prompt_ids, ids),
            truncated=not stopped,
            finish="stop" if stopped else "length",
        )
        append_jsonl(output / f"{draw.name}.jsonl", asdict(record))


def write_report(output: Path, summaries: Sequence[Summary], note: str) -> None:
    """`report.md` (the table, and the note below it), `report.json` and `report.png`."""
    (output / "report.md").write_text(summary_table(summaries) + (f"\n{note}\n" if note else ""))
    (output / "report.json").write_text(json.dumps([asdict(s) for s in summaries], indent=2) + "\n")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [s.name for s in summaries]
    panels = {"pass@1 (%)": (100, [s.pass_at[1] for s in summaries])}
    panels["tokens per completion"] = (1, [s.mean_tokens for s in summaries])
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels) + len(names), 4), layout="constrained")
    for axis, (label, (scale, estimates)) in zip(axes, panels.items(), strict=True):
        errors = [scale * e.standard_error for e in estimates]
        axis.bar(names, [scale * e.value for e in estimates], yerr=errors, capsize=4, color="tab:blue")
        axis.set_ylabel(label)
    figure.savefig(output / "report.png", dpi=150)
    plt.close(figure)


def compare_runs(first: str | Path, second: str | Path) -> dict[str, dict[str, Comparison]]:
    """Paired comparison of pass@1 and length on each data set that both runs have.

    Raises:
        ValueError: if a folder holds no run, the runs share no data set, or a shared one has other problems.
    """
    settings = []
    for folder in (first, second):
        path = Path(folder) / _SETTINGS_FILE
        if not path.exists():
            raise ValueError(f"compare: {str(folder)!r} holds no evaluation; give the output folder of one.")
        settings.append(json.loads(path.read_text()))
    shared = [name for name in settings[0]["data"] if name in settings[1]["data"]]
    if not shared:
        raise ValueError(f"compare: {str(first)!r} and {str(second)!r} share no data set; evaluate both on one.")
    comparisons = {}
    for name in shared:
        if settings[0]["data"][name] != settings[1]["data"][name]:
            raise ValueError(f"compare: {name} has other problems or answers in the second run; use one file.")
        pair = [read_records(Path(folder) / f"{name}.jsonl")[0] for folder in (first, second)]
        lengths = [[fmean(r.num_tokens for r in group) for group in by_problem(records)] for records in pair]
        comparisons[name] = {
            "pass@1 %": paired_bootstrap(*(accuracy_per_problem(records) for records in pair)),
            "tokens": paired_bootstrap(*lengths),
        }
    return comparisons
