r"""slimIPL: continuous pseudo-labelling with a dynamic cache; hard labels, soft ones, or both.

Source: Likhomanenko, Xu, Kahn, Synnaeve, Collobert, "slimIPL", arXiv:2010.11524; details from the
    authors' code, flashlight/wav2letter recipes/slimIPL (Train.cpp, *_slimipl.cfg).  Soft labels:
    "Continuous Soft Pseudo-Labeling in ASR", arXiv:2211.06007 (abstract), and the branch
    slimIPL_use_soft of that code; sampled labels, and a cache that labels leave by how much they
    change, arXiv:2210.08711 (abstract).
Equation: L = L_sup(x, y) on N_L and λ-weighted L_u on N_U of N_L + N_U updates,
    L_u = − log p_θ(ŷ|strong(x)),  ŷ = greedy(θ', weak(x)) from the cache or made on the spot;
    θ' = θ (live), its moving average (ema), or its state at the start (frozen).
    With other weights than hard = 1, L_u is a sum of objectives: parts/objectives.py.
Differs from the paper: the loss is not divided by the square root of the label length but is
    ESPnet's own criterion; labels are token sequences, not words sent through a lexicon; filling
    the cache takes no updates (the labels are the same, see data/pairing.py); unusable labels are
    dropped, where the code trains on '|' for an empty and cuts a too long one.  Soft labels are
    summed over the valid frames of an utterance, where the code takes 20 times their mean over
    all, padding too; the most likely tokens are kept, with the sum of the others.
    Defaults are those of the released 100 h configuration, except warmup: recipes start from a
    trained seed, the paper from scratch with M = 20000.
Cost: per unlabelled update one training pass, and p (with a cache) or 1 (without) forward
    passes without gradient.
"""

from dataclasses import dataclass
from typing import Literal

from espnet_pl.methods.pseudo_labelling import OwnTeacher, OwnTeacherConfig
from espnet_pl.parts.schedule import set_dropout
from espnet_pl.parts.teacher import Teacher


@dataclass(frozen=True)
class Config(OwnTeacherConfig):
    """Fields that are not set keep these values; names of the released flags beside them."""

    labelled: int = 1  # N_L                                   slimIPL_sup_updates
    unlabelled: int = 4  # N_U                                 slimIPL_unsup_updates
    warmup: int = 0  # M, supervised updates before pseudo-labels; 20000
    capacity: int = 100  # C, batches; 0 labels on the spot    slimIPL_cache_size
    replace: float = 0.1  # p                                  slimIPL_cache_prob
    replace_when: Literal["random", "changed", "settled"] = "random"  # parts/evolution.py
    teacher: Literal["live", "ema", "frozen"] = "live"  #      slimIPL_ema
    dropout: float | None = None  # before and during warm-up; None: as in the model's configuration
    dropout_after: float | None = None  # from the first pseudo-label on; 0.1

    def __post_init__(self) -> None:
        for name in ("dropout", "dropout_after"):
            if not 0.0 <= (getattr(self, name) or 0.0) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}, it must lie in [0, 1)")
        super().__post_init__()


class Method(OwnTeacher):
    """Teacher, cache, and the diagnostics of pseudo-labels."""

    def __init__(self, config, student, resources):
        super().__init__(config, student, resources)
        self.teacher = None
        if config.teacher != "live":
            decay = config.decay if config.teacher == "ema" else 1.0
            self.teacher = Teacher(student, decay, config.decay_warmup)
        self.follows = config.teacher == "ema"

    def forward(self, student, batch):
        warm = self.step < self.config.warmup
        rate = self.config.dropout if warm else self.config.dropout_after
        if rate is not None:
            set_dropout(student, rate)
        return super().forward(student, batch)
