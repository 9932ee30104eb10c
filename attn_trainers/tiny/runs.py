"""What the tiny recipes share: the task, the warm start, held-out accuracy, results and pictures."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerFast, ProgressCallback, Trainer, TrainerCallback

from ..base.options import require_choice
from ..jsonl import append_jsonl
from ..sampling.problems import render_prompt
from ..sampling.requests import GenerationRequest
from ..tables import markdown_table
from .arithmetic import WarmStart, prompt_messages
from .dependency_start import DependencyStart
from .tasks import ChainTask, DependencyTask, Task


TRAIN_SEED, HELD_OUT_SEED = 1, 2


@dataclass
class TinyArguments:
    """The task, the warm start and the evaluation of a tiny recipe. What is None is set by the task."""

    task: str = field(
        default="chain",
        metadata={"help": "'chain': a chain of operations, learnt in minutes; 'dependencies': steps of known worth."},
    )
    cache_dir: str = field(default="runs/cache", metadata={"help": "Where warm-started models are kept."})
    num_operations: int = field(default=5, metadata={"help": "Operations per problem of the chain task."})
    max_start: int = field(default=99, metadata={"help": "Largest number that a chain starts from."})
    noise: float | None = field(default=None, metadata={"help": "Probability that the teacher writes a wrong result."})
    recheck: float | None = field(
        default=None, metadata={"help": "Probability that a step is followed by a re-check."}
    )
    needed: int = field(default=15, metadata={"help": "Steps that a dependency problem needs."})
    unneeded: int = field(default=7, metadata={"help": "Variables that a dependency problem does not need."})
    detour: float = field(default=0.8, metadata={"help": "Probability that the teacher computes such a variable."})
    warm_start_steps: int | None = field(default=None, metadata={"help": "Optimizer steps of the warm start."})
    warm_start_batch_size: int = field(default=32, metadata={"help": "Chains per step of the warm start."})
    num_train_problems: int = field(default=4000, metadata={"help": "Problems to train on."})
    num_eval_problems: int = field(default=200, metadata={"help": "Held-out problems."})
    num_eval_samples: int = field(default=4, metadata={"help": "Samples per held-out problem."})
    max_generated_tokens: int = field(
        default=0,
        metadata={"help": "Train no generation batch more after so many sampled tokens; 0: max_steps alone ends it."},
    )
    eval_every_tokens: int = field(
        default=0, metadata={"help": "Sampled tokens between held-out evaluations during training; 0: none."}
    )


@dataclass(frozen=True)
class HeldOutResult:
    """Sampled accuracy and length on held-out problems.

    Attributes:
        accuracy: pass@1, mean over problems of the mean over samples.
        standard_error: of the accuracy, over problems.
        mean_length: completion tokens.
        mean_thinking: tokens before `</think>`; all of a completion that does not close its thinking.
        num_problems, num_samples: n.
        per_problem: accuracy of each problem.
    """

    accuracy: float
    standard_error: float
    mean_length: float
    mean_thinking: float
    num_problems: int
    num_samples: int
    per_problem: list[float]


def exact_answer_reward(completions: Sequence, answer: Sequence[str], **kwargs) -> list[float]:
    """1.0 where the completion closes its thinking and boxes the answer, else 0.0 (a TRL reward function)."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [
        float(text.count("</think>") == 1 and text.endswith(f"\\boxed{{{a}}}"))
        for text, a in zip(texts, answer, strict=True)
    ]


def task_of(args: TinyArguments, restate: bool = False) -> Task:
    """The task that the arguments name.

    Raises:
        ValueError: for an unknown task, or a size that no problem has.
    """
    require_choice("task", args.task, ("chain", "dependencies"))
    given = {"noise": args.noise, "recheck": args.recheck, "steps": args.warm_start_steps}
    given = {name: value for name, value in given.items() if value is not None}
    if args.task == "dependencies":
        given |= {"needed": args.needed, "unneeded": args.unneeded, "detour": args.detour}
        return DependencyTask(DependencyStart(**given))
    sizes = {"num_operations": args.num_operations, "max_start": args.max_start}
    return ChainTask(WarmStart(**given, **sizes, restate=restate, batch_size=args.warm_start_batch_size))


def to_dataset(problems: Sequence) -> Dataset:
    """Problems as a TRL data set with conversational prompts and an `answer` column."""
    return Dataset.from_list([{"prompt": prompt_messages(p), "answer": p.answer} for p in problems])


def prepare(args: TinyArguments, restate: bool = False) -> tuple[Path, PreTrainedTokenizerFast, list, list]:
    """The warm-started model's folder, its tokenizer, training problems and held-out problems.

    The warm start runs on one rank, the others wait.
    """
    task = task_of(args, restate)
    held_out = task.problems(args.num_eval_problems, HELD_OUT_SEED)
    texts = {problem.text for problem in held_out}
    training = task.problems(args.num_train_problems, TRAIN_SEED, exclude=texts)
    with PartialState().main_process_first():
        folder = task.warm_start(args.cache_dir, texts)
    return folder, PreTrainedTokenizerFast.from_pretrained(folder), training, held_out


def evaluate_held_out(trainer, problems: Sequence, num_samples: int, seed: int = 0) -> HeldOutResult:
    """Sample held-out problems with the trainer's own generation, shared by the ranks.

    Args:
        trainer: a trainer with `generate_requests`.
        problems: held-out problems.
        num_samples: samples per problem.
        seed: of the samples.
    """
    tokenizer = trainer.processing_class
    rank, num_ranks = trainer.accelerator.process_index, trainer.accelerator.num_processes
    own = list(enumerate(problems))[rank::num_ranks]
    requests = []
    for index, problem in own:
        text = render_prompt(tokenizer, prompt_messages(problem), trainer.args.chat_template_kwargs)
        ids = tokenizer(text)["input_ids"]
        seeds = [(seed * 1_000_003 + index) * 1_009 + sample for sample in range(num_samples)]
        requests += [GenerationRequest(ids, trainer.max_completion_length, s) for s in seeds]
    sampled = trainer.generate_requests(requests)
    texts = tokenizer.batch_decode([s.token_ids for s in sampled], skip_special_tokens=True)
    answers = [problem.answer for _, problem in own for _ in range(num_samples)]
    rewards = torch.tensor(exact_answer_reward(texts, answers)).view(-1, num_samples)
    end = tokenizer.convert_tokens_to_ids("</think>")
    lengths = [  # (samples, 2): completion, thinking
        (len(s.token_ids), s.token_ids.index(end) if end in s.token_ids else len(s.token_ids)) for s in sampled
    ]
    local = [(index, row.mean().item()) for (index, _), row in zip(own, rewards, strict=True)]
    per_problem = torch.tensor([accuracy for _, accuracy in sorted(gather_object(local))])
    mean_length, mean_thinking = torch.tensor(gather_object(lengths), dtype=torch.float32).mean(dim=0).tolist()
    error = (per_problem.std() / len(per_problem) ** 0.5).item()
    return HeldOutResult(
        accuracy=per_problem.mean().item(),
        standard_error=error,
        mean_length=mean_length,
        mean_thinking=mean_thinking,
        num_problems=len(problems),
        num_samples=num_samples,
        per_problem=per_problem.tolist(),
    )


class HeldOutCurve(TrainerCallback):
    """Held-out accuracy over the tokens that training sampled, and the end of the run at a budget of them.

    Each point is a line of a file at once, so that others can follow the run. Points and the end fall between
    generation batches: the budget is exceeded by less than the tokens of one. Evaluation draws by seeds of its own.

    Args:
        trainer: a trainer with `generated_tokens`; the callback adds itself to it.
        args: how often, how many samples, which budget.
        problems: held-out problems.
        path: file of the points, begun anew.
    """

    def __init__(self, trainer, args: TinyArguments, problems: Sequence, path: str | Path):
        self.trainer, self.args, self.problems, self.path = trainer, args, problems, Path(path)
        self.evaluation_seconds = 0.0
        self._start = time.perf_counter()
        if trainer.accelerator.is_main_process:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")
        trainer.add_callback(self)

    def measure(self) -> HeldOutResult:
        """Evaluate, and write the point: counts, seconds without evaluation, accuracy and lengths."""
        start = time.perf_counter()
        result = evaluate_held_out(self.trainer, self.problems, self.args.num_eval_samples)
        now = time.perf_counter()
        self.evaluation_seconds += now - start
        point = {
            "generated_tokens": self.trainer.generated_tokens,
            "updates": self.trainer.state.global_step,
            "seconds": round(now - self._start - self.evaluation_seconds, 1),
            "accuracy": round(result.accuracy, 5),
            "standard_error": round(result.standard_error, 5),
            "mean_length": round(result.mean_length, 2),
            "mean_thinking": round(result.mean_thinking, 2),
        }
        if self.trainer.accelerator.is_main_process:
            append_jsonl(self.path, point)
        return result

    def on_train_begin(self, args, state, control, **kwargs):
        self._next = self.args.eval_every_tokens

    def on_step_end(self, args, state, control, **kwargs):
        if not self.trainer.is_between_generations():
            return
        tokens, every = self.trainer.generated_tokens, self.args.eval_every_tokens
        if 0 < self.args.max_generated_tokens <= tokens:
            control.should_training_stop = True
        elif every and tokens >= self._next and state.global_step < state.max_steps:
            self.measure()
            self._next = (tokens // every + 1) * every


class MetricsInBar(ProgressCallback):
    """The progress bar with a few metrics behind it, in place of a line of all metrics at every log."""

    def __init__(self, metrics: dict[str, str]):
        super().__init__()
        self.metrics = metrics  # name to label

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {label: f"{logs[name]:.3g}" for name, label in self.metrics.items() if logs.get(name) is not None}
        if self.training_bar is not None and shown:
            self.training_bar.set_postfix(shown)


def show_in_bar(trainer: Trainer, metrics: dict[str, str]) -> None:
    """Show these metrics (name to label) behind the progress bar and no others; all stay in the trainer's log."""
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(MetricsInBar(metrics))


class Stopwatch:
    """Seconds of the named parts of a run."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def show_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table."""
    table = Table(title=title)
    for column in header:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)


def write_results(folder: str | Path, title: str, header: Sequence[str], rows: Sequence, details: dict) -> None:
    """Write the table as `results.md` and everything measured as `results.json`."""
    folder = Path(folder)
    (folder / "results.md").write_text(f"# {title}\n\n{markdown_table(header, rows)}\n")
    (folder / "results.json").write_text(json.dumps(details, indent=2))
