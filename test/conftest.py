"""Shapes and types are annotations, and are checked while testing."""

from jaxtyping import install_import_hook

# Not in the bridge and the recipes, whose tests let small objects stand in for ESPnet's.
# An int is welcome where a float is asked for.
install_import_hook(
    [f"espnet_pl.{floor}" for floor in ("losses", "parts", "data", "methods")],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)
