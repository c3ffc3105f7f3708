"""What a recipe says: ``recipe.yaml`` (the corpus) and ``conf/<run>.yaml`` (one run each).

A mistake in either is reported before any work, with the nearest name that would be right.
"""

import contextlib
import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from espnet_pl.bridge.merge import merge
from espnet_pl.recipe import markers

ASR = Path("conf/asr.yaml")  # the model and optimiser that all runs share
WRITTEN = ("studies", "phases")  # folders of an expdir with configurations that the driver writes


class RecipeError(Exception):
    """The recipe or the command line is wrong; the message says how to mend it."""


@dataclass(frozen=True)
class Recipe:
    """The fields of ``recipe.yaml``: what differs between corpora, nothing else.

    Sets are directories under ``data/``; runs are files ``conf/<run>.yaml``.

    Args:
        labelled: the transcribed training set.
        unlabelled: the training set without transcripts; may be absent.
        valid: chooses the epoch of every run.
        test: recognised and scored.
        report_together: test sets that are also reported as one.
        token_type: ``word``, ``char`` or ``bpe``.
        nbpe: number of BPE tokens.
        tokens_from: sets whose text makes the token list (default: ``labelled``).
        rate: samples per second.
        methods: the runs of ``--method all``, in order.
        other_model: a configuration in place of ``conf/asr.yaml``, for methods that need another
            student; its runs are a block of their own in the table.
        other_methods: its runs of ``--method all``; with the same baseline and oracle by name.
        default: the runs without ``--method``.
        baseline: the run differences and recovery rates refer to.
        oracle: the run with the truth of the unlabelled set; recovery 100 %.
        seeds: the seeds without ``--seed``.
        truth: a set whose text holds the unlabelled set's truth; for diagnostics only.
        lm_text: sets whose text a language model is trained on (default: ``labelled``).
    """

    labelled: str = "train_labelled"
    unlabelled: str | None = "train_unlabelled"
    valid: str = "dev"
    test: list[str] = dataclasses.field(default_factory=lambda: ["test"])
    report_together: list[str] = dataclasses.field(default_factory=list)
    token_type: str = "char"
    nbpe: int = 500
    tokens_from: list[str] = dataclasses.field(default_factory=list)
    rate: int = 16000
    methods: list[str] = dataclasses.field(default_factory=lambda: ["supervised"])
    other_model: str | None = None
    other_methods: list[str] = dataclasses.field(default_factory=list)
    default: list[str] = dataclasses.field(default_factory=lambda: ["supervised"])
    baseline: str = "supervised"
    oracle: str = "oracle"
    seeds: list[int] = dataclasses.field(default_factory=lambda: [1])
    truth: str | None = None
    lm_text: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        _check_token_type(self.token_type)
        for name in self.report_together:
            if name not in self.test:
                raise RecipeError(f"report_together: {did_you_mean(name, self.test)}")
        if self.other_methods and not self.other_model:
            raise RecipeError("other_methods: of which model? Give other_model, too")
        if not self.tokens_from:
            object.__setattr__(self, "tokens_from", [self.labelled])
        for name in self.lm_text:
            if name == self.truth:
                raise RecipeError(
                    f"lm_text: {name!r} holds what is said in the unlabelled speech (truth), which "
                    "a language model may not know"
                )
            if name in (self.valid, *self.test):
                raise RecipeError(f"lm_text: {name!r} is recognised and scored; give other sets")
        if not self.lm_text:
            object.__setattr__(self, "lm_text", [self.labelled])

    def tokens(self, token_type: str) -> Path:
        """The folder of the token list of that type."""
        size = self.nbpe if token_type == "bpe" else ""
        return Path(f"data/token_list/{token_type}{size}")

    def token_files(self, token_type: str) -> tuple[Path, ...]:
        """What is in it: the list and, of BPE, its model."""
        names = ("tokens.txt", "bpe.model") if token_type == "bpe" else ("tokens.txt",)
        return tuple(self.tokens(token_type) / name for name in names)


@dataclass(frozen=True)
class RunOptions:
    """The ``recipe:`` mapping of ``conf/<run>.yaml``, read by the driver only.

    That of ``conf/asr.yaml`` is for all runs of the model.

    Args:
        labelled: the labelled set (default: the recipe's).
        unlabelled: the unlabelled set (default: the recipe's, if there is one).
        token_type: ``word``, ``char`` or ``bpe`` (default: the recipe's).  A run that starts from
            one with another token type takes over the encoder only.
        init: the run whose exported model this one starts from.
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
        _check_token_type(self.token_type)
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


def _check_token_type(name: str) -> None:
    kinds = ("word", "char", "bpe")
    if name not in kinds:
        raise RecipeError(f"token_type: {did_you_mean(name, kinds)}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``'tset' is not known; did you mean 'test'? known: dev, test``."""
    known = [str(name) for name in known]
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]!r}?" if near else "."
    return f"{str(word)!r} is not known{guess} Known: {', '.join(known) or 'none'}"


def load_recipe(path: Path = Path("recipe.yaml")) -> Recipe:
    """Reads and checks ``recipe.yaml``."""
    if not path.exists():
        raise RecipeError(f"no {path} here: run this from a recipe such as egs/<corpus>/pl1")
    return _typed(Recipe, mapping(path), str(path))


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


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a configuration, if it says something else than what is there."""
    text = yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False, allow_unicode=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def removed(expdir: Path) -> Iterator[None]:
    """Takes configurations away that were written meanwhile."""
    before = {expdir, *expdir.rglob("*")} if expdir.exists() else set()
    try:
        yield
    finally:
        folders = [expdir / name for name in WRITTEN]
        inside = [path for folder in folders for path in sorted(folder.rglob("*"), reverse=True)]
        for path in [*inside, *folders, expdir]:
            if path.exists() and path not in before:
                path.rmdir() if path.is_dir() else path.unlink()


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
        name, tuple(confs), str(merged["method"]), _typed(RunOptions, options, f"{where}, recipe:"),
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
        if run.options.init is not None and run.options.init not in runs:
            raise RecipeError(f"{where} init: {did_you_mean(run.options.init, runs)}")
        for name in run.options.teachers:
            if name not in runs and not is_path(name):
                raise RecipeError(f"{where} teachers: {did_you_mean(name, runs)}")
        if run.options.export not in (None, "student", "teacher"):
            raise RecipeError(f"{where} export: must be student or teacher")


def is_path(teacher: str) -> bool:
    """Whether a teacher is no run but a model from elsewhere."""
    return "/" in teacher or teacher.endswith(".zip")


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
            teachers = (teacher for teacher in options.teachers if not is_path(teacher))
            for other in filter(None, [options.init, *teachers]):
                visit(other, (*path, name))
            ordered.append(name)

    for name in names:
        visit(name, ())
    return ordered


def default_expdir(asr: Path) -> Path:
    """Where the experiments of a model configuration are: ``exp``, or ``exp_<its name>``."""
    return Path("exp") if asr == ASR else beside(Path("exp"), asr)


def beside(expdir: Path, asr: Path) -> Path:
    """Where the experiments of another model are, for a call about both."""
    return expdir.with_name(f"{expdir.name}_{asr.stem}")


def other_results(recipe: Recipe, asr: Path, expdir: Path) -> Path | None:
    """The numbers of the recipe's other model, if there are any that this model's table shows."""
    if asr != ASR or not recipe.other_model:
        return None
    path = beside(expdir, Path(recipe.other_model)) / "results.json"
    return path if path.exists() else None


def run_dir(run: str, seed: int, expdir: Path) -> Path:
    """The folder of one run: ``<expdir>/<run>``, other seeds in ``<expdir>/seed<N>/<run>``."""
    return expdir / run if seed == 1 else expdir / f"seed{seed}" / run


def mapping(path: Path) -> dict:
    """The 'name: value' lines of a YAML file; none if it is empty."""
    try:
        content = markers.load_yaml(path)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if content is not None and not isinstance(content, dict):
        raise RecipeError(f"{path}: expected 'name: value' lines")
    return content or {}


def _typed(cls, content: Mapping, where: str):
    """Builds the dataclass; unknown keys and wrong types are refused by name."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for key, value in content.items():
        if key not in fields:
            raise RecipeError(f"{where}: {did_you_mean(key, fields)}")
        kind = fields[key].type
        many, number = getattr(kind, "__origin__", None) is list, "int" in str(kind)
        items = value if isinstance(value, list) and many else [value]
        optional = value is None and "None" in str(kind)
        wanted = int if number else str
        if not optional and not all(type(item) is wanted for item in items):
            raise RecipeError(f"{where}: {key}: expected {wanted.__name__}, got {value!r}")
        values[key] = items if many else value
    try:
        return cls(**values)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
