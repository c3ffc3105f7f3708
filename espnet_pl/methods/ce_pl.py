r"""Frame classification by pseudo-labels (CE-PL): what contrastive learning is compared with.

Source: the baseline of Xiao, Fuegen, Mohamed, "Contrastive Semi-supervised Learning for ASR",
    arXiv:2103.05149 (abstract, and descriptions of the paper by others).
Equation: L = L_sup on N_L and λ · L_u on N_U of N_L + N_U updates, with the label y_t of a frame
    (parts/frame_labels.py), the encoder f, a linear layer W, b, and F the frames with a label,
    L_u = 1/|F| Σ_{t∈F} − log softmax(W f(strong(x))_t + b)_{y_t}
Differs from the paper: its teacher is a hybrid model of context-dependent graphemes, ours has a CTC
    layer; order: 2 makes units of its tokens that know their left neighbour.  Unverified, for its
    text was not at hand: how frames were labelled, and whether all of them are learnt.  There, too,
    labels meet by the choice of batches; here with ``batching: label_aware``.
Cost: one training pass of the encoder per unlabelled update; the teacher is asked once, and what it
    said is that for csl.
"""

from dataclasses import dataclass

from torch import nn

from espnet_pl.methods.frame_labelling import FrameLabelling, FrameLabellingConfig


@dataclass(frozen=True)
class Config(FrameLabellingConfig):
    """Fields that are not set keep these values."""


class Method(FrameLabelling):
    """The layer is trained with the encoder, and left behind with the method."""

    def __init__(self, config, student, resources):
        super().__init__(config, student, resources)
        self.prediction = nn.Linear(student.feature_size, config.number_of_units(self.tokens))

    def learns(self):
        return [*self.prediction.parameters()]

    def learn(self, features, labels):
        return self.classify(self.prediction, features, labels)
