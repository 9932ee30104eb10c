"""Settings of Rhythm."""

from dataclasses import dataclass, field, fields

from trl import GRPOConfig

from ..base.checkpoints import check_save_interval
from .credit import BOTTOM_SCHEMES, PRESET_FAI_HORIZON, PRESET_GAMMA_SIGN, SCHEMES, CreditOptions
from .reward import RhythmRewardOptions


_PER_TOKEN_LOSSES = ("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo")
_CHOICES = {
    "scheme": SCHEMES + BOTTOM_SCHEMES,
    "head_scope": ("batch", "sequence", "calibration"),
    "reward_head_scope": ("calibration", "batch", "sequence"),
    "head_pool": ("middle", "all"),
    "fai_tail": ("undefined", "zero", "nearest"),
    "delta_mode": ("abs", "drop"),
    "intro_mode": ("argmax_delta", "argmax_waad"),
    "overlap": ("additive", "max", "overwrite"),
    "gamma_sign": ("both", "pos", "neg"),
    "gamma_renorm": ("none", "mean1"),
    "reward_mode": ("split", "total", "token"),
    "reward_gate": ("always", "correct_only"),
    "reward_norm": ("token_mean", "chunk_mean", "sum"),
    "reward_segment": ("waad", "newline"),
}
_PRESETS = {
    name: {
        "scheme": "coupled",
        "rhythm_lambda": 0.0,
        "gamma_sign": PRESET_GAMMA_SIGN[name],
        "fai_max_distance": PRESET_FAI_HORIZON[name][1],
    }
    for name in PRESET_GAMMA_SIGN
}
_PRESETS["rhythm_reward"] = _PRESETS["paper_v2"] | {"scheme": "none", "rhythm_lambda": 0.1}


@dataclass
class RhythmConfig(GRPOConfig):
    r"""
    Configuration class for [`RhythmTrainer`].

    Holds the parameters of preplan-and-anchor credit ([Attention Illuminates LLM
    Reasoning](https://huggingface.co/papers/2510.13554)) and of the rhythm reward. All other parameters are those of
    [`~trl.GRPOConfig`], with its defaults; `recipes/rhythm_4b.py` has the paper's.

    Parameters:
        > Parameters that control what is done

        preset (`str`, *optional*, defaults to `"paper_v2"`):
            Sets `scheme`, `rhythm_lambda`, `gamma_sign` and `fai_max_distance` where they are not given: `"paper_v2"`
            (coupled credit, advantages of both signs, horizon 100), `"paper_v1"` (positive advantages only, horizon
            50) or `"rhythm_reward"` (no credit factors, `rhythm_lambda=0.1`).
        scheme (`str`, *optional*, defaults to that of the preset):
            Which tokens get more credit: `"none"`, `"local"` (preplan tokens), `"global"` (anchors), `"coupled"`, the
            baselines `"random"` and `"entropy"`, or the lowest instead of the highest values: `"local_bottom"`,
            `"global_bottom"`, `"coupled_bottom"`, `"entropy_bottom"`.
        rhythm_lambda (`float`, *optional*, defaults to that of the preset):
            Weight λ of the rhythm reward. At `0` with scheme `"none"` the trainer is [`~trl.GRPOTrainer`] to the bit
            and reads no attention.

        > Parameters that control the signals

        head_scope (`str`, *optional*, defaults to `"batch"`):
            Over what heads are ranked for credit: `"batch"` (all tokens of the generation batch on all ranks),
            `"sequence"` (each response), or `"calibration"` (fixed from the policy's first responses; until then all
            factors are 1).
        reward_head_scope (`str`, *optional*, defaults to `"calibration"`):
            The same for the rhythm reward. `"batch"` and `"sequence"` cost one more forward.
        calibration_responses (`int`, *optional*, defaults to `64`):
            Responses that a calibration takes at least.
        calibration_refresh (`int`, *optional*, defaults to `0`):
            Generation batches after which heads are calibrated anew; `0`: never.
        head_pool (`str`, *optional*, defaults to `"middle"`):
            Layers whose heads are ranked: `"middle"` (five in the middle third) or `"all"`.
        head_fraction (`float`, *optional*, defaults to `0.3`):
            Share of the heads in the local and in the global set.
        waad_window (`int`, *optional*, defaults to `10`):
            W of WAAD, in tokens.
        fai_min_distance (`int`, *optional*, defaults to `10`):
            Least distance H_lo of FAI, in tokens.
        fai_max_distance (`int`, *optional*, defaults to that of the preset):
            Greatest distance H_hi of FAI, in tokens; `-1` reaches to the end of the response.
        fai_tail (`str`, *optional*, defaults to `"undefined"`):
            FAI of the last `fai_min_distance` tokens: `"undefined"` (never selected), `"zero"`, or `"nearest"` (the
            attention of the last row).
        row_offset (`int`, *optional*, defaults to `0`):
            Row that belongs to a token: `0`, its own, or `-1`, the one that generates it.

        > Parameters that control the credit factors

        amplification (`float`, *optional*, defaults to `1.5`):
            Factor of a selected token (γ_amp).
        top_fraction (`float`, *optional*, defaults to `0.4`):
            Share of a response's tokens that is selected (q).
        delta_mode (`str`, *optional*, defaults to `"abs"`):
            Change of WAAD that makes a preplan token: `"abs"` or `"drop"` (falls only).
        intro_mode (`str`, *optional*, defaults to `"argmax_delta"`):
            Which token before a dominated anchor shares its credit: `"argmax_delta"` or `"argmax_waad"`.
        alpha (`float`, *optional*, defaults to `0.5`):
            Share of a dominated anchor's bonus that goes to its introductory token (α).
        lookback (`int`, *optional*, defaults to `3`):
            Tokens before an anchor in which a recent WAAD peak is sought (k).
        tau_waad (`float`, *optional*, defaults to `0.5`):
            Quantile of the response's WAAD that a dominated anchor must not exceed.
        tau_delta (`float`, *optional*, defaults to `1 - top_fraction`):
            Quantile of the response's change of WAAD that the lookback must reach.
        overlap (`str`, *optional*, defaults to `"additive"`):
            Factor of a token that is both anchor and introductory token: `"additive"`, `"max"` or `"overwrite"`.
        gamma_sign (`str`, *optional*, defaults to that of the preset):
            Advantages that are scaled: `"both"`, `"pos"` or `"neg"`.
        gamma_renorm (`str`, *optional*, defaults to `"none"`):
            `"mean1"` divides the factors by their mean over the response.
        skip_punctuation (`bool`, *optional*, defaults to `False`):
            Whether special tokens, punctuation and white space are never selected.

        > Parameters that control the rhythm reward

        reward_mode (`str`, *optional*, defaults to `"split"`):
            `"split"` (rhythm normalised on its own and added to the advantage), `"total"` (added to the task reward
            before normalising) or `"token"` (each token gets the reward of its chunk).
        reward_gate (`str`, *optional*, defaults to `"always"`):
            `"correct_only"` gives wrong answers no rhythm reward.
        reward_norm (`str`, *optional*, defaults to `"token_mean"`):
            A response's value: `"token_mean"`, `"chunk_mean"` or `"sum"` over chunks, which grows with length.
        reward_segment (`str`, *optional*, defaults to `"waad"`):
            Where chunks begin: at `"waad"` peaks or after a `"newline"`.
        reward_rank (`bool`, *optional*, defaults to `True`):
            Whether breadth and concentration enter as ranks within the response, or as values.
        sink_tokens (`int`, *optional*, defaults to `1`):
            First tokens of a sequence that breadth leaves out.
        success_threshold (`float`, *optional*, defaults to `0.5`):
            A completion counts as correct if its weighted reward is at least this.
    """

    preset: str = field(
        default="paper_v2", metadata={"help": "'paper_v2', 'paper_v1' or 'rhythm_reward'; see the fields it sets."}
    )
    scheme: str | None = field(default=None, metadata={"help": "Which tokens get more credit. Default: the preset's."})
    rhythm_lambda: float | None = field(
        default=None, metadata={"help": "Weight λ of the rhythm reward. Default: the preset's (0 for the paper's)."}
    )
    head_scope: str = field(
        default="batch", metadata={"help": "Heads ranked per 'batch', 'sequence' or 'calibration', for credit."}
    )
    reward_head_scope: str = field(
        default="calibration", metadata={"help": "The same for the rhythm reward; 'calibration' fixes the heads."}
    )
    calibration_responses: int = field(default=64, metadata={"help": "Responses that a calibration takes at least."})
    calibration_refresh: int = field(
        default=0, metadata={"help": "Generation batches after which heads are calibrated anew; 0: never."}
    )
    head_pool: str = field(default="middle", metadata={"help": "Layers whose heads are ranked: 'middle' or 'all'."})
    head_fraction: float = field(default=0.3, metadata={"help": "Share of the heads in each set."})
    waad_window: int = field(default=10, metadata={"help": "W of WAAD, in tokens."})
    fai_min_distance: int = field(default=10, metadata={"help": "Least distance of FAI, in tokens (H_lo)."})
    fai_max_distance: int | None = field(
        default=None, metadata={"help": "Greatest distance of FAI (H_hi); -1: to the end. Default: the preset's."}
    )
    fai_tail: str = field(
        default="undefined", metadata={"help": "FAI of the last tokens: 'undefined', 'zero' or 'nearest'."}
    )
    row_offset: int = field(default=0, metadata={"help": "Row of a token: 0, its own; -1, the one that generates it."})
    amplification: float = field(default=1.5, metadata={"help": "Factor of a selected token (γ_amp)."})
    top_fraction: float = field(default=0.4, metadata={"help": "Share of the tokens that is selected (q)."})
    delta_mode: str = field(default="abs", metadata={"help": "Change of WAAD: 'abs' or 'drop'."})
    intro_mode: str = field(
        default="argmax_delta", metadata={"help": "Introductory token: 'argmax_delta' or 'argmax_waad'."}
    )
    alpha: float = field(default=0.5, metadata={"help": "Share of an anchor's bonus for its introductory token (α)."})
    lookback: int = field(default=3, metadata={"help": "Tokens before an anchor that may introduce it (k)."})
    tau_waad: float = field(
        default=0.5, metadata={"help": "Quantile of WAAD that a dominated anchor must not exceed."}
    )
    tau_delta: float | None = field(
        default=None, metadata={"help": "Quantile of the change of WAAD before it. Default: 1 - top_fraction."}
    )
    overlap: str = field(
        default="additive", metadata={"help": "Anchor and introductory at once: 'additive', 'max' or 'overwrite'."}
    )
    gamma_sign: str | None = field(
        default=None, metadata={"help": "Advantages scaled: 'both', 'pos' or 'neg'. Default: the preset's."}
    )
    gamma_renorm: str = field(default="none", metadata={"help": "'mean1' divides the factors by their mean."})
    skip_punctuation: bool = field(
        default=False, metadata={"help": "Never select special tokens, punctuation and white space."}
    )
    reward_mode: str = field(default="split", metadata={"help": "How λ enters: 'split', 'total' or 'token'."})
    reward_gate: str = field(default="always", metadata={"help": "'correct_only': no rhythm for wrong answers."})
    reward_norm: str = field(
        default="token_mean", metadata={"help": "A response's value: 'token_mean', 'chunk_mean' or 'sum'."}
    )
    reward_segment: str = field(default="waad", metadata={"help": "Where chunks begin: 'waad' or 'newline'."})
    reward_rank: bool = field(default=True, metadata={"help": "Use ranks within the response instead of values."})
    sink_tokens: int = field(default=1, metadata={"help": "First tokens that breadth leaves out."})
    success_threshold: float = field(
        default=0.5, metadata={"help": "A completion is correct if its weighted reward is at least this."}
    )

    def __post_init__(self):
        if self.preset not in _PRESETS:
            raise ValueError(f"preset={self.preset!r} is unknown; set it to one of {', '.join(_PRESETS)}.")
        for name, value in _PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self._check_values()
        super().__post_init__()
        self._check_support()
        check_save_interval(self)

    @property
    def reads_attention(self) -> bool:
        """Whether the settings need the model's attention."""
        return self.rhythm_lambda > 0 or self.credit_reads_attention

    @property
    def credit_reads_attention(self) -> bool:
        """Whether the credit scheme selects tokens by attention."""
        return self.scheme.removesuffix("_bottom") in ("local", "global", "coupled")

    @property
    def calibrates(self) -> bool:
        """Whether head sets are fixed from the policy's first responses."""
        for_credit = self.credit_reads_attention and self.head_scope == "calibration"
        return for_credit or (self.rhythm_lambda > 0 and self.reward_head_scope == "calibration")

    @property
    def horizon(self) -> tuple[int, int | None]:
        """(H_lo, H_hi), `None` for the end of the response."""
        return self.fai_min_distance, None if self.fai_max_distance == -1 else self.fai_max_distance

    def credit_options(self) -> CreditOptions:
        own = {f.name: getattr(self, f.name) for f in fields(CreditOptions) if f.name != "renorm"}
        return CreditOptions(renorm=self.gamma_renorm, **own)

    def reward_options(self) -> RhythmRewardOptions:
        return RhythmRewardOptions(rank=self.reward_rank, norm=self.reward_norm, segment=self.reward_segment)

    def _check_values(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; set it to one of {', '.join(allowed)}.")
        least = {"rhythm_lambda": 0.0, "calibration_responses": 1, "calibration_refresh": 0, "waad_window": 1}
        least |= {"fai_min_distance": 0, "amplification": 1.0, "lookback": 1, "sink_tokens": 0}
        for name, bound in least.items():
            if not bound <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} is out of range; set it to at least {bound}.")
        for name in ("top_fraction", "alpha", "tau_waad", "tau_delta"):
            if getattr(self, name) is not None and not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} is no share; set it to a number from 0 to 1.")
        if not 0.0 < self.head_fraction <= 1.0:
            raise ValueError(f"head_fraction={self.head_fraction} must lie in (0, 1]; published: 0.3.")
        if self.fai_max_distance != -1 and self.fai_max_distance < self.fai_min_distance:
            raise ValueError(
                f"fai_max_distance={self.fai_max_distance} is below fai_min_distance={self.fai_min_distance}; raise "
                "it, or set it to -1 for the end of the response."
            )
        if self.row_offset not in (0, -1):
            raise ValueError(f"row_offset={self.row_offset} is unknown; set it to 0 or -1.")
        if self.row_offset == -1 and self.waad_window < 2:
            raise ValueError(
                f"waad_window={self.waad_window} with row_offset=-1 makes WAAD 1 everywhere; set waad_window to 2 or "
                "more."
            )
        if self.row_offset == -1 and self.rhythm_lambda > 0:
            raise ValueError(
                f"row_offset=-1 does not go with rhythm_lambda={self.rhythm_lambda}: the rhythm reward is defined on "
                "each token's own row; set row_offset to 0."
            )

    def _check_support(self) -> None:
        """Refuse what does not take advantages per token, or no rhythm reward."""
        per_token = self.scheme != "none" or (self.rhythm_lambda > 0 and self.reward_mode == "token")
        if per_token and self.loss_type not in _PER_TOKEN_LOSSES:
            raise ValueError(
                f"loss_type={self.loss_type!r} does not take advantages per token; set it to one of "
                f"{', '.join(_PER_TOKEN_LOSSES)} (the paper's mean per response is 'grpo'), or set scheme='none'."
            )
        if per_token and self.importance_sampling_level != "token":
            raise ValueError(
                f"importance_sampling_level={self.importance_sampling_level!r} does not go with advantages per token; "
                "set it to 'token', or set scheme='none'."
            )
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
