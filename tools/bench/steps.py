#!/usr/bin/env python3
"""What an update of each method costs, on labels of each kind, beside a supervised one.

    tools/bench/steps.py [--recipe RECIPE] [--run RUN] [--json FILE]

The trained seed of a recipe (the README's first command makes the default's), or another run of it,
and as much of its unlabelled speech as its configuration has in a batch.  An update is forward
pass, backward pass, clipping and optimiser on that same speech: 'supervised' has the model's own
words as transcripts.
By slimipl the others learn theirs; from a cache (p = 0.1) one batch in ten updates is labelled.
By csl and ce_pl they learn stored labels of frames, by lpm a beam of four, weighed by a language
model (of conf/lm.yaml, untrained) that knows them or hears of them for the first time; by bljust
the self-supervised task alone (exploration), or beside the same speech and its words (joint); by
bljust_pl live pseudo-labels of the moving average in place of the task.

Variants take turns, one update at a time, one thread.  Printed are the median of the processor time
of an update, and the median of what it is of the supervised update beside it, over --repeat times
ten updates; where one in ten labels a batch, nine and one parts of the medians of both kinds.
Neither reading speech nor ESPnet's trainer is in it: both are the same for all.
"""

import fnmatch
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import soundfile
import torch
import yaml
from common import ROOT, machine, parser, timed
from espnet2.tasks.lm import LMTask

from espnet_pl.bridge.language_models import NeuralLanguageModel
from espnet_pl.bridge.model import PLModel
from espnet_pl.bridge.recogniser import Recogniser
from espnet_pl.bridge.task import PLTask
from espnet_pl.methods.base import Batch, Utterances
from espnet_pl.methods.registry import build, module_of
from espnet_pl.parts.decoding import pad
from espnet_pl.parts.language_model import Remembering
from espnet_pl.parts.pseudo_labels import propose

PERIOD = 10  # updates, in which p = 0.1 replaces one batch
CACHE, LIVE = {"capacity": 100}, {"capacity": 0}
EMA = {"capacity": 0, "teacher": "ema"}
SOFT, LATTICE = {"hard": 0.0, "soft": 1.0}, {"hard": 0.0, "lattice": 1.0}
SEQUENCES = {"hard": 0.0, "sequences": 1.0}  # eight of them
JOINT = {"explore": 0, "joint": 0, "gamma": 0.1, "norms_every": 0}
VARIANTS = {
    "supervised": ("supervised", {}),
    "hard, cache": ("slimipl", CACHE),
    "hard, live": ("slimipl", LIVE),
    "hard, moving average": ("slimipl", EMA),
    "hard, cache by changes": ("slimipl", CACHE | {"replace_when": "changed"}),
    "sampled, moving average": ("slimipl", EMA | {"label": "sampled"}),
    "soft, cache": ("slimipl", CACHE | SOFT),
    "soft, live": ("slimipl", LIVE | SOFT),
    "soft, moving average": ("slimipl", EMA | SOFT),
    "hypotheses, cache": ("slimipl", CACHE | SEQUENCES),
    "hypotheses, live": ("slimipl", LIVE | SEQUENCES),
    "occupancies, cache": ("slimipl", CACHE | LATTICE),
    "occupancies, live": ("slimipl", LIVE | LATTICE),
    "frames, classified": ("ce_pl", {}),
    "frames, contrast": ("csl", {}),
    "local prior, text known": ("lpm", {"proposal": "frozen"}),
    "local prior, text new": ("lpm", {"proposal": "frozen"}),
    "exploration": ("bljust", {"labelled": 0}),
    "joint": ("bljust", JOINT),
    "joint, labels": ("bljust_pl", {"explore": 0, "joint": 0, "gamma": 0.1}),
}


class Learner:
    """A model of its own that is trained one way, always on the same speech."""

    def __init__(self, net: torch.nn.Module, which: str, x: Utterances, other: Utterances, text):
        name, conf = VARIANTS[which]
        student = Recogniser(net)
        labels = [y or [1] for y in propose(student, x).labels]
        self.labels = sum(map(len, labels))
        resources = {}
        if name in ("ce_pl", "csl"):
            module = module_of(name)
            records = module.Method.ask(module.Config(**conf), student, x)
            resources = {"records": dict(zip(x.utt_id, records))}
            resources["teacher_tokens"] = len(net.token_list)
        elif name == "lpm":
            resources = {"language_model": Remembering(text, 0.0 if "new" in which else 64.0)}
        method = build(name, conf, student, resources)
        self.model = PLModel(student, method).train()
        self.optimiser = torch.optim.Adam(student.parameters(), lr=1e-5)
        y, lengths = pad(labels)
        heard = {"unlabelled": x, "labelled": replace(x, text=y, text_lengths=lengths)}
        if not which.startswith("joint"):
            del heard["unlabelled" if name == "supervised" else "labelled"]
        self.batches = [Batch(**heard)] * PERIOD
        if conf.get("capacity"):
            self.batches[0] = Batch(**heard, fresh=other)
            method(student, Batch(fresh=x))

    def update(self, place: int) -> None:
        """The update at this place of a period."""
        update(self.model, self.optimiser, self.batches[place])


def update(model: PLModel, optimiser: torch.optim.Optimizer, batch: Batch) -> None:
    """What ESPnet's trainer does with a batch."""
    optimiser.zero_grad()
    terms = model.method(model.student, batch)
    sum(t.weight * t.value for t in terms.values() if t.weight).backward()
    torch.nn.utils.clip_grad_norm_(model.student.parameters(), 5.0)
    optimiser.step()
    model.method.after_step(model.student)


def trained(recipe: Path, run: str) -> tuple[torch.nn.Module, int]:
    """A model of a recipe, and the samples of a batch."""
    folder = recipe / "exp" / run / "model"
    net, args = PLTask.stock.build_model_from_file(folder / "config.yaml", folder / "model.pth")
    return net, args.batch_bins


def random(recipe: Path) -> tuple[torch.nn.Module, int]:
    """The same without training, and a small batch."""
    conf = yaml.safe_load((recipe / "conf/asr.yaml").read_text(encoding="utf-8"))
    argv = ["--token_list", "<blank>", "--config", str(recipe / "conf/asr.yaml")]
    args = PLTask.stock.get_parser().parse_args(argv)
    args.token_list = ["<blank>", "<unk>", *"ABC", "<sos/eos>"]
    assert conf["batch_bins"] == args.batch_bins
    return PLTask.stock.build_model(args), 20000


def language_model(recipe: Path, token_list: list[str]) -> NeuralLanguageModel:
    """Of the recipe's kind, with weights that nothing has taught."""
    options = ["--token_list", "<blank>", "--config", str(recipe / "conf/lm.yaml")]
    args = LMTask.get_parser().parse_args(options)
    args.token_list = token_list
    return NeuralLanguageModel(LMTask.build_model(args))


def speech(recipe: Path, samples: int) -> tuple[Utterances, Utterances]:
    """The first unlabelled utterances that make a batch, and the next that do."""
    made, own = [], []
    for line in (recipe / "data/train_unlabelled/wav.scp").read_text().splitlines():
        utt_id, path = line.split(maxsplit=1)
        read = torch.from_numpy(soundfile.read(recipe / path, dtype="float32")[0])
        if own and (len(own) + 1) * max(len(read), *(len(y) for _, y in own)) > samples:
            made.append(_padded(own))
            own = []
        own.append((utt_id, read))
        if len(made) == 2:
            return made[0], made[1]
    raise SystemExit(f"{recipe}: there is not enough unlabelled speech for two batches")


def noise(samples: int) -> tuple[Utterances, Utterances]:
    """Two batches of what is no speech."""
    several = torch.randn(4, samples // 2).split(2)
    return tuple(_padded([(f"{i}{j}", y) for j, y in enumerate(x)]) for i, x in enumerate(several))


def _padded(own: list[tuple[str, torch.Tensor]]) -> Utterances:
    ids, several = zip(*own)
    lengths = torch.tensor([len(y) for y in several])
    return Utterances(list(ids), torch.nn.utils.rnn.pad_sequence(several, True), lengths)


def typical(values: list[float]) -> float:
    """The mean over a period of what is typical at its first place and at the others."""
    labels = values[::PERIOD]
    others = [value for place, value in enumerate(values) if place % PERIOD]
    return (median(labels) + (PERIOD - 1) * median(others)) / PERIOD


def main() -> None:
    """Measure, print, and write what was measured."""
    options = parser(__doc__, 15, "times ten updates")
    options.add_argument("--only", nargs="+", default="*", help="patterns of variants: 'hard*'")
    options.add_argument("--recipe", type=Path, default=ROOT / "egs/mini_alnum/pl1")
    options.add_argument("--run", default="supervised", help="of exp")
    options.add_argument("--small", action="store_true", help="to see that it runs")
    args = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = partial(random, args.recipe) if args.small else partial(trained, args.recipe, args.run)
    net, samples = made()
    x, other = noise(samples) if args.small else speech(args.recipe, samples)
    text = language_model(args.recipe, net.token_list)
    learners = {}
    for name in VARIANTS:
        wanted = any(fnmatch.fnmatch(name, pattern) for pattern in args.only)
        if name != "supervised" and not wanted:
            continue
        copy = made()[0]
        copy.load_state_dict(net.state_dict())
        learners[name] = Learner(copy, name, x, other, text)
        learners[name].update(0)  # chooses kernels
    seconds: dict[str, list[float]] = {name: [] for name in learners}
    for place in [*range(PERIOD)] * (1 if args.small else args.repeat):
        for name, learner in learners.items():
            seconds[name].append(timed(1, learner.update, place)[0])
    labels = learners["supervised"].labels
    print(f"{len(x)} utterances, {int(x.speech_lengths.sum())} samples, {labels} labels\n")
    print("| | CPU s | of supervised |\n|-|-:|-:|")
    base = seconds["supervised"]
    rows = {
        name: {"seconds": typical(own), "ratio": typical([a / b for a, b in zip(own, base)])}
        for name, own in seconds.items()
    }
    for name, row in rows.items():
        print(f"| {name} | {row['seconds']:.4f} | {row['ratio']:.2f} |")
    if args.json:
        size = {"utterances": len(x), "samples": int(x.speech_lengths.sum()), "labels": labels}
        args.json.write_text(json.dumps({"machine": machine(), **size, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
