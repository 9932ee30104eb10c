"""A page about one completion: which tokens are pushed up, which down, and how far."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import torch
from torch import Tensor

from ..token_spans import token_char_spans
from .credit import SignalPass
from .exhibits import Page


_STYLE = """
body { font: 15px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24;
  background: #fff; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; } .facts { color: #57606a; }
.text { white-space: pre-wrap; margin: 0; font: inherit; overflow-wrap: anywhere; }
.legend span { padding: .15rem .6rem; margin-right: .6rem; }
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head><body>
<h1>{title}</h1>
<p class="facts">{facts}</p>
<p class="legend"><span style="background:{up}">pushed up</span><span style="background:{down}">pushed down</span>
<span>the fuller the colour, the more; point at a text for its advantage and factor</span></p>
<h2>Prompt</h2><pre class="text">{prompt}</pre>
<h2>Completion</h2><pre class="text">{completion}</pre>
</body></html>
"""
LONGEST_MARKDOWN = 4000  # characters of the completion in Markdown


@dataclass(frozen=True)
class CreditedRow:
    """One completion of n tokens with what its tokens are trained on.

    Attributes:
        prompt_ids, completion_ids: tokens.
        advantages: (n,).
        factors: (n,), 1 without a credit method.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    advantages: list[float]
    factors: list[float]

    def page(self, tokenizer, title: str) -> Page:
        return credit_page(tokenizer, self.prompt_ids, self.completion_ids, self.advantages, self.factors, title)


def telling_row(
    passes: Sequence[SignalPass], advantages: Sequence[Tensor], factors: Sequence[Tensor] | None
) -> CreditedRow:
    """The row whose tokens differ most in advantage times factor; of several the one with the largest.

    Args:
        passes: rows of a generation batch.
        advantages: per pass (B, 1) or (B, T).
        factors: per pass (B, T), `None` for 1 everywhere.
    """
    best, found = None, None
    for index, signal in enumerate(passes):
        shape = (len(signal.batch.input_ids), signal.batch.completion_width)
        values = advantages[index].cpu().expand(shape)
        scales = torch.ones(shape) if factors is None else factors[index].cpu()
        for row, length in enumerate(map(len, signal.batch.completion_ids)):
            pushes = (values[row] * scales[row])[:length]
            key = ((pushes.max() - pushes.min()).item(), pushes.abs().max().item()) if length else (-1.0, 0.0)
            if best is None or key > best:
                best, found = key, (signal.batch, row, values[row, :length].tolist(), scales[row, :length].tolist())
    batch, row, values, scales = found
    return CreditedRow(batch.prompt_ids[row], batch.completion_ids[row], values, scales)


def shade(push: float) -> str:
    """Background of a token: green above 0, red below, white at 0, full at -1 and 1."""
    strength = min(abs(push), 1.0)
    red, green, blue = (45, 155, 95) if push > 0 else (210, 80, 60)
    return "#" + "".join(f"{round(255 - 0.75 * strength * (255 - level)):02x}" for level in (red, green, blue))


def credit_page(
    tokenizer,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    advantages: Sequence[float],
    factors: Sequence[float],
    title: str,
    facts: Sequence[str] = (),
) -> Page:
    """Page of a completion whose tokens are shaded by advantage times factor, over the largest of the completion.

    Args:
        tokenizer: of the model.
        prompt_ids: tokens of the prompt.
        completion_ids: n tokens.
        advantages: (n,) advantage of each token.
        factors: (n,) factor of a credit method; 1 without one.
        title: heading.
        facts: what else is told of the completion.
    """
    text, spans = token_char_spans(tokenizer, [int(token) for token in completion_ids])
    pushes = [advantage * factor for advantage, factor in zip(advantages, factors, strict=True)]
    largest = max(map(abs, pushes), default=0.0) or 1.0
    pieces, markdown = [], []
    for start, end, first in _runs(spans, list(zip(advantages, factors, strict=True))):
        told = f"advantage {advantages[first]:+.3f}, factor {factors[first]:.2f}"
        colour = shade(pushes[first] / largest)
        pieces.append(f'<span style="background:{colour}" title="{told}">{escape(text[start:end])}</span>')
        markdown.append(f"`{advantages[first]:+.2f} × {factors[first]:.2f}` {escape(text[start:end])}")
    told = escape(" · ".join([*facts, f"{len(completion_ids)} tokens"]))
    html = _PAGE.format(
        title=escape(title),
        style=_STYLE,
        facts=told,
        up=shade(0.6),
        down=shade(-0.6),
        prompt=escape(tokenizer.decode(list(prompt_ids))),
        completion="".join(pieces),
    )
    shown = "\n\n".join(markdown)
    shown = shown if len(shown) <= LONGEST_MARKDOWN else f"{shown[:LONGEST_MARKDOWN]} …"
    return Page(html, f"**{escape(title)}**: {told}\n\n{shown}")


def _runs(spans: Sequence[tuple[int, int]], values: Sequence[object]) -> list[tuple[int, int, int]]:
    """Start and end in the text, and the first token, of each run of tokens with the same values.

    Tokens whose bytes make up one character between them go together.
    """
    runs: list[tuple[int, int, int]] = []
    for token, ((start, end), value) in enumerate(zip(spans, values, strict=True)):
        if runs and (values[runs[-1][2]] == value or start < runs[-1][1]):
            runs[-1] = (runs[-1][0], max(end, runs[-1][1]), runs[-1][2])
        else:
            runs.append((start, end, token))
    return runs
