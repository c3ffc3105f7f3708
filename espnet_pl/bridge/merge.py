"""One configuration over another.  Imports nothing: the driver of a recipe uses it too."""

from collections.abc import Mapping


def merge(old: Mapping, new: Mapping) -> dict:
    """``old`` with what ``new`` says otherwise, key by key also inside mappings."""
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged
