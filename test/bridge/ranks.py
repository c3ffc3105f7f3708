"""Two processes that train together, again and again: they start once, which takes longest."""

import os
import queue
import traceback

import torch
import torch.multiprocessing as mp

from espnet_pl.bridge import task
from espnet_pl.bridge.recogniser import Recogniser
from espnet_pl.bridge.train import main
from espnet_pl.methods import csl, pseudo_labelling

PATIENCE = 240  # seconds; who has not answered then waits for another rank
GOLDEN = 0.6180339887498949


class Ranks:
    """Processes that run what they are told, all of them at once."""

    def __init__(self, count: int = 2) -> None:
        context = mp.get_context("spawn")
        self.answers = context.Queue()
        self.questions = [context.Queue() for _ in range(count)]
        self.processes = [
            context.Process(target=_serve, args=(rank, mine, self.answers), daemon=True)
            for rank, mine in enumerate(self.questions)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, function, *args):
        """``function(rank, ranks, *args)`` in each; what they return, or ``Broken``."""
        for mine in self.questions:
            mine.put((function, len(self.questions), args))
        found = {}
        try:
            while len(found) < len(self.questions):
                rank, answer, wrong = self.answers.get(timeout=PATIENCE)
                found[rank] = Broken(wrong) if wrong else answer
        except queue.Empty:
            self.end()
            raise AssertionError(f"only ranks {sorted(found)} have answered: {found}") from None
        return [found[rank] for rank in sorted(found)]

    def end(self) -> None:
        """Whatever they do."""
        for process in self.processes:
            process.kill()
            process.join()


class Broken(str):
    """What went wrong in a rank."""


def _serve(rank, questions, answers):
    torch.set_num_threads(1)
    while True:
        function, ranks, args = questions.get()
        try:
            answers.put((rank, function(rank, ranks, *args), None))
        except BaseException:
            answers.put((rank, None, traceback.format_exc()))
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def train(rank, ranks, argv, rendezvous, harm=None):
    """One rank of a training, or the only one; what it knows in the end.

    Args:
        harm: the name of a function here that spoils something for the last rank.
    """
    more = []
    if ranks > 1:
        more = ["--dist_init_method", f"file://{rendezvous}", "--dist_world_size", str(ranks)]
        more += ["--dist_rank", str(rank), "--multiprocessing_distributed", "false"]
    return _observed([*argv, *more], harm and (lambda: globals()[harm](rank)))


def started_by(rank, ranks, who, argv, port):
    """One rank of a training that ``srun`` or ``torchrun`` has started: the environment says so."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
    names |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    argv = [*argv, "--multiprocessing_distributed", "false"]
    if who == "srun":
        names = {"PROCID": rank, "LOCALID": rank, "NTASKS": ranks, "NODEID": 0}
        names |= {"STEP_NUM_NODES": 1, "STEP_NODELIST": "localhost"}
        names = {f"SLURM_{name}": value for name, value in names.items()}
        argv += ["--dist_launcher", "slurm", "--dist_master_port", str(port)]
    os.environ |= {name: str(value) for name, value in names.items()}
    try:
        return _observed(argv)
    finally:
        for name in names:
            del os.environ[name]


def _observed(argv, harm=None):
    begun = {}

    def make(attach):
        def observed(optimizer, model):
            begun.update(flat(model.method.state_dict()))
            attach(optimizer, model)

        return observed

    undo = [_same_draws(), _changed(task, "attach", make), *([harm()] if harm else [])]
    try:
        main(argv)
    finally:
        for function in undo:
            function()
    model = task._Learning.built
    return {
        "student": flat(model.state_dict()),
        "begun": begun,
        "method": flat(model.method.state_dict()),
        "step": int(model.method.step),
    }


def flat(state, prefix=""):
    """A state dictionary without nesting, copied."""
    out = {}
    for key, value in state.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value.clone()
    return out


def _same_draws():
    """Draws that do not depend on how many utterances there are; what puts them back."""
    drawn = torch.rand

    def rand(*shape, **how):
        if len(shape) == 1:
            return torch.full(shape, 0.5, **how)
        return (torch.arange(shape[-1], **how) * GOLDEN % 1).expand(shape)

    torch.rand = rand
    return lambda: setattr(torch, "rand", drawn)


def _changed(owner, name, make):
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    return lambda: setattr(owner, name, before)


def nan_in_the_second_labelled_batch(rank):
    """Of the last rank only."""
    calls = []

    def make(supervised):
        def spoilt(self, x):
            loss, parts = supervised(self, x)
            calls.append(x)
            return (loss * torch.nan if rank and len(calls) == 2 else loss), parts

        return spoilt

    return _changed(Recogniser, "supervised", make)


def silent_teacher(rank, whom=(1,)):
    """It has nothing to say of the last rank's speech."""

    def make(propose):
        def silent(*args):
            made = propose(*args)
            if rank not in whom:
                return made
            several = ("labels", "lengths", "log_w", "log_p")
            records = [
                {name: x[:0] if name in several else x for name, x in own.items()}
                for own in made.records
            ]
            return made._replace(labels=[[] for _ in made.labels], records=records)

        return silent

    return _changed(pseudo_labelling, "propose", make)


def silent_teachers(rank):
    """They have nothing to say at all."""
    return silent_teacher(rank, (0, 1))


def no_segments(rank):
    """None in the last rank's speech."""

    def make(draw):
        return lambda labels: draw(labels.fill_(-1) if rank else labels)

    return _changed(csl, "draw_of_segments", make)
