#!/usr/bin/env python3
"""What an update of a transducer costs that learns from a teacher, beside one on transcripts.

    tools/bench/distillation.py [--recipe RECIPE] [--run RUN] [--json FILE]

A trained transducer of a recipe teaches a copy of itself on as much unlabelled speech as its
configuration has in a batch.  An update is forward pass, backward pass, clipping and optimiser:
'supervised' has the teacher's labels as transcripts; the others learn by transducer_kd, from
records made before ('stored') or in the update ('online').  One hypothesis, but where there are
eight.

Variants take turns, one update at a time, one thread.  Printed are the median of the processor time
of an update, and the median of what it is of the supervised update beside it; memory is what the
resident set grows by at its peak in one update, in a process of its own (Linux).
"""

import json
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import yaml
from common import ROOT, fresh, machine, parser, reset_peak, status, timed
from steps import noise, speech, update

from espnet_pl.bridge.model import PLModel
from espnet_pl.bridge.task import PLTransducerTask
from espnet_pl.bridge.transducer import TransducerRecogniser
from espnet_pl.methods.base import Batch, Utterances
from espnet_pl.methods.registry import build
from espnet_pl.methods.transducer_kd import Config, Method
from espnet_pl.parts.decoding import pad
from espnet_pl.parts.hypotheses import likeliest

HARD, ONE = {"full_sum": 0.0, "hard": 1.0, "beam": 1}, {"beam": 1}
SEVERAL = {"full_sum": 1.0, "discriminative": 1.0, "beam": 8}
VARIANTS = {  # settings, and whether the records are there
    "supervised": (None, True),
    "hard label, stored": (HARD, True),
    "full sum, stored": (ONE, True),
    "full sums of 8, stored": (SEVERAL, True),
    "three classes, stored": (HARD | {"collapsed": 0.01}, True),
    "best path, stored": (HARD | {"one_best": 0.1}, True),
    "all tokens, online": (HARD | {"full_lattice": 0.01}, False),
    "full sum, online": (ONE, False),
    "full sums of 8, online": (SEVERAL, False),
}


class Learner:
    """A model of its own that is trained one way, always on the same speech."""

    def __init__(self, net, teacher: TransducerRecogniser, which: str, x: Utterances):
        conf, stored = VARIANTS[which]
        student = TransducerRecogniser(net)
        resources = {"teacher_answers": teacher.answers, "teacher": teacher}
        if conf is None:
            labels = likeliest(Method.ask(Config(), teacher, x))
            text, lengths = pad([y or [1] for y in labels])
            self.batch = Batch(labelled=replace(x, text=text, text_lengths=lengths))
            method = build("supervised", {}, student)
        else:
            if stored:
                records = Method.ask(Config(**conf), teacher, x)
                resources["records"] = dict(zip(x.utt_id, records))
                resources["teacher"] = None
            self.batch = Batch(unlabelled=x)
            method = build("transducer_kd", conf, student, resources)
        self.model = PLModel(student, method).train()
        self.optimiser = torch.optim.Adam(student.parameters(), lr=1e-5)

    def update(self) -> None:
        """One."""
        update(self.model, self.optimiser, self.batch)


def networks(args) -> tuple[torch.nn.Module, torch.nn.Module, int]:
    """The teacher, a student like it, and the samples of a batch."""
    stock = PLTransducerTask.stock
    if args.small:
        conf = args.recipe / "conf/asr_transducer.yaml"
        settings = yaml.safe_load(conf.read_text(encoding="utf-8"))
        known = {a.dest for a in stock.get_parser()._actions}
        settings = {k: v for k, v in settings.items() if k in known}
        options = stock.get_parser().parse_args(["--token_list", "<blank>"])
        vars(options).update(settings)
        options.token_list = ["<blank>", "<unk>", *"ABCDEFG", "<sos/eos>"]
        net, samples = stock.build_model(options), 20000
    else:
        folder = args.recipe / "exp_asr_transducer" / args.run / "model"
        net, options = stock.build_model_from_file(folder / "config.yaml", folder / "model.pth")
        samples = options.batch_bins
    same = stock.build_model(options)
    same.load_state_dict(net.state_dict())
    return net, same, samples


def learner(args, which: str) -> tuple[Learner, Utterances]:
    """One that learns that way, and the speech."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher, net, samples = networks(args)
    x = (noise(samples) if args.small else speech(args.recipe, samples))[0]
    return Learner(net, TransducerRecogniser(teacher).eval().requires_grad_(False), which, x), x


def main() -> None:
    """Measure, print, and write what was measured."""
    options = parser(__doc__, 60, "updates")
    options.add_argument("--recipe", type=Path, default=ROOT / "egs/fsdd/pl1")
    options.add_argument("--run", default="supervised", help="of exp_asr_transducer")
    options.add_argument("--small", action="store_true", help="to see that it runs")
    options.add_argument("--memory", choices=VARIANTS, help="only print the memory of a variant")
    args = options.parse_args()
    if args.memory:
        own = learner(args, args.memory)[0]
        before = reset_peak()
        own.update()
        print(json.dumps({"mb": status("VmHWM") - before}))
        return
    learners = {name: learner(args, name) for name in VARIANTS}
    x = learners["supervised"][1]
    seconds: dict[str, list[float]] = {name: [] for name in learners}
    for turn in range(2 if args.small else args.repeat + 2):
        for name, (own, _) in learners.items():
            seconds[name].append(timed(1, own.update)[0])
        if turn == 0:
            seconds = {name: [] for name in learners}  # it chooses kernels
    again = [__file__, "--recipe", str(args.recipe), "--run", args.run]
    again += ["--small"] if args.small else []
    print(f"{len(x)} utterances, {int(x.speech_lengths.sum())} samples\n")
    print("| | CPU s | of supervised | extra MB |\n|-|-:|-:|-:|")
    base, rows = seconds["supervised"], {}
    for name, own in seconds.items():
        ratio = median(a / b for a, b in zip(own, base))
        rows[name] = {"seconds": median(own), "ratio": ratio}
        if name == "supervised" or not args.small:  # each process takes seconds to begin
            rows[name]["mb"] = fresh(None, *again, "--memory", name)["mb"]
        memory = f"{rows[name].get('mb', 0.0):.0f}"
        print(f"| {name} | {median(own):.4f} | {ratio:.2f} | {memory} |")
    if args.json:
        size = {"utterances": len(x), "samples": int(x.speech_lengths.sum())}
        args.json.write_text(json.dumps({"machine": machine(), **size, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
