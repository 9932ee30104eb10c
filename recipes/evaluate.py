r"""Evaluation of a model on mathematical benchmarks: pass@1 averaged over K samples, pass@k, lengths.

    python recipes/evaluate.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --data aime24.jsonl math500.jsonl \
        --output runs/evaluation/base

A model is a local folder, a Hub id or a LoRA adapter (merged into its base model in a temporary folder for vLLM). Each
data file has a `problem` and an `answer` (a text, or a list of accepted ones) per line. K is 32 for aime24, aime25 and
amc23 and 4 for the others, as in the AttnRL paper; `--num_samples` sets it for all. A run that was cut off goes on
where it stopped.

    python recipes/evaluate.py --compare runs/evaluation/base runs/evaluation/attnrl
"""

from pathlib import Path

from transformers import HfArgumentParser

from attn_trainers.evaluation import comparison_table
from attn_trainers.evaluation_run import EvaluationArguments, compare_runs, evaluate


def main(args: EvaluationArguments) -> None:
    """Evaluate, or compare two evaluations, and print the table."""
    if args.compare:
        print(comparison_table(compare_runs(*args.compare)))
        return
    evaluate(args)
    print((Path(args.output) / "report.md").read_text())


if __name__ == "__main__":
    main(HfArgumentParser(EvaluationArguments).parse_args_into_dataclasses()[0])
