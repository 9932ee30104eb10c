"""What the ranks of a run exchange."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor


Totals = dict[str, tuple[float, float]]
"""Sum and count of each value on one rank: a mean over ranks is the sum of sums over the sum of counts."""


class Ranks:
    """The ranks of an accelerator. Every method but the properties is a collective: all ranks call it."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator

    @property
    def index(self) -> int:
        return self._accelerator.process_index

    @property
    def count(self) -> int:
        return self._accelerator.num_processes

    @property
    def is_first(self) -> bool:
        return self._accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        return self._accelerator.device

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over the ranks, in its own shape."""
        return self._accelerator.reduce(values, reduction="sum")

    def gather(self, values: Tensor) -> Tensor:
        """Tensors of all ranks, one after the other along the first dimension; all of one shape."""
        return self._accelerator.gather(values)

    def gather_padded(self, values: Tensor, dim: int) -> Tensor:
        """`gather`, of tensors that differ in size along `dim` and are padded there with 0."""
        return self._accelerator.gather(self._accelerator.pad_across_processes(values, dim=dim))

    def gather_list(self, items: Sequence) -> list:
        """Lists of all ranks, one after the other."""
        return gather_object(list(items))

    def means(self, totals: Totals) -> dict[str, float]:
        """Mean of each value over all ranks, NaN where nothing was counted; the names are the same on all ranks."""
        if not totals:
            return {}
        sums = torch.tensor(list(totals.values()), dtype=torch.float64, device=self.device)  # (N, 2)
        return {
            name: total / count if count else float("nan")
            for name, (total, count) in zip(totals, self.sum(sums).tolist(), strict=True)
        }
