r"""How much pseudo-labels change while they are in use, and how soon they are replaced therefore.

When the k-th unlabelled update uses cached labels ŷ, the teacher labels the same speech once more,

    ρ_k = min(1, Σ_i d(ŷ_i, ŷ'_i) / Σ_i |ŷ_i|)           d: edits;  0 where nothing was ever said
    p_k = p ρ_k      'changed': what the model has moved away from leaves
    p_k = p (1 − ρ_k)  'settled': what the model would say again leaves

Source: arXiv:2210.08711 (abstract): 'the online changes in PLs to control the membership of the
cache'.  Both forms, p = 1 in them, and that the edits are those of tokens, are recollection; that a
label which stays is the old one is our choice.
"""

from collections.abc import Sequence

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor, nn

from espnet_pl.parts.ranks import gather


class Evolution(nn.Module):
    """The changes of all unlabelled updates so far; they travel in the checkpoint.

    Args:
        most: p.
        settled: whether it is the unchanged that leave.
    """

    def __init__(self, most: float, settled: bool) -> None:
        super().__init__()
        self.most, self.settled = most, settled
        self.changes: list[float] = []

    def see(self, old: Sequence[list[int]], new: Sequence[list[int]]) -> float:
        """ρ of one update, over all ranks."""
        edits = sum(Levenshtein.distance(a, b) for a, b in zip(old, new, strict=True))
        edits, tokens = map(sum, zip(*gather((edits, sum(map(len, old))))))
        self.changes.append(min(1.0, edits / max(tokens, 1)))
        return self.changes[-1]

    def chance(self, turn: int) -> float:
        """p of an unlabelled update, counted from 0.

        Raises:
            IndexError: it has not been made.
        """
        if turn >= len(self.changes):
            raise IndexError(
                f"unlabelled update {turn} is asked about before it was made "
                f"({len(self.changes)} were): was the checkpoint written with another "
                "num_iters_per_epoch?  Start the run anew"
            )
        change = self.changes[turn]
        return self.most * (1 - change if self.settled else change)

    def get_extra_state(self) -> Tensor:
        """All changes."""
        return torch.tensor(self.changes, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """The inverse of ``get_extra_state``."""
        self.changes = state.tolist()
