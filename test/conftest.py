"""Shapes and types are annotations, and are checked while testing."""

import contextlib

from jaxtyping import install_import_hook

# Triton compiles these functions from their source: without anything around them.
with contextlib.suppress(ImportError):
    import espnet_pl.losses.programs  # noqa: F401

# Not in the bridge and the recipes, whose tests let small objects stand in for ESPnet's.
# An int is welcome where a float is asked for.
install_import_hook(
    [f"espnet_pl.{floor}" for floor in ("losses", "parts", "data", "methods")],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)
