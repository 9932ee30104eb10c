r"""Where the time of an AttnRL step goes on 1 to 256 GPUs: a model on paper, from named unit costs.

    python benchmarks/scale_model.py                              # table and picture in runs/scale_model
    python benchmarks/scale_model.py --measure [--data graded_rollouts.jsonl]    # unit costs of this host first
    python benchmarks/scale_model.py --write docs/scale.md        # put the tables into the document

One generation batch of the published settings (64 prompts, 6 rollouts each, 2 x 2 continuations of each expanded one)
is drawn with long-tailed lengths. Which rank samples, forwards and trains what is the package's own code; how long a
GPU takes for it is arithmetic on published figures of the card (`Hardware`), times efficiencies that are assumptions;
what the host does was measured (`host_costs.py`). Nothing here was measured on a GPU.
"""

import argparse
import json
import pickle
import random
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
from batch_cost import PROMPT_TOKENS, random_prompt
from host_costs import HostCosts, measure_host

from attn_trainers.attnrl.batches import arrange_updates, rank_loads
from attn_trainers.attnrl.rollouts import PromptRollouts, branches_of
from attn_trainers.attnrl.rows import prompt_rows
from attn_trainers.plots import INK, plt
from attn_trainers.tables import markdown_table


PROMPTS, ROLLOUTS, MEAN_TOKENS = 64, 6, 3000
GPUS = (1, 8, 64, 256)
GROWN = 64  # GPUs for which a batch that grows with them is tried too; 2,048 prompts for 256 are 4 GB of rows
PARTS = ("sampling", "forwards", "backward", "gradients", "sync", "rewards", "gathers")
COLOURS = ("#2f6db3", "#6fa8dc", "#d9822b", "#f0b775", "#8a4fae", "#3c9d5b", "#888888")
START, END = "<!-- made by benchmarks/scale_model.py -->", "<!-- end -->"


@dataclass(frozen=True)
class Hardware:
    """One GPU and what joins it to others: published figures of an H100 SXM, and efficiencies, which are assumed."""

    flops: float = 989e12  # dense bfloat16, data sheet
    memory_bandwidth: float = 3.35e12  # bytes per second, data sheet
    memory: float = 80e9  # bytes, data sheet
    node_link: float = 450e9  # bytes per second and direction within a node of 8, data sheet
    network: float = 50e9  # bytes per second per GPU between nodes: one 400 Gbit/s port each
    training_share: float = 0.40  # of the FLOPs that a forward or backward reaches; assumed
    decode_share: float = 0.60  # of the memory bandwidth that decoding reaches; assumed
    decode_overhead: float = 4e-3  # seconds per engine step beside the GPU's work; assumed
    cache_share: float = 0.25  # of the memory that the KV cache gets in colocate; assumed (0.3 less the weights)
    launch: float = 0.2e-3  # seconds per tensor that is pushed into an engine; assumed


@dataclass(frozen=True)
class Model:
    """A decoder's sizes."""

    name: str
    parameters: float
    layers: int
    width: int  # of the queries
    key_width: int
    tensors: int


MODELS = (
    Model("1.5B", 1.54e9, 28, 1536, 256, 338),
    Model("7B", 7.62e9, 28, 3584, 512, 339),
)


@dataclass(frozen=True)
class Setup:
    """How a run is laid out.

    Attributes:
        packed: whether trees are forwarded as one row.
        server: share of the GPUs that only samples, 0 for colocate.
        at_once: whether a server gets the next batch's initial rollouts together with this batch's continuations, or
            only when training begins.
        prompts: prompts of a generation batch.
    """

    packed: bool = True
    server: float = 0.0
    at_once: bool = False
    prompts: int = PROMPTS


# ---- what is to be done ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """One generation batch: prompts with their trees, and the rows they are trained on."""

    prompts: list[PromptRollouts]
    rows: list

    @classmethod
    def draw(cls, prompts: int, seed: int = 0) -> "Batch":
        rng = np.random.default_rng(seed)
        drawn = [
            random_prompt(i, rng, ROLLOUTS, random.Random(i).randint(3, ROLLOUTS), MEAN_TOKENS) for i in range(prompts)
        ]
        rows = [row for prompt in drawn for row in prompt_rows(prompt, train_unexpanded=False)]
        return cls(drawn, rows)

    def requests(self, kind: str) -> list[list[tuple[int, int]]]:
        """Context and new tokens of each sample of each prompt: of the "initial" rollouts or of "continuations"."""
        if kind == "initial":
            return [[(PROMPT_TOKENS, len(r.tokens)) for r in p.rollouts] for p in self.prompts]
        return [
            [(PROMPT_TOKENS + b.offset, len(b.tokens)) for r in p.rollouts for b in branches_of(r)]
            for p in self.prompts
        ]


# ---- how long it takes ----------------------------------------------------------------------------------------------


def forward_flops(model: Model, tokens: float, length: float) -> float:
    """Of a forward over tokens whose rows are `length` long: 2 per parameter, and causal attention."""
    return tokens * (2 * model.parameters + 2 * model.layers * model.width * length)


def decode_seconds(
    model: Model, hardware: Hardware, requests: list[tuple[int, int]], later: list[tuple[int, int]] = ()
) -> tuple[float, float]:
    """Of one engine for its requests: steps of all that run, new ones as the KV cache has room.

    Args:
        model, hardware: what runs where.
        requests: context and new tokens of each; the longest is taken first.
        later: requests that are taken after those.

    Returns:
        Seconds until `requests` are done, and until all are.
    """
    kv_bytes = 4 * model.layers * model.key_width
    room = hardware.cache_share * hardware.memory / kv_bytes
    order = [(*r, True) for r in sorted(requests, key=sum)[::-1]] + [(*r, False) for r in sorted(later, key=sum)[::-1]]
    context, left, urgent = np.array(order).T  # (n,), in the order in which they are taken
    held = np.cumsum(context + left)  # tokens of cache, with all before
    taken, done, freed = 0, np.zeros(len(order), dtype=bool), 0
    compute = hardware.flops * hardware.training_share
    first = seconds = forward_flops(model, context.sum(), PROMPT_TOKENS) / compute  # prefill
    while not done.all():
        taken = max(int(np.searchsorted(held, room + freed, side="right")), int(done.sum()) + 1, taken)
        running = np.flatnonzero(~done[:taken])
        steps = int(left[running].min())
        cached = context[running].sum() + steps * len(running) / 2
        read = (2 * model.parameters + cached * kv_bytes) / (hardware.memory_bandwidth * hardware.decode_share)
        seconds += steps * (max(read, 2 * model.parameters * len(running) / compute) + hardware.decode_overhead)
        if urgent[running].any():
            first = seconds
        context[running] += steps
        left[running] -= steps
        ended = running[left[running] <= 0]
        done[ended] = True
        freed += int(context[ended].sum())
    return first, seconds


Requests = list[list[tuple[int, int]]]
"""Of each prompt, or of each request alone, the context and the new tokens."""


def sampling_seconds(
    model: Model, hardware: Hardware, prompts: Requests, engines: int, later: Requests = ()
) -> tuple[float, float]:
    """Of the slowest engine, prompts dealt in turn: seconds until `prompts` are done, and until `later` are too."""
    own, own_later = (
        [[r for prompt in kind[rank::engines] for r in prompt] for rank in range(engines)] for kind in (prompts, later)
    )
    work = [sum(left for _, left in a + b) for a, b in zip(own, own_later, strict=True)]
    longest = [max((left for _, left in a + b), default=0) for a, b in zip(own, own_later, strict=True)]
    # The slowest is one with the most tokens, or with the longest completion: no need to run all of them.
    ranks = {r for key in (work, longest) for r in sorted(range(engines), key=key.__getitem__)[-8:] if key[r]}
    ends = [decode_seconds(model, hardware, own[rank], own_later[rank]) for rank in ranks]
    return max(first for first, _ in ends), max(last for _, last in ends)


def exchange_seconds(hardware: Hardware, size: float, ranks: int) -> float:
    """Of an all-gather or a reduce-scatter of `size` bytes over all ranks, by rings."""
    link = hardware.node_link if ranks <= 8 else hardware.network
    return size * (ranks - 1) / ranks / link


def training_parts(model: Model, hardware: Hardware, host: HostCosts, batch: Batch, ranks: int, packed: bool) -> dict:
    """Seconds of forwards, backward and exchange of gradients on the slowest rank."""
    speed = hardware.flops * hardware.training_share
    rollouts = [PROMPT_TOKENS + len(r.tokens) for p in batch.prompts for r in p.rollouts]
    own = [
        sum(len(r.tokens) + PROMPT_TOKENS for p in batch.prompts[i::ranks] for r in p.rollouts) for i in range(ranks)
    ]
    length = float(np.mean(rollouts))
    reading = host.influence * forward_flops(model, max(own), length) / speed
    updates = arrange_updates(
        batch.rows,
        rows_per_update=max(192 * len(batch.prompts) // PROMPTS, ranks),
        num_ranks=ranks,
        rows_per_rank=4,
        max_tokens=4 * 9216 if packed else None,
        seed="0",
    )
    if packed:
        loads = [max(rank_loads(update)) for update in updates]
    else:
        loads = [max(sum(r.length for m in update for r in m[rank]) for rank in range(ranks)) for update in updates]
    once = forward_flops(model, sum(loads), length) / speed
    exchanged = 2 * exchange_seconds(hardware, 2 * model.parameters, ranks) if ranks > 1 else 0.0
    return {
        "forwards": reading + 2 * once,  # influence; log-probs of continuations, and of the reference model
        "backward": 4 * once,  # forward, the same again (gradient checkpointing), and a backward of twice its work
        "gradients": len(updates) * exchanged,
    }


def step_parts(model: Model, setup: Setup, gpus: int, hardware: Hardware, host: HostCosts, batch: Batch) -> dict:
    """Seconds of each part of a training step; with a server `sampling` is what training does not hide."""
    samplers = max(1, round(setup.server * gpus)) if setup.server else gpus
    ranks = gpus - samplers if setup.server else gpus
    initial, continued = batch.requests("initial"), batch.requests("continuations")
    parts = training_parts(model, hardware, host, batch, ranks, setup.packed)
    weights = 2 * model.parameters
    if setup.server:
        # An engine of a server takes any request, and its cache has the memory that training would need.
        roomy = replace(hardware, cache_share=0.7)
        ahead, behind = (
            sorted([[request] for prompt in kind for request in prompt], key=lambda one: -one[0][1])
            for kind in (initial, continued)
        )
        training = parts["forwards"] + parts["backward"] + parts["gradients"]
        if setup.at_once:
            until, whole = sampling_seconds(model, roomy, behind, samplers, ahead)
            hidden = whole - until
        else:
            until, hidden = (sampling_seconds(model, roomy, kind, samplers)[1] for kind in (behind, ahead))
        parts["sampling"] = until + max(0.0, hidden - training)
        parts["sync"] = weights / hardware.network + model.tensors * hardware.launch
    else:
        both = [a + b for a, b in zip(initial, continued, strict=True)]
        parts["sampling"] = sampling_seconds(model, hardware, both, gpus)[1]
        parts["sync"] = 2 * weights / hardware.memory_bandwidth + model.tensors * hardware.launch
    samples = sum(map(len, initial)) + sum(map(len, continued))
    parts["rewards"] = -(-samples // ranks) * host.grading / host.workers
    size = len(pickle.dumps(batch.prompts))
    tokens = sum(len(r.tokens) for p in batch.prompts for r in p.rollouts)
    parts["gathers"] = (
        size * host.pickling + exchange_seconds(hardware, size, ranks) + len(batch.rows) * host.arranging
    ) + tokens / ranks * host.segmenting
    return {name: parts[name] for name in PARTS}


# ---- table, picture, document ---------------------------------------------------------------------------------------


def layouts(gpus: int) -> dict[str, Setup]:
    """Ways to lay out a run that are compared."""
    ways = {"colocate, rows": Setup(packed=False), "colocate, packed": Setup()}
    if gpus > 1:
        ways["server on 50 %, packed"] = Setup(server=0.5)
        ways["the same, all sent at once"] = Setup(server=0.5, at_once=True)
    if gpus == GROWN:
        ways["colocate, packed, 8 prompts a GPU"] = Setup(prompts=8 * gpus)
    return ways


def simulate(hardware: Hardware, host: HostCosts) -> list[dict]:
    """A result per model, number of GPUs and layout."""
    batches = {prompts: Batch.draw(prompts) for prompts in (PROMPTS, 8 * GROWN)}
    results = []
    for model in MODELS:
        for gpus in GPUS:
            for name, setup in layouts(gpus).items():
                parts = step_parts(model, setup, gpus, hardware, host, batches[setup.prompts])
                rows = len(batches[setup.prompts].rows)
                results.append({"model": model.name, "gpus": gpus, "layout": name, "rows": rows, "parts": parts})
    return results


def first_bottleneck(result: dict) -> str:
    """The largest part, with its share."""
    parts = result["parts"]
    name = max(parts, key=parts.get)
    return f"{name} {parts[name] / sum(parts.values()):.0%}"


def table(results: list[dict]) -> str:
    header = ("model", "GPUs", "layout", "step, s", "rows/s", *(f"{part}, s" for part in PARTS), "largest part")
    rows = []
    for one in results:
        parts = one["parts"]
        times = [f"{parts[part]:.1f}" if parts[part] >= 0.05 else f"{parts[part]:.2f}" for part in PARTS]
        total = f"{sum(parts.values()):.0f}"
        rows.append(
            (
                one["model"],
                one["gpus"],
                one["layout"],
                total,
                f"{one['rows'] / sum(parts.values()):.1f}",
                *times,
                first_bottleneck(one),
            )
        )
    return markdown_table(header, rows)


def inputs_table(hardware: Hardware, host: HostCosts) -> str:
    """The unit costs, with what they are."""
    rows = [("GPU", one.name, f"{getattr(hardware, one.name):.4g}") for one in fields(hardware)]
    rows += [("host", one.name, f"{getattr(host, one.name):.3g}") for one in fields(host)]
    return markdown_table(("of", "unit cost", "value"), rows)


def draw(results: list[dict], path: Path) -> None:
    """Shares of a step, a bar per number of GPUs and layout."""
    figure, axes = plt.subplots(1, len(MODELS), figsize=(13, 4.6), sharey=True)
    for axis, model in zip(axes, MODELS, strict=True):
        own = [one for one in results if one["model"] == model.name]
        bottom = np.zeros(len(own))
        for part, colour in zip(PARTS, COLOURS, strict=True):
            shares = np.array([one["parts"][part] / sum(one["parts"].values()) for one in own])
            axis.bar(range(len(own)), shares, bottom=bottom, color=colour, label=part)
            bottom += shares
        for place, one in enumerate(own):
            axis.text(place, 1.01, f"{sum(one['parts'].values()):.0f} s", ha="center", fontsize=7, color=INK)
        labels = [f"{one['gpus']}: {one['layout']}" for one in own]
        axis.set_xticks(range(len(own)), labels, rotation=60, ha="right", fontsize=7)
        axis.set_title(f"{model.name}: shares of an AttnRL step (modelled)", fontsize=10, color=INK, pad=14)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_document(path: Path, text: str) -> None:
    """Replace what stands between the marks."""
    document = path.read_text()
    head, _, rest = document.partition(START)
    _, _, tail = rest.partition(END)
    path.write_text(f"{head}{START}\n\n{text}\n\n{END}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure the host's unit costs here, and keep them")
    parser.add_argument("--data", type=Path, help="graded completions, for the cost of grading")
    parser.add_argument("--output", type=Path, default=Path("runs/scale_model"))
    parser.add_argument("--write", type=Path, help="document whose marked part is replaced by the tables")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    kept = args.output / "host.json"
    if args.measure:
        kept.write_text(json.dumps(asdict(measure_host(Batch.draw(PROMPTS).prompts, args.data)), indent=2))
    host = HostCosts(**json.loads(kept.read_text())) if kept.exists() else HostCosts()
    hardware = Hardware()
    results = simulate(hardware, host)
    (args.output / "results.json").write_text(json.dumps(results, indent=2))
    draw(results, args.output / "shares.png")
    text = f"{table(results)}\n\nUnit costs (bytes, seconds, shares):\n\n{inputs_table(hardware, host)}"
    print(text)
    print(f"Drawn in {args.output / 'shares.png'}.")
    if args.write:
        write_document(args.write, text)
        draw(results, args.write.with_suffix(".png"))


if __name__ == "__main__":
    main()
