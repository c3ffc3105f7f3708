"""What a recipe says: ``recipe.yaml`` (the corpus) and ``conf/<run>.yaml`` (one run each).

A mistake in either is reported before any work, with the nearest name that would be right.
"""

import contextlib
import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

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
        check_token_type(self.token_type)
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


def check_token_type(name: str) -> None:
    """Refuses what is none."""
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
    return typed(Recipe, mapping(path), str(path))


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


def typed(cls, content: Mapping, where: str):
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
