"""Per-token credit factors from the preplan-and-anchor rhythm (arXiv 2510.13554v2, sections 4 and 5, Eq 14-19).

A response of n tokens comes with two signals: WAAD (how far back its tokens look, high where the model plans) and FAI
(how much later tokens attend to a token, high at anchors). A scheme turns them into factors gamma_t that multiply the
response's advantage (Eq 13). Selections are made within each response.

What the paper leaves open, and what is done here: the exact count of a top selection, ties, the thresholds of locally
dominated anchors, the lookback and the choice of the introductory token. Each is a field of `CreditOptions`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


SCHEMES = ("none", "local", "global", "coupled", "random", "entropy")
BOTTOM_SCHEMES = ("local_bottom", "global_bottom", "coupled_bottom", "entropy_bottom")
# The paper's two versions differ in the advantages that are scaled and in FAI's horizon (least, greatest distance).
PRESET_GAMMA_SIGN = {"paper_v2": "both", "paper_v1": "pos"}
PRESET_FAI_HORIZON = {"paper_v2": (10, 100), "paper_v1": (10, 50)}


def _require_choice(field: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{field} is {value!r}: choose one of {', '.join(choices)}")


def _require_share(field: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{field} is {value!r}: give a number between 0 and 1")


@dataclass(frozen=True)
class CreditOptions:
    """How factors are formed.

    Args:
        amplification: gamma_amp, factor of a selected token, at least 1 (paper: 1.5).
        top_fraction: q, share of a response's tokens that is selected (paper: 0.4).
        delta_mode: change of WAAD from a token to the next: "abs" (Eq 14) or "drop" (falls only).
        intro_mode: the token before a dominated anchor that shares its credit: "argmax_delta" or "argmax_waad".
        alpha: share of a dominated anchor's bonus that goes to its introductory token (Eq 19).
        lookback: k, number of tokens before an anchor in which a recent WAAD peak is sought (paper: 1, 2 or 3).
        tau_waad: level of the quantile of the response's WAAD that a dominated anchor must not exceed (0.5: median).
        tau_delta: level of the quantile of the response's Delta that the lookback must reach; None: 1 - top_fraction,
            so that the recent peak is itself a preplan token.
        overlap: factor of a token that is both anchor and introductory token: bonuses are added ("additive", Eq 19),
            the larger one counts ("max"), or the introductory one replaces the other ("overwrite").
        renorm: "none" (paper) or "mean1": factors are divided by their mean over the response.
        gamma_sign: advantages that are scaled, see `apply_sign` (`credit_factors` sees no advantage and leaves it be).

    Raises:
        ValueError: for a field outside its range.
    """

    amplification: float = 1.5
    top_fraction: float = 0.4
    delta_mode: str = "abs"
    intro_mode: str = "argmax_delta"
    alpha: float = 0.5
    lookback: int = 3
    tau_waad: float = 0.5
    tau_delta: float | None = None
    overlap: str = "additive"
    renorm: str = "none"
    gamma_sign: str = "both"

    def __post_init__(self) -> None:
        if not 1.0 <= self.amplification < math.inf:
            raise ValueError(f"amplification is {self.amplification!r}: give a finite factor of at least 1")
        if self.lookback < 1:
            raise ValueError(f"lookback is {self.lookback!r}: give a whole number of at least 1")
        _require_share("top_fraction", self.top_fraction)
        _require_share("alpha", self.alpha)
        _require_share("tau_waad", self.tau_waad)
        _require_share("tau_delta", self.tau_delta_level)
        _require_choice("delta_mode", self.delta_mode, ("abs", "drop"))
        _require_choice("intro_mode", self.intro_mode, ("argmax_delta", "argmax_waad"))
        _require_choice("overlap", self.overlap, ("additive", "max", "overwrite"))
        _require_choice("renorm", self.renorm, ("none", "mean1"))
        _require_choice("gamma_sign", self.gamma_sign, ("both", "pos", "neg"))

    @property
    def tau_delta_level(self) -> float:
        return 1.0 - self.top_fraction if self.tau_delta is None else self.tau_delta

    @classmethod
    def from_preset(cls, name: str) -> Self:
        """Options of a version of the paper: "paper_v2" or "paper_v1" (its FAI horizon is in `PRESET_FAI_HORIZON`)."""
        _require_choice("preset", name, tuple(PRESET_GAMMA_SIGN))
        return cls(gamma_sign=PRESET_GAMMA_SIGN[name])

    @classmethod
    def from_keywords(cls, keywords: dict) -> Self:
        names = [field.name for field in fields(cls)]
        for name in keywords:
            _require_choice("option", name, names)
        return cls(**keywords)


@dataclass(frozen=True)
class CreditSets:
    """Token sets of one response, each a boolean (n,) mask."""

    preplan: Tensor  # T_loc, Eq 14
    anchors: Tensor  # T_glob, Eq 16
    dominated: Tensor  # D, Eq 18
    intro: Tensor  # I(D)


def top_tokens(values: Tensor, fraction: float, *, largest: bool = True) -> Tensor:
    """Mask (n,) of the floor(fraction * n + 0.5) largest (or smallest) values of (n,).

    The count is exact whatever the ties, which go to the lower index. NaN is never selected, so fewer are where
    too few values are defined.
    """
    defined = (~values.isnan()).nonzero().squeeze(1)  # (m,)
    count = math.floor(fraction * len(values) + 0.5)
    order = torch.argsort(values[defined], descending=largest, stable=True)
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[defined[order[:count]]] = True
    return mask


def waad_delta(waad: Tensor, mode: str = "abs") -> Tensor:
    """Delta_t (n,) = |WAAD_t - WAAD_{t+1}| (Eq 14), or only its falls with mode "drop"; 0 at the last token."""
    delta = torch.zeros_like(waad)
    drop = waad[:-1] - waad[1:]
    delta[:-1] = drop.clamp(min=0) if mode == "drop" else drop.abs()
    return delta


def preplan_tokens(waad: Tensor, fraction: float = 0.4, delta_mode: str = "abs", *, largest: bool = True) -> Tensor:
    """T_loc (n,): tokens where WAAD changes most (Eq 14)."""
    return top_tokens(waad_delta(waad, delta_mode), fraction, largest=largest)


def anchor_tokens(fai: Tensor, fraction: float = 0.4, *, largest: bool = True) -> Tensor:
    """T_glob (n,): tokens with the highest FAI (Eq 16)."""
    return top_tokens(fai, fraction, largest=largest)


def _lookback(values: Tensor, lookback: int) -> Tensor:
    """(n, k): column j holds the value j + 1 tokens earlier, -inf before the response and where undefined."""
    values = values.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    padded = torch.cat([values.new_full((lookback,), -math.inf), values])
    return padded.unfold(0, lookback, 1)[: len(values)].flip(1)


def locally_dominated_anchors(waad: Tensor, anchors: Tensor, options: CreditOptions) -> Tensor:
    """D (n,): anchors that look back little themselves and follow a WAAD peak by at most k tokens (Eq 18)."""
    delta = waad_delta(waad, options.delta_mode)
    tau_waad = torch.nanquantile(waad, options.tau_waad)
    tau_delta = torch.nanquantile(delta, options.tau_delta_level)
    recent = _lookback(delta, options.lookback).amax(1)  # (n,)
    return anchors & (waad <= tau_waad) & (recent >= tau_delta)


def intro_tokens(waad: Tensor, dominated: Tensor, options: CreditOptions) -> Tensor:
    """I(D) (n,): per dominated anchor the token of its lookback with the largest Delta (or WAAD), nearest on ties."""
    values = waad if options.intro_mode == "argmax_waad" else waad_delta(waad, options.delta_mode)
    window = _lookback(values, options.lookback)  # (n, k)
    distances = torch.arange(1, options.lookback + 1, device=waad.device)
    best = window == window.amax(1, keepdim=True)
    distance = torch.where(best, distances, options.lookback).amin(1)  # (n,)
    intro = torch.zeros_like(dominated)
    intro[dominated.nonzero().squeeze(1) - distance[dominated]] = True
    return intro


def _only(values: Tensor, eligible: Tensor | None) -> Tensor:
    """`values` with NaN where a token may not be selected."""
    return values if eligible is None else values.masked_fill(~eligible.to(values.device), math.nan)


@torch.no_grad()
def credit_sets(
    waad: Tensor,
    fai: Tensor,
    options: CreditOptions | None = None,
    *,
    largest: bool = True,
    eligible: Tensor | None = None,
) -> CreditSets:
    """All token sets of one response; largest=False selects the lowest Delta and FAI (ablation of Table 5).

    The thresholds of D are those of Eq 18 in either case: the ablation changes which tokens are preplan and anchor.
    Tokens outside the mask `eligible` (n,) are neither preplan nor anchor; they may still introduce an anchor.
    """
    options = options or CreditOptions()
    waad, fai = _checked(waad, fai)
    delta = _only(waad_delta(waad, options.delta_mode), eligible)
    preplan = top_tokens(delta, options.top_fraction, largest=largest)
    anchors = anchor_tokens(_only(fai, eligible), options.top_fraction, largest=largest)
    if len(waad) < 2:
        return CreditSets(preplan, anchors, torch.zeros_like(anchors), torch.zeros_like(anchors))
    dominated = locally_dominated_anchors(waad, anchors, options)
    return CreditSets(preplan, anchors, dominated, intro_tokens(waad, dominated, options))


def coupled_factors(sets: CreditSets, options: CreditOptions) -> Tensor:
    """gamma (n,) of Eq 19, float64: an anchor's bonus b, shared with the introductory token where it is dominated."""
    bonus = options.amplification - 1.0
    anchor_bonus = bonus * sets.anchors.double()
    anchor_bonus[sets.dominated] = (1.0 - options.alpha) * bonus
    intro_bonus = options.alpha * bonus * sets.intro.double()
    if options.overlap == "additive":
        return 1.0 + anchor_bonus + intro_bonus
    if options.overlap == "max":
        return 1.0 + torch.maximum(anchor_bonus, intro_bonus)
    return 1.0 + torch.where(sets.intro, intro_bonus, anchor_bonus)


def random_tokens(n: int, fraction: float, generator: torch.Generator) -> Tensor:
    """Mask (n,) of floor(fraction * n + 0.5) tokens drawn uniformly, on the generator's device."""
    mask = torch.zeros(n, dtype=torch.bool, device=generator.device)
    mask[torch.randperm(n, generator=generator, device=generator.device)[: math.floor(fraction * n + 0.5)]] = True
    return mask


def _checked(waad: Tensor, fai: Tensor) -> tuple[Tensor, Tensor]:
    """Both signals in float64: differences of float32 or bfloat16 values are then exact and ties stay ties."""
    if waad.dim() != 1 or fai.shape != waad.shape:
        raise ValueError(
            f"waad has shape {tuple(waad.shape)} and fai {tuple(fai.shape)}: give (n,), one value per response token"
        )
    return waad.detach().double(), fai.detach().double()


def _selected_tokens(
    sets: CreditSets,
    kind: str,
    options: CreditOptions,
    largest: bool,
    entropies: Tensor | None,
    generator,
    eligible: Tensor | None,
) -> Tensor:
    if kind == "local":
        return sets.preplan
    if kind == "global":
        return sets.anchors
    if kind == "random":
        if generator is None:
            raise ValueError("generator is None: scheme 'random' draws from a torch.Generator, give one")
        if eligible is None:
            return random_tokens(len(sets.anchors), options.top_fraction, generator).to(sets.anchors.device)
        draws = torch.rand(len(sets.anchors), generator=generator, device=generator.device)
        return top_tokens(_only(draws, eligible), options.top_fraction).to(sets.anchors.device)
    if entropies is None or entropies.shape != sets.anchors.shape:
        raise ValueError(
            f"entropies is {None if entropies is None else tuple(entropies.shape)}: scheme 'entropy' needs one entropy"
            f" per response token, {tuple(sets.anchors.shape)}"
        )
    entropies = _only(entropies.detach().double().to(sets.anchors.device), eligible)
    return top_tokens(entropies, options.top_fraction, largest=largest)


@torch.no_grad()
def credit_factors(
    waad: Tensor,
    fai: Tensor,
    scheme: str,
    *,
    entropies: Tensor | None = None,
    generator: torch.Generator | None = None,
    eligible: Tensor | None = None,
    **options,
) -> Tensor:
    """Factors gamma_t (n,) of one response's tokens (arXiv 2510.13554v2 section 5.2, Eq 14-19), detached.

    Args:
        waad: (n,) windowed average attention distance in tokens, 0 to W.
        fai: (n,) future attention influence, 0 to 1, NaN where undefined (never selected).
        scheme: "none" (all 1), "local" (preplan tokens), "global" (anchors), "coupled" (anchors, credit shared with
            the introductory token), the baselines "random" and "entropy"; "local_bottom", "global_bottom",
            "coupled_bottom", "entropy_bottom" select the lowest instead of the highest values (Table 5).
        entropies: (n,) in nats, for the entropy schemes: entropy of the distribution each token was sampled from.
        generator: source of randomness, for "random".
        eligible: (n,) boolean, tokens that may be selected; None: all.
        options: fields of `CreditOptions`; `**vars(options)` passes a whole object.

    Returns:
        (n,) in waad's dtype and device; at least 1 unless renorm is "mean1"; all 1 for n < 2.

    Raises:
        ValueError: for an unknown scheme or option, a value out of range, unequal shapes, a missing `entropies` or
            `generator`.
    """
    _require_choice("scheme", scheme, SCHEMES + BOTTOM_SCHEMES)
    settings = CreditOptions.from_keywords(options)
    kind, largest = scheme.removesuffix("_bottom"), not scheme.endswith("_bottom")
    sets = credit_sets(waad, fai, settings, largest=largest, eligible=eligible)
    if kind == "none" or len(waad) < 2:
        return torch.ones_like(waad)
    if kind == "coupled":
        factors = coupled_factors(sets, settings)
    else:
        selected = _selected_tokens(sets, kind, settings, largest, entropies, generator, eligible)
        factors = 1.0 + (settings.amplification - 1.0) * selected.double()
    if settings.renorm == "mean1":
        factors = factors / factors.mean()
    return factors.to(waad.dtype)


def apply_sign(factors: Tensor, advantage: Tensor | float, gamma_sign: str = "both") -> Tensor:
    """Factors for advantages of the wanted sign, 1 for the others (section 5.3.1: v2 "both", v1 "pos"; Table 7a).

    Args:
        factors: (n,) or (B, T).
        advantage: a number, or a tensor that broadcasts against the factors, such as (B, 1).
        gamma_sign: "both", "pos" (advantage > 0) or "neg" (advantage < 0).
    """
    _require_choice("gamma_sign", gamma_sign, ("both", "pos", "neg"))
    if gamma_sign == "both":
        return factors
    advantage = torch.as_tensor(advantage, device=factors.device)
    scaled = advantage > 0 if gamma_sign == "pos" else advantage < 0
    return torch.where(scaled, factors, torch.ones_like(factors))
