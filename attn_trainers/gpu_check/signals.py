"""Attention signals: equal to those of eager maps, and what they cost; packed trees against rows."""

import statistics

import torch
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from ..attention import InfluenceObserver, observe_attention
from . import attention_cost, tree_cost
from .attention_cost import eager_influence, even_ranges
from .measuring import peak_memory
from .models import load
from .registry import Context, Finding, Skipped, check, on_gpu


INSTALLED = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}


@torch.no_grad()
def compare_capture(context: Context, implementation: str) -> list[Finding]:
    """Influence read under an implementation, against eager maps in float32; and the model's outputs meanwhile.

    The model's own rounding is the measure: half-precision eager maps lie as far from float32 as they lie, and what is
    read may lie no more than twice as far.
    """
    half = torch.float32 if context.device == "cpu" else torch.bfloat16
    length, steps = (96, 10) if context.smoke else (1024, 20)
    if implementation in INSTALLED and not INSTALLED[implementation]():
        raise Skipped(f"{implementation} is not installed")
    exact = load(context, "sdpa", torch.float32)
    torch.manual_seed(0)
    ids = torch.randint(4, exact.config.vocab_size, (1, length), device=context.device)
    mask, ranges = torch.ones_like(ids), even_ranges(length, steps)
    wanted = eager_influence(exact, ids, mask, ranges)
    del exact
    own = eager_influence(load(context, "sdpa", half), ids, mask, ranges, dtype=torch.float32)
    model = load(context, implementation, half)
    plain = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    observer = InfluenceObserver(mask, [ranges])
    with observe_attention(model, observer):
        observed = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    # Prompt and first step have no influence by definition; their maps do.
    read, wanted, own = (values.to(wanted.device)[2:] for values in (observer.result()[0], wanted, own))
    scale = wanted.max()
    rounding = ((own - wanted).abs().max() / scale).item()
    error = ((read - wanted).abs().max() / scale).item()
    return [
        Finding("largest error of influence, relative", error, most=2 * rounding + 1e-4),
        Finding("logits that observing changed", float((plain != observed).sum()), most=0),
    ]


@check("capture_sdpa", 90)
def capture_sdpa(context: Context) -> list[Finding]:
    """Capture equals eager under sdpa."""
    return compare_capture(context, "sdpa")


@check("capture_flash_attention_2", 90, needs_cuda="flash attention is a CUDA kernel")
def capture_flash_attention_2(context: Context) -> list[Finding]:
    """Capture equals eager under flash attention 2."""
    return compare_capture(context, "flash_attention_2")


@check("capture_flash_attention_3", 90, needs_cuda="flash attention is a CUDA kernel")
def capture_flash_attention_3(context: Context) -> list[Finding]:
    """Capture equals eager under flash attention 3."""
    return compare_capture(context, "flash_attention_3")


@check("capture_flex", 120)
def capture_flex(context: Context) -> list[Finding]:
    """Capture equals eager under flex attention."""
    return compare_capture(context, "flex_attention")


def cost_of(context: Context, way: str, heads: int, most: float) -> list[Finding]:
    """Time and memory of a signal against the plain forward; ways take turns, the median of their ratios counts."""
    length, steps = (256, 8) if context.smoke else (8192, 60)
    task = {"length": length, "steps": steps, "heads": heads, "device": context.device}
    model = load(context, "sdpa", torch.float32 if context.device == "cpu" else torch.bfloat16)
    timed = attention_cost.measure({**task, "ways": ["plain", way], "repeats": 3 if context.smoke else 7}, model)
    ratios = [mine / plain for mine, plain in zip(*(timed["seconds"][w] for w in (way, "plain")), strict=True)]
    findings = [
        Finding("plain forward, ms", 1e3 * statistics.median(timed["seconds"]["plain"])),
        on_gpu(context, "time / plain forward", statistics.median(ratios), most),
    ]
    if context.device == "cuda":  # a CPU's allocator keeps what it freed: there each way needs a process of its own
        peaks = [attention_cost.measure({**task, "ways": [w], "repeats": 1}, model)["peak"] for w in ("plain", way)]
        findings.append(on_gpu(context, "peak memory / plain forward", peaks[1] / peaks[0], 1.05))
    return findings


@check("influence_cost", 60)
def influence_cost(context: Context) -> list[Finding]:
    """Influence of all heads and layers against the plain forward."""
    return cost_of(context, "fci", 0, 1.12)


@check("key_focus_cost", 60)
def key_focus_cost(context: Context) -> list[Finding]:
    """Key-focus scores of three heads against the plain forward."""
    return cost_of(context, "heads", 3, 1.01)


@check("packed_trees", 120)
def packed_trees(context: Context) -> list[Finding]:
    """A tree packed against its rows: log-probs, time and memory of forward and backward."""
    device = context.device
    free = torch.cuda.get_device_properties(0).total_memory / 2**30 if device == "cuda" else 0
    length = 128 if context.smoke else 8192 if free > 70 else 4096 if free > 35 else 2048
    prompt, points = 64, (0.2, 0.4)
    model = load(context, "sdpa", torch.float32 if device == "cpu" else torch.bfloat16)
    rows = tree_cost.sample_tree(prompt, min(length, 1024), points, model.config.vocab_size)
    with torch.no_grad():
        differences = (tree_cost.rows_logps(model, rows, prompt) - tree_cost.packed_logps(model, rows, prompt)).abs()
    task = {"length": length, "prompt": prompt, "points": points, "trees": 1, "device": device, "repeats": 3}
    if not context.smoke:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # checkpoints are for training alone; nothing is dropped
    tree_cost.measure({**task, "ways": ["rows", "packed"], "repeats": 1}, model)  # allocates and chooses kernels
    timed = tree_cost.measure({**task, "ways": ["rows", "packed"]}, model)
    speed_up = timed["seconds"]["rows"] / timed["seconds"]["packed"]
    findings = [
        Finding("mean difference of log-probs", differences.mean().item(), most=1e-5 if device == "cpu" else 0.02),
        Finding(f"speed-up at {length} tokens", speed_up),
        on_gpu(context, "speed-up / saved tokens", speed_up / timed["ratio"], least=0.9),
    ]
    if device == "cuda":
        peaks = [tree_cost.measure({**task, "ways": [w], "repeats": 1}, model)["memory"] for w in ("rows", "packed")]
        findings.append(on_gpu(context, "memory / that of rows", peaks[1] / peaks[0], 1.0))
    peak_memory(device, reset=True)
    return findings
