"""Which attention heads AttnPO reads: known ones, a heads file, or a list.

A head is a pair [layer, head], both counted from 0. `attn-trainers heads` finds the heads of a model and
writes a heads file.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from transformers import PretrainedConfig


Head = tuple[int, int]

DISCOVERY_COMMAND = "attn-trainers heads --model {model} --data FILE.jsonl"

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
        model_name: model the heads were found in.
        heads: pairs (layer, head), best first.
        sra: step ranking accuracy of each, in [0, 1]; empty if unknown.
        num_layers: layers of the model; None if unknown, as the three below.
        num_heads: attention (query) heads in a layer.
        fingerprint: `model_fingerprint` of the model.
        step_mode: how its thinking was cut into steps.
        label_source: who labelled the steps: a rule or a judge.
        criterion: pairs of steps that the heads were ranked by.
        settings: what the discovery ran with, for the record.
    """

    model_name: str
    heads: tuple[Head, ...]
    sra: tuple[float, ...] = ()
    num_layers: int | None = None
    num_heads: int | None = None
    fingerprint: str | None = None
    step_mode: str | None = None
    label_source: str | None = None
    criterion: str | None = None
    settings: dict = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "heads", parse_heads(self.heads))
        object.__setattr__(self, "sra", tuple(float(value) for value in self.sra))
        if self.sra and len(self.sra) != len(self.heads):
            raise ValueError(f"sra has {len(self.sra)} values for {len(self.heads)} heads: give one per head, or none")
        if not all(0.0 <= value <= 1.0 for value in self.sra):
            raise ValueError(f"sra={list(self.sra)} must lie in [0, 1]")

    def check_model(self, model_name: str, num_layers: int, num_heads: int, fingerprint: str | None = None) -> None:
        """Refuse a model of another shape than the heads were found in. What the file does not know is not checked.

        Raises:
            ValueError: layers, heads or the fingerprint differ.
        """
        known = (self.num_layers, self.num_heads, self.fingerprint if fingerprint else None)
        actual = (num_layers, num_heads, fingerprint)
        if any(a is not None and a != b for a, b in zip(known, actual, strict=True)):
            shapes = [
                f"{layers} x {heads} heads, fingerprint {mark}"
                for layers, heads, mark in ((self.num_layers, self.num_heads, self.fingerprint), actual)
            ]
            raise ValueError(
                f"were found in {self.model_name!r} ({shapes[0]}), and {model_name!r} is a model of another shape "
                f"({shapes[1]}); find its own heads with `{DISCOVERY_COMMAND.format(model=model_name)}`."
            )

    def check_step_mode(self, step_mode: str) -> None:
        """Refuse steps that are cut another way than those the heads were found on.

        Raises:
            ValueError: the modes differ.
        """
        if self.step_mode not in (None, step_mode):
            raise ValueError(
                f"were found with step_mode={self.step_mode!r}, and step_mode={step_mode!r} cuts other steps; set "
                f"step_mode={self.step_mode!r}, or find the heads again with --step_mode {step_mode}."
            )


def model_fingerprint(config: PretrainedConfig) -> str:
    """12 hexadecimal digits of a hash of what a model's heads are: its type and the shape of its attention.

    The same for a model and those tuned from it, whose heads rank alike; the vocabulary, which tuning may extend, has
    no part in it.
    """
    text = config.get_text_config()
    names = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "head_dim")
    shape = {name: getattr(text, name, None) for name in names}
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:12]


def save_heads(path: str | Path, heads: KeyFocusHeads) -> None:
    """Write a heads file (JSON)."""
    Path(path).write_text(json.dumps(asdict(heads), indent=2) + "\n", encoding="utf-8")


def load_heads(path: str | Path) -> KeyFocusHeads:
    """Read a heads file.

    Raises:
        ValueError: it is no JSON object with `model_name` and `heads`, or a field is malformed.
        FileNotFoundError: there is no such file.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"heads file {path} is not JSON: {error}") from error
    known = [field.name for field in fields(KeyFocusHeads)]
    if not isinstance(record, dict) or not {"model_name", "heads"} <= set(record) <= set(known):
        raise ValueError(
            f"heads file {path}: expected an object with model_name and heads (and {', '.join(known[2:])})"
        )
    try:
        return KeyFocusHeads(**record)
    except (TypeError, ValueError) as error:
        raise ValueError(f"heads file {path}: {error}") from error


def parse_heads(heads: Sequence) -> tuple[Head, ...]:
    """Check that `heads` is a non-empty list of distinct pairs of non-negative integers.

    Raises:
        ValueError: it is not.
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


def resolve_heads(
    heads: Sequence | str | Path | None,
    model_name: str,
    num_layers: int,
    num_heads: int,
    *,
    step_mode: str | None = None,
    fingerprint: str | None = None,
) -> list[Head]:
    """Heads to read in a model.

    Args:
        heads: a list of [layer, head] pairs, the path of a heads file, the name of a known model (for one tuned from
            it), or None for the known heads of this model.
        model_name: name or path of the model. Known models are recognised by its last part.
        num_layers: layers of the model.
        num_heads: attention (query) heads in a layer.
        step_mode: how the steps are cut that the heads are to rank; None leaves a heads file's mode unchecked.
        fingerprint: `model_fingerprint` of the model; None leaves that of a heads file unchecked.

    Returns:
        Pairs (layer, head).

    Raises:
        ValueError: the heads are malformed or not in the model, a heads file belongs to a model of another shape or to
            another step mode, or none are given for a model without known ones.
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
        found = known or _heads_of_file(heads, model_name, (num_layers, num_heads, fingerprint), step_mode)
    else:
        found = parse_heads(heads)
    for layer, head in found:
        if layer >= num_layers or head >= num_heads:
            raise ValueError(
                f"heads contain [{layer}, {head}], but {model_name!r} has {num_layers} layers of {num_heads} heads "
                f"(counted from 0): find its heads with `{command}`"
            )
    return list(found)


def _heads_of_file(path: str | Path, model_name: str, shape: tuple, step_mode: str | None) -> tuple[Head, ...]:
    content = load_heads(path)
    try:
        content.check_model(model_name, *shape)
        if step_mode is not None:
            content.check_step_mode(step_mode)
    except ValueError as error:
        raise ValueError(f"heads={str(path)!r} {error}") from None
    return content.heads
