"""ESPnet's trainer, which tells a method how validations went; nothing re-typed."""

import argparse

import torch
from espnet2.train.reporter import SubReporter, aggregate
from espnet2.train.trainer import Trainer

from espnet_pl.bridge.model import RIVAL, PLModel
from espnet_pl.methods.base import ConfigError, Method


class PLTrainer(Trainer):
    """The stock loop."""

    @classmethod
    def validate_one_epoch(
        cls, model: torch.nn.Module, iterator, reporter: SubReporter, options, distributed_option
    ) -> None:
        """As stock; then the method knows, before the checkpoint of this epoch is written."""
        super().validate_one_epoch(
            model=model,
            iterator=iterator,
            reporter=reporter,
            options=options,
            distributed_option=distributed_option,
        )
        inner: PLModel = getattr(model, "module", model)  # what a distributed one wraps
        if not inner.method.validates:
            return
        _, name, mode = options.best_model_criterion[0]
        mine, rivals = (_mean(reporter, of + name) for of in ("", RIVAL))
        if mine is None:
            raise ConfigError(
                f"best_model_criterion: validation says nothing of {name!r}; it says "
                f"{', '.join(sorted(reporter.stats))}"
            )
        sign = -1.0 if mode == "max" else 1.0
        inner.method.validated(
            inner.student, sign * mine, None if rivals is None else sign * rivals
        )


def check_criterion(args: argparse.Namespace, method: Method) -> None:
    """Whether the best epoch is chosen by validation, for a method that asks how that went.

    Raises:
        ConfigError: it is not.
    """
    phase, name, _ = args.best_model_criterion[0]
    if method.validates and phase != "valid":
        raise ConfigError(
            f"best_model_criterion: [{phase}, {name}] is not of validation, by which method "
            f"{args.method} decides; give one of 'valid'"
        )


def _mean(reporter: SubReporter, name: str) -> float | None:
    """Over the validation set and all ranks; NaN where nothing was finite."""
    values = reporter.stats.get(name)
    return float(aggregate(values)) if values else None
