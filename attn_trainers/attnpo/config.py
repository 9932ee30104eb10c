"""Settings of AttnPO's trainer."""

from dataclasses import dataclass, field

from ..base.config import MethodConfig
from .method import AttnPOCredit
from .options import AttnPOOptions


@dataclass
class AttnPOConfig(AttnPOOptions, MethodConfig):
    r"""
    Configuration class for [`AttnPOTrainer`]: the fields of [`AttnPOOptions`] and those of [`~trl.GRPOConfig`], of
    which these have other defaults:

    - `num_generations=8`, `max_completion_length=16384`, `learning_rate=2e-6`, `lr_scheduler_type="constant"`,
      `weight_decay=0.01`, `delta=3.0` (dual clip), `loss_type="dapo"` (token mean).
    - `scale_rewards="none"`: advantages are leave-one-out, without a deviation.
    - `vllm_importance_sampling_mode="token_truncate"`: the published runs do not correct the difference between
      sampler and trainer; masking whole sequences, TRL's default, would drop long responses.
    """

    max_completion_length: int | None = field(default=16384, metadata={"help": "Tokens per completion at most."})
    learning_rate: float = field(default=2e-6, metadata={"help": "Learning rate of AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning-rate schedule."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    delta: float | None = field(default=3.0, metadata={"help": "Dual clip: bound of the ratio for A < 0."})
    scale_rewards: str = field(
        default="none", metadata={"help": "'none': leave-one-out advantages are not divided by a deviation."}
    )
    vllm_importance_sampling_mode: str = field(
        default="token_truncate", metadata={"help": "How the vLLM-to-trainer mismatch is corrected; see GRPOConfig."}
    )
    num_generations_eval: int | None = field(
        default=1, metadata={"help": "Number of completions per prompt in evaluation."}
    )

    def __post_init__(self):
        AttnPOOptions.__post_init__(self)
        MethodConfig.__post_init__(self)
        required = {
            "scale_rewards": ("none", "leave-one-out advantages are not divided by a deviation"),
            "multi_objective_aggregation": (
                "sum_then_normalize",
                "rewards are combined before the advantage is taken",
            ),
        }
        self.require(required, "AttnPO")
        self.check_per_token_advantages()

    def preflight(self, model_config, tokenizer, report):
        AttnPOCredit(self).preflight(model_config, tokenizer, report)
