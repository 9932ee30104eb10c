"""AttnPO as a TRL trainer: length-penalised rewards, leave-one-out advantages, and step scales under TRL's loss."""

from ..base.card import paper
from ..base.credit_trainer import CreditTrainer
from .config import AttnPOConfig
from .method import AttnPOCredit


class AttnPOTrainer(CreditTrainer):
    """
    Trainer for AttnPO, which shortens reasoning by scaling each step's credit by the final answer's attention to it.

    [AttnPO](https://huggingface.co/papers/2602.09953) rewards correct responses for being short among the correct ones
    of their prompt, takes leave-one-out advantages, and scales them per reasoning step by the attention that a few
    key-focus heads pay from the final answer to the step: redundant steps of good responses lose credit, essential
    steps of long ones are spared. Wrong responses are not scaled. Evaluation is plain accuracy.

    Several reward functions combine as in [`~trl.GRPOTrainer`]; the one that is the correctness
    (`args.accuracy_reward`) must return 1 or 0, or `None` for a response it cannot score, and enters training with the
    length penalty.

    Args:
        model, reward_funcs, args, kwargs: as for [`~trl.GRPOTrainer`]; `args` is an [`AttnPOConfig`]. Tools and
            environments are not supported.

    Raises:
        ValueError: for settings that cannot be honoured; for a model without known heads, naming the command that
            finds them; in training, for a correctness that is neither 0 nor 1.
    """

    _tag_names = ["trl", "attnpo"]
    _name = "AttnPO"
    _paper = paper(
        "AttnPO: Attention-Guided Process Supervision for Efficient Reasoning",
        "2602.09953",
        "nie2026attnpo",
        2026,
        "Shuaiyi Nie and Siyu Ding and Wenyuan Zhang and Linhao Yu and Tianmeng Yang and Yao Chen and "
        "Weichong Yin and Yu Sun and Hua Wu and Tingwen Liu",
    )
    config_class = AttnPOConfig
    metric_prefix = "attnpo"

    @staticmethod
    def credit_of(args: AttnPOConfig) -> AttnPOCredit:
        return AttnPOCredit(args)
