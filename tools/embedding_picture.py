#!/usr/bin/env python3
"""Draw what encoders make of frames: one dot for each token of some speech, near what is like it.

    tools/embedding_picture.py --data data/dev --align exp/oracle/model --output csl_embedding.png \
        --model teacher=exp/teacher/model --model csl=exp/csl.contrast/model

``--align`` is a model with a CTC layer and the tokens that colour the dots: its alignment of the
transcripts says where each token is.  Of each (of two in a row that are the same, as one), one
frame is drawn, the same for all models that
have as many frames; its vector is what the model's encoder makes of it (unit length).  Two
dimensions are left of it by t-SNE (van der Maaten and Hinton, JMLR 9, 2008; scikit-learn).

t-SNE shows what is near, not how near, so a number stands beside each picture: the share of dots
whose nearest other dot (cosine, all dimensions, other utterances only) is of the same token.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from espnet_pl.bridge import teachers
from espnet_pl.data.kaldi import read_scp
from espnet_pl.losses.ctc import best_alignment
from espnet_pl.methods.base import Utterances
from espnet_pl.parts.frame_labels import FrameLabels, draw_of_segments, frame_labels

COLOURS = 10  # tokens, the most frequent ones


def speech(folder: Path, utterances: int) -> Iterator[tuple[Utterances, list[str]]]:
    """The first utterances of a data folder, one by one, and their words."""
    wav, text = (read_scp(folder / name) for name in ("wav.scp", "text"))
    for utt_id in sorted(wav)[:utterances]:
        samples = torch.from_numpy(soundfile.read(wav[utt_id], dtype="float32")[0])
        yield Utterances([utt_id], samples[None], torch.tensor([len(samples)])), text[utt_id]


@torch.no_grad()
def places(model: teachers.LoadedTeacher, x: Utterances, text: str, generator: int) -> tuple:
    """Of each token of an utterance one frame, as a share of its length, and the token."""
    network, tokens = model.network, model.tokens
    split = text.split() if tokens.token_type == "word" else [*text.replace(" ", "")]
    known = {token: i for i, token in enumerate(tokens.token_list)}
    labels = torch.tensor([[known[token] for token in split if token in known]])
    log_p, frames = network.hear(x).frame_log_probs()
    path = best_alignment(log_p, frames, labels, torch.tensor([labels.shape[1]]), network.blank)[0]
    runs, lengths = torch.unique_consecutive(
        path.masked_fill(path == network.blank, -1), return_counts=True
    )
    of_frames = frame_labels(
        FrameLabels(), [{"labels": runs, "lengths": lengths}], len(tokens.token_list), frames
    )
    torch.manual_seed(generator)
    _, drawn = draw_of_segments(of_frames)
    names = [tokens.token_list[unit - 1] for unit in of_frames[0, drawn].tolist()]
    return (drawn + 0.5) / frames[0], names


@torch.no_grad()
def vectors(model: teachers.LoadedTeacher, x: Utterances, where: Tensor) -> np.ndarray:
    """What the encoder makes of frames, at these shares of the utterance's length."""
    features, frames = model.network.hear(x).features()
    z = features[0, (where * frames[0]).long()]
    return torch.nn.functional.normalize(z.float(), dim=1).numpy()


def nearest_is_alike(z: np.ndarray, names: np.ndarray, utterance: np.ndarray) -> float:
    """The share of dots whose nearest dot of another utterance has the same name."""
    near = z @ z.T
    near[utterance[:, None] == utterance] = -np.inf
    return float((names[near.argmax(1)] == names).mean())


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="folder with wav.scp and text")
    parser.add_argument("--align", type=Path, required=True, help="a model that says where")
    parser.add_argument(
        "--model", action="append", required=True, metavar="NAME=MODEL", help="one panel each"
    )
    parser.add_argument("--output", type=Path, required=True, help="the picture")
    parser.add_argument("--utterances", type=int, default=120)
    args = parser.parse_args(argv)
    import matplotlib
    from sklearn.manifold import TSNE

    matplotlib.use("Agg")
    from matplotlib import pyplot

    aligner = teachers.load(args.align)
    models = {name: teachers.load(path) for name, path in (m.split("=", 1) for m in args.model)}
    z: dict[str, list[np.ndarray]] = {name: [] for name in models}
    names, utterance = [], []
    for i, (x, text) in enumerate(speech(args.data, args.utterances)):
        where, said = places(aligner, x, text, i)
        names += said
        utterance += [i] * len(said)
        for name, model in models.items():
            z[name].append(vectors(model, x, where))
    names, utterance = np.array(names), np.array(utterance)
    frequent = [name for name, _ in Counter(names.tolist()).most_common(COLOURS)]
    figure, panels = pyplot.subplots(
        1, len(models), figsize=(4 * len(models), 4.3), squeeze=False, layout="constrained"
    )
    for panel, (name, rows) in zip(panels[0], z.items()):
        own = np.concatenate(rows)
        alike = nearest_is_alike(own, names, utterance)
        perplexity = min(30.0, (len(own) - 1) / 3)
        flat = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(own)
        panel.scatter(*flat[~np.isin(names, frequent)].T, s=4, color="lightgrey")
        for token in frequent:
            panel.scatter(*flat[names == token].T, s=6, label=token)
        panel.set(xticks=[], yticks=[], title=f"{name}: {100 * alike:.0f} % alike")
        print(f"{name}: {len(own)} tokens, the nearest is alike for {100 * alike:.1f} %")
    figure.legend(
        *panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=COLOURS
    )
    figure.savefig(args.output, dpi=100)


if __name__ == "__main__":
    main()
