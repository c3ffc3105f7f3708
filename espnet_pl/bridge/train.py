"""Train: ``python -m espnet_pl.bridge.train --config conf/asr.yaml --config conf/slimipl.yaml …``

All options of ``python -m espnet2.bin.asr_train`` (or of ``asr_transducer_train``, where a
configuration says ``task: asr_transducer``), ours, and ``--config`` several times: a later file
changes what an earlier one said, key by key also inside ``…_conf``.
"""

import argparse
import functools
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from espnet2.train.class_choices import ClassChoices
from espnet2.train.distributed_utils import get_rank, get_world_size

from espnet_pl.bridge import batching, checkpoints, compat, processes, teaching
from espnet_pl.bridge.keeping import Interval
from espnet_pl.bridge.merge import merge
from espnet_pl.bridge.task import task_of
from espnet_pl.methods.base import ConfigError
from espnet_pl.methods.registry import config_of, module_of, unknown
from espnet_pl.parts import ranks
from espnet_pl.parts.signals import AGAIN

__all__ = ["ConfigError", "load_config", "main", "needs_language_model", "needs_unlabelled", "uses"]


def load_config(paths: Sequence[str | Path]) -> dict[str, Any]:
    """One configuration from several files, checked.

    Args:
        paths: YAML files; the mapping ``recipe`` of a file is the stage driver's and left out.

    Raises:
        ConfigError: an unknown key at the top, in ``method_conf`` or in the ``…_conf`` of a
            chosen class, with the nearest valid one; or a combination known to go wrong.
    """
    config: dict[str, Any] = {}
    for path in paths:
        config = merge(config, _read(path))
    config.pop("recipe", None)
    task = task_of(config)
    known = {action.dest for action in _parser(task)._actions}
    for key in config:
        if key not in known:
            raise ConfigError(unknown(_where(paths), key, known))
    config_of(config.get("method", "supervised"), config.get("method_conf", {}))
    teaching.check_mode(config.get("teacher_mode", "stored"))
    Interval(config.get("save_interval", "10min"))
    batching.settings_of(config)
    for choices in task.class_choices_list:
        _check_conf(paths, choices, config)
    if config.get("train_dtype") in ("float16", "bfloat16"):
        raise ConfigError(
            f"{_where(paths)}: train_dtype: {config['train_dtype']}: weights and moving averages "
            "need float32; use_amp: true computes in half precision"
        )
    criteria = config.get("best_model_criterion", [None])
    keep = config.get("keep_nbest_models", [10])
    if compat.averages_one_criterion_only() and (
        len(criteria) > 1 or (isinstance(keep, list) and len(keep) > 1)
    ):
        raise ConfigError(
            f"{_where(paths)}: espnet 202511 averages checkpoints wrongly with more than one "
            "best_model_criterion or keep_nbest_models; give one of each"
        )
    return config


def needs_unlabelled(config: Mapping[str, Any]) -> bool:
    """Whether the method of a configuration wants unlabelled speech."""
    name = config.get("method", "supervised")
    settings = config_of(name, config.get("method_conf", {}))
    return module_of(name).Method.pairing(settings).unlabelled > 0


def needs_language_model(config: Mapping[str, Any]) -> bool:
    """Whether the method of a configuration cannot work without a language model."""
    name = config.get("method", "supervised")
    settings = config_of(name, config.get("method_conf", {}))
    return "language_model" in module_of(name).Method.needs(settings)


def uses(config: Mapping[str, Any]) -> list[str]:
    """What from outside the method of a configuration has a use for, by name."""
    return sorted(module_of(config.get("method", "supervised")).Method.uses)


def main(argv: Sequence[str] | None = None) -> None:
    """Merge the configurations, write them to the output directory, and call the task."""
    argv = list(sys.argv[1:] if argv is None else argv)
    words, paths, rest = [*argv], [], []
    while argv:
        word = argv.pop(0)
        if word == "--config" and argv:
            paths.append(argv.pop(0))
        elif word.startswith("--config="):
            paths.append(word.removeprefix("--config="))
        else:
            rest.append(word)
    config = load_config(paths)
    task = task_of(config)
    parser = _parser(task)
    for word in rest:
        flag = word.split("=")[0]
        if flag.startswith("--") and flag not in parser._option_string_actions:
            raise ConfigError(unknown("option", flag, parser._option_string_actions))
    output_dir = parser.parse_args(rest).output_dir
    if output_dir is None:
        raise ConfigError("--output_dir is needed")
    merged = Path(output_dir) / "train.yaml"
    merged.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    # At once: every rank of a distributed job writes it, and reads it again.
    checkpoints.replace(merged, lambda new: new.write_text(text, encoding="utf-8"))
    args = parser.parse_args(["--config", str(merged), *rest])
    if args.num_processes > 1 and not args.collect_stats:  # which ESPnet does not share out
        processes.run(args.num_processes, args.ngpu, words)
        return
    rest += _of_ranks(args)
    task.main(cmd=["--config", str(merged), *rest])


def _of_ranks(args: argparse.Namespace) -> list[str]:
    """What ESPnet does not find out itself where several ranks train."""
    found = []
    if not args.ngpu and get_world_size(args.dist_world_size, args.dist_launcher) > 1:
        found += ["--dist_backend", "gloo"]  # the default is of GPUs only
    if args.dist_launcher == "slurm" and args.dist_rank is None:
        # Else it refuses several tasks on a node, also where it is not to start processes.
        found += ["--dist_rank", str(get_rank(None, "slurm"))]
    return found


def _read(path: str | Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(config or {}, dict):
        raise ConfigError(f"{path}: a mapping is expected, not {type(config).__name__}")
    return config or {}


def _check_conf(paths: Sequence, choices: ClassChoices, config: Mapping[str, Any]) -> None:
    """The keys of ``encoder_conf`` and its like against the signature of the chosen class."""
    conf = config.get(f"{choices.name}_conf") or {}
    name = config.get(choices.name, choices.default)
    if name is None or not conf:
        return
    try:
        chosen = choices.get_class(name)
    except ValueError:
        raise ConfigError(
            unknown(f"{_where(paths)}, {choices.name}", name, choices.choices())
        ) from None
    if chosen is None:
        return
    parameters = inspect.signature(chosen).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in conf:
        if key not in parameters:
            raise ConfigError(unknown(f"{_where(paths)}, {choices.name}_conf", key, parameters))


def _where(paths: Sequence) -> str:
    return " + ".join(map(str, paths)) or "configuration"


@functools.cache
def _parser(task):
    return task.get_parser()


if __name__ == "__main__":
    status = 0
    try:
        main()
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    except SystemExit as told:
        if told.code != AGAIN:
            raise
        status = AGAIN
    ranks.end(status)
