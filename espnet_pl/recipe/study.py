"""A study: many cells, each a run like any other, decided on dev; its results are kept as data.

``conf/studies/<study>.yaml`` of a recipe says what the cells are::

    question: in one sentence
    model: conf/asr_transducer.yaml                           whose cells they are; conf/asr.yaml
    common: {method: slimipl, recipe: {init: supervised}}     over conf/asr.yaml, in every cell
    grid:                                                     one cell for each combination
        target: {hard: {}, soft: {method_conf: {hard: 0.0, soft: 1.0}}}
        ratio: {1: {method_conf: {unlabelled: 1}}, 10: {method_conf: {unlabelled: 10}}}
    cells:                                                    and these
        soft-10-ema: {like: soft-10, method_conf: {teacher: ema}, seeds: [1, 2, 3]}
    seeds: [1]                                                of cells that do not say which

A cell is the run ``<study>.<cell>``.  When it has been recognised, a record of each seed is written
to ``docs/studies/data/<study>/<corpus>.<cell>.<seed>.json``: errors of every utterance (for paired
intervals), what was logged every so many updates, settings, time, commit.  Those of a trial
(another ``--expdir``) stay in it, ``<expdir>/records``.

Usage: ``./run.sh --study <study> [--method 'soft*,hard*'] [--seed 1]``
"""

import fnmatch
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from espnet_pl.bridge.merge import merge
from espnet_pl.recipe import config, stages
from espnet_pl.recipe.config import RecipeError
from espnet_pl.recipe.job import Job
from espnet_pl.recipe.runs import Run, check_references, load_model, load_phases, write_phases

DATA = Path("../../../docs/studies/data")
KEYS = ("question", "model", "common", "grid", "cells", "seeds", "sets")


@dataclass(frozen=True)
class Study:
    """Which cells there are, and which seeds of each."""

    name: str
    runs: dict[str, Run]  # the recipe's, and the cells by their full names
    seeds: dict[str, tuple[int, ...]]  # of each cell, by its full name
    sets: tuple[str, ...]  # what is recognised


def model(name: str) -> Path:
    """The model that a study is about.

    Raises:
        RecipeError: there is no such study, or it says nothing that could be a model.
    """
    path = _path(name)
    found = config.mapping(path).get("model", str(config.ASR))
    if not isinstance(found, str):
        raise RecipeError(f"{path}: model: expected a file such as {config.ASR}, got {found!r}")
    return Path(found)


def _path(name: str) -> Path:
    path = Path(f"conf/studies/{name}.yaml")
    if not path.exists():
        known = [found.stem for found in Path("conf/studies").glob("*.yaml")]
        raise RecipeError(f"--study: {config.did_you_mean(name, known)}")
    return path


def load(
    name: str, recipe: config.Recipe, runs: Mapping[str, Run], asr: Path, expdir: Path
) -> Study:
    """Reads a study, and writes the configuration of each cell beside the experiments.

    Raises:
        RecipeError: there is none of that name, or a cell cannot be.
    """
    path = _path(name)
    content = config.mapping(path)
    for key in content:
        if key not in KEYS:
            raise RecipeError(f"{path}: {config.did_you_mean(key, KEYS)}")
    shared, every, seeds = load_model(asr), dict(runs), {}
    for cell, settings in cells(content, str(path)).items():
        own = settings.pop("seeds", content.get("seeds", [1]))
        if not isinstance(own, list) or not all(type(seed) is int for seed in own):
            raise RecipeError(f"{path}, {cell}: seeds: expected a list of numbers, got {own!r}")
        full = f"{name}.{cell}"
        target = file_of(name, cell, expdir)
        confs, phases = {**shared, target: settings}, target.with_suffix("")
        found = load_phases(full, confs, recipe, phases)
        if not found:
            raise RecipeError(f"{path}, {cell}: it has no method")
        config.write(target, settings)
        write_phases(found.values())
        every |= found
        seeds[full] = tuple(own)
    check_references(every)
    sets = content.get("sets", [recipe.valid])
    if not isinstance(sets, list):
        raise RecipeError(f"{path}: sets: expected a list of test sets, got {sets!r}")
    for test in sets:
        if test not in (recipe.valid, *recipe.test):
            raise RecipeError(f"{path}, sets: {config.did_you_mean(test, recipe.test)}")
    return Study(name, every, seeds, tuple(sets))


def file_of(study: str, cell: str, expdir: Path) -> Path:
    """Where the settings of a cell are, those of all its phases."""
    return expdir / "studies" / study / f"{cell}.yaml"


def cells(content: Mapping[str, Any], where: str) -> dict[str, dict]:
    """The settings of each cell: what is common, the grid's, its own.

    Raises:
        RecipeError: a cell is like one that is not there, or no mapping.
    """

    def settings_in(value: Any, name: str) -> dict:
        if not isinstance(value or {}, dict):
            raise RecipeError(f"{where}, {name}: expected 'name: value' lines, got {value!r}")
        return value or {}

    common, grid, named = (
        settings_in(content.get(key), key) for key in ("common", "grid", "cells")
    )
    for axis, values in grid.items():
        for value, own in settings_in(values, f"grid: {axis}").items():
            settings_in(own, f"grid: {axis}: {value}")
    if not named and not grid:
        raise RecipeError(f"{where}: no cells and no grid of them")
    found: dict[str, dict] = {}
    if grid:
        for values in itertools.product(*(axis.items() for axis in grid.values())):
            settings = dict(common)
            for _, own in values:
                settings = merge(settings, own or {})
            found["-".join(str(value) for value, _ in values)] = settings
    for cell, own in named.items():
        own = dict(settings_in(own, str(cell)))
        like = own.pop("like", None)
        if like is not None and like not in found:
            raise RecipeError(f"{where}, {cell}: like: {config.did_you_mean(like, found)}")
        base = found[like] if like is not None else common
        found[str(cell)] = merge({k: v for k, v in base.items() if k != "seeds"}, own)
    for cell in found:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", cell):
            raise RecipeError(f"{where}: a cell is named by letters, digits, _ and -, not {cell!r}")
    # Through JSON: no two cells share a mapping, which YAML would write as a reference.
    return {cell: json.loads(json.dumps(settings)) for cell, settings in found.items()}


def chosen(
    study: Study, patterns: str | None, seeds: Sequence[int] | None
) -> list[tuple[str, int]]:
    """The cells and seeds of a call, in the study's order, one seed after the other.

    Raises:
        RecipeError: a pattern that no cell fits, or nothing left.
    """
    names = {full.partition(".")[2]: full for full in study.seeds}
    picked = set(names)
    if patterns and patterns != "all":
        picked = set()
        for pattern in patterns.split(","):
            fits = fnmatch.filter(names, pattern)
            if not fits:
                raise RecipeError(f"--method: {config.did_you_mean(pattern, names)}")
            picked |= set(fits)
    pairs = [
        (full, seed)
        for cell, full in names.items()
        for seed in study.seeds[full]
        if cell in picked and (seeds is None or seed in seeds)
    ]
    if not pairs:
        raise RecipeError(f"--seed: study {study.name} asks for none of {seeds} in these cells")
    return sorted(pairs, key=lambda pair: pair[1])


def jobs(plan: stages.Plan, study: Study, pairs: Sequence[tuple[str, int]]) -> Iterator[Job]:
    """Train, recognise and record one cell after the other; shared starting points once."""
    corpus, seen = Path.cwd().parent.name, set()
    data = plan.expdir / "records" if plan.is_trial else DATA
    recipe = replace(plan.recipe, test=list(study.sets), report_together=[])
    for name, seed in pairs:
        own = replace(plan, recipe=recipe, chosen=(name,), seeds=(seed,))
        for job in (*stages.train(own), *stages.infer(own)):
            if job.log not in seen:
                seen.add(job.log)
                yield job
        folder, cell = plan.dir(name, seed), name.partition(".")[2]
        output = data / study.name / f"{corpus}.{cell}.{seed}.json"
        texts = [folder / "infer" / test / "text" for test in study.sets]
        references = [Path(f"data/{test}/text") for test in study.sets]
        conf, before = file_of(study.name, cell, plan.expdir), plan.runs[name].before
        folders = [plan.dir(phase, seed) for phase in before]
        argv = ["python3", "-m", "espnet_pl.recipe.record", str(folder), str(conf)]
        argv += [word for phase in folders for word in ("--before", str(phase))]
        yield Job(
            f"record {name} seed {seed}",
            (*argv, "--sets", ",".join(study.sets), "--seed", str(seed), "--output", str(output)),
            folder / "record.log",
            inputs=(*texts, *references, *(own / "config.yaml" for own in (*folders, folder))),
            outputs=(output,), here=True,
        )  # fmt: skip
