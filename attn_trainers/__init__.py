"""Reinforcement learning of reasoning models whose process signal is the model's own attention.

Three TRL trainers: `AttnRLTrainer` (arXiv 2509.26628), `AttnPOTrainer` (arXiv 2602.09953) and `RhythmTrainer`
(arXiv 2510.13554). They are imported on first use, so that the pure parts (`attn_trainers.attention`,
`attn_trainers.attnrl.trees`, ...) load without trl and vllm.
"""

import importlib


__version__ = "0.1.0"

_EXPORTS = {
    "AttnRLConfig": "attn_trainers.attnrl.config",
    "AttnRLTrainer": "attn_trainers.attnrl.trainer",
    "AttnPOConfig": "attn_trainers.attnpo.config",
    "AttnPOTrainer": "attn_trainers.attnpo.trainer",
    "RhythmConfig": "attn_trainers.rhythm.config",
    "RhythmTrainer": "attn_trainers.rhythm.trainer",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
