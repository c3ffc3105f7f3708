"""The model that ESPnet's trainer sees: a stock model that is trained by a method.

In training mode the objective is the method's; in eval mode (validation,
attention plots) it is the stock model's own, so dev figures compare across methods.
"""

from typing import Any

import torch
from espnet2.torch_utils.device_funcs import force_gatherable
from espnet2.train.abs_espnet_model import AbsESPnetModel
from torch import Tensor

from espnet_pl.bridge.batches import to_batch
from espnet_pl.bridge.recogniser import Recogniser
from espnet_pl.methods.base import Method, Term
from espnet_pl.parts.ranks import gather, several

RIVAL = "rival_"  # before what is said of a method's rival in validation
SAVED_AS = "method"  # the entry of the optimiser's state that holds the method's


class PLModel(AbsESPnetModel):
    """Student and method, behind ESPnet's seam (loss, stats, weight).

    Its state is the student's, under stock names: every checkpoint that the trainer
    writes loads in stock ESPnet as it is.  The method's own state (teacher, cache,
    counters) changes with each update, as the optimiser's does, and travels with it:
    ``attach``.
    """

    def __init__(self, student: Recogniser, method: Method) -> None:
        super().__init__()
        self.student, self.method = student, method

    def forward(self, **flat: Any) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """ESPnet's flat batch → the weighted sum of the method's terms, each term, a weight."""
        if not self.training:
            return self._validate(flat)
        terms = self.method(self.student, to_batch(flat))
        terms, weight = _across_ranks(terms, len(flat["utt_id"]))
        device = flat[next(k for k in flat if k.endswith("speech"))].device
        loss = sum(t.weight * t.value for t in terms.values() if t.weight)
        stats = {name: t.value.detach().to(device) for name, t in terms.items()}
        return force_gatherable((loss, stats | {"loss": loss.detach()}, weight), device)

    def _validate(self, flat: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The stock model's own criterion; and of the method's rival, under other names."""
        loss, stats, weight = self.student.net(**flat)
        rival = self.method.rival()
        if rival is not None:
            _, theirs, _ = rival.net(**flat)
            stats = stats | {RIVAL + name: value for name, value in theirs.items()}
        return loss, stats, weight

    def collect_feats(self, **flat: Any) -> dict[str, Tensor]:
        """The stock model's features, for the statistics stage."""
        return self.student.net.collect_feats(**flat)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The student's, under the names stock ESPnet expects."""
        return self.student.net.state_dict(*args, **kwargs)

    def load_state_dict(self, state: dict[str, Tensor], *args: Any, **kwargs: Any):
        """Into the student."""
        return self.student.net.load_state_dict(state, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # ``init_param: file:encoder:encoder`` and other parts of ESPnet reach for model.encoder.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("student").net, name)


def attach(optimizer: torch.optim.Optimizer, model: PLModel) -> None:
    """Let the method follow the optimiser: a call after each real update, and the same checkpoint.

    The hook fires once per update, also under AMP, and not when ESPnet or the
    GradScaler skipped it.
    """

    def save(_, state):
        return {**state, SAVED_AS: model.method.state_dict()}

    def load(_, state):
        if SAVED_AS not in state:
            raise RuntimeError(
                "the checkpoint holds no state of a method: it was not written by espnet_pl; "
                "start a new run from its model file with --init_param"
            )
        model.method.load_state_dict(state[SAVED_AS])
        return {name: value for name, value in state.items() if name != SAVED_AS}

    optimizer.register_step_post_hook(lambda *_: model.method.after_step(model.student))
    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)


def _across_ranks(terms: dict[str, Term], count: float) -> tuple[dict[str, Term], float]:
    """Terms such that the trainer's average over ranks is each term's mean by its own count.

    The trainer averages losses and stats by the returned weight, and DDP averages
    gradients: with equal weights both are (1/R) Σ_r v_r, so rank r hands over
    R · c_r · v_r / Σ_r c_r.  The weights of all ranks are together what one rank's would be.
    """
    if not several():
        return terms, count
    counts, sizes = zip(*gather(({name: term.count for name, term in terms.items()}, count)))
    nothing = torch.zeros((), device=next(t.value.device for t in terms.values() if t.weight))
    out = {}
    for name in sorted(set().union(*counts)):  # a rank may have nothing to say about a diagnostic
        term = terms.get(name, Term(nothing, 0.0, 0))
        share = term.count * len(counts) / (sum(of.get(name, 0) for of in counts) or 1)
        out[name] = Term(term.value * share, term.weight, term.count)
    return out, sum(sizes) / len(sizes)
