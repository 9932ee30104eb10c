"""Per-token credit factors from the preplan-and-anchor rhythm (arXiv 2510.13554v2, sections 4 and 5, Eq 14-19).

A response of n tokens comes with two signals: WAAD (how far back its tokens look, high where the model plans) and FAI
(how much later tokens attend to a token, high at anchors). A scheme turns them into factors gamma_t that multiply the
response's advantage (Eq 13). Selections are made within each response.

What the paper leaves open, and what is done here: the exact count of a top selection, ties, the thresholds of locally
dominated anchors, the lookback and the choice of the introductory token. Each is a field of `CreditOptions`.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..base.options import require_choice
from .options import BOTTOM_SCHEMES, SCHEMES, CreditOptions


@dataclass(frozen=True)
class CreditSets:
    """Token sets of one response, each a boolean (n,) mask."""

    preplan: Tensor  # T_loc, Eq 14
    anchors: Tensor  # T_glob, Eq 16
    dominated: Tensor  # D, Eq 18
    intro: Tensor  # I(D)


@dataclass(frozen=True)
class Credit:
    """Credit of one response.

    Attributes:
        factors: (n,) gamma_t.
        sets: its token sets under the scheme's selection, also where the scheme does not use them.
    """

    factors: Tensor
    sets: CreditSets


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
            f"waad has shape {tuple(waad.shape)} and fai {tuple(fai.shape)}; give (n,), one value per response token."
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
            raise ValueError("generator=None; scheme 'random' draws from a torch.Generator, give one.")
        if eligible is None:
            return random_tokens(len(sets.anchors), options.top_fraction, generator).to(sets.anchors.device)
        draws = torch.rand(len(sets.anchors), generator=generator, device=generator.device)
        return top_tokens(_only(draws, eligible), options.top_fraction).to(sets.anchors.device)
    if entropies is None or entropies.shape != sets.anchors.shape:
        raise ValueError(
            f"entropies={None if entropies is None else tuple(entropies.shape)}; scheme 'entropy' needs one entropy"
            f" per response token, {tuple(sets.anchors.shape)}."
        )
    entropies = _only(entropies.detach().double().to(sets.anchors.device), eligible)
    return top_tokens(entropies, options.top_fraction, largest=largest)


@torch.no_grad()
def response_credit(
    waad: Tensor,
    fai: Tensor,
    scheme: str,
    options: CreditOptions | None = None,
    *,
    entropies: Tensor | None = None,
    generator: torch.Generator | None = None,
    eligible: Tensor | None = None,
) -> Credit:
    """Factors gamma_t (n,) of one response's tokens (arXiv 2510.13554v2 section 5.2, Eq 14-19), detached, and the sets
    they were made of.

    Args:
        waad: (n,) windowed average attention distance in tokens, 0 to W.
        fai: (n,) future attention influence, 0 to 1, NaN where undefined (never selected).
        scheme: "none" (all 1), "local" (preplan tokens), "global" (anchors), "coupled" (anchors, credit shared with
            the introductory token), the baselines "random" and "entropy"; "local_bottom", "global_bottom",
            "coupled_bottom", "entropy_bottom" select the lowest instead of the highest values (Table 5).
        options: how factors are formed; default: the paper's.
        entropies: (n,) in nats, for the entropy schemes: entropy of the distribution each token was sampled from.
        generator: source of randomness, for "random".
        eligible: (n,) boolean, tokens that may be selected; None: all.

    Returns:
        Factors in waad's dtype and on its device; at least 1 unless renorm is "mean1"; all 1 for n < 2.

    Raises:
        ValueError: for an unknown scheme, unequal shapes, a missing `entropies` or `generator`.
    """
    require_choice("scheme", scheme, SCHEMES + BOTTOM_SCHEMES)
    settings = options or CreditOptions()
    kind, largest = scheme.removesuffix("_bottom"), not scheme.endswith("_bottom")
    sets = credit_sets(waad, fai, settings, largest=largest, eligible=eligible)
    if kind == "none" or len(waad) < 2:
        return Credit(torch.ones_like(waad), sets)
    if kind == "coupled":
        factors = coupled_factors(sets, settings)
    else:
        selected = _selected_tokens(sets, kind, settings, largest, entropies, generator, eligible)
        factors = 1.0 + (settings.amplification - 1.0) * selected.double()
    if settings.renorm == "mean1":
        factors = factors / factors.mean()
    return Credit(factors.to(waad.dtype), sets)


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
    """The factors (n,) of `response_credit`, with the fields of `CreditOptions` as keywords.

    Raises:
        ValueError: as `response_credit`, and for an unknown option or a value out of range.
    """
    known = [one.name for one in fields(CreditOptions)]
    for name in options:
        require_choice("option", name, known)
    settings = CreditOptions(**options)
    drawn = {"entropies": entropies, "generator": generator, "eligible": eligible}
    return response_credit(waad, fai, scheme, settings, **drawn).factors


def apply_sign(factors: Tensor, advantage: Tensor | float, gamma_sign: str = "both") -> Tensor:
    """Factors for advantages of the wanted sign, 1 for the others (section 5.3.1: v2 "both", v1 "pos"; Table 7a).

    Args:
        factors: (n,) or (B, T).
        advantage: a number, or a tensor that broadcasts against the factors, such as (B, 1).
        gamma_sign: "both", "pos" (advantage > 0) or "neg" (advantage < 0).
    """
    require_choice("gamma_sign", gamma_sign, ("both", "pos", "neg"))
    if gamma_sign == "both":
        return factors
    advantage = torch.as_tensor(advantage, device=factors.device)
    scaled = advantage > 0 if gamma_sign == "pos" else advantage < 0
    return torch.where(scaled, factors, torch.ones_like(factors))
