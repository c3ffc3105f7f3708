"""The runs of a recipe: what ``conf/<run>.yaml`` says, what it needs, and its phases."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espnet_pl.bridge.merge import merge
from espnet_pl.recipe.config import (
    ASR,
    Recipe,
    RecipeError,
    check_token_type,
    did_you_mean,
    mapping,
    typed,
    write,
)


@dataclass(frozen=True)
class RunOptions:
    """The ``recipe:`` mapping of ``conf/<run>.yaml``, read by the driver only.

    That of ``conf/asr.yaml`` is for all runs of the model.

    Args:
        labelled: the labelled set (default: the recipe's).
        unlabelled: the unlabelled set (default: the recipe's, if there is one).
        token_type: ``word``, ``char`` or ``bpe`` (default: the recipe's).  A run that starts from
            one with another token type takes over the encoder only.
        init: the run whose exported model this one starts from, or the path of any ESPnet model of
            the same architecture: a folder of config.yaml and model.pth, or weights (``.pth``)
            beside their config.yaml.
        take: what of it, ``model`` or ``encoder``.
        teachers: runs whose exported models label beside the method's own teacher.  A method that
            is taught has one: a run, of any tokens, or the path of a model folder or packed zip.
        language_model: for a method that needs one, the path of another than the recipe's own: a
            folder of ``espnet2.bin.lm_train``, or n-grams of tokens (``.arpa``).
        export: which network users get, ``student`` or ``teacher`` (default: the method's choice).
    """

    labelled: str
    unlabelled: str | None
    token_type: str
    init: str | None = None
    take: str = "model"
    teachers: list[str] = dataclasses.field(default_factory=list)
    language_model: str | None = None
    export: str | None = None

    def __post_init__(self):
        check_token_type(self.token_type)
        if self.take not in ("model", "encoder"):
            raise RecipeError(f"take: {did_you_mean(self.take, ('model', 'encoder'))}")


@dataclass(frozen=True)
class Run:
    """One trained system: ``conf/<name>.yaml`` over ``conf/asr.yaml``; see ``files``.

    Phases of a run are trainings one after the other: the last one is the run, and those before it
    are runs of their own, which come with it.
    """

    name: str
    files: tuple[Path, ...]  # its configuration, a later file over an earlier one
    method: str
    options: RunOptions
    normalize: str | None  # of the merged configuration: decides whether statistics are needed
    task: str  # the same: which of ESPnet's programs recognises
    teacher_mode: str  # the same, of a method that is taught: stored or online
    batching_labels: str | None = None  # the same: a file that batches are made of
    before: tuple[str, ...] = ()  # its earlier phases
    written: Mapping[str, Any] | None = None  # what its last file is to say, if the driver's

    @property
    def decode(self) -> Path:
        """The file with the search's settings: those of ``asr_inference``, or of the task's own."""
        return Path("conf/decode.yaml" if self.task == "asr" else f"conf/decode_{self.task}.yaml")


def load_runs(recipe: Recipe, asr: Path = ASR, expdir: Path = Path("exp")) -> dict[str, Run]:
    """Every ``conf/*.yaml`` with a ``method:``, and every ``conf/<model>/*.yaml`` of this model.

    What a run leaves open is as in the recipe.  Of a run with ``phases`` there is one for each.
    """
    found = [path for top in ("", asr.stem) for path in Path("conf", top).glob("*.yaml")]
    shared, runs = load_model(asr), {}
    for name in sorted({path.stem for path in found}):
        own = {path: mapping(path) for path in files(name, asr)[1:]}
        runs |= load_phases(name, shared | own, recipe, expdir / "phases" / name)
    check_references(runs)
    return runs


def load_model(asr: Path) -> dict[Path, dict]:
    """What all runs of a model share, by its file; nothing if there is none."""
    return {asr: mapping(asr) if asr.exists() else {}}


def load_phases(
    name: str, confs: Mapping[Path, dict], recipe: Recipe, written: Path
) -> dict[str, Run]:
    """The runs that these files make, the model's first: one, or one for each phase.

    ``recipe: {phases: {first: {...}, second: {...}}}`` says what differs in each phase from the
    rest of the configuration.  A phase starts from the one before.  The last one is the run
    ``<name>``, the others are ``<name>.<phase>``.

    Args:
        written: where the phases' own configurations are to be, ``<written>.<phase>.yaml``.

    Raises:
        RecipeError: phases that cannot be.
    """
    (asr, shared), *own = confs.items()
    settings = functools.reduce(merge, (conf for _, conf in own), {})
    options = settings.get("recipe")
    if not isinstance(options, dict) or "phases" not in options:
        run = load_run(name, confs, recipe)
        return {name: run} if run else {}
    phases = options["phases"]
    where = f"{' + '.join(str(path) for path, _ in own)}, recipe: phases:"
    if not isinstance(phases, dict) or not phases:
        raise RecipeError(f"{where} expected 'name: {{what differs}}' lines")
    common = {**settings, "recipe": {k: v for k, v in options.items() if k != "phases"}}
    runs: dict[str, Run] = {}
    for phase, differs in phases.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", str(phase)):
            raise RecipeError(f"{where} named by letters, digits, _ and -, not {phase!r}")
        if not isinstance(differs, dict) or not isinstance(differs.get("recipe") or {}, dict):
            raise RecipeError(f"{where} {phase}: expected 'name: value' lines")
        content = merge(common, differs)
        if runs:
            if "init" in (differs.get("recipe") or {}):
                raise RecipeError(f"{where} {phase}: init: it starts from the phase before")
            content = merge(content, {"recipe": {"init": [*runs][-1]}})
        full = name if phase == [*phases][-1] else f"{name}.{phase}"
        file = written.with_name(f"{written.name}.{phase}.yaml")
        run = load_run(full, {asr: shared, file: content}, recipe)
        if run is None:
            raise RecipeError(f"{where} {phase}: it has no method")
        runs[full] = dataclasses.replace(run, before=tuple(runs), written=content)
    return runs


def write_phases(runs: Iterable[Run]) -> None:
    """Writes what ``load_phases`` made of runs that have phases."""
    for run in runs:
        if run.written is not None:
            write(run.files[-1], run.written)


def load_run(name: str, confs: Mapping[Path, dict], recipe: Recipe) -> Run | None:
    """The run that these files make, the model's first; None if none of the others has a method."""
    if not any("method" in conf for conf in [*confs.values()][1:]):
        return None
    merged: dict = {}
    options = {key: getattr(recipe, key) for key in ("labelled", "unlabelled", "token_type")}
    for path, conf in confs.items():
        own = conf.get("recipe") or {}
        if not isinstance(own, dict):
            raise RecipeError(f"{path}, recipe: expected 'name: value' lines")
        merged |= conf
        options |= own
    where = " + ".join(map(str, confs))
    return Run(
        name, tuple(confs), str(merged["method"]), typed(RunOptions, options, f"{where}, recipe:"),
        merged.get("normalize"), merged.get("task") or "asr",
        str(merged.get("teacher_mode", "stored")), merged.get("batching_labels"),
    )  # fmt: skip


def check_references(runs: Mapping[str, Run]) -> None:
    """Every run that another one names must exist and fit.

    Raises:
        RecipeError: it does not.
    """
    for run in runs.values():
        where = f"{run.files[1]}, recipe:"
        init = run.options.init
        if init is not None and is_path(init):
            _check_model(init, f"{where} init:")
        elif init is not None and init not in runs:
            raise RecipeError(f"{where} init: {did_you_mean(init, runs)}")
        for name in run.options.teachers:
            if name not in runs and not is_path(name):
                raise RecipeError(f"{where} teachers: {did_you_mean(name, runs)}")
        if run.options.export not in (None, "student", "teacher"):
            raise RecipeError(f"{where} export: must be student or teacher")


def is_path(model: str) -> bool:
    """Whether what is named is no run but a model from elsewhere."""
    return "/" in model or model.endswith(".zip")


def weights_of(model: Path) -> Path:
    """The weights of a model that is not packed; its config.yaml is beside them."""
    return model if model.suffix == ".pth" else model / "model.pth"


def _check_model(model: str, where: str) -> None:
    if model.endswith(".zip"):
        raise RecipeError(
            f"{where} {model} is packed: unpack it (python3 -m zipfile -e {model} FOLDER) and name "
            "the folder of its config.yaml"
        )
    weights = weights_of(Path(model))
    for path in (weights.with_name("config.yaml"), weights):
        if not path.is_file():
            raise RecipeError(
                f"{where} there is no {path}: name a folder of config.yaml and model.pth, or "
                "weights (.pth) beside their config.yaml"
            )


def files(run: str, asr: Path) -> list[Path]:
    """The configuration of a run, a later file over an earlier one.

    What all runs of a model share; the run, ``conf/<run>.yaml``; and what differs for this model,
    or a run that only this model has: ``conf/<model>/<run>.yaml``.
    """
    own = [Path(f"conf/{run}.yaml"), Path("conf", asr.stem, f"{run}.yaml")]
    return [asr, *(path for path in own if path.exists())]


def with_inits(names: Iterable[str], runs: Mapping[str, Run]) -> list[str]:
    """The runs and all runs they start from or are taught by, each after those."""
    ordered: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise RecipeError(f"runs that need each other: {' <- '.join((*path, name))}")
        if name not in ordered:
            options = runs[name].options
            for other in filter(None, [options.init, *options.teachers]):
                if not is_path(other):
                    visit(other, (*path, name))
            ordered.append(name)

    for name in names:
        visit(name, ())
    return ordered
