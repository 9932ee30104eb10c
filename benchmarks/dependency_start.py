"""What the warm start on dependency arithmetic has learnt, look-ups apart from arithmetic.

    python benchmarks/dependency_start.py                             # the recipes' warm start, cached
    python benchmarks/dependency_start.py --needed 8 --steps 300      # a smaller one

Teacher-forced on solutions without errors: share of tokens that the model finds most likely among those of its kind.
A look-up counts by its distance, in tokens, from the nearest place that tells the value. Then sampled solutions.
"""

import random
import time
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, HfArgumentParser, PreTrainedTokenizerFast

from attn_trainers.sampling.requests import GenerationRequest, SamplingSettings
from attn_trainers.sampling.transformers import sample_with_transformers
from attn_trainers.tables import markdown_table
from attn_trainers.tiny.dependencies import Teacher, sample_distinct, write_dependencies
from attn_trainers.tiny.dependency_start import DependencyStart, dependency_warm_start
from attn_trainers.tiny.runs import exact_answer_reward
from attn_trainers.tiny.truth import read_truth


# The tokens of a step ` c a4 + b9 = c3` and a blank line.
KINDS = (
    "variable",
    "first operand",
    "look-up",
    "sign",
    "second operand",
    "look-up",
    "=",
    "variable again",
    "result",
    "end",
)
DISTANCES = (20, 50, 100, 200, 1000)


@dataclass
class Arguments:
    """The warm start, and how much is measured."""

    noise: float = 0.02
    needed: int = 15
    unneeded: int = 7
    steps: int = DependencyStart.steps
    batch_tokens: int = DependencyStart.batch_tokens
    learning_rate: float = DependencyStart.learning_rate
    cache_dir: str = "runs/cache"
    num_problems: int = field(default=50, metadata={"help": "Problems read, and problems solved."})


def forced(model, tokenizer, problems: list, rng: random.Random) -> dict[str, list[bool]]:
    """By kind of token, whether the model finds each most likely."""
    found = defaultdict(list)
    for problem in problems:
        prompt = problem.text + "<think>"
        text = prompt + write_dependencies(problem, rng, Teacher(noise=0.0, recheck=0.0))
        first, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(text)["input_ids"]
        with torch.no_grad():
            guesses = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        for place in range(first, ids.index(tokenizer.convert_tokens_to_ids("</think>"))):
            kind, right = KINDS[(place - first) % len(KINDS)], guesses[place - 1] == ids[place]
            found[kind].append(right)
            if kind == "look-up":
                told = max(p for p in range(1, place - 1) if ids[p - 1 : p + 1] == ids[place - 1 : place + 1])
                bound = next(bound for bound in DISTANCES if place - told < bound)
                found[f"look-up nearer than {bound}"].append(right)
    return found


def sampled(folder: str, tokenizer, problems: list) -> dict[str, float]:
    """What sampled solutions are like."""
    prompts = [tokenizer(problem.text + "<think>")["input_ids"] for problem in problems]
    requests = [GenerationRequest(ids, 352, seed=i) for i, ids in enumerate(prompts)]
    rewards, tokens, truths = [], [], []
    for index, sample in sample_with_transformers(folder, SamplingSettings(batch_size=50), tokenizer, requests):
        text = tokenizer.decode(sample.token_ids, skip_special_tokens=True)
        rewards += exact_answer_reward([text], [problems[index].answer])
        tokens.append(len(sample.token_ids))
        truths.append(read_truth(problems[index], text.split("</think>")[0].removesuffix("\n\n").split("\n\n")))
    steps = [truth for solution in truths for truth in solution]
    return {
        "sampled: right": sum(rewards) / len(rewards),
        "sampled: tokens": sum(tokens) / len(tokens),
        "sampled: steps": len(steps) / len(truths),
        "sampled: steps that are needed": sum(truth.needed for truth in steps) / len(steps),
        "sampled: steps that are right": sum(truth.right for truth in steps) / len(steps),
    }


def main(args: Arguments) -> None:
    settings = DependencyStart(
        noise=args.noise,
        needed=args.needed,
        unneeded=args.unneeded,
        steps=args.steps,
        batch_tokens=args.batch_tokens,
        learning_rate=args.learning_rate,
    )
    start, busy = time.perf_counter(), time.process_time()
    folder = dependency_warm_start(settings, args.cache_dir)
    print(f"{time.perf_counter() - start:.0f} s, {time.process_time() - busy:.0f} s of processor time: {folder}")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    problems = sample_distinct(args.num_problems, 4, settings.size)
    found = forced(model, tokenizer, problems, random.Random(0))
    rows = [[kind, f"{sum(right) / len(right):.3f}", len(right)] for kind, right in sorted(found.items())]
    rows += [
        [name, f"{value:.3f}", len(problems)] for name, value in sampled(str(folder), tokenizer, problems).items()
    ]
    print(markdown_table(["token", "share or mean", "n"], rows))


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
