"""Time and memory of this process, on a CPU or a GPU."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def now(device: str) -> float:
    """Seconds: on a CPU those that this process computed, which other load changes less than the clock's."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device: str, *, reset: bool) -> float:
    """Highest memory so far in MiB; with `reset`, the current one, from which the peak is counted anew."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    field = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(field.split()[1]) / 2**10


def take_turns(run: Callable[[str], None], ways: Sequence[str], repeats: int, device: str) -> dict:
    """Run ways one after the other, so that other load falls on all alike.

    Returns:
        `seconds` per way and repeat, `peak` memory in MiB and what of it is `own`, above that before the first run.
    """
    idle = peak_memory(device, reset=True)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            start = now(device)
            run(way)
            seconds[way].append(now(device) - start)
    peak = peak_memory(device, reset=False)
    return {"seconds": seconds, "peak": peak, "own": peak - idle}


def device_used() -> float:
    """Memory in use on the GPU in GiB, of all processes and allocators: what sleep mode gives back shows here."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30
