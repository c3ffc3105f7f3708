r"""Self-supervised losses: what an encoder did not hear is predicted from what it did.

Of utterance x, frames j ∈ H(x) are predicted, each as p_j.  Two ways to be right about it:

InfoNCE: which of the candidates A(j) is the target v_j, where s is the cosine similarity,

    L(x) = − Σ_{j ∈ H(x)} log( exp(s(p_j, v_j)/τ) / Σ_{a ∈ A(j)} exp(s(p_j, v_a)/τ) )

    A(j) = all frames of x, or of all utterances of the batch; j is one of them

Codes: which of C classes the frame is in, where p_j are the logits of the classes,

    L(x) = − Σ_{j ∈ H(x)} log( exp(p_j[y_j]) / Σ_c exp(p_j[c]) )
    y_j  = argmax_c s(P v_j, w_c)                             P and w are random, and never change

Both are negative log-probabilities: who knows nothing pays log |A(j)| or log C for each frame.

Source: van den Oord, Li, Vinyals, "Representation Learning with Contrastive Predictive Coding",
arXiv:1807.03748, equation 4; codes of random projections: Chiu et al., "Self-supervised Learning
with Random-projection Quantizer for Speech Recognition" (BEST-RQ), arXiv:2202.01855, equation 1,
which is written with a distance between vectors of length 1: the nearest has the highest cosine.
Both equations are recalled, not read again.
Axes: n utterances, t frames, k predictions, d dimensions, c codes.  Unit: nats per prediction, and
with ``per_utterance`` nats per utterance.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from espnet_pl.losses.contrastive import Frames, contrastive


class Predicted(NamedTuple):
    """What a prediction costs, and out of how many it was to be found."""

    loss: Float[Tensor, " k"]
    candidates: Int[Tensor, " k"]


def info_nce(
    predictions: Float[Tensor, "k d"],
    rows: Int[Tensor, " k"],
    places: Int[Tensor, " k"],
    targets: Float[Tensor, "n t d"],
    frames: Int[Tensor, " n"],
    *,
    negatives: Literal["utterance", "batch"] = "utterance",
    temperature: float = 0.1,
) -> Predicted:
    """InfoNCE of each prediction, in float32 at least.

    Args:
        predictions: of any length; the loss divides by it, and by that of the targets.
        rows, places: the utterance and the frame that each is a prediction of.
        targets: of every frame; they have a gradient if they ask for one.
        frames: valid ones of each utterance.

    Returns:
        A prediction whose frame is the only candidate costs exactly 0.

    Raises:
        ValueError: a prediction of a frame that is none, or shapes that do not fit.
    """
    if bool(((places < 0) | (places >= frames[rows])).any()):
        raise ValueError("a prediction is of a frame behind the last one of its utterance")
    n, t, d = targets.shape
    valid = torch.arange(t, device=frames.device) < frames[:, None]
    number = torch.arange(n * t, device=frames.device).view(n, t)  # every frame is its own class
    whose = torch.arange(n, device=frames.device)[:, None].expand(n, t)
    own = negatives == "utterance"
    found = contrastive(
        Frames(predictions, number[rows, places], rows if own else None),
        Frames(targets[valid].view(-1, d), number[valid], whose[valid] if own else None),
        temperature=temperature,
    )
    return Predicted(found.loss, found.positives + found.negatives)


def of_codes(logits: Float[Tensor, "k c"], codes: Int[Tensor, " k"]) -> Predicted:
    """Cross-entropy of each prediction, in float32 at least."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    loss = torch.nn.functional.cross_entropy(logits.to(exact), codes, reduction="none")
    return Predicted(loss, torch.full_like(codes, logits.shape[1]))


def code_of(
    features: Float[Tensor, "*n f"], projection: Float[Tensor, "f d"], book: Float[Tensor, "c d"]
) -> Int[Tensor, "*n"]:
    """The vector of the book in whose direction the projected features are, without gradient.

    Args:
        book: of vectors of any length but 0.
    """
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        lengths = torch.linalg.vector_norm(book, dim=1, keepdim=True)
        return (features.to(projection.dtype) @ projection @ (book / lengths).t()).argmax(-1)


def standardised(
    features: Float[Tensor, "n t f"], frames: Int[Tensor, " n"]
) -> Float[Tensor, "n t f"]:
    """Mean 0 and variance 1 in each dimension of each utterance; 0 behind its frames.

    Without it most frames would be in the same few classes.  A dimension that never changes is 0.
    """
    there = (torch.arange(features.shape[1], device=frames.device) < frames[:, None])[..., None]
    count = frames.clamp(min=1)[:, None, None]
    own = torch.where(there, features, 0.0)
    centred = torch.where(there, own - own.sum(1, keepdim=True) / count, 0.0)
    deviation = (centred.square().sum(1, keepdim=True) / count).sqrt()
    # What hardly changes is rounding, not speech.
    still = deviation <= 1e-5 * own.abs().amax(dim=1, keepdim=True)
    return torch.where(still, 0.0, centred / torch.where(still, 1.0, deviation))


def per_utterance(
    loss: Float[Tensor, " k"], rows: Int[Tensor, " k"], n: int
) -> Float[Tensor, " n"]:
    """The sum over the predictions of each utterance; 0, on the graph, where there are none."""
    return loss.new_zeros(n).index_add(0, rows, loss)
