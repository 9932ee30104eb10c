"""Weights that travel as files: written whole or not at all, for a server that sees the same folder."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


SHARD_BYTES = 2 * 2**30
PREFIX = "weights-"


def write_weights(
    folder: Path, name: str, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, writes: bool = True
) -> tuple[Path, Exception | None]:
    """Write weights as safetensors files into a new folder of `folder`, which has its name once it is whole.

    The weights are gone through to the end whatever happens, since on several ranks each of them may be a collective.

    Args:
        folder: holds nothing but what this wrote; what an earlier push left there is removed.
        name: of the new folder.
        weights: names and tensors, materialized one at a time.
        dtype: of floating-point weights in the files.
        writes: whether this rank writes; others only go through the weights.

    Returns:
        The new folder, and what went wrong; then nothing is left of it.
    """
    whole = folder / f"{PREFIX}{name}"
    partial = folder / f"{PREFIX}{name}.partial"
    shard: dict[str, Tensor] = {}
    problem: Exception | None = None
    files = held = 0

    def flush() -> None:
        nonlocal files, held
        if shard:
            files += 1
            save_file(shard, partial / f"model-{files:05d}.safetensors")
            shard.clear()
            held = 0

    def guarded(act) -> None:
        nonlocal problem
        if writes and problem is None:
            try:
                act()
            except (OSError, SafetensorError) as error:
                problem = error
                shard.clear()

    def start() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        remove_weights(folder)
        partial.mkdir()

    def keep(name: str, tensor: Tensor) -> None:
        nonlocal held
        kept = tensor.detach().to(device="cpu", dtype=dtype if tensor.is_floating_point() else None, copy=True)
        shard[name] = kept.contiguous()
        held += kept.nbytes
        if held >= SHARD_BYTES:
            flush()

    guarded(start)
    for weight, tensor in weights:
        guarded(lambda weight=weight, tensor=tensor: keep(weight, tensor))
    guarded(flush)
    guarded(lambda: partial.rename(whole))
    if problem is not None:
        shutil.rmtree(partial, ignore_errors=True)
    return whole, problem


def write_whole(folder: Path, name: str, write: Callable[[Path], None]) -> tuple[Path, Exception | None]:
    """Have something written into a new folder of `folder`, which has its name once it is whole.

    As `write_weights`, whose folders it shares, for what one rank has at hand.

    Args:
        folder: see there.
        name: see there.
        write: gets the folder to write into.
    """
    whole = folder / f"{PREFIX}{name}"
    partial = folder / f"{PREFIX}{name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_weights(folder)
        partial.mkdir()
        write(partial)
        partial.rename(whole)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        return whole, error
    return whole, None


def remove_weights(folder: Path) -> None:
    """Remove what `write_weights` left in a folder, half written ones of a killed run included."""
    for old in folder.glob(f"{PREFIX}*"):
        shutil.rmtree(old, ignore_errors=True)
