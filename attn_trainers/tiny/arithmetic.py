"""Multi-step arithmetic: a reasoning task small enough that a CPU trains on it in minutes.

A problem is a chain of one-digit additions and subtractions. Its solution is the shape of a reasoning model's answer:
a `<think>` part in paragraphs, one per operation, then `</think>` and a boxed result. A noisy teacher writes some
results wrong and goes on from the wrong value, so that a model warm-started on it knows the format and the facts and
samples both right and wrong chains: something for reinforcement learning to choose from.
"""

import hashlib
import json
import logging
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from .byte_model import small_config


logger = logging.getLogger(__name__)

MAX_VALUE = 199
BUCKETS = 8  # batches that are drawn at once and sorted by length, so that little is padded
RECHECK = "Wait, let me check: "
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
)


@dataclass(frozen=True)
class Problem:
    """A chain `start (+|-) d (+|-) d ...`; `operations` are signed digits, partial results in [0, MAX_VALUE]."""

    start: int
    operations: tuple[int, ...]

    @property
    def text(self) -> str:
        return str(self.start) + "".join(_operation(op) for op in self.operations)

    @property
    def answer(self) -> str:
        return str(self.start + sum(self.operations))


def _operation(op: int) -> str:
    return f" + {op}" if op > 0 else f" - {-op}"


def sample_problem(rng: random.Random, num_operations: int = 5, max_start: int = 99) -> Problem:
    """Draw a chain from a start between 10 and `max_start` whose partial results never turn negative."""
    value = start = rng.randint(10, max_start)
    operations = []
    for _ in range(num_operations):
        digit = rng.randint(1, 9)
        op = -digit if rng.random() < 0.5 and value >= digit else digit
        operations.append(op)
        value += op
    return Problem(start, tuple(operations))


def sample_problems(
    count: int, seed: int, num_operations: int = 5, max_start: int = 99, exclude: set[str] = frozenset()
) -> list[Problem]:
    """Draw `count` different problems, none of whose texts is in `exclude`."""
    rng = random.Random(seed)
    seen, problems = set(exclude), []
    while len(problems) < count:
        problem = sample_problem(rng, num_operations, max_start)
        if problem.text not in seen:
            seen.add(problem.text)
            problems.append(problem)
    return problems


def write_solution(
    problem: Problem, rng: random.Random, noise: float, recheck: float = 0.0, restate: bool = False
) -> str:
    """Write a solution as the noisy teacher does.

    Args:
        problem: what to solve.
        rng: source of the noise.
        noise: probability that a written result is wrong; the chain goes on from the wrong value.
        recheck: probability that a step is followed by a redundant re-check of it, the inverse operation (and that by
            another, and so on).
        restate: whether the answer repeats the steps, without re-checks, before the boxed result.
    """
    value, paragraphs, steps = problem.start, [], []
    for op in problem.operations:
        result = value + op
        if rng.random() < noise:
            result += rng.choice([-5, -4, -3, -2, -1, 1, 2, 3, 4, 5])
        result = min(MAX_VALUE, max(0, result))  # a wrong chain, too, keeps to numbers that have a token
        steps.append(f"{value}{_operation(op)} = {result}")
        paragraphs.append(steps[-1])
        while rng.random() < recheck:
            paragraphs.append(f"{RECHECK}{result}{_operation(-op)} = {value}")
        value = result
    answer = "".join(step + "\n" for step in steps if restate) + f"\\boxed{{{value}}}"
    return "\n\n".join(paragraphs) + "\n\n</think>" + answer


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Lossless word-level tokenizer in which a number, a sign and a blank line are one token each."""
    words = ["<pad>", "<eos>", "<unk>", "<think>", "</think>", "\n\n", "\n", "\\boxed{", "}", RECHECK]
    words += [" + ", " - ", " = "] + [str(n) for n in range(MAX_VALUE + 1)]
    return word_tokenizer(words, rf"\n\n|\n|</?think>|\\boxed\{{|\}}|{RECHECK}| [+=-] |\d+")


def word_tokenizer(words: list[str], pattern: str) -> PreTrainedTokenizerFast:
    """A tokenizer of words, `<pad>`, `<eos>` and `<unk>` among them, that finds them by a pattern."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int = 128, num_layers: int = 4, tie_word_embeddings: bool = False
) -> Qwen2ForCausalLM:
    """Qwen2 from scratch with heads of 32 (the smallest that vLLM's CPU attention takes), two to a key head.

    The embeddings of numbers start as Fourier features of their values, so that near and congruent numbers are alike
    and the facts of addition need not be learnt one by one.
    """
    config = small_config(
        tokenizer,
        hidden_size,
        num_layers,
        num_key_value_heads=max(1, hidden_size // 64),
        intermediate_size=3 * hidden_size,
        max_position_embeddings=512,
        initializer_range=0.06,
        tie_word_embeddings=tie_word_embeddings,
    )
    model = Qwen2ForCausalLM(config)
    first = tokenizer.convert_tokens_to_ids("0")
    with torch.no_grad():
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            weight[first : first + MAX_VALUE + 1] = _number_features(hidden_size)
    return model


def _number_features(size: int, scale: float = 0.1) -> torch.Tensor:
    """(MAX_VALUE + 1, size): cosines and sines of the numbers at periods from 2 to twice their range."""
    periods = torch.logspace(math.log10(2), math.log10(2 * (MAX_VALUE + 1)), size // 2)
    angles = 2 * math.pi * torch.arange(MAX_VALUE + 1)[:, None] / periods  # (MAX_VALUE + 1, size / 2)
    return scale * torch.cat([angles.cos(), angles.sin()], dim=1)


def prompt_messages(problem: Problem) -> list[dict[str, str]]:
    """The problem as a TRL conversational prompt."""
    return [{"role": "user", "content": problem.text}]


@dataclass(frozen=True)
class WarmStart:
    """Settings of the supervised warm start; equal settings give the same cached model."""

    noise: float = 0.15
    recheck: float = 0.0
    restate: bool = False
    num_operations: int = 5
    max_start: int = 99
    steps: int = 1600
    batch_size: int = 32
    learning_rate: float = 3e-3
    hidden_size: int = 128
    num_layers: int = 4
    seed: int = 0

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def _solutions(settings: WarmStart, tokenizer: PreTrainedTokenizerFast, exclude: set[str]) -> Iterator[tuple]:
    """Token ids of prompt + solution + EOS, and the number of them that are the prompt's, without end."""
    rng = random.Random(settings.seed)
    while True:
        problem = sample_problem(rng, settings.num_operations, settings.max_start)
        if problem.text in exclude:
            continue
        prompt = tokenizer.apply_chat_template(prompt_messages(problem), add_generation_prompt=True, tokenize=False)
        solution = write_solution(problem, rng, settings.noise, settings.recheck, settings.restate)
        ids = tokenizer([prompt, prompt + solution + tokenizer.eos_token])["input_ids"]
        yield ids[1], len(ids[0])


def _batches(settings: WarmStart, tokenizer: PreTrainedTokenizerFast, exclude: set[str]) -> Iterator[dict]:
    """Right-padded batches of rows of like length; labels are -100 on the prompt and the padding."""
    rng = random.Random(settings.seed)
    solutions = _solutions(settings, tokenizer, exclude)
    queue: list[list[tuple]] = []
    for _ in range(settings.steps):
        if not queue:
            rows = sorted(islice(solutions, BUCKETS * settings.batch_size), key=lambda row: len(row[0]))
            queue = [rows[i : i + settings.batch_size] for i in range(0, len(rows), settings.batch_size)]
            rng.shuffle(queue)
        batch = padded(queue.pop(), tokenizer.pad_token_id)
        yield batch | {"attention_mask": (batch["input_ids"] != tokenizer.pad_token_id).long()}  # (B, T)


def padded(rows: list[tuple[list[int], int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows of token ids with the length of their prompt, padded on the right: `input_ids` and `labels`, (B, T)."""
    width = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for i, (ids, prompt_length) in enumerate(rows):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        labels[i, prompt_length : len(ids)] = torch.tensor(ids[prompt_length:])
    return {"input_ids": input_ids, "labels": labels}


def warm_start(settings: WarmStart, cache_dir: str | Path, exclude: set[str] = frozenset()) -> Path:
    """Train a small model on the noisy teacher's solutions, or find it in the cache.

    Args:
        settings: what to train; `settings.key` names the folder in the cache.
        cache_dir: folder of finished models.
        exclude: texts of problems kept out (held-out problems). They do not enter the key.

    Returns:
        Folder with the model and its tokenizer.
    """
    folder = Path(cache_dir) / f"arithmetic-{settings.key}"
    if (folder / "config.json").exists():
        logger.info("Warm-started model found in %s", folder)
        return folder
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = build_model(tokenizer, settings.hidden_size, settings.num_layers)
    fit(model, _batches(settings, tokenizer, exclude), settings.steps, settings.learning_rate)
    return save_finished(model, tokenizer, folder)


def fit(model: Qwen2ForCausalLM, batches: Iterator[dict], steps: int, learning_rate: float) -> None:
    """One AdamW step a batch, with a warm-up over a tenth of them and a decay to nothing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=steps, pct_start=0.1)
    progress = tqdm(batches, total=steps, desc="Warm start")
    for batch in progress:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def save_finished(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Save a model under a name that is there only once all of it is."""
    partial = folder.with_suffix(".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder
