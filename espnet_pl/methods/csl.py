r"""Contrastive semi-supervised learning (CSL): pseudo-labels say only who is like whom.

Source: Xiao, Fuegen, Mohamed, "Contrastive Semi-supervised Learning for ASR", arXiv:2103.05149
    (abstract, and descriptions of the paper by others); the loss is that of Khosla et al.,
    arXiv:2004.11362, equation 2 (losses/contrastive.py).
Equation: L = L_sup on N_L and λ · L_u on N_U of N_L + N_U updates.  Of each segment, a maximal run
    of frames with the same label y (parts/frame_labels.py), one frame is drawn in each update;
    z = g(f(strong(x))) / |g(f(strong(x)))| of it, with the encoder f and a projection g, and
    L_u = 1/|I| Σ_{i∈I} −1/|P(i)| Σ_{p∈P(i)} log( exp(z_i·z_p/τ) / Σ_{a∈A(i)} exp(z_i·z_a/τ) )
    P(i): the other frames of the batch with label y_i;  N(i): those of other labels in the same
    utterance (negatives: utterance) or in the batch;  A(i) = P(i) ∪ N(i), or {p} ∪ N(i)
    (denominator: one);  I: frames that have both.
Differs from the paper: its teacher is a hybrid model of context-dependent graphemes, ours has a CTC
    layer; order: 2 makes units of its tokens that know their left neighbour.  Unverified, for its
    text was not at hand: τ, the denominator, how frames were labelled (by alignment or not), if
    frames that are masked may be drawn, and the activation of g's hidden layer.  From descriptions:
    one hidden layer of 1024, 128 dimensions, one frame of each segment, negatives from the same
    utterance; that batches are made such that labels meet (``batching: label_aware``; of units of
    order 2 with ``batching_conf: {order: 2}``), and that cross-entropy in turn with this loss
    (``alternate``) was no better.
Cost: one training pass of the encoder per unlabelled update; the teacher is asked once.  Where
    several ranks train, each computes L_u of the frames of all of them.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from espnet_pl.losses.contrastive import Frames, contrastive
from espnet_pl.methods import base
from espnet_pl.methods.frame_labelling import FrameLabelling, FrameLabellingConfig
from espnet_pl.parts.frame_labels import draw_of_segments
from espnet_pl.parts.ranks import before, gather, together


@dataclass(frozen=True)
class Config(FrameLabellingConfig):
    """Fields that are not set keep these values."""

    temperature: float = 0.1  # τ; the paper's is not known
    hidden: int = 1024  # of the projection
    out: int = 128
    negatives: Literal["utterance", "batch"] = "utterance"
    denominator: Literal["all", "one"] = "all"
    alternate: bool = False  # every other unlabelled batch by cross-entropy, as in ce_pl

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}, it must be positive")
        for name in ("hidden", "out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")


class Method(FrameLabelling):
    """The projection is trained with the encoder, and left behind with the method."""

    def __init__(self, config, student, resources):
        super().__init__(config, student, resources)
        self.projection = nn.Sequential(
            nn.Linear(student.feature_size, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, config.out),
        )
        self.prediction = None
        if config.alternate:
            units = config.number_of_units(self.tokens)
            self.prediction = nn.Linear(student.feature_size, units)
        self.register_buffer("turn", torch.zeros((), dtype=torch.long))  # unlabelled batches heard

    def learns(self):
        layers = [layer for layer in (self.projection, self.prediction) if layer]
        return [p for layer in layers for p in layer.parameters()]

    def learn(self, features, labels):
        self.turn += 1
        if self.prediction and self.turn % 2 == 0:
            return self.classify(self.prediction, features, labels)
        rows, places = (x.to(features.device) for x in draw_of_segments(labels))
        y = labels.to(features.device)[rows, places]
        # The batch is that of all ranks: frames of the same label may be anywhere.
        z = together(self.projection(features[rows, places]))
        y, rows = together(y), together(rows + before(len(labels)))
        utterance = rows if self.config.negatives == "utterance" else None
        loss, positives, negatives = contrastive(
            Frames(z, y, utterance),
            temperature=self.config.temperature,
            denominator=self.config.denominator,
        )
        anchors = (positives > 0) & (negatives > 0)
        count = int(anchors.sum())
        # Without an anchor it is 0, and on the graph: every rank of a job has a gradient.
        mean = torch.where(anchors, loss, 0.0).sum() / max(count, 1)
        numbers = {
            "segments": len(y) / max(sum(gather(len(labels))), 1),
            "segments_skipped": 1 - count / max(len(y), 1),
            "positives": float(positives[anchors].sum()) / max(count, 1),
            "negatives": float(negatives[anchors].sum()) / max(count, 1),
        }
        return {"contrastive": base.Term(mean, self.config.weight, count)}, numbers
