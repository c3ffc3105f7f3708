"""Methods by name: the file, its settings as they are written in YAML, and the method itself.

What does not exist or does not fit is refused before training, with the nearest name that would be
right.
"""

import dataclasses
import difflib
import importlib
import pkgutil
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from espnet_pl.methods.base import ConfigError, Method

# Files beside the methods that are none.
SHARED = ("base", "bilevel", "frame_labelling", "pseudo_labelling", "registry")


def module_of(name: str) -> types.ModuleType:
    """The module of a method: a file in ``espnet_pl/methods``, or a dotted path.

    Raises:
        ConfigError: there is none of that name.
    """
    if name in SHARED:
        raise ConfigError(unknown("method", name, methods()))
    path = name if "." in name else f"espnet_pl.methods.{name}"
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
        raise ConfigError(unknown("method", name, methods())) from None


def methods() -> list[str]:
    """The names of all methods: the files beside this one."""
    beside = pkgutil.iter_modules([str(Path(__file__).parent)])
    return sorted(module.name for module in beside if module.name not in SHARED)


def config_of(name: str, conf: Mapping[str, Any]) -> Any:
    """The typed settings of a method.

    Raises:
        ConfigError: a field that the method does not have, or a value of the wrong type or range.
    """
    return settings(f"method_conf of {name}", module_of(name).Config, conf)


def settings(what: str, config_class: type, conf: Mapping[str, Any]) -> Any:
    """A mapping as an object of a dataclass.

    Args:
        what: the mapping is, for messages.

    Raises:
        ConfigError: a field that there is not, or a value of the wrong type or range.
    """
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    hints = typing.get_type_hints(config_class)
    for key, value in conf.items():
        if key not in fields:
            raise ConfigError(unknown(what, key, fields))
        if not _fits(value, hints[key]):
            raise ConfigError(f"{what}: {key} is {value!r}, it must be {_spell(hints[key])}")
    try:
        return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in conf.items()})
    except ValueError as error:
        raise ConfigError(f"{what}: {error}") from None


def build(
    name: str,
    conf: Mapping[str, Any],
    student: nn.Module,
    resources: Mapping[str, Any] = types.MappingProxyType({}),
) -> Method:
    """A method by name.

    Args:
        name: a file in ``espnet_pl/methods``, or a dotted path.
        conf: fields of its ``Config`` that are not at their default.
        student: what will be trained; answers ``Student``'s questions.
        resources: what comes from outside, by name: ``truth``, the held-back labels of
            unlabelled utterances (for diagnostics only); ``teachers``, trained networks that
            label beside the method's own teacher and never change (for pseudo-labelling);
            ``language_model``, which scores sequences of tokens (``parts.language_model``).
            A method that is taught has instead of these: ``teacher``, the trained network, on the
            CPU, or ``records``, what ``ask`` made of it by utterance id (``parts.store.Reader``),
            the other is None; ``translate``, from its labels to the student's, or None;
            ``same_tokens`` and ``same_frames``, whether both have the same; ``teacher_tokens``, how
            many it has; ``teacher_answers``, as a student's ``answers``.

    Raises:
        ConfigError: unknown method or setting, a student that cannot answer, resources that the
            method lacks, or teachers or a language model that it has no use for.
    """
    config = config_of(name, conf)
    method_class = module_of(name).Method
    lacking = sorted(method_class.requires - student.answers)
    if lacking:
        remedy = "a CTC branch (model_conf: ctc_weight > 0)"
        if lacking == ["inputs"]:
            remedy = "a front end (frontend: default)"
        raise ConfigError(
            f"method {name} asks the student for {', '.join(lacking)}, which this architecture "
            f"does not have; give it {remedy} or use another method"
        )
    if resources.get("teachers") and "teachers" not in method_class.uses:
        raise ConfigError(f"method {name} makes no pseudo-labels: it has no use for other teachers")
    if resources.get("language_model") is not None and "language_model" not in method_class.uses:
        raise ConfigError(f"method {name} has no use for a language model")
    for need in sorted(method_class.needs(config)):
        if resources.get(need) is None:
            raise ConfigError(
                f"method {name} needs a {need.replace('_', ' ')} with these settings: --{need}"
            )
    return method_class(config, student, resources)


def unknown(what: str, key: str, known) -> str:
    """The words for a name that does not exist: the nearest one that does, or all."""
    near = difflib.get_close_matches(key, list(known), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known)) or 'none'}"
    return f"{what}: unknown {key!r}; {hint}"


def _fits(value: Any, hint: Any) -> bool:
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return value in options
    if typing.get_origin(hint) is tuple:  # of any length; a list in YAML
        return isinstance(value, (list, tuple)) and all(_fits(v, options[0]) for v in value)
    if options:
        return any(_fits(value, option) for option in options)
    if hint is float:  # 1 is a float to whoever writes YAML, True is not
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a list of {_spell(typing.get_args(hint)[0])}"
    return " or ".join(getattr(h, "__name__", str(h)) for h in typing.get_args(hint) or (hint,))
