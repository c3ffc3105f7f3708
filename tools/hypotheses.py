#!/usr/bin/env python3
"""How wrong are a model's hypotheses, and how wrong is what a student would learn from them?

    tools/hypotheses.py exp/supervised/model data/train_oracle [--speeds 1,0.9]
        [--language_model exp/lm/word]

run in a recipe's folder.  Of the model's labels, in per cent of the tokens that were said:

    greedy, consensus   the best path at speed 1, and of all speeds what most are like
    best                the hypothesis with the greatest w, the mean opinion of all speeds
    w^1, w^2, w^4       the mean over hypotheses, weighed: what −Σ_k w_k log P(y_k) teaches
    risk                the hypothesis of least Bayes risk
    oracle              the best hypothesis there is

and the entropy of w in nats.  With a language model, of the hypotheses that lpm would keep (where
it keeps none, of the greedy one, whose length decides), and the perplexity of what was said:

    uniform, lm, lm·w   the mean over hypotheses, alike or weighed by the language model or by both

Nothing is trained; whole sets take minutes, --utterances some.
"""

import argparse
import math
import random
from pathlib import Path

import soundfile
import torch
from rapidfuzz.distance import Levenshtein

from espnet_pl.bridge.language_models import load
from espnet_pl.bridge.recogniser import Recogniser
from espnet_pl.bridge.task import PLTask
from espnet_pl.data.views import at_speed
from espnet_pl.methods import lpm
from espnet_pl.methods.base import Utterances
from espnet_pl.parts.language_model import LanguageModel
from espnet_pl.parts.objectives import Objectives
from espnet_pl.parts.pseudo_labels import agree, by_risk, propose

BATCH = 10  # utterances
EXPONENTS = (1, 2, 4)
PRIORS = ("uniform", "lm", "lm·w")


def measure(
    student,
    x,
    truth: list[list[int]],
    speeds: list[float],
    beam: int,
    language_model: LanguageModel | None = None,
) -> dict[str, float]:
    """Edits by name, summed over the utterances; ``tokens`` and ``entropy`` beside them, and with a
    language model the ``surprise`` of what was said, in nats."""
    how = Objectives(sequences=1.0, beam=beam)
    views = [propose(student, at_speed(x, speed), how) for speed in speeds]
    made = agree(views)
    found = dict.fromkeys(("greedy", "consensus", "best"), 0.0)
    found |= {f"w^{k}": 0.0 for k in EXPONENTS} | {"risk": 0.0, "oracle": 0.0}
    found |= {"entropy": 0.0, "tokens": float(sum(map(len, truth)))}
    if language_model is not None:
        found |= dict.fromkeys(PRIORS, 0.0)
        found["surprise"] = -float(language_model.log_p(truth).sum())
    for first, label, record, said in zip(views[0].labels, made.labels, made.records, truth):
        found["greedy"] += Levenshtein.distance(first, said)
        found["consensus"] += Levenshtein.distance(label, said)
        rows = [y[:n] for y, n in zip(record["labels"].tolist(), record["lengths"].tolist())]
        edits = torch.tensor([float(Levenshtein.distance(y, said)) for y in rows])
        if language_model is not None:
            log_lm = by_language_model(language_model, rows, len(label))
            left = ~log_lm.isneginf()
            log_w = record["log_w"][left]
            for name, prior in zip(PRIORS, (0 * log_w, log_lm[left], log_lm[left] + log_w)):
                mean = float(prior.softmax(0) @ edits[left])
                found[name] += mean if len(log_w) else Levenshtein.distance(first, said)
        if not len(edits):  # nothing at all is said
            for name in ("best", "risk", "oracle", *(f"w^{k}" for k in EXPONENTS)):
                found[name] += len(said)
            continue
        log_w = record["log_w"]
        found["best"] += float(edits[log_w.argmax()])
        for k in EXPONENTS:
            found[f"w^{k}"] += float((k * log_w).softmax(0) @ edits)
        found["risk"] += float(edits[by_risk(record, 1.0)["log_w"].argmax()])
        found["oracle"] += float(edits.min())
        found["entropy"] -= float(log_w.exp() @ log_w)
    return found


def by_language_model(language_model: LanguageModel, rows: list[list[int]], greedy: int):
    """log p_LM of each hypothesis; −inf of those that lpm would not keep."""
    least, most = lpm.Config().band(greedy)
    keep = torch.tensor([bool(y) and least <= len(y) <= most for y in rows], dtype=torch.bool)
    return language_model.log_p(rows).float().where(keep, -torch.inf)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--speeds", default="1")
    parser.add_argument("--beam", type=int, default=8)
    parser.add_argument("--utterances", type=int, default=150, help="drawn at random, seed 0")
    parser.add_argument("--language_model", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    net, conf = PLTask.stock.build_model_from_file(
        args.model / "config.yaml", args.model / "model.pth"
    )
    student, speeds = Recogniser(net), [float(speed) for speed in args.speeds.split(",")]
    tokenise = PLTask.build_preprocess_fn(conf, train=False)
    language_model = load(args.language_model, conf.token_list) if args.language_model else None

    def read(name: str) -> dict[str, str]:
        lines = (args.data / name).read_text(encoding="utf-8").splitlines()
        return dict((line + " ").split(" ", 1) for line in lines)

    text, wav = read("text"), read("wav.scp")
    ids = random.Random(0).sample(sorted(text), min(args.utterances, len(text)))
    total: dict[str, float] = {}
    for begin in range(0, len(ids), BATCH):
        own = ids[begin : begin + BATCH]
        speech = [torch.from_numpy(soundfile.read(wav[i].strip(), dtype="float32")[0]) for i in own]
        lengths = torch.tensor([len(y) for y in speech])
        x = Utterances(own, torch.nn.utils.rnn.pad_sequence(speech, batch_first=True), lengths)
        truth = [tokenise(i, {"text": text[i].strip()})["text"].tolist() for i in own]
        found = measure(student, x, truth, speeds, args.beam, language_model)
        for name, value in found.items():
            total[name] = total.get(name, 0.0) + value
    tokens, entropy = total.pop("tokens"), total.pop("entropy")
    surprise = total.pop("surprise", None)
    print(f"{args.model}, {len(ids)} utterances of {args.data}, {tokens:.0f} tokens, at {speeds}")
    print("  ".join(f"{name} {100 * edits / tokens:.1f}" for name, edits in total.items()))
    print(f"entropy of w: {entropy / len(ids):.2f} nats")
    if surprise is not None:  # the end of a sentence is a token, too
        print(f"perplexity of what was said: {math.exp(surprise / (tokens + len(ids))):.1f}")


if __name__ == "__main__":
    main()
