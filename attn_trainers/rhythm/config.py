"""Settings of Rhythm's trainer."""

from dataclasses import dataclass, field

from ..base.config import MethodConfig
from .method import RhythmCredit
from .options import RhythmOptions


@dataclass
class RhythmConfig(RhythmOptions, MethodConfig):
    r"""
    Configuration class for [`RhythmTrainer`]: the fields of [`RhythmOptions`] and those of [`~trl.GRPOConfig`], with
    its defaults but for one; `recipes/rhythm_4b.py` has the paper's.

    - `vllm_importance_sampling_mode="token_truncate"`: masking whole sequences, TRL's default, would drop a fifth to a
      third of long responses.
    """

    vllm_importance_sampling_mode: str = field(
        default="token_truncate", metadata={"help": "How the vLLM-to-trainer mismatch is corrected; see GRPOConfig."}
    )

    def __post_init__(self):
        RhythmOptions.__post_init__(self)
        MethodConfig.__post_init__(self)
        if self.scheme != "none" or (self.rhythm_lambda > 0 and self.reward_mode == "token"):
            self.check_per_token_advantages(", or set scheme='none'")
        if self.rhythm_lambda > 0 and self.num_generations < 2:
            raise ValueError(
                f"num_generations={self.num_generations} leaves rhythm nothing to compare; set it to at least 2."
            )
        if self.rhythm_lambda > 0 and self.reward_mode == "total":
            for name, value in {"scale_rewards": "group", "multi_objective_aggregation": "sum_then_normalize"}.items():
                if getattr(self, name) != value:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} is not how reward_mode='total' normalises; set {name} to "
                        f"{value!r}, or reward_mode to 'split'."
                    )

    def preflight(self, model_config, tokenizer, report):
        RhythmCredit(self).preflight(model_config, tokenizer, report)
