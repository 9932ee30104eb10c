"""Files of JSON lines that a run which was cut off goes on with."""

import json
from pathlib import Path


def drop_torn_line(path: str | Path) -> bool:
    """Remove a last line that a crash cut off, so that the next one starts on a line of its own.

    Returns:
        Whether there was one. A file that does not exist has none.
    """
    path = Path(path)
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    torn = len(whole) < len(content)
    if torn:
        path.write_bytes(whole)
    return torn


def read_jsonl(path: str | Path, *, repair: bool = False) -> list[dict]:
    """Values of a file of JSON lines, blank lines passed over.

    Args:
        path: the file; none if it does not exist and `repair` is set.
        repair: `drop_torn_line` first.

    Raises:
        ValueError: a line is malformed; the message names it.
    """
    path = Path(path)
    if repair:
        drop_torn_line(path)
        if not path.exists():
            return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            if line.strip():
                records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is no JSON object ({error}); correct or remove it.") from error
    return records


def append_jsonl(path: Path, record: dict) -> None:
    """Add one line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
