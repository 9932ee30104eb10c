"""What a model's attention says about its own responses: curves, steps, and the rhythm paper's coupling statistics.

One forward per response gives WAAD and FAI of every head (arXiv 2510.13554), forward context influence of every step
(AttnRL, arXiv 2509.26628), key-focus scores of every thinking step (AttnPO, arXiv 2602.09953) and token entropies. The
pages and pictures are in `attn_trainers.inspection.page`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..attention import (
    AttentionObserver,
    Head,
    InfluenceObserver,
    KeyFocusObserver,
    LayerAttention,
    RhythmObserver,
    RhythmProfile,
    combine_heads,
    decoder_of,
    mean_backward_span,
    middle_layers,
    observe_attention,
    rank_heads,
)
from ..attention.rhythm import peaks
from ..attnpo.alignment import StepAlignment, reasoning_step_ranges
from ..attnpo.steps import Splitter, Step
from ..attnrl.steps import StepDelimiters, StepSegmentation, segment_steps
from ..rhythm.credit import CreditOptions, credit_sets
from ..thinking import END_OF_THINKING
from .analysis import (
    Coupling,
    entropy_at_waad_peaks,
    fai_peaks_after_waad_peaks,
    lift,
    receiver_heads,
    receiver_peaks_at_global_peaks,
)


# Least distances of FAI that the statistics are taken at, both up to the end of the response: read literally the
# paper's analysis counts a token's attention to itself (0); its training does not count the next tokens either (10).
ANALYSIS_DISTANCES = (0, 10)
STATISTICS = ("entropy", "receiver_global", "fai_after_waad")
HEAD_POOLS = ("all", "middle")
# Why a response has no key-focus scores, by the reason that the alignment of its steps gives.
NO_THINKING_STEPS = {
    "no_end_of_thinking": "the thinking has no end: the model writes none, or the response was cut off while thinking",
    "several_end_of_thinking": "the response has more than one end of thinking",
    "no_answer": "nothing follows the thinking",
    "too_few_steps": "the thinking is less than two steps",
}
_ENTROPY_ROWS = 256


@dataclass(frozen=True)
class InspectionSettings:
    """What is measured.

    Attributes:
        head_pool: layers whose heads are ranked: "all" (the paper's analysis) or "middle" (its training).
        head_fraction: share of the heads in the local, the global and the receiver set.
        window: W of WAAD, in tokens.
        horizon: (lo, hi) of the FAI that is drawn and from which anchors are chosen.
        top_fraction: share of the tokens that are preplan, and that are anchor tokens.
        peak_fraction: a peak lies in this top share of its response.
        influence_delta: forward context influence counts steps at least so much later.
        key_focus_heads: heads of the key-focus scores; empty: none are taken.
        splitter: cuts the thinking into steps for the key-focus scores.
        end_of_thinking: text that ends the thinking.
        answer: where the final answer begins, as in `AttnPOOptions`.
        influence_aggregation: "sum" or "mean" over later steps, as in `AttnRLConfig`.
    """

    head_pool: str = "all"
    head_fraction: float = 0.3
    window: int = 10
    horizon: tuple[int, int | None] = (10, 100)
    top_fraction: float = 0.4
    peak_fraction: float = 0.3
    influence_delta: int = 4
    key_focus_heads: tuple[Head, ...] = ()
    splitter: Callable[[str], list[Step]] = Splitter()
    end_of_thinking: str = END_OF_THINKING
    answer: str = "tag"
    influence_aggregation: str = "sum"

    def __post_init__(self):
        if self.head_pool not in HEAD_POOLS:
            raise ValueError(f"head_pool={self.head_pool!r} is unknown; set it to one of {', '.join(HEAD_POOLS)}.")


@dataclass(frozen=True)
class StepScores:
    """A score per step of a response.

    Attributes:
        ranges: half-open token ranges within the response.
        scores: one per range.
        note: why there are none; empty otherwise.
    """

    ranges: list[tuple[int, int]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    note: str = ""


@dataclass
class InspectedResponse:
    """What was seen of one response of n tokens.

    Attributes:
        problem: text of the problem.
        tokens: texts of the response's tokens.
        waad, fai, entropy: (n,) each, in tokens, attention weights (NaN where undefined) and nats.
        preplan, anchors, waad_peaks, fai_peaks: (n,) boolean masks.
        influence: forward context influence of the steps.
        key_focus: key-focus scores of the thinking steps.
        local_heads, global_heads: the heads that WAAD and FAI are averaged over.
        correct: whether the answer is right, where it is known.
        cut_off: whether a token limit ended it.
        profiles: per least distance of the analysis, all heads' profile with FAI up to the end of the response.
    """

    problem: str
    tokens: list[str]
    waad: Tensor
    fai: Tensor
    entropy: Tensor
    preplan: Tensor
    anchors: Tensor
    waad_peaks: Tensor
    fai_peaks: Tensor
    influence: StepScores
    key_focus: StepScores
    local_heads: list[Head]
    global_heads: list[Head]
    correct: bool | None = None
    cut_off: bool = False
    profiles: dict[int, RhythmProfile] = field(default_factory=dict)

    def analysis_fai(self, distance: int) -> Tensor:
        """FAI (n,) from one of the least distances of the analysis up to the end of the response."""
        return combine_heads(self.profiles[distance], self.local_heads, self.global_heads).fai


@dataclass(frozen=True)
class StatisticSummary:
    """A coupling over several responses, each weighing the same.

    Attributes:
        name: "entropy", "receiver_global" or "fai_after_waad" (Table 2 of the paper, in its order).
        distance: least distance of FAI, in tokens.
        responses: number of responses in which it is defined.
        observed, random: means over responses: nats, or shares from 0 to 1.
        observed_sd, random_sd: standard deviations over responses.
        densities: mean share of tokens that are peaks, per signal.
    """

    name: str
    distance: int
    responses: int
    observed: float
    random: float
    observed_sd: float
    random_sd: float
    densities: dict[str, float]

    @property
    def lift(self) -> float:
        """Of the means."""
        return lift(self.observed, self.random)


class ObserverGroup:
    """Several observers of one forward; each is shown the layers it asks for."""

    def __init__(self, observers: Sequence[AttentionObserver]):
        self.observers = list(observers)
        every = any(observer.layers is None for observer in self.observers)
        self.layers = None if every else frozenset().union(*(observer.layers for observer in self.observers))

    def observe(self, layer: LayerAttention) -> None:
        for observer in self.observers:
            if observer.layers is None or layer.layer_idx in observer.layers:
                observer.observe(layer)


def token_entropies(logits: Tensor) -> Tensor:
    """Entropies (n,) in nats, float32, of the distributions given by (n, V) logits, some rows at a time."""
    parts = []
    for rows in logits.split(_ENTROPY_ROWS):
        logps = rows.float().log_softmax(dim=-1)
        parts.append(-(logps.exp() * logps).nan_to_num(nan=0.0).sum(dim=-1))  # 0 log 0 = 0
    return torch.cat(parts) if parts else logits.new_zeros(0, dtype=torch.float32)


@torch.no_grad()
def inspect_response(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    completion_ids: list[int],
    settings: InspectionSettings,
    delimiters: StepDelimiters,
    *,
    problem: str = "",
    correct: bool | None = None,
    cut_off: bool = False,
) -> InspectedResponse:
    """Everything about one response, from one forward.

    Args:
        model: transformers decoder, plain or wrapped.
        tokenizer: of the model.
        prompt_ids, completion_ids: tokens without padding, at least one each.
        settings: what is measured.
        delimiters: of the tokenizer, for the steps of the influence.
        problem, correct, cut_off: kept as they are.

    Raises:
        ValueError: for an empty prompt or completion, or an architecture that cannot be observed.
    """
    if not prompt_ids or not completion_ids:
        raise ValueError(
            f"prompt_ids has {len(prompt_ids)} tokens and completion_ids {len(completion_ids)}; give one or more of "
            "each."
        )
    prompt = len(prompt_ids)
    ids = torch.tensor([prompt_ids + completion_ids], device=next(model.parameters()).device)  # (1, N)
    mask = torch.ones_like(ids)
    rhythm = _rhythm_observers(model, settings, mask, prompt)
    segmentation = segment_steps(prompt, completion_ids, delimiters)
    influence = InfluenceObserver(
        mask, [segmentation.ranges], [segmentation.stop_step], settings.influence_delta, settings.influence_aggregation
    )
    alignment = reasoning_step_ranges(
        tokenizer,
        completion_ids,
        splitter=settings.splitter,
        end_of_thinking=settings.end_of_thinking,
        answer=settings.answer,
    )
    focus = _focus_observer(settings, alignment, mask, prompt)
    with observe_attention(model, ObserverGroup([*rhythm, influence] + ([focus] if focus else []))):
        kept = len(completion_ids) + 1
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits[0, :-1]
    drawn, *analysed = [observer.result()[0] for observer in rhythm]
    return InspectedResponse(
        problem=problem,
        tokens=[tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in completion_ids],
        entropy=token_entropies(logits).cpu(),
        influence=_influence(settings, segmentation, influence.result()[0][1:].tolist(), prompt),
        key_focus=_key_focus(settings, alignment, focus),
        correct=correct,
        cut_off=cut_off,
        profiles=dict(zip(ANALYSIS_DISTANCES, map(_on_cpu, analysed), strict=True)),
        **_curves(settings, drawn),
    )


def _rhythm_observers(
    model: nn.Module, settings: InspectionSettings, mask: Tensor, prompt: int
) -> list[RhythmObserver]:
    """One for the curves, then one per least distance of the analysis."""
    num_layers = decoder_of(model).config.num_hidden_layers
    layers = range(num_layers) if settings.head_pool == "all" else middle_layers(num_layers)
    horizons = [settings.horizon, *((low, None) for low in ANALYSIS_DISTANCES)]
    return [RhythmObserver(mask, [prompt], layers, settings.window, horizon) for horizon in horizons]


def _curves(settings: InspectionSettings, drawn: RhythmProfile) -> dict:
    """The fields of an `InspectedResponse` that come from the ranked heads."""
    heads = rank_heads(mean_backward_span([drawn]), drawn.heads, settings.head_fraction)
    signals = combine_heads(drawn, *heads)
    waad, fai = signals.waad.cpu(), signals.fai.cpu()
    sets = credit_sets(waad, fai, CreditOptions(top_fraction=settings.top_fraction))
    return {
        "waad": waad,
        "fai": fai,
        "preplan": sets.preplan,
        "anchors": sets.anchors,
        "waad_peaks": peaks(waad, settings.peak_fraction),
        "fai_peaks": peaks(fai, settings.peak_fraction),
        "local_heads": signals.local_heads,
        "global_heads": signals.global_heads,
    }


def _on_cpu(profile: RhythmProfile) -> RhythmProfile:
    return RhythmProfile(profile.heads, profile.span_sum.cpu(), profile.waad.cpu(), profile.fai.cpu())


def _focus_observer(
    settings: InspectionSettings, alignment: StepAlignment, mask: Tensor, prompt: int
) -> KeyFocusObserver | None:
    if not settings.key_focus_heads or alignment.reason is not None:
        return None
    ranges = [(prompt + start, prompt + end) for start, end in alignment.step_ranges]
    return KeyFocusObserver(mask, [ranges], [prompt + alignment.answer_start], settings.key_focus_heads)


def _influence(
    settings: InspectionSettings, segmentation: StepSegmentation, scores: list[float], prompt: int
) -> StepScores:
    ranges = [(start - prompt, end - prompt) for start, end in segmentation.ranges[1:]]
    note = ""
    if not any(scores):
        note = (
            f"no influence: a step counts from the second on, and with steps at least {settings.influence_delta} "
            f"later; this response has {len(ranges)} (blank lines, else line breaks, end one)"
        )
    return StepScores(ranges, scores, note)


def _key_focus(settings: InspectionSettings, alignment: StepAlignment, focus: KeyFocusObserver | None) -> StepScores:
    if focus is not None:
        return StepScores(list(alignment.step_ranges), focus.result()[0].tolist())
    notes = []
    if not settings.key_focus_heads:
        notes.append("no key-focus heads are known for this model (find them, then name them by key_focus_heads)")
    if alignment.reason is not None:
        notes.append(NO_THINKING_STEPS.get(alignment.reason, alignment.reason))
    return StepScores(note="; ".join(notes))


def response_couplings(
    response: InspectedResponse, receivers: Sequence[Head], distance: int, peak_fraction: float = 0.3
) -> dict[str, Coupling]:
    """The three couplings of Table 2 in one response, with FAI from `distance` tokens on to the response's end."""
    profile = response.profiles[distance]
    signals = combine_heads(profile, response.local_heads, response.global_heads)
    receiver = combine_heads(profile, response.local_heads, receivers).fai
    waad, fai = signals.waad.cpu(), signals.fai.cpu()
    return {
        "entropy": entropy_at_waad_peaks(response.entropy, waad, peak_fraction),
        "receiver_global": receiver_peaks_at_global_peaks(receiver.cpu(), fai, peak_fraction),
        "fai_after_waad": fai_peaks_after_waad_peaks(fai, waad, peak_fraction),
    }


def find_receiver_heads(responses: Sequence[InspectedResponse], fraction: float = 0.3) -> list[Head]:
    """Heads that send all attention to few columns: highest mean kurtosis of the columns' means over all responses.

    The mean of a column over all later rows, its own included, is FAI at distance 0 up to the end.
    """
    heads = responses[0].profiles[0].heads
    return [heads[i] for i in receiver_heads([response.profiles[0].fai for response in responses], fraction)]


def summarise_couplings(
    responses: Sequence[InspectedResponse], receivers: Sequence[Head], peak_fraction: float = 0.3
) -> list[StatisticSummary]:
    """The three couplings at each analysis distance, over the responses in which they are defined."""
    summaries = []
    for distance in ANALYSIS_DISTANCES:
        couplings = [response_couplings(response, receivers, distance, peak_fraction) for response in responses]
        for name in STATISTICS:
            if name == "entropy" and distance != ANALYSIS_DISTANCES[0]:
                continue  # it does not depend on FAI
            summaries.append(_summary(name, distance, [coupling[name] for coupling in couplings]))
    return summaries


def _summary(name: str, distance: int, couplings: Sequence[Coupling]) -> StatisticSummary:
    defined = [c for c in couplings if not (math.isnan(c.observed) or math.isnan(c.random))]
    values = [[c.observed for c in defined], [c.random for c in defined]]
    means = [fmean(v) if v else math.nan for v in values]
    deviations = [stdev(v) if len(v) > 1 else math.nan for v in values]
    densities = {
        signal: fmean(c.densities[signal] for c in defined) for signal in (defined[0].densities if defined else ())
    }
    return StatisticSummary(name, distance, len(defined), *means, *deviations, densities)
