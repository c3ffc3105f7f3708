"""What the ranks of a distributed job tell each other; a job of one rank is alone with itself.

All ranks must ask, and in the same order: who asks alone waits for ever.
"""

import atexit
import os
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from espnet_pl.parts.gradients import weighed

SMALL, LENGTH = 1024, 8  # bytes of what is sent at once, and of the number before it


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
    """What every rank holds, in the order of the ranks.

    What is small, as nearly always, is sent at once: ``all_gather_object`` asks for the sizes
    first, and needs four times as long.
    """
    if not several():
        return [mine]
    data = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8)
    sent = torch.zeros(SMALL, dtype=torch.uint8)
    sent[:LENGTH] = torch.tensor([len(data)]).view(torch.uint8)
    sent[LENGTH:][: len(data)] = data[: SMALL - LENGTH]
    held = [rows.cpu() for rows in _all(sent.to(_device()))]
    sizes = [int(rows[:LENGTH].view(torch.long)) for rows in held]
    if max(sizes) > SMALL - LENGTH:
        sent = torch.zeros(LENGTH + max(sizes), dtype=torch.uint8)
        sent[LENGTH:][: len(data)] = data
        held = [rows.cpu() for rows in _all(sent.to(_device()))]
    return [pickle.loads(rows[LENGTH:][:size].numpy().tobytes()) for rows, size in zip(held, sizes)]


def by_first(what: Callable[[], Any]) -> Any:
    """What the first rank gets of something that it alone does; all raise what it raises."""
    got = problem = None
    if rank() == 0:
        try:
            got = what()
        except Exception as error:
            problem = error
    got, problem = gather((got, problem))[0]
    if problem:
        raise problem
    return got


def _all(mine: Tensor) -> list[Tensor]:
    """The tensors of all ranks, which are of one shape."""
    held = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(held, mine)
    return held


def _device() -> torch.device:
    """Where what is sent has to lie."""
    return torch.device("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")


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
    parts = [rows[:size] for rows, size in zip(_all(room), sizes)]
    parts[torch.distributed.get_rank()] = weighed(mine, float(len(sizes)))
    return torch.cat(parts)


def averages(mine: Mapping[str, Tensor], weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Means over the ranks, by weight, and the sum of the weights; without gradient.

    Args:
        mine: numbers, under the same names on all ranks; NaN: this rank has none.
        weight: of this rank.
    """
    sent = torch.stack([value.detach().double() for value in mine.values()]) * weight
    *held, weights = torch.stack(_all(torch.cat([sent, weight.double()[None]]))).unbind(1)
    whole = weights.sum()
    means = [sums.nanmean() * len(sums) / whole for sums in held]
    return {n: x.to(mine[n].dtype) for n, x in zip(mine, means)}, whole.to(weight.dtype)


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
