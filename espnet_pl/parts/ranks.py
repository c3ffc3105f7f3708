"""What the ranks of a distributed job tell each other; a job of one rank is alone with itself.

All ranks must ask, and in the same order: who asks alone waits for ever.
"""

import atexit
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from espnet_pl.parts.gradients import weighed


def several() -> bool:
    """Whether there are others."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and torch.distributed.get_world_size() > 1


def rank() -> int:
    """Which one this is, from 0."""
    return torch.distributed.get_rank() if several() else 0


def leave() -> None:
    """This rank is done, and so are the others."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def end(status: int) -> NoReturn:
    """End this process, which has left its group, without what Python would still do.

    DDP holds a group for as long as the process lives (torch 2.13), and with it the threads of
    gloo, one of which may abort the process while Python ends: "terminate called without an active
    exception", of a rank that has done all it had to.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def gather(mine: Any) -> list[Any]:
    """What every rank holds, in the order of the ranks."""
    if not several():
        return [mine]
    held = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(held, mine)
    return held


def total(mine: Tensor) -> Tensor:
    """The sum over the ranks; without gradient."""
    if not several():
        return mine
    mine = mine.detach().clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(mine)
    return mine


def together(mine: Tensor) -> Tensor:
    """The rows of all ranks, one behind the other in the order of the ranks: one batch.

    For a loss in which utterances meet.  Every rank then computes the same loss of them all, and
    its gradient goes to the rank's own rows only, R times: the mean over R ranks, which is what
    DDP makes of gradients, is that of the loss, and nothing has to be sent on the way back.
    """
    if not several():
        return mine
    sizes = gather(len(mine))
    room = mine.new_zeros(max(sizes), *mine.shape[1:])
    room[: len(mine)] = mine.detach()
    held = [torch.empty_like(room) for _ in sizes]
    torch.distributed.all_gather(held, room)
    parts = [rows[:size] for rows, size in zip(held, sizes)]
    parts[torch.distributed.get_rank()] = weighed(mine, float(len(sizes)))
    return torch.cat(parts)


def of_all_ranks(mine: Tensor) -> Tensor:
    """The sum over the ranks, with gradient: see ``together``."""
    return together(mine[None]).sum(0)


def before(mine: int) -> int:
    """The sum of what the ranks before this one hold: where its own rows begin."""
    return sum(gather(mine)[: torch.distributed.get_rank()]) if several() else 0


def mean_gradients(
    mine: Sequence[Tensor | None], of: Sequence[Tensor], count: int
) -> list[Tensor | None]:
    """Gradients of a mean over the utterances of all ranks, from those of each rank's own mean.

    Args:
        mine: of each parameter; None where this rank has none.
        of: the parameters.
        count: utterances of this rank.
    """
    if not several():
        return [*mine]
    counts, known = zip(*gather((count, [grad is not None for grad in mine])))
    share = count / max(sum(counts), 1)
    out: list[Tensor | None] = []
    for grad, parameter, *there in zip(mine, of, *known):
        own = torch.zeros_like(parameter) if grad is None else share * grad
        out.append(total(own) if any(there) else None)
    return out
