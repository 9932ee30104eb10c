"""Files of JSON lines that a run which was cut off goes on with."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
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
    """Values of a file of JSON lines, blank lines passed over. Only a line feed ends a line: JSON strings may hold
    U+2028 and other characters that end lines elsewhere.

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
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
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


def digest_of(*parts: object) -> str:
    """Name of all that a stored result depends on."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def resumed(path: Path, keys: Sequence[str], compute: Callable[[list[int]], Iterator[tuple[int, dict]]]) -> list[dict]:
    """A record per key, those in the file as they are, the others computed and added to it.

    Args:
        path: JSON lines {"key": ..., "record": ...}; lines of other keys stay in it, unread.
        keys: what identifies each record.
        compute: given the indices of the missing ones, yields each with its record.
    """
    stored = {line["key"]: line["record"] for line in read_jsonl(path, repair=True)}
    missing = [i for i, key in enumerate(keys) if key not in stored]
    for i, record in compute(missing) if missing else ():
        append_jsonl(path, {"key": keys[i], "record": record})
        stored[keys[i]] = record
    return [stored[key] for key in keys]
