"""A stock ESPnet model folder from a training directory.

``python -m espnet_pl.bridge.export --exp exp/slimipl --output exp/slimipl/model``
writes ``config.yaml`` and ``model.pth`` (and the files the configuration names)
so that ``espnet2.bin.asr_inference`` (for a transducer
``asr_transducer_inference``) loads them where espnet_pl is not installed.
"""

import argparse
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from espnet2.tasks.abs_task import AbsTask
from torch import Tensor

from espnet_pl.bridge import compat
from espnet_pl.bridge.model import SAVED_AS
from espnet_pl.bridge.task import OPTIONS, task_of

TEACHER = "teacher._average.module.net."


def export(exp: Path, output: Path, source: str = "student") -> None:
    """Write the model folder, and prove that stock ESPnet loads it completely.

    Args:
        exp: a training directory with ``config.yaml`` and checkpoints.
        output: where to; an older export there is replaced.
        source: ``student`` takes the average of the best checkpoints by the run's criterion,
            ``teacher`` the method's moving average as it is in the last checkpoint.

    Raises:
        FileNotFoundError: the run has not finished.
        ValueError: there is no teacher in it, or stock ESPnet would not load the result completely.
    """
    config = yaml.safe_load((exp / "config.yaml").read_text(encoding="utf-8"))
    state = _teacher(exp) if source == "teacher" else _student(exp, config)

    temporary = output.with_name(output.name + ".unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    task = task_of(config).stock
    config = _stock(config)
    copied = []
    for conf, key in ((config.get("normalize_conf") or {}, "stats_file"), (config, "bpemodel")):
        if conf.get(key):
            kept = temporary / ("feats_stats.npz" if key == "stats_file" else "bpe.model")
            shutil.copyfile(conf[key], kept)
            conf[key] = str(kept)
            copied.append((conf, key))
    config["espnet_version"] = compat.version()
    _write(temporary, config, state)
    _prove(task, temporary, state)
    for conf, key in copied:
        conf[key] = str(output / Path(conf[key]).name)
    _write(temporary, config, state)
    shutil.rmtree(output, ignore_errors=True)
    temporary.rename(output)


def _student(exp: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    phase, criterion, _ = config["best_model_criterion"][0]
    path = exp / f"{phase}.{criterion}.ave.pth"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: the training in {exp} has not finished, or its criterion "
            f"{phase} {criterion} was never reported; see {exp}/train.log"
        )
    logging.info("exporting %s", path.resolve().name)
    return torch.load(path, map_location="cpu", weights_only=True)


def _teacher(exp: Path) -> dict[str, Tensor]:
    path = exp / "checkpoint.pth"
    # weights_only=False: ESPnet keeps its reporter's history there, a file of the user's own run.
    states = torch.load(path, map_location="cpu", weights_only=False)
    method = states["optimizers"][0].get(SAVED_AS, {})
    state = {k.removeprefix(TEACHER): v for k, v in method.items() if k.startswith(TEACHER)}
    if not state:
        raise ValueError(f"{path}: the method of this run has no teacher of its own")
    return state


def _stock(config: dict[str, Any]) -> dict[str, Any]:
    """Without our options, and without the paths and switches of the training run."""
    return {key: value for key, value in config.items() if key not in OPTIONS}


def _write(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    torch.save(state, folder / "model.pth")


def _prove(task: type[AbsTask], folder: Path, state: dict[str, Tensor]) -> None:
    """Stock loading is not strict: a wrong name would leave a layer random without a word."""
    net, _ = task.build_model_from_file(folder / "config.yaml", folder / "model.pth", "cpu")
    loaded = net.state_dict()
    wrong = sorted(set(loaded) ^ set(state)) or sorted(
        name for name, tensor in loaded.items() if not torch.equal(tensor, state[name])
    )
    if wrong:
        raise ValueError(
            f"stock ESPnet does not load {len(wrong)} of {len(loaded)} tensors of this model, "
            f"the first is {wrong[0]}"
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exp", type=Path, required=True, help="training directory")
    parser.add_argument("--output", type=Path, required=True, help="model folder to write")
    parser.add_argument("--source", choices=["student", "teacher"], default="student")
    args = parser.parse_args()
    export(args.exp, args.output, args.source)


if __name__ == "__main__":
    logging.basicConfig(level="INFO")
    main()
