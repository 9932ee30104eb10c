"""Which attention heads AttnPO reads: known ones, a heads file, or a list.

A head is a pair [layer, head], both counted from 0. `recipes/find_key_focus_heads.py` finds the heads of a model and
writes a heads file.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


Head = tuple[int, int]

DISCOVERY_COMMAND = "python recipes/find_key_focus_heads.py --model {model} --data FILE.jsonl"

KNOWN_HEADS: dict[str, tuple[Head, ...]] = {
    "DeepSeek-R1-Distill-Qwen-1.5B": ((16, 2), (20, 9), (23, 2)),
    "DeepSeek-R1-Distill-Qwen-7B": ((16, 14), (19, 22), (21, 5)),
}
"""Heads by the last part of a model's name.

Those of the 1.5B model are the ones the published training script uses. Which three the 7B model was trained with is
not published: these are the first of the nine that the paper's map of heads shows above 0.90 step ranking accuracy
([16,14] [19,22] [21,5] [22,3] [22,4] [22,6] [22,7] [22,22] [23,13]). Run the discovery to choose three by accuracy.
"""


@dataclass(frozen=True)
class KeyFocusHeads:
    """The content of a heads file.

    Attributes:
        model_name: Model the heads were found in.
        heads: Pairs (layer, head), best first.
        sra: Step ranking accuracy of each, in [0, 1]; empty if unknown.
        settings: What the discovery ran with, for the record.
    """

    model_name: str
    heads: tuple[Head, ...]
    sra: tuple[float, ...] = ()
    settings: dict = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "heads", parse_heads(self.heads))
        object.__setattr__(self, "sra", tuple(float(value) for value in self.sra))
        if self.sra and len(self.sra) != len(self.heads):
            raise ValueError(f"sra has {len(self.sra)} values for {len(self.heads)} heads: give one per head, or none")
        if not all(0.0 <= value <= 1.0 for value in self.sra):
            raise ValueError(f"sra={list(self.sra)} must lie in [0, 1]")


def save_heads(path: str | Path, heads: KeyFocusHeads) -> None:
    """Write a heads file (JSON)."""
    Path(path).write_text(json.dumps(asdict(heads), indent=2) + "\n", encoding="utf-8")


def load_heads(path: str | Path) -> KeyFocusHeads:
    """Read a heads file.

    Raises:
        ValueError: It is no JSON object with `model_name` and `heads`, or a field is malformed.
        FileNotFoundError: There is no such file.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"heads file {path} is not JSON: {error}") from error
    known = {"model_name", "heads", "sra", "settings"}
    if not isinstance(record, dict) or not {"model_name", "heads"} <= set(record) <= known:
        raise ValueError(f"heads file {path}: expected an object with model_name and heads (sra, settings)")
    try:
        return KeyFocusHeads(**record)
    except (TypeError, ValueError) as error:
        raise ValueError(f"heads file {path}: {error}") from error


def parse_heads(heads: Sequence) -> tuple[Head, ...]:
    """Check that `heads` is a non-empty list of distinct pairs of non-negative integers.

    Raises:
        ValueError: It is not.
    """
    if isinstance(heads, str) or not isinstance(heads, Sequence) or not heads:
        raise ValueError(f"heads={heads!r} must be a non-empty list of [layer, head] pairs")
    parsed = []
    for pair in heads:
        is_pair = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
        if not is_pair or not all(type(index) is int and index >= 0 for index in pair):
            raise ValueError(f"heads contain {pair!r}: each must be a pair [layer, head] of integers from 0 on")
        parsed.append((pair[0], pair[1]))
    if len(set(parsed)) < len(parsed):
        raise ValueError(f"heads={[list(pair) for pair in parsed]} name a head twice: remove the repetition")
    return tuple(parsed)


def resolve_heads(heads: Sequence | str | Path | None, model_name: str, num_layers: int, num_heads: int) -> list[Head]:
    """Heads to read in a model.

    Args:
        heads: A list of [layer, head] pairs, the path of a heads file, the name of a known model (for one tuned from
            it), or None for the known heads of this model.
        model_name: Name or path of the model. Known models are recognised by its last part.
        num_layers: Layers of the model.
        num_heads: Attention (query) heads in a layer.

    Returns:
        Pairs (layer, head).

    Raises:
        ValueError: The heads are malformed or not in the model, or none are given for a model without known ones.
    """
    command = DISCOVERY_COMMAND.format(model=model_name)
    if heads is None:
        found = KNOWN_HEADS.get(Path(model_name).name)
        if found is None:
            raise ValueError(
                f"heads=None, but no key-focus heads are known for {model_name!r}: find them with `{command}`"
            )
    elif isinstance(heads, str | Path):
        known = KNOWN_HEADS.get(Path(heads).name)
        if known is None and not Path(heads).exists():
            raise ValueError(
                f"heads={str(heads)!r} is neither a file nor a model with known heads ({', '.join(KNOWN_HEADS)}): "
                f"find the heads of the model with `{command}`"
            )
        found = known or load_heads(heads).heads
    else:
        found = parse_heads(heads)
    for layer, head in found:
        if layer >= num_layers or head >= num_heads:
            raise ValueError(
                f"heads contain [{layer}, {head}], but {model_name!r} has {num_layers} layers of {num_heads} heads "
                f"(counted from 0): find its heads with `{command}`"
            )
    return list(found)
