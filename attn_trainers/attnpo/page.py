"""Pages and records of responses: steps, how much the final answer attends to each, where credit was scaled."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..base.exhibits import Page
from ..base.ranks import Ranks
from ..tables import cell, markdown_table
from .responses import ScoredResponse


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h1 { font-size: 1.3rem; } .facts { color: #57606a; } .text { white-space: pre-wrap; margin: 0; font: inherit; }
.step { display: grid; grid-template-columns: 9rem 1fr; gap: .8rem; padding: .45rem .6rem;
  border-left: 6px solid #d0d7de; }
.step.attenuated { border-left-color: #d1742f; } .step.protected { border-left-color: #2f8f5b; }
.tag { font-size: .8rem; color: #424a53; } .legend span { padding: .15rem .6rem; margin-right: .6rem; }
.legend .mark { border-left: 6px solid; }
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head><body>
<h1>{title}</h1>
<p class="facts">{facts}</p>
<p class="legend"><span style="background:{low}">S &lt; S_base</span>
<span style="background:{high}">S &gt; S_base</span>
<span class="mark" style="border-color:#d1742f">credit attenuated</span>
<span class="mark" style="border-color:#2f8f5b">spared a negative advantage</span></p>
<h2>Prompt</h2><pre class="text">{prompt}</pre>
<h2>Thinking</h2>
{steps}
<h2>Answer</h2><pre class="text">{answer}</pre>
</body></html>
"""


def shade(ratio: float | None) -> str:
    """Background of a step with score ratio S / S_base: grey below 1, white at 1, blue above; full at 0 and 4."""
    if ratio is None or ratio != ratio:
        return "#ffffff"
    if ratio < 1.0:
        level = round(255 - 45 * (1.0 - max(ratio, 0.0)))
        return f"#{level:02x}{level:02x}{level:02x}"
    strength = (min(ratio, 4.0) - 1.0) / 3.0
    return f"#{round(255 - 105 * strength):02x}{round(255 - 55 * strength):02x}ff"


def _step_html(index: int, kind: str, text: str, ratio: float | None, scale: float | None, positive: bool) -> str:
    scaled = scale is not None and scale != 1.0
    mark = (" attenuated" if positive else " protected") if scaled else ""
    tags = [f"{index + 1} · {kind}"]
    if ratio is not None:
        tags.append(f"S / S_base {ratio:.2f}")
    if scale is not None:
        tags.append(f"γ {scale:.2f}")
    return (
        f'<div class="step{mark}" style="background:{shade(ratio)}">'
        f'<div class="tag">{"<br>".join(map(escape, tags))}</div>'
        f'<pre class="text">{escape(text.strip())}</pre></div>'
    )


def response_page(response: ScoredResponse, tokenizer, title: str) -> str:
    """HTML page of one response: each step shaded by its score against the baseline, and marked where it was scaled.

    Args:
        response: what the trainer made of it; without usable steps its text is shown and the reason named.
        tokenizer: decodes prompt and answer.
        title: heading.
    """
    alignment, baseline = response.alignment, response.baseline
    facts = [
        "correct" if response.correct else "wrong",
        f"accuracy of the prompt {response.accuracy:.2f}",
        f"advantage {response.advantage:+.3f}",
        f"{len(response.completion_ids)} tokens",
    ]
    if baseline is not None:
        facts.append(f"S_base {baseline:.4f}")
    if alignment.reason is not None:
        facts.append(f"no steps: {alignment.reason}")
    scores = response.scores.tolist() if response.scores is not None else [None] * len(alignment.kinds)
    scales = response.scales.tolist() if response.scales is not None else [None] * len(alignment.kinds)
    ratios = [score / baseline if baseline and score is not None else None for score in scores]
    steps = [
        _step_html(index, *parts, response.advantage > 0)
        for index, parts in enumerate(zip(alignment.kinds, alignment.texts, ratios, scales, strict=True))
    ]
    answer_start = alignment.answer_start if alignment.reason is None else 0
    return _PAGE.format(
        title=escape(title),
        style=_STYLE,
        facts=escape(" · ".join(facts)),
        low=shade(0.0),
        high=shade(4.0),
        prompt=escape(tokenizer.decode(response.prompt_ids)),
        steps="\n".join(steps),
        answer=escape(tokenizer.decode(response.completion_ids[answer_start:])),
    )


def response_markdown(response: ScoredResponse, tokenizer, title: str) -> str:
    """The same in Markdown: a table of the steps."""
    record = response_record(response, tokenizer)
    facts = f"**{escape(title)}**: {'correct' if record['correct'] else 'wrong'}, advantage {record['advantage']:+.3f}"
    rows = [
        [
            index + 1,
            step["kind"],
            "" if not record["baseline"] or step["score"] is None else f"{step['score'] / record['baseline']:.2f}",
            "" if step["scale"] is None else f"{step['scale']:.2f}",
            cell(step["text"].strip()),
        ]
        for index, step in enumerate(record["steps"])
    ]
    body = markdown_table(["step", "kind", "S / S_base", "γ", "text"], rows) if rows else cell(record["completion"])
    return f"{facts}\n\n{body}"


def page_of(response: ScoredResponse, tokenizer, title: str) -> Page:
    """A response's page, for trackers."""
    return Page(response_page(response, tokenizer, title), response_markdown(response, tokenizer, title))


def most_scaled(responses: Sequence[ScoredResponse]) -> ScoredResponse | None:
    """The response with most scaled steps, of several the one with most steps; `None` of none."""
    return max(
        responses, key=lambda r: (int((r.attenuated | r.protected).sum()), len(r.alignment.kinds)), default=None
    )


def write_response_page(path: str | Path, response: ScoredResponse, tokenizer, title: str) -> None:
    """Write `response_page` to a file."""
    Path(path).write_text(response_page(response, tokenizer, title), encoding="utf-8")


def response_record(response: ScoredResponse, tokenizer) -> dict:
    """A response as JSON types; `steps` holds kind, text, tokens, score and factor of each step."""
    alignment = response.alignment
    count = len(alignment.kinds)
    scores = response.scores.tolist() if response.scores is not None else [None] * count
    scales = response.scales.tolist() if response.scales is not None else [None] * count
    return {
        "prompt": tokenizer.decode(response.prompt_ids),
        "completion": tokenizer.decode(response.completion_ids),
        "response_length": len(response.completion_ids),
        "answer_length": response.answer_length,
        "correct": response.correct,
        "accuracy": response.accuracy,
        "advantage": response.advantage,
        "baseline": response.baseline,
        "no_steps": alignment.reason,
        "steps": [
            {"kind": kind, "text": text, "tokens": list(tokens), "score": score, "scale": scale}
            for kind, text, tokens, score, scale in zip(
                alignment.kinds, alignment.texts, alignment.step_ranges, scores, scales, strict=True
            )
        ],
    }


def write_report(folder: Path, step: int, responses: Sequence[ScoredResponse], tokenizer, ranks: Ranks) -> None:
    """Write the page of one of the first rank's responses, and the records of all ranks' responses, one JSON object a
    line; called on every rank."""
    name = f"step-{step:06d}"
    records = ranks.gather_list([response_record(response, tokenizer) for response in responses])
    if ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        write_response_page(folder / f"{name}.html", most_scaled(responses), tokenizer, title=f"Step {step}")
        lines = (json.dumps(record, ensure_ascii=False) for record in records)
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
