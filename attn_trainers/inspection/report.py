"""The files of an inspection: page, pictures, tables as Markdown and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..tables import markdown_table
from .measure import InspectedResponse, StatisticSummary
from .page import (
    PERTURBATION_HEADER,
    STATISTIC_HEADER,
    page,
    perturbation_row,
    plot_couplings,
    plot_perturbations,
    plot_response,
    statistic_rows,
)
from .perturbation import PerturbationSummary, PerturbedResponse, summarise_perturbations


def write_report(
    folder: Path,
    name: str,
    facts: Sequence[str],
    inspected: Sequence[InspectedResponse],
    statistics: Sequence[StatisticSummary],
    perturbed: Sequence[PerturbedResponse] | None = None,
    *,
    num_shown: int = 4,
    seed: int = 0,
) -> str:
    """Write everything into a folder.

    Args:
        folder: that exists.
        name: of the model.
        facts: lines that say what was measured.
        inspected: the responses.
        statistics: their couplings.
        perturbed: their perturbations, if any were made.
        num_shown: responses that are drawn, from the first on.
        seed: of the bootstrap.

    Returns:
        The tables as Markdown.
    """
    summary = summarise_perturbations(perturbed, seed) if perturbed is not None else None
    shown = inspected[:num_shown]
    html = page(f"Attention of {name}", facts, statistics, shown, summary, perturbed or ())
    (folder / "index.html").write_text(html, encoding="utf-8")
    for index, response in enumerate(shown, start=1):
        first_line = response.problem.splitlines()[0][:100].replace("$", r"\$")
        plot_response(response, folder / f"response_{index}.png", f"Response {index}: {first_line}")
    plot_couplings(statistics, folder / "couplings.png", f"Couplings, {name}")
    tables = [markdown_table(STATISTIC_HEADER, statistic_rows(statistics))]
    (folder / "couplings.md").write_text("\n".join([*facts, "", *tables]) + "\n", encoding="utf-8")
    if summary is not None:
        tables.append(markdown_table(PERTURBATION_HEADER, [perturbation_row(summary)]))
        (folder / "perturbation.md").write_text("\n".join([*facts, "", tables[-1]]) + "\n", encoding="utf-8")
        record = perturbation_record(summary, perturbed)
        (folder / "perturbation.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        plot_perturbations(perturbed, folder / "perturbation.png", f"Perturbed tokens, {name}")
    return "\n\n".join(tables)


def perturbation_record(summary: PerturbationSummary, perturbed: Sequence[PerturbedResponse]) -> dict:
    """The summary and each response's means as JSON has them; null where there is no value."""
    means = [
        {"top": response.mean_jaccard(True), "bottom": response.mean_jaccard(False)}
        if response.perturbations
        else {"top": None, "bottom": None}
        for response in perturbed
    ]
    share = summary.share_below if summary.responses else None
    return {**asdict(summary), "share_below": share, "mean_jaccard": means}
