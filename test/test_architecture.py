"""The rules of the house that a program can check."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from espnet_pl.methods.registry import SHARED
from espnet_pl.parts.decoding import collapse

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "espnet_pl"
METHODS = sorted(
    path.stem for path in (PACKAGE / "methods").glob("[!_]*.py") if path.stem not in SHARED
)
MODULES = sorted(PACKAGE.rglob("*.py"))
RECIPES = sorted(path for path in ROOT.glob("egs/*/pl1") if path.is_dir())
COMMON = ("run.sh", "path.sh", "cmd.sh", "conf/slurm.conf")
HEADINGS = ("Source", "Equation", "Differs from the paper", "Cost")

FORBIDDEN = {
    "a path of somebody's machine": r"(?<![\w.$}~/-])/(work|opt|root|home/\w+|Users)(?![\w-])",
    "the address of a package index": r"pythonhosted\.org|pypi\.org|download\.pytorch",
    "notes outside the repository": r"\.\./shared/docs",
    "a merge conflict": r"^(<{7}|>{7}) ",
}


def files() -> list[Path]:
    """What the repository holds: tracked, or new and not ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    paths = {ROOT / name for name in run.stdout.split("\0") if name}
    return sorted(path for path in paths if path.is_file())


def undocumented(tree: ast.Module) -> list[str]:
    """The public classes, functions and methods without a docstring.

    A method that a base class documents needs no second docstring; what bases outside the file
    document is not known here, so methods of classes with a base are let pass.
    """
    lost = []

    def visit(body: list[ast.stmt], prefix: str = "") -> None:
        for node in body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                lost.append(f"{prefix}{node.name}")
            if isinstance(node, ast.ClassDef) and not node.bases:
                visit(node.body, f"{prefix}{node.name}.")

    visit(tree.body)
    return lost


def test_floors_use_only_those_below_them():
    program = "from importlinter.cli import lint_imports_command as run; run()"
    command = [sys.executable, "-c", program, "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3 kept, 0 broken" in run.stdout


def test_there_are_methods_and_recipes():
    assert "supervised" in METHODS
    assert {path.parent.name for path in RECIPES} >= {"mini_alnum", "fsdd", "an4"}


@pytest.mark.parametrize("method", METHODS)
def test_method_says_where_it_comes_from(method):
    docstring = ast.get_docstring(ast.parse((PACKAGE / f"methods/{method}.py").read_text())) or ""
    lost = [h for h in HEADINGS if not re.search(rf"^{h}\b", docstring, re.MULTILINE)]
    assert not lost, f"espnet_pl/methods/{method}.py: no heading {', '.join(lost)} in its docstring"


@pytest.mark.parametrize("method", METHODS)
def test_method_has_a_test(method):
    assert (ROOT / f"test/methods/test_{method}.py").is_file()


@pytest.mark.parametrize("name", COMMON)
def test_recipes_share_their_scripts(name):
    contents = {recipe.parent.name: (recipe / name).read_bytes() for recipe in RECIPES}
    original = contents["mini_alnum"]
    differing = [recipe for recipe, content in contents.items() if content != original]
    assert not differing, f"{name} differs from mini_alnum's; copy that one"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.parent.name)
def test_recipe_can_be_started(recipe):
    assert os.access(recipe / "run.sh", os.X_OK)
    links = [path for path in files() if path.is_symlink() and recipe in path.parents]
    assert not links, "a recipe is copied to other places: no links"


def test_shapes_are_checked_here():
    with pytest.raises(TypeCheckError):
        collapse(torch.zeros(2, 3, dtype=torch.long))  # asks for one path, not two


def test_public_names_have_docstrings():
    lost = []
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = undocumented(tree)
        if not ast.get_docstring(tree):
            names.insert(0, "the module")
        lost += [f"{path.relative_to(ROOT)}: {name}" for name in names]
    assert not lost, "without a docstring:\n" + "\n".join(lost)


def test_undocumented_finds_what_it_should():
    source = (
        "class A:\n  def b(self): pass\n  def _c(self): pass\nclass D(A):\n  '''D.'''\ndef e(): 0"
    )
    assert undocumented(ast.parse(source)) == ["A", "A.b", "e"]


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_names(what):
    pattern = re.compile(FORBIDDEN[what], re.MULTILINE)
    found = []
    for path in files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # audio and images
        for match in pattern.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{path.relative_to(ROOT)}:{line}: {match.group()}")
    assert not found, f"{what}:\n" + "\n".join(found)


@pytest.mark.parametrize("folder", ["work/main", "opt", "root/.cache", "home/ada/data"])
def test_machine_paths_are_found(folder):
    pattern = FORBIDDEN["a path of somebody's machine"]
    for text in (f"see /{folder}", f"'/{folder}'", f"PATH=/{folder}/bin"):
        assert re.search(pattern, text), text


@pytest.mark.parametrize("text", ["exp/work/x", "$root/work/", "a/home/b/c", "https://x.org/opt/y"])
def test_other_paths_are_not(text):
    assert not re.search(FORBIDDEN["a path of somebody's machine"], text)
