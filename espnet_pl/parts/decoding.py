r"""From frame distributions to label sequences.

    ŷ = B(argmax_k p_1(k), …, argmax_k p_T(k)),   B: merge repeats, then drop blanks

The order matters: blanks dropped first would merge real double letters (l ∅ l → l).
Source: best-path decoding, Graves et al., ICML 2006, section 3.2.

Of several sequences H for the same speech the consensus is the one nearest to all of them,

    ŷ = argmin_{h ∈ H} Σ_{g ∈ H} edits(h, g)

Source: the set median string (Kohonen, Pattern Recognition Letters 3, 1985); it is the decision of
    minimum Bayes risk (Goel and Byrne, Computer Speech and Language 14, 2000) if all of H are
    equally probable.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from rapidfuzz.distance import Levenshtein
from torch import Tensor


def greedy(
    log_p: Float[Tensor, "n t v"], frames: Int[Tensor, " n"], blank: int = 0
) -> list[list[int]]:
    """The label sequence of each utterance's best path; may be empty."""
    best = log_p.argmax(dim=-1).cpu()  # n t
    said = best != blank
    said[:, 1:] &= best[:, 1:] != best[:, :-1]
    said &= torch.arange(best.shape[1]) < frames.cpu()[:, None]
    return [part.tolist() for part in best[said].split(said.sum(1).tolist())]


def collapse(path: Int[Tensor, " t"], blank: int = 0) -> list[int]:
    """B(path): repeats merged, then blanks dropped."""
    merged = torch.unique_consecutive(path)
    return merged[merged != blank].tolist()


def consensus(sequences: Sequence[list[int]]) -> list[int]:
    """The sequence with the fewest edits to all the others; of equally near ones the first."""
    return min(sequences, key=lambda h: sum(Levenshtein.distance(h, g) for g in sequences))


def pad(
    labels: list[list[int]], device: torch.device | str = "cpu"
) -> tuple[Int[Tensor, "n u"], Int[Tensor, " n"]]:
    """Sequences as one tensor, padded with −1 (ESPnet's ``ignore_id``), and their lengths."""
    lengths = torch.tensor([len(y) for y in labels], dtype=torch.long)
    padded = torch.full((len(labels), int(max([0, *lengths.tolist()]))), -1, dtype=torch.long)
    for row, y in zip(padded, labels):
        row[: len(y)] = torch.tensor(y, dtype=torch.long)
    return padded.to(device), lengths.to(device)
