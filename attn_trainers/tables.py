"""Tables in Markdown."""

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table with aligned columns."""
    cells = [list(map(str, header)), *[list(map(str, row)) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def cell(text: str) -> str:
    """A text that fits a cell of a Markdown table: on one line, with nothing that ends the cell or reads as HTML."""
    for character, shown in {"&": "&amp;", "<": "&lt;", "|": "&#124;", "\n": "<br>"}.items():
        text = text.replace(character, shown)
    return text
