r"""Tokens per second of vLLM with seeded requests, as evaluation draws them: in groups, and with admission.

    python benchmarks/sampling_speed.py --model MODEL --data FILE.jsonl [--problems 32] [--bind auto nobind] \
        [--dtype auto bfloat16]

In groups, a call to the engine holds as many prompts as one step of it takes, and the next call waits for the longest
answer; with admission a request is taken as soon as there is room. Each setting of `VLLM_CPU_OMP_THREADS_BIND` and
each dtype is measured in a process of its own, since an engine binds its threads for good; the two ways take turns in
one engine, after a short round that warms it up.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain, product

from attn_trainers.sampling.models import tokenizer_of
from attn_trainers.sampling.problems import STEP_BY_STEP, load_problems, prompt_token_ids, request_seed
from attn_trainers.sampling.requests import GeneratedTokens, GenerationRequest, SamplingSettings
from attn_trainers.sampling.vllm import admission_of, engine_of, run_requests
from attn_trainers.tables import markdown_table


Sampler = Callable[[object, list[GenerationRequest], dict], Iterator[tuple[int, GeneratedTokens]]]


def with_admission(llm, requests: list[GenerationRequest], settings: dict) -> Iterator[tuple[int, GeneratedTokens]]:
    """All requests in one run, each taken as room comes."""
    return run_requests(llm, requests, settings, on_cpu=True)


def in_groups(llm, requests: list[GenerationRequest], settings: dict) -> Iterator[tuple[int, GeneratedTokens]]:
    """One run after the other, each of as many prompts as one step of the engine takes."""
    room = admission_of(llm, requests, on_cpu=True).prompt_tokens
    groups: list[list[int]] = [[]]
    used = 0
    for index, request in enumerate(requests):
        used += len(request.prompt_ids)
        if used > room and groups[-1]:
            groups.append([])
            used = len(request.prompt_ids)
        groups[-1].append(index)
    runs = ([requests[i] for i in group] for group in groups)
    return chain.from_iterable(
        ((group[i], sample) for i, sample in run_requests(llm, run, settings, on_cpu=True))
        for group, run in zip(groups, runs, strict=True)
    )


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens per second of each round of each way, and whether both drew the same."""
    tokenizer = tokenizer_of(args.model)
    problems = load_problems(args.data, "test").to_list()[: args.problems]
    requests = [
        GenerationRequest(
            prompt_token_ids(tokenizer, row["problem"], STEP_BY_STEP, None), args.tokens, request_seed(0, "", i, 0)
        )
        for i, row in enumerate(problems)
    ]
    length = max(len(request.prompt_ids) for request in requests) + args.tokens
    llm = engine_of(args.model, SamplingSettings(dtype=args.dtype[0]), length)
    settings = {"temperature": 0.6, "stop_token_ids": [tokenizer.eos_token_id], "detokenize": False}
    list(run_requests(llm, [GenerationRequest(requests[0].prompt_ids, 8, 0)], settings, on_cpu=True))
    ways: dict[str, Sampler] = {"groups": in_groups, "admission": with_admission}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    drawn: dict[str, list[list[int]]] = {}
    for _ in range(args.rounds):
        for name, sample in ways.items():
            llm.reset_prefix_cache()
            start = time.perf_counter()
            samples = dict(sample(llm, requests, settings))
            seconds = time.perf_counter() - start
            drawn[name] = [samples[i].token_ids for i in range(len(requests))]
            rates[name].append(sum(map(len, drawn[name])) / seconds)
            print(f"{name}: {rates[name][-1]:.0f} tokens/s, {seconds:.0f} s", file=sys.stderr, flush=True)
    same = sum(a == b for a, b in zip(drawn["groups"], drawn["admission"], strict=True)) / len(requests)
    return rates | {"same": [same]}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="JSONL of problems and answers")
    parser.add_argument("--problems", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200, help="limit of each answer")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of each way")
    parser.add_argument("--bind", nargs="+", default=["auto"], help="values of VLLM_CPU_OMP_THREADS_BIND")
    parser.add_argument("--dtype", nargs="+", default=["auto"], help="what the engine computes in, as in evaluation")
    parser.add_argument("--one", action="store_true", help="measure here, under the environment as it is")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.one:
        print(json.dumps(measure(args)))
        sys.stdout.flush()
        return
    table = []
    for bind, dtype in product(args.bind, args.dtype):
        command = [sys.executable, __file__, "--one", "--model", args.model, "--data", args.data, "--dtype", dtype]
        command += [f"--{name}={getattr(args, name)}" for name in ("problems", "tokens", "rounds")]
        # Without binding, threads are as many as this variable says; a number there is no part of the comparison.
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        environment["VLLM_CPU_OMP_THREADS_BIND"] = bind
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        # The engine's processes may print there too, also after it.
        rates = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
        means = {name: sum(values) / len(values) for name, values in rates.items()}
        ranges = {name: f"{means[name]:.0f} ({min(rates[name]):.0f}-{max(rates[name]):.0f})" for name in means}
        ratio = f"{means['admission'] / means['groups']:.2f}"
        table.append([bind, dtype, ranges["groups"], ranges["admission"], ratio, f"{means['same']:.0%}"])
    print(markdown_table(["bind", "dtype", "groups, tokens/s", "admission, tokens/s", "ratio", "same answers"], table))


if __name__ == "__main__":
    main()
