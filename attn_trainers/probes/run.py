"""A probe from problems to tables: rollouts, what is read in them, branch points, continuations, on demand corrupted
steps.

What takes long is written to the output folder as it goes: a run that was cut off takes from `rollouts.jsonl`,
`signals.jsonl`, `continuations.jsonl` and `disruptions.jsonl` what it had, as far as the model and the settings are
the same. Continuations are the criteria's common property: where two branch a rollout at one token, they share them.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..attnrl.branching_report import report_branching
from ..attnrl.exploration import BranchPoints
from ..attnrl.steps import StepDelimiters
from ..evaluation.run import weights_digest
from ..jsonl import digest_of, resumed
from ..rewards import math_accuracy_reward
from ..sampling.models import load_config, load_model, num_positions, tokenizer_of
from ..sampling.problems import load_problems, prompt_token_ids, request_seed
from ..sampling.requests import GenerationRequest, fit_positions
from ..sampling.session import SamplingSession
from ..thinking import EndOfThinking
from .arguments import BranchingArguments
from .disruption import Disruption, StepKind, choose_steps, corrupt_numbers
from .measure import RolloutSignals, points_of, read_rollout
from .report import write_report
from .statistics import Tree


@dataclass(frozen=True)
class Rollout:
    """An initial rollout: of which problem and the how many-th it is, and its tokens."""

    problem: int
    sample: int
    prompt_ids: list[int]
    completion_ids: list[int]


class Probe:
    """One probe: its problems, its files and what draws and grades its completions.

    Args:
        args: of the probe.

    Raises:
        ValueError: for problems or a model that cannot be used.
    """

    def __init__(self, args: BranchingArguments):
        self.args, self.folder = args, Path(args.output_dir)
        columns = (args.problem_column, args.answer_column)
        self.problems = load_problems(args.data, args.dataset_split, *columns).to_list()[: args.num_problems]
        self.tokenizer = tokenizer_of(args.model)
        self.thinking = EndOfThinking(self.tokenizer, args.end_of_thinking)
        self.positions = num_positions(load_config(args.model))
        self.prompts = [self._prompt(row["problem"]) for row in self.problems]
        self.model_facts = [weights_digest(args.model) or args.model, args.sampling_facts]
        longest = max(map(len, self.prompts)) + args.max_completion_length
        # Corrupted numbers may take more tokens than the right ones.
        longest += 64 * args.disrupt
        longest = longest if self.positions is None else min(longest, self.positions)
        self.session = SamplingSession(args.backend, args.model, args.sampling, self.tokenizer, longest)
        self.folder.mkdir(parents=True, exist_ok=True)

    def _prompt(self, problem: str) -> list[int]:
        return prompt_token_ids(self.tokenizer, problem, self.args.prompt_template, self.args.chat_template_kwargs)

    def seed(self, name: str, problem: int, sample: int) -> int:
        return request_seed(self.args.seed, name, problem, sample)

    # Sampling and reading ----------------------------------------------------------------------------

    def sampled(self, file: str, label: str, requests: Sequence[GenerationRequest]) -> list[list[int]]:
        """Sampled tokens of each request, from the file where it has them."""
        requests, _ = fit_positions(requests, self.positions)
        keys = [digest_of(self.model_facts, asdict(request)) for request in requests]

        def compute(missing: list[int]) -> Iterator[tuple[int, dict]]:
            drawn = self.session.sample([requests[i] for i in missing])
            for place, sample in tqdm(drawn, total=len(missing), desc=label, unit="completion"):
                ids = sample.token_ids
                yield missing[place], {"token_ids": ids, "text": self.tokenizer.decode(ids)}

        return [record["token_ids"] for record in resumed(self.folder / file, keys, compute)]

    def rollouts(self) -> list[Rollout]:
        """The initial rollouts of all problems; an empty one is left out."""
        args = self.args
        places = [(p, g) for p in range(len(self.problems)) for g in range(args.num_rollouts)]
        requests = [
            GenerationRequest(self.prompts[p], args.max_completion_length, self.seed("rollouts", p, g))
            for p, g in places
        ]
        drawn = self.sampled("rollouts.jsonl", "Rollouts", requests)
        return [Rollout(p, g, self.prompts[p], ids) for (p, g), ids in zip(places, drawn, strict=True) if ids]

    def signals(self, rollouts: Sequence[Rollout]) -> list[RolloutSignals]:
        """What one forward over each rollout tells."""
        args = self.args
        facts = [args.step_mode, args.end_of_thinking, args.influence_delta, args.influence_aggregation]
        keys = [digest_of(self.model_facts, facts, r.prompt_ids, r.completion_ids) for r in rollouts]

        def compute(missing: list[int]) -> Iterator[tuple[int, dict]]:
            model = load_model(args.model, args.dtype).to("cuda" if torch.cuda.is_available() else "cpu")
            delimiters = StepDelimiters.from_tokenizer(self.tokenizer, args.end_of_thinking, args.step_mode)
            for i in tqdm(missing, desc="Read", unit="rollout"):
                signals = read_rollout(
                    model,
                    rollouts[i].prompt_ids,
                    rollouts[i].completion_ids,
                    delimiters,
                    delta=args.influence_delta,
                    aggregation=args.influence_aggregation,
                    temperature=args.temperature,
                )
                yield i, asdict(signals)

        stored = resumed(self.folder / "signals.jsonl", keys, compute)
        return [
            RolloutSignals([tuple(r) for r in one["step_ranges"]], one["influence"], one["entropies"])
            for one in stored
        ]

    def grade(self, problems: Sequence[int], completions: Sequence[Sequence[int]]) -> list[float]:
        """1.0 or 0.0 of each completion."""
        texts = [self.thinking.text(ids) for ids in completions]
        answers = [self.problems[p]["answer"] for p in problems]
        return math_accuracy_reward(texts, answers, end_of_thinking=self.args.end_of_thinking)

    # Branching ---------------------------------------------------------------------------------------

    def points(self, criterion: str, rollouts: Sequence[Rollout], signals: Sequence[RolloutSignals]):
        """Branch points of each rollout by a criterion."""
        args = self.args
        return [
            points_of(
                criterion,
                one,
                num_points=args.num_branch_points,
                top_fraction=args.branch_top_fraction,
                min_spacing=args.min_branch_spacing,
                seed=self.seed("points", rollout.problem, rollout.sample),
            )
            for rollout, one in zip(rollouts, signals, strict=True)
        ]

    def trees(
        self, rollouts: Sequence[Rollout], signals: Sequence[RolloutSignals], correct: Sequence[float]
    ) -> dict[str, list[Tree]]:
        """The trees of each criterion, one per rollout."""
        points = {name: self.points(name, rollouts, signals) for name in self.args.criteria}
        slots = {name: [self._slots(p.offsets) for p in chosen] for name, chosen in points.items()}
        wanted = sorted({(i, *slot) for chosen in slots.values() for i, rows in enumerate(chosen) for slot in rows})
        requests = [self._continuation(rollouts[i], offset, copy) for i, offset, copy in wanted]
        drawn = self.sampled("continuations.jsonl", "Continuations", requests)
        wholes = [rollouts[i].completion_ids[:offset] + ids for (i, offset, _), ids in zip(wanted, drawn, strict=True)]
        rewards = self.grade([rollouts[i].problem for i, *_ in wanted], wholes)
        outcomes = {slot: (reward, len(ids)) for slot, reward, ids in zip(wanted, rewards, drawn, strict=True)}
        first = self.points("first_steps", rollouts, signals)
        trees = {}
        for name, chosen in points.items():
            trees[name] = [
                self._tree(rollout, correct[i], chosen[i], first[i], [outcomes[(i, *s)] for s in slots[name][i]])
                for i, rollout in enumerate(rollouts)
            ]
        return trees

    def _slots(self, offsets: Sequence[int]) -> list[tuple[int, int]]:
        """(offset, copy) of each continuation; an offset that is listed twice has twice as many copies."""
        copies = self.args.rollouts_per_branch
        return [(o, copy) for o, times in Counter(offsets).items() for copy in range(times * copies)]

    def _continuation(self, rollout: Rollout, offset: int, copy: int) -> GenerationRequest:
        return GenerationRequest(
            rollout.prompt_ids + rollout.completion_ids[:offset],
            self.args.max_completion_length - offset,
            self.seed(f"continuations of {rollout.sample} at {offset}", rollout.problem, copy),
        )

    @staticmethod
    def _tree(rollout: Rollout, correct: float, chosen: BranchPoints, first: BranchPoints, outcomes) -> Tree:
        return Tree(
            prompt=rollout.problem,
            correct=correct,
            num_tokens=len(rollout.completion_ids),
            offsets=chosen.offsets,
            num_fallbacks=chosen.num_fallbacks,
            num_agreeing=(Counter(chosen.offsets) & Counter(first.offsets)).total(),
            rewards=[reward for reward, _ in outcomes],
            continuation_tokens=[tokens for _, tokens in outcomes],
        )

    # Disruption --------------------------------------------------------------------------------------

    def disruptions(
        self, rollouts: Sequence[Rollout], signals: Sequence[RolloutSignals], correct: Sequence[float]
    ) -> list[Disruption]:
        """Steps of the right rollouts with other numbers, and whether the answers after them are right."""
        args = self.args
        chosen: list[tuple[Rollout, StepKind, list[int]]] = []
        for rollout, one, right in zip(rollouts, signals, correct, strict=True):
            if right:
                chosen += self._corrupted(rollout, one)
        requests = [
            GenerationRequest(
                rollout.prompt_ids + head,
                args.max_completion_length - len(head),
                self.seed(f"disruption of {rollout.sample}", rollout.problem, kind.step),
            )
            for rollout, kind, head in chosen
        ]
        drawn = self.sampled("disruptions.jsonl", "Disrupted", requests)
        wholes = [head + ids for (_, _, head), ids in zip(chosen, drawn, strict=True)]
        rewards = self.grade([rollout.problem for rollout, *_ in chosen], wholes)
        return [Disruption(r.problem, kind, reward) for (r, kind, _), reward in zip(chosen, rewards, strict=True)]

    def _corrupted(self, rollout: Rollout, signals: RolloutSignals) -> Iterator[tuple[Rollout, StepKind, list[int]]]:
        """The steps of one rollout that are corrupted, each with the head that ends with it."""
        ids = rollout.completion_ids
        texts = [self.tokenizer.decode(ids[start:end]) for start, end in signals.step_ranges]
        rng = random.Random(self.seed("disrupted steps", rollout.problem, rollout.sample))
        eligible = [any(c.isdigit() for c in text) for text in texts]
        steps = choose_steps(signals, eligible, self.args.branch_top_fraction, self.args.disrupt_steps, rng)
        for kind in steps:
            wrong = encode(self.tokenizer, corrupt_numbers(texts[kind.step], rng))
            head = ids[: signals.step_ranges[kind.step][0]] + wrong
            if len(head) < self.args.max_completion_length:
                yield rollout, kind, head


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def run_branching(args: BranchingArguments) -> str:
    """Probe, and write tables, picture and JSON into the output folder.

    Returns:
        The tables and what they mean, as Markdown.

    Raises:
        ValueError: for problems or a model that cannot be used, or where no rollout has a token.
    """
    probe = Probe(args)
    rollouts = probe.rollouts()
    if not rollouts:
        raise ValueError(f"model={args.model!r} wrote no token; check the prompt template.")
    signals = probe.signals(rollouts)
    correct = probe.grade([r.problem for r in rollouts], [r.completion_ids for r in rollouts])
    trees = probe.trees(rollouts, signals, correct)
    disruptions = probe.disruptions(rollouts, signals, correct) if args.disrupt else None
    choice = report_branching(
        [one.step_ranges for one in signals],
        [one.influence for one in signals],
        num_points=args.num_branch_points,
        top_fraction=args.branch_top_fraction,
        min_spacing=args.min_branch_spacing,
        delta=args.influence_delta,
        step_mode=args.step_mode,
        aggregation=args.influence_aggregation,
    )
    return write_report(args, trees, choice, disruptions)
