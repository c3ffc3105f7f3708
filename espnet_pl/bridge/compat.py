"""What differs between the supported releases of ESPnet.

202511 (Python 3.10, 3.11) and 202611 (Python 3.12, 3.13) share the interface of
tasks, trainer and iterators.  The differences that reach us:

* 202511 numbers the output layer of convolutional subsampling ``embed.out.0``,
  202611 names it ``embed.out``.  Both load the other's file without a word, as
  loading is not strict, and leave the layer random when it is not renamed.
* 202511 averages wrongly as soon as there is more than one criterion or number of
  best models: all averages after the first are sums of sums.
"""

import importlib.metadata
import re

from torch import Tensor

SUPPORTED = ("202511", "202611")


def version() -> str:
    """The installed release.

    Raises:
        RuntimeError: it is not one of the supported ones.
    """
    installed = importlib.metadata.version("espnet")
    if installed not in SUPPORTED:
        raise RuntimeError(
            f"espnet {installed} is installed, supported are {' and '.join(SUPPORTED)}: "
            "run tools/install.sh, or pip install one of these"
        )
    return installed


def averages_one_criterion_only() -> bool:
    """Whether averaging is right only for a single criterion and number of best models."""
    return version() == "202511"


def rename_for_installed(state: dict[str, Tensor], ours: set[str]) -> dict[str, Tensor]:
    """A checkpoint of either release under the names of the model that is to load it.

    Args:
        state: the checkpoint.
        ours: the names that the model has.
    """
    renamed = {}
    for name, tensor in state.items():
        other = re.sub(r"(\.embed\.out)\.0\.", r"\1.", name)
        if other == name:
            other = re.sub(r"(\.embed\.out)\.(weight|bias)$", r"\1.0.\2", name)
        renamed[other if name not in ours and other in ours else name] = tensor
    return renamed
