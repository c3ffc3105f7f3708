"""Asks the bridge about configurations, in a process of its own: ESPnet takes seconds and memory.

Usage: ``check FILE[,FILE...]...`` prints one JSON line with a verdict per configuration: what its
method needs, or what is wrong with it.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from espnet_pl import __version__
from espnet_pl.recipe import config, markers
from espnet_pl.recipe.runs import Run


class Verdict(NamedTuple):
    """What the method of a run needs."""

    unlabelled: bool = False  # speech
    taught: bool = False  # one trained teacher
    asked: str | None = None  # a hash of what it asks its teacher
    language_model: bool = False
    uses: Sequence[str] = ("language_model", "teachers")  # it may have


def check_runs(
    names: Iterable[str],
    others: Iterable[str],
    runs: Mapping[str, Run],
    expdir: Path,
    write: bool = True,
) -> dict[str, Verdict]:
    """Lets the bridge check the runs' configurations; tells what each of them needs.

    Importing ESPnet takes seconds, so verdicts are kept beside the experiments until a file
    changes.  ``others`` are runs this call is not about: a mistake in one only leaves it out.
    """
    memory = expdir / "checked.json"
    known = markers.read(memory) or {}
    keys = {}
    for name in [*names, *others]:
        content = [markers.content(path) for path in runs[name].files]
        keys[name] = hashlib.sha256(json.dumps([content, __version__]).encode()).hexdigest()
    new = [name for name, key in keys.items() if not isinstance(known.get(key), dict)]
    if new:
        try:
            verdicts = ask([[str(path) for path in runs[name].files] for name in new])
        except RuntimeError as error:
            raise config.RecipeError(f"the configurations cannot be checked:\n{error}") from error
        for name, verdict in zip(new, verdicts, strict=True):
            if isinstance(verdict, str) and name in names:
                raise config.RecipeError(verdict)
            known[keys[name]] = verdict
        if write:
            markers.write(memory, {key: v for key, v in known.items() if isinstance(v, dict)})
    return {
        name: Verdict(**known[key]) for name, key in keys.items() if isinstance(known[key], dict)
    }


def refuse_unused(runs: Mapping[str, Run], verdicts: Mapping[str, Verdict]) -> None:
    """A run names teachers or a language model only if its method has a use for them.

    Args:
        verdicts: of the runs that matter.

    Raises:
        config.RecipeError: one does without.
    """
    for name, verdict in verdicts.items():
        run = runs[name]
        for what, words in (("teachers", "other teachers"), ("language_model", "one")):
            used = what in verdict.uses or (what == "teachers" and verdict.taught)
            if getattr(run.options, what) and not used:
                raise config.RecipeError(
                    f"{run.files[1]}, recipe: {what}: method {run.method} has no use for {words} "
                    "(of phases, only those that have name it)"
                )


def ask(configurations: Sequence[Sequence[str]]) -> list[dict | str]:
    """The fields of a `Verdict`, or a message about a mistake."""
    argv = [sys.executable, "-m", __name__, *(",".join(files) for files in configurations)]
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        argv, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    if done.returncode:
        raise RuntimeError("\n".join(done.stderr.splitlines()[-15:]))
    return json.loads(done.stdout.splitlines()[-1])


def main(configurations: Sequence[str]) -> None:
    """Prints the verdicts."""
    with contextlib.redirect_stdout(sys.stderr):  # ESPnet talks while it is imported
        from espnet_pl.bridge.teaching import hash_of_asked, is_taught
        from espnet_pl.bridge.train import (
            ConfigError,
            load_config,
            needs_language_model,
            needs_unlabelled,
            uses,
        )

    verdicts: list[dict | str] = []
    for files in configurations:
        try:
            conf = load_config(files.split(","))
            found = Verdict(
                needs_unlabelled(conf),
                is_taught(conf),
                hash_of_asked(conf),
                needs_language_model(conf),
                uses(conf),
            )
            verdicts.append(found._asdict())
        except ConfigError as error:
            verdicts.append(str(error))
    print(json.dumps(verdicts))


if __name__ == "__main__":
    main(sys.argv[1:])
