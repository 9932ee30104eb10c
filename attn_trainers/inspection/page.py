"""Page and pictures of an inspection: one self-contained HTML file that needs no network, and a PNG per response."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from torch import Tensor  # noqa: E402

from .measure import InspectedResponse, StatisticSummary, StepScores  # noqa: E402
from .perturbation import PerturbationSummary, PerturbedResponse  # noqa: E402


WAAD_COLOUR, FAI_COLOUR, FCI_COLOUR, FOCUS_COLOUR = "#2f6db3", "#c2571a", "#5b8c5a", "#7d5ba6"
STATISTIC_TITLES = {
    "entropy": ("entropy at WAAD peaks, nats", "all response tokens"),
    "receiver_global": ("receiver-FAI peaks that are global-FAI peaks, %", "density of global-FAI peaks"),
    "fai_after_waad": ("FAI peaks at or right after a WAAD peak, %", "shuffled FAI peaks"),
}
_LEFT, _RIGHT, _PANEL, _GAP = 64, 16, 120, 46  # pixels
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h1 { font-size: 1.4rem; }
h2 { font-size: 1.1rem; margin-top: 2.5rem; border-top: 1px solid #d0d7de; padding-top: 1rem; }
table { border-collapse: collapse; }
td, th { padding: .3rem .7rem; border-bottom: 1px solid #d0d7de; text-align: right; }
td { white-space: nowrap; } .forced td:last-child { white-space: normal; }
td:first-child, th:first-child, td:last-child, th:last-child { text-align: left; }
.facts, .note { color: #57606a; } .scroll { overflow-x: auto; } svg { display: block; }
.tokens { font: 14px/2 ui-monospace, monospace; background: #f6f8fa; padding: .6rem; }
.tokens { max-height: 20rem; overflow: auto; overflow-wrap: anywhere; }
.tokens span { padding: .1rem 0; white-space: pre-wrap; } .anchor { background: #f6c9a8; }
.preplan { border-bottom: 3px solid #2f6db3; } pre { white-space: pre-wrap; background: #f6f8fa; padding: .6rem; }
text { font: 11px system-ui, sans-serif; fill: #57606a; } .label { font-weight: 600; fill: #1b1f24; }
.hover { fill: transparent; } .hover:hover { fill: rgb(0 0 0 / 8%); }
"""


# Numbers ---------------------------------------------------------------------------------------------


def _number(value: float, digits: int = 3) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _spread(mean: float, deviation: float, percent: bool) -> str:
    factor, digits = (100.0, 1) if percent else (1.0, 3)
    return f"{_number(factor * mean, digits)} ± {_number(factor * deviation, digits)}"


def statistic_rows(statistics: Sequence[StatisticSummary]) -> list[list[str]]:
    """Cells of the table of couplings: what, FAI from, n, observed ± sd, chance ± sd, lift, densities."""
    rows = []
    for s in statistics:
        percent = s.name != "entropy"
        densities = ", ".join(f"{name.replace('_', ' ')} {100 * share:.1f} %" for name, share in s.densities.items())
        lift = "–" if math.isnan(s.lift) else f"{100 * s.lift:+.1f} %"
        distance = str(s.distance) if percent else "–"
        observed = _spread(s.observed, s.observed_sd, percent)
        chance = _spread(s.random, s.random_sd, percent)
        rows.append([STATISTIC_TITLES[s.name][0], distance, str(s.responses), observed, chance, lift, densities])
    return rows


STATISTIC_HEADER = ["statistic", "FAI from", "n", "observed ± sd", "by chance ± sd", "lift", "peak densities"]


PERTURBATION_HEADER = [
    "n",
    "Jaccard, highest FAI",
    "Jaccard, lowest FAI",
    "lowest − highest, 95 % interval",
    "Pr(highest < lowest)",
    "place of highest, lowest",
    "left out",
]


def perturbation_row(summary: PerturbationSummary) -> list[str]:
    """Cells of the one row of the table of perturbations."""
    c, left_out = summary.comparison, str(summary.left_out)
    if c is None or summary.places is None:
        return ["0", *["–"] * 5, left_out]
    low, high = c.interval
    return [
        str(summary.responses),
        f"{c.first:.3f}",
        f"{c.second:.3f}",
        f"{c.difference:+.3f} [{low:+.3f}, {high:+.3f}]",
        f"{100 * summary.share_below:.1f} %",
        ", ".join(f"{100 * place:.0f} %" for place in summary.places),
        left_out,
    ]


# HTML ------------------------------------------------------------------------------------------------


def _table(name: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    table = f'<table class="{name}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def visible(token: str) -> str:
    """A token's text with line breaks and the space at its beginning made visible."""
    return token.replace("\n", "↵").replace(" ", "·") if not token.strip() else token.replace("\n", "↵")


def _scale(values: Iterable[float]) -> float:
    finite = [value for value in values if not math.isnan(value)]
    return max(finite, default=0.0) or 1.0


class _Chart:
    """Panels below each other over the same tokens, as inline SVG."""

    def __init__(self, response: InspectedResponse):
        self.tokens = response.tokens
        self.step = max(7.0, min(24.0, 1000.0 / len(self.tokens)))  # pixels per token
        self.width = _LEFT + self.step * len(self.tokens) + _RIGHT
        self.bottom = 0.0
        self.parts: list[str] = []

    def x(self, token: float) -> float:
        return _LEFT + self.step * token

    def panel(self, title: str, top_value: float, digits: int) -> tuple[float, float]:
        """Frame of a panel; returns its lower edge and the pixels per unit."""
        top = self.bottom + _GAP
        self.bottom = top + _PANEL
        right = self.width - _RIGHT
        self.parts += [
            f'<text class="label" x="{_LEFT}" y="{top - 8:.1f}">{escape(title)}</text>',
            f'<line x1="{_LEFT}" x2="{right:.1f}" y1="{self.bottom}" y2="{self.bottom}" stroke="#8c959f"/>',
            f'<text x="{_LEFT - 6}" y="{top + 20:.1f}" text-anchor="end">{top_value:.{digits}f}</text>',
            f'<text x="{_LEFT - 6}" y="{self.bottom:.1f}" text-anchor="end">0</text>',
        ]
        return self.bottom, (_PANEL - 16) / top_value

    def curve(self, title: str, values: Tensor, marked: Tensor, peaks: Tensor, colour: str, digits: int) -> None:
        """A line that breaks where undefined, dots on marked tokens and triangles over peaks."""
        numbers = values.tolist()
        base, unit = self.panel(title, _scale(numbers), digits)
        points = [(self.x(t + 0.5), base - unit * v) for t, v in enumerate(numbers)]
        path, pen = [], "M"
        for (x, y), v in zip(points, numbers, strict=True):
            if math.isnan(v):
                pen = "M"
                continue
            path.append(f"{pen}{x:.1f} {y:.1f}")
            pen = "L"
        self.parts.append(f'<path d="{"".join(path)}" fill="none" stroke="{colour}" stroke-width="1.3"/>')
        for t in marked.nonzero().flatten().tolist():
            x, y = points[t]
            self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{colour}"/>')
        for t in peaks.nonzero().flatten().tolist():
            x, y = points[t]
            self.parts.append(f'<path d="M{x - 4:.1f} {y - 12:.1f}h8l-4 6z" fill="#1b1f24"/>')

    def bars(self, title: str, steps: StepScores, colour: str) -> None:
        """A bar per step, as wide as its tokens."""
        if steps.note:
            self.bottom += _GAP
            self.parts.append(f'<text class="label" x="{_LEFT}" y="{self.bottom - 8}">{escape(title)}</text>')
            self.bottom += 16
            self.parts.append(f'<text x="{_LEFT}" y="{self.bottom - 6}">{escape(steps.note)}</text>')
            return
        base, unit = self.panel(title, _scale(steps.scores), 4)
        for index, ((start, end), score) in enumerate(zip(steps.ranges, steps.scores, strict=True)):
            text = "".join(self.tokens[start:end]).strip()
            height = 0.0 if math.isnan(score) else unit * score
            left, width = self.x(start), self.step * (end - start) - 1.5
            tip = escape(f"step {index + 1}: {score:.5f}\n{text}")
            self.parts.append(
                f'<rect x="{left:.1f}" y="{base - height:.1f}" width="{width:.1f}" height="{height:.1f}" '
                f'fill="{colour}"/><rect class="hover" x="{left:.1f}" y="{base - _PANEL:.1f}" width="{width:.1f}" '
                f'height="{_PANEL}"><title>{tip}</title></rect>'
                f'<text x="{left + width / 2:.1f}" y="{base + 13:.1f}" text-anchor="middle">{index + 1}</text>'
            )

    def tooltips(self, response: InspectedResponse, top: float, bottom: float) -> None:
        for t, token in enumerate(self.tokens):
            values = [response.waad[t].item(), response.fai[t].item(), response.entropy[t].item()]
            waad, fai, entropy = (_number(v, d) for v, d in zip(values, (2, 5, 3), strict=True))
            tip = escape(f"{t}: “{visible(token)}”\nWAAD {waad}, FAI {fai}, entropy {entropy}")
            self.parts.append(
                f'<rect class="hover" x="{self.x(t):.1f}" y="{top}" width="{self.step:.2f}" '
                f'height="{bottom - top:.1f}"><title>{tip}</title></rect>'
            )

    def svg(self) -> str:
        height = self.bottom + 24
        return (
            f'<div class="scroll"><svg width="{self.width:.0f}" height="{height:.0f}" role="img">'
            + "".join(self.parts)
            + "</svg></div>"
        )


def response_chart(response: InspectedResponse) -> str:
    """Inline SVG of WAAD, FAI, entropy, influence and key focus over a response's tokens."""
    chart = _Chart(response)
    unmarked = response.preplan & False
    waad_title = "WAAD, tokens  ● preplan token  ▾ peak"
    fai_title = "FAI, attention weight  ● anchor token  ▾ peak"
    chart.curve(waad_title, response.waad, response.preplan, response.waad_peaks, WAAD_COLOUR, 1)
    chart.curve(fai_title, response.fai, response.anchors, response.fai_peaks, FAI_COLOUR, 4)
    chart.curve("token entropy, nats", response.entropy, unmarked, unmarked, "#6e7781", 2)
    chart.tooltips(response, _GAP, chart.bottom)
    chart.bars("forward context influence of each step", response.influence, FCI_COLOUR)
    chart.bars("key-focus score of each thinking step", response.key_focus, FOCUS_COLOUR)
    return chart.svg()


def _token_strip(response: InspectedResponse) -> str:
    spans = []
    for token, anchor, preplan in zip(
        response.tokens, response.anchors.tolist(), response.preplan.tolist(), strict=True
    ):
        names = " ".join(name for name, is_so in (("anchor", anchor), ("preplan", preplan)) if is_so)
        text = escape(visible(token)) + ("<br>" if "\n" in token else "")
        spans.append(f'<span class="{names}">{text}</span>')
    return '<div class="tokens">' + "".join(spans) + "</div>"


def _perturbation_section(summary: PerturbationSummary) -> str:
    return f"""<h2>Perturbation</h2>
{_table("perturbation", PERTURBATION_HEADER, [perturbation_row(summary)])}
<p class="note">{summary.continuations} greedy continuations after a forced token. Jaccard: content words that a
continuation shares with the response behind the same position, of all that either has. n: responses long enough;
place: mean position as a share of the response. The later a position, the fewer words are left to differ, so a
difference says something of FAI only where the places are alike. The paper (Qwen3-4B-Base, 70 problems of GSM8K):
0.534 against 0.631, lower in 87.1&nbsp;%.</p>"""


def _perturbation_table(perturbed: PerturbedResponse) -> str:
    """Forced tokens of one response, highest FAI first."""
    rows = [
        [
            "highest" if p.top else "lowest",
            str(p.position),
            f"{p.fai:.5f}",
            f"“{visible(p.token)}”",
            ", ".join(f"“{visible(text)}” {jaccard:.2f}" for text, jaccard in zip(p.forced, p.jaccards, strict=True)),
        ]
        for p in perturbed.perturbations
    ]
    return _table("forced", ["FAI", "token", "FAI value", "text", "forced in its place, and the Jaccard"], rows)


def _response_section(index: int, response: InspectedResponse, perturbed: PerturbedResponse | None) -> str:
    verdict = {None: "", True: " · right", False: " · wrong"}[response.correct]
    count = len(response.tokens)
    cut_off = " · cut off" if response.cut_off else ""
    facts = (
        f"{count} tokens{cut_off}{verdict} · {int(response.preplan.sum())} preplan, "
        f"{int(response.anchors.sum())} anchor tokens · {len(response.influence.ranges)} steps · "
        f"{len(response.local_heads)} local and {len(response.global_heads)} global heads"
    )
    return (
        f'<section id="response-{index + 1}"><h2>Response {index + 1}</h2><pre>{escape(response.problem)}</pre>'
        f'<p class="facts">{facts}</p>{_token_strip(response)}{response_chart(response)}'
        f"{_perturbation_table(perturbed) if perturbed and perturbed.perturbations else ''}</section>"
    )


def page(
    title: str,
    facts: Sequence[str],
    statistics: Sequence[StatisticSummary],
    shown: Sequence[InspectedResponse],
    summary: PerturbationSummary | None = None,
    perturbed: Sequence[PerturbedResponse] = (),
) -> str:
    """The whole HTML page.

    Args:
        title: of the page.
        facts: lines about the model, the data and the settings.
        statistics: the couplings.
        shown: responses to draw.
        summary: of the perturbations, if any were made.
        perturbed: the perturbations of the responses, the drawn ones first.
    """
    sections = [
        _response_section(index, response, one)
        for index, (response, one) in enumerate(zip_longest(shown, perturbed[: len(shown)]))
    ]
    chance = "; ".join(f"{what}: {chance}" for what, chance in STATISTIC_TITLES.values())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{escape(title)}</h1>
{"".join(f'<p class="facts">{escape(fact)}</p>' for fact in facts)}
<h2>Couplings</h2>
{_table("couplings", STATISTIC_HEADER, statistic_rows(statistics))}
<p class="note">n: responses in which the statistic is defined; sd: over these. Chance level: {escape(chance)}. A peak
is a local maximum in its response's top share; independent noise has 21.9 % peaks. A statistic is undefined in a
response without such peaks: FAI from 10 tokens on has no value in the last 10 tokens.</p>
{_perturbation_section(summary) if summary else ""}
<p class="note">In the texts below, <span class="preplan">preplan tokens</span> are underlined and
<span class="anchor">anchor tokens</span> shaded.</p>
{"".join(sections)}
</body></html>
"""


# PNG -------------------------------------------------------------------------------------------------


def plot_response(response: InspectedResponse, path: str | Path, title: str) -> None:
    """Curves and steps of one response over its tokens."""
    count = len(response.tokens)
    figure, axes = plt.subplots(4, 1, figsize=(min(30, max(9, 0.16 * count)), 8.5), sharex=True)
    curves = (
        ("WAAD, tokens", response.waad, response.preplan, response.waad_peaks, WAAD_COLOUR, "preplan token"),
        ("FAI", response.fai, response.anchors, response.fai_peaks, FAI_COLOUR, "anchor token"),
    )
    for axis, (label, values, marked, at_peak, colour, name) in zip(axes, curves, strict=False):
        numbers = values.tolist()
        axis.plot(range(count), numbers, color=colour, linewidth=1.2)
        chosen, tops = marked.nonzero().flatten().tolist(), at_peak.nonzero().flatten().tolist()
        axis.plot(chosen, [numbers[t] for t in chosen], "o", color=colour, markersize=4, label=name)
        offset = 0.06 * _scale(numbers)
        axis.plot(tops, [numbers[t] + offset for t in tops], "v", color="#1b1f24", markersize=4, label="peak")
        axis.set_ylabel(label, fontsize=9)
        axis.legend(fontsize=7, loc="upper right", framealpha=0.6)
    bars = (
        ("influence", response.influence, FCI_COLOUR),
        ("key focus", response.key_focus, FOCUS_COLOUR),
    )
    for axis, (label, steps, colour) in zip(axes[2:], bars, strict=True):
        widths = [end - start - 0.2 for start, end in steps.ranges]
        axis.bar([start - 0.5 for start, _ in steps.ranges], steps.scores, width=widths, align="edge", color=colour)
        axis.set_ylabel(label, fontsize=9)
        if steps.note:
            axis.text(0.01, 0.5, steps.note, transform=axis.transAxes, fontsize=8, color="#57606a")
            axis.set_yticks([])
    axes[-1].tick_params(axis="x", labelsize=8)
    if count <= 150:
        axes[-1].set_xticks(range(count), [visible(t).strip() for t in response.tokens], rotation=90, fontsize=6)
    axes[-1].set_xlabel("response token", fontsize=9)
    axes[0].set_title(title, fontsize=10, loc="left")
    for axis in axes:
        axis.tick_params(axis="y", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(bottom=0)
        axis.set_xlim(-1, count)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_couplings(statistics: Sequence[StatisticSummary], path: str | Path, title: str) -> None:
    """Observed against chance for every statistic, error bars one standard deviation over responses."""
    figure, axes = plt.subplots(1, len(statistics), figsize=(2.9 * len(statistics), 3.6), squeeze=False)
    for axis, s in zip(axes[0], statistics, strict=True):
        factor = 1.0 if s.name == "entropy" else 100.0
        heights = [factor * s.random, factor * s.observed]
        errors = [0.0 if math.isnan(v) else factor * v for v in (s.random_sd, s.observed_sd)]
        axis.bar(["by chance", "observed"], heights, yerr=errors, color=["#afb8c1", WAAD_COLOUR], capsize=4)
        name = STATISTIC_TITLES[s.name][0].replace(" that ", "\nthat ").replace(" at ", "\nat ")
        suffix = "" if s.name == "entropy" else f"\nFAI from {s.distance} tokens on"
        axis.set_title(f"{name}{suffix}\nn = {s.responses}", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_perturbations(perturbed: Sequence[PerturbedResponse], path: str | Path, title: str) -> None:
    """A point per response, mean Jaccard at the positions of highest over that at those of lowest FAI."""
    usable = [response for response in perturbed if response.perturbations]
    figure, axis = plt.subplots(figsize=(4.6, 4.6))
    axis.plot([0, 1], [0, 1], color="#afb8c1", linewidth=1)
    top, bottom = ([response.mean_jaccard(is_top) for response in usable] for is_top in (True, False))
    axis.plot(bottom, top, "o", color=FAI_COLOUR, markersize=5)
    axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axis.set_xlabel("mean Jaccard at lowest FAI", fontsize=9)
    axis.set_ylabel("mean Jaccard at highest FAI", fontsize=9)
    axis.set_title(f"{title}\nn = {len(usable)}; below the line: more changes at highest FAI", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
