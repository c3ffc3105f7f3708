"""What a checkpoint belongs to: another training must not go on from it."""

import argparse
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from espnet_pl.methods.base import ConfigError

# Options that may change while a training goes on: they decide where, how long and how loudly.
FREE = {
    "output_dir", "config", "dry_run", "print_config", "resume", "ngpu", "num_workers", "max_epoch",
    "patience", "keep_nbest_models", "nbest_averaging_interval", "save_interval", "num_att_plot",
    "create_graph_in_tensorboard", "detect_anomaly", "local_rank", "sharded_ddp", "ddp_comm_hook",
    "unused_parameters", "gradient_as_bucket_view", "truth", "iterator_type", "required",
    "num_processes", "distributed", "use_matplotlib", "use_tensorboard", "use_tf32", "use_wandb",
}  # fmt: skip
FREE_PREFIXES = ("dist_", "multiprocessing_", "log_", "wandb_", "cudnn_", "collect_")


def traits(args: argparse.Namespace) -> dict[str, str]:
    """What decides the updates of a training: its options, and the content of its files."""
    return {
        name: _spell(value)
        for name, value in sorted(vars(args).items())
        if not (name in FREE or name.startswith(FREE_PREFIXES))
    }


def check(theirs: Mapping[str, str], ours: Mapping[str, str], folder: Path) -> None:
    """Whether a checkpoint's traits are those of this training.

    Raises:
        ConfigError: they are not; all that differs, by name.
    """
    differ = [
        f"    {name}: {theirs.get(name, 'not there')} -> {ours.get(name, 'not there')}\n"
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name)
    ]
    if differ:
        raise ConfigError(
            f"the checkpoint in {folder} is of another training:\n{''.join(differ)}"
            "Undo the change, or train in another folder (--init_param takes a model along)"
        )


def _spell(value: Any) -> str:
    """A value in words, that differ where it does; a file's are of its content."""
    words = repr(value)
    if isinstance(value, (list, tuple)) and value and all(map(_is_data, value)):
        return ", ".join(f"{name} {_digest(path, kind)}" for path, name, kind in value)
    if isinstance(value, (list, tuple)) and value and all(map(_is_file, value)):
        return ", ".join(_digest(path) for path in value)
    if _is_file(value):
        return _digest(value)
    if len(words) > 300:
        return f"{words[:40]}... {hashlib.sha256(words.encode()).hexdigest()[:12]}"
    return words


def _is_file(value: Any) -> bool:
    return isinstance(value, (str, Path)) and value != "" and Path(value).is_file()


def _is_data(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 3 and _is_file(value[0])


def _digest(path: str | Path, kind: str = "text") -> str:
    """Of the whole file; of speech only whose it is, for where it lies may change."""
    lines = Path(path).read_bytes().splitlines()
    if kind != "text":
        lines = [line.split(maxsplit=1)[0] for line in lines if line.strip()]
    content = hashlib.sha256(b"\n".join(lines)).hexdigest()[:12]
    return f"{len(lines)} lines {content}"
