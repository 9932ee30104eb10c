"""Rhythm as a TRL trainer: preplan-and-anchor credit factors and the rhythm reward on top of GRPO."""

from ..base.card import paper
from ..base.credit_trainer import CreditTrainer
from .config import RhythmConfig
from .method import RhythmCredit


class RhythmTrainer(CreditTrainer):
    """
    Trainer for preplan-and-anchor credit and the rhythm reward.

    [Attention Illuminates LLM Reasoning](https://huggingface.co/papers/2510.13554) multiplies each token's advantage
    by a factor that is larger on preplan tokens (where the model looks far back), on anchors (to which later tokens
    attend), or on both, coupled. Which heads are asked follows from how far back they look on the current batch. The
    rhythm reward, which is not in the paper, adds to the advantage how well a response's attention alternates between
    the two.

    With `scheme="none"` and `rhythm_lambda=0` this is [`~trl.GRPOTrainer`] to the bit. So it is in evaluation.

    Args:
        model, reward_funcs, args, kwargs: as for [`~trl.GRPOTrainer`]; `args` is a [`RhythmConfig`]. Tools and
            environments are not supported.

    Raises:
        ValueError: for settings that do not work together, naming field, value and fix.
    """

    _tag_names = ["trl", "rhythm"]
    _name = "Rhythm"
    _paper = paper(
        "Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained Policy Optimization",
        "2510.13554",
        "li2025attention",
        2025,
        "Yang Li and Zhichen Dong and Yuhan Sun and Weixun Wang and Shaopan Xiong and Yijia Luo and Jiashun "
        "Liu and Han Lu and Jiamang Wang and Wenbo Su and Bo Zheng and Junchi Yan",
    )
    config_class = RhythmConfig
    metric_prefix = "rhythm"

    @staticmethod
    def credit_of(args: RhythmConfig) -> RhythmCredit:
        return RhythmCredit(args)
