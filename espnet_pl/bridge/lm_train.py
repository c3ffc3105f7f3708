"""Trains a language model by ESPnet's own task, and leaves its files whole whatever ends it.

Usage: as ``espnet2.bin.lm_train``, which writes over its checkpoint: killed meanwhile, it leaves
half of one, with which no later call goes on.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from espnet2.tasks.lm import LMTask
from espnet2.train.trainer import Trainer

from espnet_pl.bridge import checkpoints


class KeptTrainer(Trainer):
    """As stock; what it saves takes its place at once."""

    @classmethod
    def run(cls, *args, trainer_options, **kwargs) -> None:
        """As stock."""
        folder = Path(trainer_options.output_dir)
        checkpoints.tidy(folder)
        with checkpoints.saving(folder):
            super().run(*args, trainer_options=trainer_options, **kwargs)


class KeptLMTask(LMTask):
    """ESPnet's task with that trainer."""

    trainer = KeptTrainer


def main(argv: Sequence[str] | None = None) -> None:
    """Train."""
    KeptLMTask.main(cmd=sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
