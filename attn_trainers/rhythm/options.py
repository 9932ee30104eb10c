"""What a user sets of the rhythm credit and the rhythm reward, whatever trainer they run in; each field once."""

from dataclasses import dataclass, field, fields
from typing import Any, Self

from ..base.options import check_choices, check_least, check_shares


SCHEMES = ("none", "local", "global", "coupled", "random", "entropy")
BOTTOM_SCHEMES = ("local_bottom", "global_bottom", "coupled_bottom", "entropy_bottom")
# The paper's two versions differ in the advantages that are scaled and in FAI's horizon (its greatest distance).
PRESETS: dict[str, dict[str, object]] = {
    "paper_v2": {"scheme": "coupled", "rhythm_lambda": 0.0, "gamma_sign": "both", "fai_max_distance": 100},
    "paper_v1": {"scheme": "coupled", "rhythm_lambda": 0.0, "gamma_sign": "pos", "fai_max_distance": 50},
    "rhythm_reward": {"scheme": "none", "rhythm_lambda": 0.1, "gamma_sign": "both", "fai_max_distance": 100},
}


@dataclass
class CreditOptions:
    """How factors are formed; `RhythmOptions` tells of each field.

    Raises:
        ValueError: for a field outside its range, naming field, value and fix.
    """

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
    gamma_sign: str = field(default="both", metadata={"help": "Advantages that are scaled: 'both', 'pos' or 'neg'."})
    renorm: str = field(default="none", metadata={"help": "'mean1' divides the factors by their mean."})

    def __post_init__(self) -> None:
        check_choices(
            self,
            {
                "delta_mode": ("abs", "drop"),
                "intro_mode": ("argmax_delta", "argmax_waad"),
                "overlap": ("additive", "max", "overwrite"),
                "renorm": ("none", "mean1"),
                "gamma_sign": ("both", "pos", "neg"),
            },
        )
        check_least(self, {"amplification": 1.0, "lookback": 1})
        check_shares(self, ["top_fraction", "alpha", "tau_waad", "tau_delta"])

    @property
    def tau_delta_level(self) -> float:
        """Level of the quantile of the response's change of WAAD that the lookback must reach."""
        return 1.0 - self.top_fraction if self.tau_delta is None else self.tau_delta

    @classmethod
    def of(cls, settings: Any) -> Self:
        """These fields of any settings that have them."""
        return cls(**{one.name: getattr(settings, one.name) for one in fields(cls)})


@dataclass
class RhythmRewardOptions:
    """How a response's rhythm is measured; `RhythmOptions` tells of each field.

    Raises:
        ValueError: for a field outside its range, naming field, value and fix.
    """

    reward_norm: str = field(
        default="token_mean", metadata={"help": "A response's value: 'token_mean', 'chunk_mean' or 'sum'."}
    )
    reward_segment: str = field(default="waad", metadata={"help": "Where chunks begin: 'waad' or 'newline'."})
    reward_rank: bool = field(default=True, metadata={"help": "Use ranks within the response instead of values."})

    def __post_init__(self) -> None:
        choices = {"reward_norm": ("token_mean", "chunk_mean", "sum"), "reward_segment": ("waad", "newline")}
        check_choices(self, choices)


@dataclass
class RhythmOptions(CreditOptions, RhythmRewardOptions):
    r"""
    Settings of preplan-and-anchor credit ([Attention Illuminates LLM
    Reasoning](https://huggingface.co/papers/2510.13554)) and of the rhythm reward.

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
        renorm (`str`, *optional*, defaults to `"none"`):
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

    Raises:
        ValueError: for a field outside its range or fields that do not go together, naming field, value and fix.
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
    gamma_sign: str | None = field(
        default=None, metadata={"help": "Advantages scaled: 'both', 'pos' or 'neg'. Default: the preset's."}
    )
    skip_punctuation: bool = field(
        default=False, metadata={"help": "Never select special tokens, punctuation and white space."}
    )
    reward_mode: str = field(default="split", metadata={"help": "How λ enters: 'split', 'total' or 'token'."})
    reward_gate: str = field(default="always", metadata={"help": "'correct_only': no rhythm for wrong answers."})
    sink_tokens: int = field(default=1, metadata={"help": "First tokens that breadth leaves out."})
    success_threshold: float = field(
        default=0.5, metadata={"help": "A completion is correct if its weighted reward is at least this."}
    )

    def __post_init__(self) -> None:
        check_choices(self, {"preset": tuple(PRESETS)})
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        CreditOptions.__post_init__(self)
        RhythmRewardOptions.__post_init__(self)
        check_choices(
            self,
            {
                "scheme": SCHEMES + BOTTOM_SCHEMES,
                "head_scope": ("batch", "sequence", "calibration"),
                "reward_head_scope": ("calibration", "batch", "sequence"),
                "head_pool": ("middle", "all"),
                "fai_tail": ("undefined", "zero", "nearest"),
                "reward_mode": ("split", "total", "token"),
                "reward_gate": ("always", "correct_only"),
                "row_offset": (0, -1),
            },
        )
        least = {"rhythm_lambda": 0.0, "calibration_responses": 1, "calibration_refresh": 0, "waad_window": 1}
        check_least(self, least | {"fai_min_distance": 0, "sink_tokens": 0})
        check_shares(self, ["head_fraction"], positive=True)
        self._check_combinations()

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

    def _check_combinations(self) -> None:
        if self.fai_max_distance != -1 and self.fai_max_distance < self.fai_min_distance:
            raise ValueError(
                f"fai_max_distance={self.fai_max_distance} is below fai_min_distance={self.fai_min_distance}; raise "
                "it, or set it to -1 for the end of the response."
            )
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
