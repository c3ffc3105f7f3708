"""parts/ranks: what several ranks make of their parts is what one makes of the whole."""

import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as mp

from espnet_pl.parts.gradients import gradients
from espnet_pl.parts.ranks import (
    SMALL,
    averages,
    before,
    by_first,
    gather,
    mean_gradients,
    of_all_ranks,
    several,
    together,
)

WHOLE = torch.arange(10, dtype=torch.float64).view(5, 2) / 10
SHARES = [slice(0, 3), slice(3, 5)]


def loss_of(x):
    """One in which rows meet, and that is no sum over them."""
    return (x @ x.t()).tanh().logsumexp((0, 1)) + x.mean(0).square().sum().log()


def parts(rank, weight):
    """Of everything that is asked below, the gradient or value that this rank has."""
    own = WHOLE[SHARES[rank]] if several() else WHOLE
    found = {}
    x = weight * own
    (found["together"],) = gradients(loss_of(together(x)), [weight])
    (found["sum"],) = gradients(of_all_ranks(x.sum(0)).log().sum(), [weight])
    found["order"] = together(torch.arange(len(own)) + before(len(own)))
    other = torch.ones(2, requires_grad=True)
    of = [weight, other, torch.ones(2, requires_grad=True)]
    mean = x.square().sum(1).mean() + (other.sum() if rank else 0)  # the last rank alone knows it
    found["mean"] = mean_gradients(gradients(mean, of), of, len(own))
    return found


def _rank(rank, world, path, results):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}", world_size=world, rank=rank
    )
    weight = torch.tensor([0.5, -2.0], dtype=torch.float64, requires_grad=True)
    assert gather(rank) == [*range(world)]
    for size in (SMALL, 3 * SMALL):  # of the last rank: more than is sent at once
        assert gather("x" * rank * size) == ["", "x" * size]
    assert by_first(lambda: f"of {rank}") == "of 0"
    with pytest.raises(ValueError, match="of 0"):
        by_first(lambda: int(f"of {rank}"))
    results[rank] = parts(rank, weight)
    nothing = torch.tensor([torch.nan, 6.0][rank])  # the first rank has none
    numbers = {"loss": torch.tensor(2.0 + 3 * rank), "rare": nothing, "never": nothing * torch.nan}
    results[f"averages {rank}"] = averages(numbers, torch.tensor([1, 3][rank]))
    torch.distributed.destroy_process_group()


def test_two_ranks_make_of_their_parts_what_one_makes_of_the_whole(tmp_path):
    weight = torch.tensor([0.5, -2.0], dtype=torch.float64, requires_grad=True)
    one = parts(0, weight)
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, args=(2, str(tmp_path / "r"), results), nprocs=2)
        first, second = (results[rank] for rank in (0, 1))
        for means, weight in (results[f"averages {rank}"] for rank in (0, 1)):
            assert weight == 4 and means["loss"] == (1 * 2 + 3 * 5) / 4
            assert means["rare"] == 2 * 3 * 6 / 4 and means["never"].isnan()  # as ESPnet has it
            assert all(value.dtype == torch.float32 for value in means.values())
    for name in ("together", "sum"):  # DDP takes the mean
        torch.testing.assert_close((first[name] + second[name]) / 2, one[name])
    assert first["order"].tolist() == second["order"].tolist() == [0, 1, 2, 3, 4]
    for found in (first["mean"], second["mean"]):
        torch.testing.assert_close(found[0], one["mean"][0])
        assert found[1].tolist() == pytest.approx([0.4, 0.4]) and found[2] is None


def test_one_rank_is_alone_with_itself():
    x = torch.ones(2, 3, requires_grad=True)
    assert together(x) is x and before(7) == 0 and gather("a") == ["a"] and not several()
    assert mean_gradients([None, x], [x, x], 5) == [None, x]


def test_a_rank_ends_without_what_python_does_last():
    """``leave`` does not end the threads of a group that DDP holds: nothing may wait for them."""
    code = """
import atexit, sys, threading
from espnet_pl.parts import ranks
threading.Thread(target=threading.Event().wait).start()
atexit.register(print, "what others want done at the end")
sys.stdout.write("and what is not written yet; ")
ranks.end(75)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (75, "")
    assert done.stdout == "and what is not written yet; what others want done at the end\n"
