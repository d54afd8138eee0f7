"""Division of linears among the processes of a pruning: owners, sums for them, and their results.

All processes make the same calls in the same order. A single process owns every linear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from racdeploy.pruning.job_share import JobShare

T = TypeVar("T")


class WorkShare:
    """Linears with an owner each, the process that solves it."""

    def __init__(self, share: JobShare, costs: Mapping[tuple[str, ...], int]) -> None:
        """Assign owners.

        Args:
            costs: linears that one process solves together → their number of weights.
        """
        self._share = share
        self._owners: dict[str, int] = {}
        owners = share.assign_owners(list(costs.values()))
        for linears, owner in zip(costs, owners, strict=True):
            self._owners |= dict.fromkeys(linears, owner)

    def list_owned(self, linears: Sequence[str]) -> list[str]:
        """Return those of some linears that this process owns."""
        owners = [self._owners[linear] for linear in linears]
        return [linears[index] for index in self._share.list_owned(owners)]

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum over all processes, in all of them."""
        self._share.add_up(tensor)

    def add_up_for_owners(self, tensor: Tensor, linears: Sequence[str]) -> None:
        """Replace a tensor by the sum over all processes, in owners of some linears.

        In other processes the tensor is undefined afterwards.
        """
        self._share.add_up_for(tensor, [self._owners[linear] for linear in linears])

    def get_tensor(self, linear: str, tensor: Tensor) -> Tensor:
        """Return the tensor of a linear's owner; others pass one of the same shape and dtype."""
        return self._share.send_to_all(tensor, self._owners[linear])

    def get_object(self, linear: str, value: T) -> T:
        """Return the object of a linear's owner."""
        return self._share.send_object_to_all(value, self._owners[linear])
