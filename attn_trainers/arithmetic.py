"""Multi-step arithmetic: a reasoning task small enough that a CPU trains on it in minutes.

A problem is a chain of one-digit additions and subtractions. Its solution is the shape of a reasoning model's answer:
a `<think>` part in paragraphs, one per operation, then `</think>` and a boxed result. A noisy teacher writes some
results wrong and goes on from the wrong value, so that a model warm-started on it knows the format and the facts and
samples both right and wrong chains: something for reinforcement learning to choose from.
"""

import hashlib
import json
import logging
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


logger = logging.getLogger(__name__)

MAX_VALUE = 199
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


def sample_problem(rng: random.Random, num_operations: int = 5) -> Problem:
    """Draw a chain from a two-digit start whose partial results never turn negative."""
    value = start = rng.randint(10, 99)
    operations = []
    for _ in range(num_operations):
        digit = rng.randint(1, 9)
        op = -digit if rng.random() < 0.5 and value >= digit else digit
        operations.append(op)
        value += op
    return Problem(start, tuple(operations))


def sample_problems(count: int, seed: int, num_operations: int = 5, exclude: set[str] = frozenset()) -> list[Problem]:
    """Draw `count` different problems, none of whose texts is in `exclude`."""
    rng = random.Random(seed)
    seen, problems = set(exclude), []
    while len(problems) < count:
        problem = sample_problem(rng, num_operations)
        if problem.text not in seen:
            seen.add(problem.text)
            problems.append(problem)
    return problems


def write_solution(problem: Problem, rng: random.Random, noise: float, recheck: float = 0.0) -> str:
    """Write a solution as the noisy teacher does.

    Args:
        problem: what to solve.
        rng: source of the noise.
        noise: probability that a written result is wrong; the chain goes on from the wrong value.
        recheck: probability that a step is followed by a redundant re-check of it (and that by another, and so on).
    """
    value, paragraphs = problem.start, []
    for op in problem.operations:
        result = value + op
        if rng.random() < noise:
            result = min(MAX_VALUE, max(0, result + rng.choice([-5, -4, -3, -2, -1, 1, 2, 3, 4, 5])))
        step = f"{value}{_operation(op)} = {result}"
        paragraphs.append(step)
        while rng.random() < recheck:
            paragraphs.append(RECHECK + step)
        value = result
    return "\n\n".join(paragraphs) + f"\n\n</think>\\boxed{{{value}}}"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Lossless word-level tokenizer in which a number, a sign and a blank line are one token each."""
    words = ["<pad>", "<eos>", "<unk>", "<think>", "</think>", "\n\n", "\n", "\\boxed{", "}", RECHECK]
    words += [" + ", " - ", " = "] + [str(n) for n in range(MAX_VALUE + 1)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    pattern = rf"\n\n|\n|</?think>|\\boxed\{{|\}}|{RECHECK}| [+=-] |\d+"
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
    """Qwen2 from scratch with heads of 32 (the smallest that vLLM's CPU attention takes), two to a key head."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=max(1, hidden_size // 64),
        max_position_embeddings=512,
        initializer_range=0.06,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def prompt_messages(problem: Problem) -> list[dict[str, str]]:
    """The problem as a TRL conversational prompt."""
    return [{"role": "user", "content": problem.text}]


@dataclass(frozen=True)
class WarmStart:
    """Settings of the supervised warm start; equal settings give the same cached model."""

    noise: float = 0.15
    recheck: float = 0.0
    num_operations: int = 5
    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 3e-3
    hidden_size: int = 128
    num_layers: int = 4
    seed: int = 0

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def _batches(settings: WarmStart, tokenizer: PreTrainedTokenizerFast, exclude: set[str]) -> Iterator[dict]:
    """Right-padded batches of prompt + solution + EOS; labels are -100 on the prompt and the padding."""
    rng = random.Random(settings.seed)
    for _ in range(settings.steps):
        rows, prompt_lengths = [], []
        while len(rows) < settings.batch_size:
            problem = sample_problem(rng, settings.num_operations)
            if problem.text in exclude:
                continue
            prompt = tokenizer.apply_chat_template(
                prompt_messages(problem), add_generation_prompt=True, tokenize=False
            )
            solution = write_solution(problem, rng, settings.noise, settings.recheck) + tokenizer.eos_token
            rows.append(tokenizer(prompt + solution)["input_ids"])
            prompt_lengths.append(len(tokenizer(prompt)["input_ids"]))
        width = max(map(len, rows))
        input_ids = torch.full((len(rows), width), tokenizer.pad_token_id)  # (B, T)
        labels = torch.full((len(rows), width), -100)  # (B, T)
        for i, (row, prompt_length) in enumerate(zip(rows, prompt_lengths, strict=True)):
            input_ids[i, : len(row)] = torch.tensor(row)
            labels[i, prompt_length : len(row)] = torch.tensor(row[prompt_length:])
        yield {
            "input_ids": input_ids,
            "attention_mask": (input_ids != tokenizer.pad_token_id).long(),
            "labels": labels,
        }


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
    torch.manual_seed(settings.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, settings.hidden_size, settings.num_layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    progress = tqdm(_batches(settings, tokenizer, exclude), total=settings.steps, desc="Warm start")
    for batch in progress:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    partial = folder.with_suffix(".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)  # a run that was cut off leaves no folder that looks finished
    return folder
