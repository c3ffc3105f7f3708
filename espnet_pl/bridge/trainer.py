"""ESPnet's trainer, kept at every update (`keeping`), which tells a method how validations went.

Nothing of its loop is re-typed but the three lines that log every so many updates: they count from
the start of the epoch, the loop from where a training goes on.
"""

import argparse
import dataclasses
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from espnet2.train import trainer
from espnet2.train.reporter import SubReporter, aggregate
from espnet2.train.trainer import Trainer, TrainerOptions

from espnet_pl.bridge import checkpoints, fits
from espnet_pl.bridge.keeping import Interval, Keeper
from espnet_pl.bridge.model import RIVAL, PLModel
from espnet_pl.methods.base import ConfigError, Method
from espnet_pl.parts.ranks import averages, leave


@dataclasses.dataclass
class PLOptions(TrainerOptions):
    """Stock ones, and ours."""

    save_interval: str
    traits: dict[str, str]


@contextmanager
def _averaging() -> Iterator[None]:
    """ESPnet sends the numbers of an update to the other ranks one by one; these go together."""
    stock = trainer.recursive_average

    def average(stats, weight, distributed=False):
        if not distributed:
            return stock(stats, weight)
        share = weight / weight.sum()
        own = {k: (value * share).sum() for k, value in stats.items() if value is not None}
        means, whole = averages(own, weight.sum())
        return dict.fromkeys(stats) | means, whole

    trainer.recursive_average = average
    try:
        yield
    finally:
        trainer.recursive_average = stock


class PLTrainer(Trainer):
    """The stock loop."""

    keeper: ClassVar[Keeper | None] = None  # of the run under way: the loop is not an object

    @classmethod
    def build_options(cls, args: argparse.Namespace) -> PLOptions:
        """Stock ones, and ours."""
        stock = vars(super().build_options(args))
        return PLOptions(**stock, save_interval=args.save_interval, traits=fits.traits(args))

    @classmethod
    def run(
        cls,
        model: PLModel,
        optimizers,
        schedulers,
        train_iter_factory,
        valid_iter_factory,
        plot_attention_iter_factory,
        trainer_options: PLOptions,
        distributed_option,
    ) -> None:
        """As stock; kept."""
        options, folder = trainer_options, Path(trainer_options.output_dir)
        cls.keeper = Keeper(
            folder,
            Interval(options.save_interval),
            options.traits,
            model,
            optimizers,
            schedulers,
            train_iter_factory,
            options.accum_grad,
        )
        with cls.keeper, checkpoints.saving(folder, cls.keeper.epoch_is_over), _averaging():
            options.resume = cls.keeper.newest(options.resume)
            super().run(
                model,
                optimizers,
                schedulers,
                train_iter_factory,
                valid_iter_factory,
                plot_attention_iter_factory,
                options,
                distributed_option,
            )
            cls.keeper.over()
        leave()

    @staticmethod
    def resume(checkpoint, model, reporter, optimizers, schedulers, scaler, ngpu=0, strict=True):
        """To the update that was the last one saved, not to the start of its epoch."""
        device = f"cuda:{torch.cuda.current_device()}" if ngpu > 0 else "cpu"
        PLTrainer.keeper.resume(reporter, scaler, device, strict)

    @classmethod
    def train_one_epoch(
        cls,
        model,
        iterator,
        optimizers,
        schedulers,
        scaler,
        reporter: SubReporter,
        summary_writer,
        options: PLOptions,
        distributed_option,
    ) -> bool:
        """As stock, from where the training stands."""
        every = options.log_interval or max(len(iterator) // 20, 10)

        def batches():
            for batch in cls.keeper.training(iterator, reporter, scaler):
                yield batch
                if reporter.count % every == 0:
                    _log(reporter, every, summary_writer, options.use_wandb)

        super().train_one_epoch(
            model=model,
            iterator=batches(),
            optimizers=optimizers,
            schedulers=schedulers,
            scaler=scaler,
            reporter=reporter,
            summary_writer=summary_writer,
            options=dataclasses.replace(options, log_interval=sys.maxsize),
            distributed_option=distributed_option,
        )
        norms = reporter.stats.get("grad_norm", [])  # of updates that were made
        return not any(math.isfinite(norm.value) for norm in norms) and not options.no_forward_run

    @classmethod
    def validate_one_epoch(
        cls, model: torch.nn.Module, iterator, reporter: SubReporter, options, distributed_option
    ) -> None:
        """As stock; then the method knows, before the checkpoint of this epoch is written."""
        super().validate_one_epoch(
            model=model,
            iterator=cls.keeper.validating(iterator),
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


def _log(reporter: SubReporter, every: int, summary_writer: Any, use_wandb: bool) -> None:
    """What the stock loop says of the last updates."""
    logging.info(reporter.log_message(-every))
    if summary_writer is not None:
        reporter.tensorboard_add_scalar(summary_writer, -every)
    if use_wandb:
        reporter.wandb_log()
