r"""warp-transducer's Python interface, with espnet_pl's loss behind it: nothing is compiled.

    loss_n = −log P(y_n|x_n),  summed over all alignments; 'mean' and 'sum' are over n

Source: the interface is that of github.com/b-flo/warp-transducer, which ESPnet asks for, as ESPnet
calls it and as two later copies of its Python file have it (its own was not read); the loss is
`espnet_pl.losses.transducer`.
Axes: n utterances, t frames, u labels, v vocabulary.  Unit: nats.
"""

import torch
from torch import Tensor, nn

from espnet_pl.losses.transducer import log_probability_of_logits, self_test

__all__ = ["RNNTLoss", "rnnt_loss"]
__version__ = "0.3+espnet_pl"

REDUCTIONS = ("mean", "sum", "none")


def rnnt_loss(
    acts: Tensor,
    labels: Tensor,
    act_lens: Tensor,
    label_lens: Tensor,
    blank: int = 0,
    reduction: str = "mean",
    fastemit_lambda: float = 0.0,
) -> Tensor:
    """The loss of some utterances: (1,), or (n,) where the reduction is 'none'.

    Args:
        acts: logits (n, t, u+1, v); those of half precision are welcome here.
        labels: (n, u), int32, padded with anything.
        act_lens: valid frames of each utterance (n,), int32; the greatest is t.
        label_lens: valid labels of each utterance (n,), int32; the greatest is u.
        reduction: 'mean' over utterances, 'sum' or 'none'.
        fastemit_lambda: the gradient of label arcs is taken 1 + λ times; the value stays.

    Raises:
        TypeError, ValueError: what warp-transducer refuses; also, what it would read without a
            word: a token outside of the vocabulary, or a blank among the labels.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")
    _certify(acts, labels, act_lens, label_lens)
    labels = labels[:, : acts.shape[2] - 1]
    loss = -log_probability_of_logits(
        acts, act_lens, labels, label_lens, blank=blank, fast_emit=fastemit_lambda
    )
    loss = loss.to(torch.promote_types(acts.dtype, torch.float32))
    if reduction == "none":
        return loss
    return (loss.mean() if reduction == "mean" else loss.sum())[None]


class RNNTLoss(nn.Module):
    """``rnnt_loss`` with its last three arguments fixed.

    Raises:
        RuntimeError: on this machine the loss is not what it should be.
    """

    def __init__(
        self, blank: int = 0, reduction: str = "mean", fastemit_lambda: float = 0.0
    ) -> None:
        super().__init__()
        self_test()
        self.blank, self.reduction, self.fastemit_lambda = blank, reduction, fastemit_lambda

    def forward(self, acts: Tensor, labels: Tensor, act_lens: Tensor, label_lens: Tensor) -> Tensor:
        """See ``rnnt_loss``."""
        return rnnt_loss(
            acts, labels, act_lens, label_lens, self.blank, self.reduction, self.fastemit_lambda
        )


def _certify(acts: Tensor, labels: Tensor, act_lens: Tensor, label_lens: Tensor) -> None:
    if not acts.is_floating_point():
        raise TypeError(f"acts must be floating, not {acts.dtype}")
    integers = {"labels": labels, "act_lens": act_lens, "label_lens": label_lens}
    for name, x in integers.items():
        if x.dtype != torch.int32:
            raise TypeError(f"{name} must be torch.int32, not {x.dtype}; give {name}.int()")
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous; give {name}.contiguous()")
    for name, axes in {"acts": 4, "labels": 2, "act_lens": 1, "label_lens": 1}.items():
        shape = tuple((integers | {"acts": acts})[name].shape)
        if len(shape) != axes:
            raise ValueError(f"{name} must be {axes}D, not {shape}")
        if shape[0] != len(acts):
            raise ValueError(f"{name} must have a row per example: {len(acts)}, not {shape[0]}")
    t, u = int(act_lens.max()), int(label_lens.max())
    if acts.shape[1] != t:
        raise ValueError(
            f"Input length mismatch: acts has {acts.shape[1]} frames, and the longest of act_lens "
            f"is {t}"
        )
    if acts.shape[2] != u + 1 or labels.shape[1] < u:
        raise ValueError(
            f"Output length mismatch: the longest of label_lens is {u}, acts has {acts.shape[2]} "
            f"states, not {u + 1}, or labels has {labels.shape[1]} columns, fewer than {u}"
        )
