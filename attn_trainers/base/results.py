"""Results of evaluations as metadata of a model card, which the Hub shows on the model's page."""

import re
from collections.abc import Mapping, Sequence

from huggingface_hub import EvalResult, ModelCard

from ..evaluation.statistics import Summary


def set_results(card: ModelCard, results: Sequence[EvalResult], model_name: str) -> None:
    """Put results into a card's metadata, in place of earlier ones; without any, those stay."""
    if results:
        card.data.model_name = card.data.get("model_name") or model_name
        card.data.eval_results = list(results)


def evaluation_result(data: str, metric: str, value: float) -> EvalResult:
    """A result as the Hub's model pages show it.

    Args:
        data: name of the data set, or its Hub id.
        metric: e.g. "pass@1", as a share.
        value: of the metric.
    """
    names = {"task_name": "Reasoning", "metric_name": metric}
    return EvalResult("text-generation", data, data, metric, round(value, 6), **names)


def summary_results(summaries: Sequence[Summary]) -> list[EvalResult]:
    """The pass@k of an evaluation."""
    return [evaluation_result(s.name, f"pass@{k}", passed.value) for s in summaries for k, passed in s.pass_at.items()]


def logged_results(log_history: Sequence[Mapping[str, float]]) -> list[EvalResult]:
    """The last pass@k of each data set in a training log."""
    latest = latest_evaluations(log_history)
    return [
        evaluation_result(data, metric, value)
        for data, values in latest.items()
        for metric, value in sorted(values.items())
        if metric.startswith("pass@")
    ]


def latest_evaluations(log_history: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """The last value of each metric of an evaluation by data set."""
    latest: dict[str, dict[str, float]] = {}
    for entry in log_history:
        for key, value in entry.items():
            if match := re.fullmatch(r"eval_(?:(.+)_)?(reward|pass@\d+|completions/mean_(?:thinking_)?length)", key):
                latest.setdefault(match[1] or "evaluation", {})[match[2]] = value
    return latest
