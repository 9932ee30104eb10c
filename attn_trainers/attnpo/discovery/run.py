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

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...attention import decoder_of
from ...jsonl import append_jsonl, read_jsonl
from ...rewards import math_accuracy_reward
from ...sampling.backends import sample_completions
from ...sampling.models import load_config, load_model, num_positions, tokenizer_of
from ...sampling.problems import prompt_token_ids, request_seed
from ...sampling.requests import GenerationRequest, SamplingSettings, fit_positions
from ..alignment import StepAlignment, exclusion_warning, reasoning_step_ranges
from ..heads import KeyFocusHeads, model_fingerprint, save_heads
from .arguments import DiscoveryArguments, check_output
from .held_out import HeldOutReport, is_held_out, measure_held_out
from .intervention import ProbedResponse, check_by_intervention
from .labels import BY_LIKELIHOOD, ESSENTIAL, GIVEN, REDUNDANT, LabelledCompletion, first_derivation, read_labels
from .probing import Candidate, label_steps, score_all_heads
from .report import HeadReport, build_report


# Responses -----------------------------------------------------------------------------------------------------------


def find_candidates(args: DiscoveryArguments, tokenizer: PreTrainedTokenizerBase, output: Path) -> list[Candidate]:
    """Responses with usable steps, from the data or generated; at most `args.max_responses`.

    Raises:
        ValueError: the data has not the columns it needs, or no response is usable.
    """
    records = read_jsonl(args.data)
    if not records or not all("problem" in record for record in records):
        raise ValueError(f"data={args.data!r} needs lines with a problem; give problem, completion and labels.")
    if all("completion" in record for record in records):
        candidates = [_candidate(args, tokenizer, record) for record in _right_records(args, tokenizer, records)]
    elif all("answer" in record for record in records):
        candidates = _generated_candidates(args, tokenizer, records, output)
    else:
        raise ValueError(f"data={args.data!r} has lines without answer; give problem and answer, or completions too.")
    if not candidates:
        raise ValueError(
            f"data={args.data!r} leads to no correct response; give easier problems, or check the answers."
        )
    usable = [one for one in candidates if one.alignment.reason is None][: args.max_responses]
    if not usable:
        reasons = [one.alignment.reason for one in candidates]
        texts = [args.thinking(tokenizer).text(one.completion_ids) for one in candidates]
        advice = exclusion_warning(reasons, texts, end_of_thinking=args.end_of_thinking, answer=args.answer)
        raise ValueError(f"data={args.data!r}: none of {len(candidates)} correct responses has usable steps. {advice}")
    return usable


def prompt_ids_of(args: DiscoveryArguments, tokenizer: PreTrainedTokenizerBase, problem: str) -> list[int]:
    """Tokens of a problem's prompt."""
    return prompt_token_ids(tokenizer, problem, args.prompt_template, args.chat_template_kwargs)


def _right_records(args: DiscoveryArguments, tokenizer: PreTrainedTokenizerBase, records: list[dict]) -> list[dict]:
    """Given completions that are right: graded where there is an answer, taken at their `correct` elsewhere."""
    thinking = args.thinking(tokenizer)
    texts = [
        thinking.text(record["completion_ids"]) if "completion_ids" in record else record["completion"]
        for record in records
    ]
    graded = [index for index, record in enumerate(records) if str(record.get("answer", "")).strip()]
    answers = [records[index]["answer"] for index in graded]
    grades = math_accuracy_reward([texts[index] for index in graded], answers, end_of_thinking=args.end_of_thinking)
    right = {index: bool(record.get("correct", True)) for index, record in enumerate(records)}
    right |= {index: bool(grade) for index, grade in zip(graded, grades, strict=True)}
    kept = [record for index, record in enumerate(records) if right[index]]
    print(
        f"{len(kept)} of {len(records)} given completions are used, {len(records) - len(kept)} wrong ones left out "
        f"({len(graded)} were graded, the others had no answer)."
    )
    return kept


def _align(args: DiscoveryArguments, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> StepAlignment:
    return reasoning_step_ranges(
        tokenizer, ids, splitter=args.splitter, end_of_thinking=args.end_of_thinking, answer=args.answer
    )


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
    source = record.get("label_source", GIVEN)
    return Candidate(record["problem"], str(record.get("answer", "")), ids, alignment, labels, source)


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
        GenerationRequest(
            prompts[index], args.max_completion_length, request_seed(args.seed, "probing", index, sample)
        )
        for index, sample in missing
    ]
    requests, num_cut = fit_positions(requests, num_positions(load_config(args.model)))
    if num_cut:
        print(
            f"{num_cut} of {len(requests)} completions are limited by the model's positions to fewer than "
            f"max_completion_length={args.max_completion_length}."
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
    texts = [args.thinking(tokenizer).text(record["completion_ids"]) for record in done]
    answers = [records[record["index"]]["answer"] for record in done]
    correct = math_accuracy_reward(texts, answers, end_of_thinking=args.end_of_thinking)
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
        labels, drops = candidate.labels, []
        if labels is None:
            prompt_ids = prompt_ids_of(args, tokenizer, candidate.problem)
            labels, drops = label_steps(model, prompt_ids, candidate, args.batch_size, args.thresholds)
        record = LabelledCompletion(
            problem=candidate.problem,
            answer=candidate.answer,
            completion=tokenizer.decode(candidate.completion_ids),
            completion_ids=candidate.completion_ids,
            step_ranges=candidate.alignment.step_ranges,
            step_texts=candidate.alignment.texts,
            labels=labels,
            label_source=BY_LIKELIHOOD if candidate.labels is None else candidate.label_source,
            derivation=first_derivation(candidate.alignment.texts, candidate.answer, candidate.problem),
            drops=drops,
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
) -> Iterator[ProbedResponse]:
    """Scores of each response that has both kinds of step; scores of an earlier run are read."""
    for index, response in enumerate(tqdm(labelled, desc="Scores", unit="response")):
        if ESSENTIAL not in response.labels or REDUNDANT not in response.labels:
            continue
        prompt_ids = prompt_ids_of(args, tokenizer, response.problem)
        answer_start = _align(args, tokenizer, response.completion_ids).answer_start
        path = output / "scores" / f"{index:05d}.pt"
        if not path.exists():
            scores = score_all_heads(model, prompt_ids, response, answer_start)
            partial_path = path.with_suffix(".partial")
            torch.save(scores, partial_path)
            partial_path.replace(path)
        yield ProbedResponse(prompt_ids, answer_start, response, torch.load(path, weights_only=True))


# The run -------------------------------------------------------------------------------------------------------------


def discover_heads(args: DiscoveryArguments) -> tuple[KeyFocusHeads, HeadReport, HeldOutReport | None]:
    """Run all stages and write `heads.json`, `report.json` and what the stages keep into `args.output_dir`.

    Raises:
        ValueError: the settings or the data cannot work, or the folder holds a discovery with other settings.
    """
    output = check_output(args)
    tokenizer = tokenizer_of(args.model)
    candidates = find_candidates(args, tokenizer, output)
    model = load_model(args.model, args.dtype).to("cuda" if torch.cuda.is_available() else "cpu")
    labelled = label_candidates(args, model, tokenizer, candidates, output)
    probed = list(score_responses(args, model, tokenizer, labelled, output))
    measuring = [one for one in probed if is_held_out(one.response.problem, args.held_out, args.seed)]
    choosing = [one for one in probed if not is_held_out(one.response.problem, args.held_out, args.seed)]
    config = decoder_of(model).config
    generator = torch.Generator().manual_seed(args.seed)
    report = build_report(
        [one.scored_steps for one in choosing],
        model_name=args.model,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        generator=generator,
        options=args.ranking_options,
    )
    order = report.ranking if args.selection == "top_k" else report.greedy_heads
    heads = [tuple(pair) for pair in order[: args.num_heads]]
    flat = [layer * report.num_heads + head for layer, head in heads]
    held_out = measure_held_out(
        [one.scored_steps for one in measuring], flat, report.criterion, args.ranking_options, generator
    )
    report.chosen = [list(pair) for pair in heads]
    report.intervention = check_by_intervention(
        model, (measuring or choosing)[: args.intervention_responses], heads, generator, batch_size=args.batch_size
    )
    found = KeyFocusHeads(
        model_name=args.model,
        heads=tuple(heads),
        sra=tuple(report.ranked_by.sra[index] for index in flat),
        num_layers=report.num_layers,
        num_heads=report.num_heads,
        fingerprint=model_fingerprint(config),
        step_mode=args.step_mode,
        label_source="; ".join(sorted({response.label_source for response in labelled})),
        criterion=report.criterion,
        settings={
            name: getattr(args, name)
            for name in ("selection", "average", "held_out", "max_responses", *asdict(args.thresholds))
        },
    )
    save_heads(output / "heads.json", found)
    content = report.to_dict() | {"held_out": asdict(held_out) if held_out else None}
    (output / "report.json").write_text(json.dumps(content, indent=2) + "\n")
    return found, report, held_out
