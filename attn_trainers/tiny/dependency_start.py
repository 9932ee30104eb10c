"""The supervised warm start on dependency arithmetic: problems that grow, and look-up heads to start from."""

import hashlib
import json
import logging
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from .arithmetic import fit, padded, save_finished
from .byte_model import small_config
from .dependencies import (
    DependencyProblem,
    ProblemSize,
    Teacher,
    build_dependency_tokenizer,
    sample_dependencies,
    write_dependencies,
)
from .lookups import HEAD_SIZE, ROPE_THETA, WIDTH, wire_lookups


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DependencyStart:
    """Settings of the warm start; equal settings give the same cached model.

    Attributes:
        noise, detour, recheck: of the `Teacher`.
        needed, unneeded, constants: of the largest problems, those that are trained on later.
        steps: optimizer steps.
        growth: share of the steps over which the largest problem of a batch grows to its size.
        batch_tokens: tokens of a batch, padding included.
    """

    noise: float = 0.02
    detour: float = 0.8
    recheck: float = 0.1
    needed: int = 15
    unneeded: int = 7
    constants: int = 4
    steps: int = 1600
    growth: float = 0.6
    batch_tokens: int = 4096
    learning_rate: float = 2e-3
    num_layers: int = 4
    seed: int = 0

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def size(self) -> ProblemSize:
        return ProblemSize(self.needed, self.unneeded, self.constants)

    @property
    def teacher(self) -> Teacher:
        return Teacher(self.noise, self.detour, self.recheck)


def build_dependency_model(tokenizer: PreTrainedTokenizerFast, num_layers: int = 4) -> Qwen2ForCausalLM:
    """Qwen2 from scratch, its first two layers wired to look values up (`wire_lookups`)."""
    config = small_config(
        tokenizer,
        WIDTH,
        num_layers,
        num_key_value_heads=WIDTH // HEAD_SIZE,
        intermediate_size=3 * WIDTH,
        max_position_embeddings=1024,
        initializer_range=0.02,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
    )
    model = Qwen2ForCausalLM(config)
    wire_lookups(model)
    return model


def _row(problem: DependencyProblem, solution: str, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], int]:
    prompt = problem.text + "<think>"
    ids = tokenizer([prompt, prompt + solution + tokenizer.eos_token])["input_ids"]
    return ids[1], len(ids[0])


def _batches(settings: DependencyStart, tokenizer: PreTrainedTokenizerFast, exclude: set[str]) -> Iterator[dict]:
    """Batches of problems of one size each, the size drawn up to a bound that grows; labels are those of solutions."""
    rng = random.Random(settings.seed)
    for step in range(settings.steps):
        bound = 1 + round((settings.needed - 1) * min(1.0, step / (settings.growth * settings.steps)))
        needed = max(1, round(bound * rng.random() ** 0.5))
        size = ProblemSize(needed, round(settings.unneeded * needed / settings.needed), settings.constants)
        rows: list[tuple[list[int], int]] = []
        width = 0
        while True:
            problem = sample_dependencies(rng, size)
            if problem.text in exclude:
                continue
            row = _row(problem, write_dependencies(problem, rng, settings.teacher), tokenizer)
            if len(rows) >= 2 and (len(rows) + 1) * max(width, len(row[0])) > settings.batch_tokens:
                break
            rows.append(row)
            width = max(width, len(row[0]))
        yield padded(rows, tokenizer.pad_token_id)  # no mask: padding is on the right, where no token sees it


def dependency_warm_start(settings: DependencyStart, cache_dir: str | Path, exclude: set[str] = frozenset()) -> Path:
    """Train a small model on the teacher's solutions, or find it in the cache; see `arithmetic.warm_start`."""
    folder = Path(cache_dir) / f"dependencies-{settings.key}"
    if (folder / "config.json").exists():
        logger.info("Warm-started model found in %s", folder)
        return folder
    tokenizer = build_dependency_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = build_dependency_model(tokenizer, settings.num_layers)
    fit(model, _batches(settings, tokenizer, exclude), settings.steps, settings.learning_rate)
    return save_finished(model, tokenizer, folder)
