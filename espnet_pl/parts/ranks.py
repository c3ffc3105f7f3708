"""What the ranks of a distributed job tell each other; a job of one rank is alone with itself."""

from typing import Any

import torch
from torch import Tensor


def several() -> bool:
    """Whether there are others."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and torch.distributed.get_world_size() > 1


def rank() -> int:
    """Which one this is, from 0."""
    return torch.distributed.get_rank() if several() else 0


def gather(mine: Any) -> list[Any]:
    """What every rank holds, in the order of the ranks; all of them must ask."""
    if not several():
        return [mine]
    held = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(held, mine)
    return held


def total(mine: Tensor) -> Tensor:
    """The sum over the ranks; all of them must ask."""
    if not several():
        return mine
    mine = mine.clone()
    torch.distributed.all_reduce(mine)
    return mine
