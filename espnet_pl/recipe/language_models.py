"""Language models of runs: a recipe's own, which ESPnet trains on text, or one from elsewhere."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from espnet_pl.recipe.config import RecipeError
from espnet_pl.recipe.job import Job
from espnet_pl.recipe.runs import with_inits

if TYPE_CHECKING:
    from espnet_pl.recipe.stages import Plan

CONF = Path("conf/lm.yaml")  # the model and optimiser


def of(plan: "Plan", name: str) -> tuple[Path, tuple[Path, ...]] | None:
    """The language model of a run, as the bridge loads it, and its files; None if it has none."""
    options = plan.runs[name].options
    if options.language_model is not None:
        path = Path(options.language_model)
        if path.suffix == ".pth":
            return path, (path.with_name("config.yaml"), path)
        if path.is_dir():
            weights = path / "model.pth", path / "valid.loss.ave.pth"
            found = next((p for p in weights if p.exists()), weights[0])
            return path, (path / "config.yaml", found)
        return path, (path,)
    if not _needed(plan, name):
        return None
    own = _model(plan, options.token_type)
    return own[1], own


def jobs(plan: "Plan") -> Iterator[Job]:
    """Gather the text, and train a language model for each type of tokens of runs that need it."""
    names = with_inits(plan.chosen, plan.runs)
    wanted = [
        plan.runs[name].options.token_type
        for name in names
        if _needed(plan, name) and plan.runs[name].options.language_model is None
    ]
    if not wanted:
        return
    if not CONF.exists():
        raise RecipeError(
            f"{CONF} is missing: it says what the language model is; or give a run another one, "
            "recipe: {language_model: PATH}"
        )
    recipe, text = plan.recipe, plan.expdir / "lm" / "text"
    texts = tuple(Path(f"data/{name}/text") for name in recipe.lm_text)
    labelled = Path(f"data/{recipe.labelled}/text")
    others = [recipe.unlabelled, *(run.options.unlabelled for run in plan.runs.values())]
    unlabelled = tuple(Path(f"data/{name}/wav.scp") for name in dict.fromkeys(others) if name)
    argv = ["python3", "-m", "espnet_pl.recipe.lm_text", str(text)]
    argv += ["--text", *map(str, texts), "--labelled", str(labelled)]
    argv += ["--unlabelled", *map(str, unlabelled)]
    inputs = tuple(dict.fromkeys((*texts, labelled, *unlabelled)))
    yield Job("lm_text", tuple(argv), text.with_name("text.log"), 0, inputs, (text,), here=True)
    for kind in dict.fromkeys(wanted):
        yield _train(plan, kind, text)


def _train(plan: "Plan", kind: str, text: Path) -> Job:
    outputs, valid = _model(plan, kind), Path(f"data/{plan.recipe.valid}/text")
    folder, tokens = outputs[0].parent, plan.recipe.token_files(kind)
    argv = ["python3", "-m", "espnet_pl.bridge.lm_train", "--config", str(CONF)]
    argv += ["--token_type", kind, "--token_list", str(tokens[0])]
    argv += ["--bpemodel", str(tokens[1])] if tokens[1:] else []
    for part, path in (("train", text), ("valid", valid)):
        argv += [f"--{part}_data_path_and_name_and_type", f"{path},text,text"]
        argv += [f"--{part}_shape_file", str(path)]  # of which unsorted batches read the names only
    # One criterion: espnet 202511 averages wrongly with the usual several.
    argv += ["--batch_type", "unsorted", "--best_model_criterion", "valid,loss,min"]
    argv += ["--use_tensorboard", "false", "--use_matplotlib", "false", "--resume", "true"]
    argv += ["--ngpu", str(plan.ngpu), "--output_dir", str(folder)]
    return Job(
        f"train_lm {kind}", tuple(argv), folder / "train.log", gpus=plan.ngpu,
        inputs=(CONF, *tokens, text, valid), outputs=outputs, resumes=folder / "checkpoint.pth",
    )  # fmt: skip


def _model(plan: "Plan", kind: str) -> tuple[Path, Path]:
    folder = plan.expdir / "lm" / plan.recipe.tokens(kind).name
    return folder / "config.yaml", folder / "valid.loss.ave.pth"


def _needed(plan: "Plan", name: str) -> bool:
    return name in plan.verdicts and plan.verdicts[name].language_model
