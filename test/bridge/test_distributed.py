"""Two processes: the streams are shared out, the plan is common, each term has its own mean."""

import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as mp

from espnet_pl.bridge.batches import PairedIterFactory
from espnet_pl.bridge.model import _across_ranks
from espnet_pl.data.pairing import Pairing
from espnet_pl.methods.base import Term
from test.bridge.models import model_folder


def two_ranks(argv, tmp_path, extra=()):
    """Run the training command twice, as the ranks of one job on CPU."""
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "espnet_pl.bridge.train",
                *argv,
                *extra,
                "--dist_backend",
                "gloo",
                "--dist_world_size",
                "2",
                "--dist_rank",
                str(rank),
                "--dist_init_method",
                f"file://{tmp_path}/rendezvous",
                "--multiprocessing_distributed",
                "false",
            ],
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        for rank in (0, 1)
    ]
    return [(rank.communicate(timeout=300)[1], rank.returncode) for rank in ranks]


def test_two_ranks_train_together_to_the_end(arguments, tmp_path):
    conf = {"capacity": 2, "unlabelled": 2, "teacher": "ema"}
    argv = arguments(method_conf=conf, max_epoch=2, model_conf={"ctc_weight": 1.0})
    results = two_ranks(argv, tmp_path)
    assert [code for _, code in results] == [0, 0], results[0][0][-2000:]
    saved = torch.load(tmp_path / "exp/checkpoint.pth", weights_only=False)
    assert saved["optimizers"][0]["method"]["step"] == 10
    assert all(v.isfinite().all() for v in saved["model"].values() if v.is_floating_point())


def test_two_ranks_train_what_a_method_learns(arguments, tmp_path):
    teacher = ["--teachers", str(model_folder(tmp_path / "teacher")), "--teacher_mode", "online"]
    # Nothing trains the CTC layer, and a rank may have no anchor.
    changes = dict(max_epoch=2, unused_parameters=True, batch_bins=12000)
    argv = arguments("csl", method_conf={"hidden": 8, "out": 4}, **changes)
    results = two_ranks([*argv, *teacher], tmp_path)
    assert [code for _, code in results] == [0, 0], results[0][0][-2000:]
    optimizer = torch.load(tmp_path / "exp/checkpoint.pth", weights_only=False)["optimizers"][0]
    own = optimizer["param_groups"][1]["params"]
    assert len(own) == 4 and all(optimizer["state"][i]["exp_avg"].any() for i in own)
    assert optimizer["method"]["step"] == 10


@pytest.mark.parametrize("when", ["random", "changed"])
def test_both_ranks_go_on_with_the_cache_they_had(when, arguments, tmp_path):
    """Rank 0 alone writes the checkpoint."""
    conf = {"capacity": 2, "unlabelled": 2, "replace": 0.5, "replace_when": when, "soft": 1.0}
    saved = []
    for out, epochs in (("whole", (2,)), ("parts", (1, 2))):
        for last in epochs:
            argv = arguments(out=out, method_conf=conf, max_epoch=last)
            (tmp_path / "rendezvous").unlink(missing_ok=True)
            results = two_ranks(argv, tmp_path, ["--resume", "true"])
            assert [code for _, code in results] == [0, 0], results[1][0][-2000:]
        saved.append(torch.load(tmp_path / out / "checkpoint.pth", weights_only=False))
    for name, value in saved[0]["model"].items():
        torch.testing.assert_close(saved[1]["model"][name], value)
    caches = [s["optimizers"][0]["method"]["cache._extra_state"] for s in saved]
    assert caches[0]["labels"].tolist() == caches[1]["labels"].tolist()
    assert caches[0]["made_at"].tolist() == caches[1]["made_at"].tolist()


def _diagnostics(rank, world, path, results):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}", world_size=world, rank=rank
    )
    terms = {"loss": Term(torch.tensor(1.0), 1.0, 2)}
    if rank == 1:
        terms["label_churn"] = Term(torch.tensor(0.5), 0.0, 3)
    found, _ = _across_ranks(terms, 2)
    results[rank] = {name: float(term.value) for name, term in found.items()}
    torch.distributed.destroy_process_group()


def test_what_one_rank_alone_can_tell_is_its_own(tmp_path):
    results = mp.Manager().dict()
    mp.spawn(_diagnostics, (2, tmp_path / "rendezvous", results), nprocs=2)
    assert results[0] == {"label_churn": 0.0, "loss": 1.0}
    assert results[1] == {"label_churn": 1.0, "loss": 1.0}  # the trainer halves it


def _rank(rank, world, path, results):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}", world_size=world, rank=rank
    )
    value, count = [(2.0, 3), (8.0, 1)][rank]
    weight = torch.tensor(1.0, requires_grad=True)
    terms = {
        "pseudo": Term(weight * value, 1.0, count),
        "labels_empty": Term(torch.tensor(value), 0.0, 1),
    }
    terms, weight_of_rank = _across_ranks(terms, [5, 2][rank])
    terms["pseudo"].value.backward()
    gradient = weight.grad.clone()
    torch.distributed.all_reduce(gradient)
    results[rank] = (
        float(gradient) / world,  # what DDP makes of it
        float(terms["pseudo"].value.detach()),
        float(terms["labels_empty"].value),
        weight_of_rank,
    )
    torch.distributed.destroy_process_group()


def test_each_term_is_the_mean_by_its_own_count(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, args=(2, str(tmp_path / "r"), results), nprocs=2)
        results = dict(results)
    mean = (3 * 2.0 + 1 * 8.0) / 4
    assert results[0][0] == results[1][0] == pytest.approx(mean)
    assert (results[0][1] + results[1][1]) / 2 == pytest.approx(mean)
    assert (results[0][2] + results[1][2]) / 2 == pytest.approx((2.0 + 8.0) / 2)
    assert results[0][3] == results[1][3] == 3.5  # and 7 together


class Stream:
    """As much of ESPnet's SequenceIterFactory as pairs are made of."""

    num_workers, pin_memory = 0, False

    def __init__(self, batches):
        self.sampler = type("Sampler", (), {"batches": batches})
        self.dataset = {utt_id: (utt_id, {}) for batch in batches for utt_id in batch}

    @staticmethod
    def collate_fn(items):
        return [utt_id for utt_id, _ in items], {"speech": len(items)}


def test_ranks_take_the_same_steps_on_different_utterances():
    batches = [[f"u{b}{i}" for i in range(4)] for b in range(5)]
    pairing = Pairing(labelled=1, unlabelled=2, capacity=3, replace=0.5)
    seen = []
    for rank in (0, 1):
        mine = Stream([b[rank::2] for b in batches])
        factory = PairedIterFactory(pairing, mine, mine, steps_per_epoch=30, seed=3)
        seen.append(
            [{k: v for k, v in flat.items() if "utt_id" in k} for _, flat in factory.build_iter(1)]
        )
    for a, b in zip(*seen):
        assert a.keys() == b.keys()
        for kind in a:
            assert not set(a[kind]) & set(b[kind])
            assert {u[:2] for u in a[kind]} == {u[:2] for u in b[kind]}


def test_an_epoch_begins_where_the_last_one_ended_also_in_a_new_process():
    batches = [[f"u{b}{i}" for i in range(2)] for b in range(5)]
    pairing = Pairing(labelled=1, unlabelled=2, capacity=3, replace=0.5)

    def epoch(factory, n):
        return [flat for _, flat in factory.build_iter(n)]

    def new():
        return PairedIterFactory(pairing, Stream(batches), Stream(batches), 7, seed=0)

    running = new()
    whole = [epoch(running, n) for n in (1, 2, 3)]
    assert epoch(new(), 3) == whole[2]
    assert whole[0] != whole[1] != whole[2]
