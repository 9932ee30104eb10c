"""Rewards for mathematical reasoning, and the processes that grade.

`think_format_reward` and `get_soft_overlong_punishment` are TRL's own, for `reward_funcs=[...]` from one place.
"""

from .math import boxed_format_reward, math_accuracy, math_accuracy_reward, unverifiable_answers


_OF_TRL = ("get_soft_overlong_punishment", "think_format_reward")

__all__ = ["boxed_format_reward", "math_accuracy", "math_accuracy_reward", "unverifiable_answers", *_OF_TRL]


def __getattr__(name: str):
    if name in _OF_TRL:
        import trl.rewards

        return getattr(trl.rewards, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
