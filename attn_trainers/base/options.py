"""Checks of settings: each refuses a field with its name, its value and what to set."""

from collections.abc import Mapping, Sequence
from dataclasses import fields


def require_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        ValueError: naming field, value and choices.
    """
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; set it to one of {', '.join(map(str, allowed))}.")


def check_choices(settings: object, choices: Mapping[str, Sequence[object]]) -> None:
    """Refuse a field whose value is none of its choices.

    Raises:
        ValueError: naming field, value and choices.
    """
    for name, allowed in choices.items():
        require_choice(name, getattr(settings, name), allowed)


def check_least(settings: object, bounds: Mapping[str, float]) -> None:
    """Refuse a field below its bound, or infinite.

    Raises:
        ValueError: naming field, value and bound.
    """
    for name, bound in bounds.items():
        if not bound <= getattr(settings, name) < float("inf"):
            raise ValueError(f"{name}={getattr(settings, name)} is out of range; set it to at least {bound}.")


def check_shares(settings: object, names: Sequence[str], *, positive: bool = False) -> None:
    """Refuse a field that is no share in [0, 1], or with `positive` in (0, 1]; fields that are `None` are passed over.

    Raises:
        ValueError: naming field, value and range.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not (0.0 <= value <= 1.0 and (value > 0 or not positive)):
            interval = "(0, 1]" if positive else "[0, 1]"
            raise ValueError(f"{name}={value} is outside {interval}; set it to a share within.")


def changed_settings(settings: object, declared: type) -> dict[str, object]:
    """Values in `settings` of the fields of the dataclass `declared`, those left out that are their defaults."""
    values = {one.name: (getattr(settings, one.name), one.default) for one in fields(declared)}
    return {name: value for name, (value, default) in values.items() if value != default}
