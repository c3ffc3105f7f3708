"""Teachers of runs, and what they say for those that are taught by one."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from espnet_pl.recipe import check
from espnet_pl.recipe.config import RecipeError
from espnet_pl.recipe.job import Job
from espnet_pl.recipe.runs import Run, is_path, weights_of

if TYPE_CHECKING:
    from espnet_pl.recipe.stages import Plan


def refuse(runs: Mapping[str, Run], verdicts: Mapping[str, check.Verdict]) -> None:
    """Every run has teachers that its method can use.

    Args:
        verdicts: of the runs that matter.

    Raises:
        RecipeError: one has not.
    """
    for name, verdict in verdicts.items():
        options, where = runs[name].options, f"{runs[name].files[1]}, recipe: teachers:"
        if verdict.taught and len(options.teachers) != 1:
            raise RecipeError(
                f"{where} method {runs[name].method} learns from one, a run or the path of a "
                f"model; there are {len(options.teachers)}"
            )
        for teacher in [] if verdict.taught else options.teachers:
            if is_path(teacher):
                raise RecipeError(f"{where} {teacher}: method {runs[name].method} takes runs only")
            if runs[teacher].options.token_type != options.token_type:
                raise RecipeError(f"{where} {teacher} has another token type")


def files(plan: "Plan", teacher: str, seed: int) -> tuple[Path, tuple[Path, ...]]:
    """A teacher, a run or a path, as the bridge loads it; and the files that it consists of."""
    path = Path(teacher) if is_path(teacher) else plan.dir(teacher, seed) / "model"
    if path.suffix == ".zip":
        return path, (path,)
    weights = weights_of(path)
    return path, (weights.with_name("config.yaml"), weights)


def label(plan: "Plan", name: str, seed: int) -> Job:
    """What the teacher of a run says of its unlabelled speech, for all runs that ask the same."""
    run, other = plan.runs[name], plan.runs[name].options.unlabelled
    (teacher,) = run.options.teachers
    model, inputs = files(plan, teacher, seed)
    same = [str(plan.verdicts[name].asked), str(other)]
    from_elsewhere = is_path(teacher)
    if from_elsewhere:
        same.append(teacher)  # another may have the same name
    digest = hashlib.sha256("\n".join(same).encode()).hexdigest()[:8]
    if from_elsewhere:  # the same for every seed
        called = f"{Path(teacher).stem} {digest}"
        folder = plan.expdir / "teaches" / called.replace(" ", "-")
    else:
        called = f"{teacher} {digest} seed {seed}"
        folder = plan.dir(teacher, seed) / "teaches" / digest
    wav, shape = Path(f"data/{other}/wav.scp"), Path(f"data/{other}/speech_shape")
    argv = ["python3", "-m", "espnet_pl.bridge.label"]
    argv += [word for path in run.files for word in ("--config", str(path))]
    argv += ["--teacher", str(model), "--wav", str(wav), "--shape", str(shape)]
    argv += ["--output", str(folder), "--ngpu", str(min(plan.ngpu, 1))]
    return Job(
        f"label {called}", tuple(argv), folder / "label.log",
        gpus=min(plan.ngpu, 1), inputs=(*inputs, wav, shape), outputs=(folder / "done.json",),
        # Whichever run asks: what matters of its configuration is in the folder's name.
        regardless=("--config",), resumes=folder / "records.1of1.sqlite",
    )  # fmt: skip
