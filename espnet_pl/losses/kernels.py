r"""The sweeps of ``lattice`` as programs of the GPU.

On a CPU, PyTorch's own operations spend next to nothing on a lattice.  On a GPU each of them is a
launch, and a lattice has T + U diagonals: here all are one launch, in both directions at once.

It computes what PyTorch computes where it cannot run: that is its fallback, and what it is compared
with.

Source: ``programs``.  Axes: d diagonals, k hypotheses, u labels, u1 = u + 1 predictor states, w
sweeps.
"""

import functools
import os
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

# False: PyTorch's operations only, on a GPU too.
ON = os.environ.get("ESPNET_PL_KERNELS", "1") != "0"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # by Triton itself, on a CPU
OLDEST = (8, 0)  # of NVIDIA's: the first with bfloat16, and that the programs are compiled for

# States of a lattice for a warp, four for each thread: by reasoning, NOT MEASURED.
WARPS = 8
OF_A_WARP = 128


def available(x: Tensor) -> bool:
    """Whether the kernels can run for x: on a GPU with Triton, or in Triton's interpreter.

    The interpreter is for tests: ``TRITON_INTERPRET=1``, set before anything imports Triton.
    ``ESPNET_PL_KERNELS=0`` turns the kernels off.
    """
    return ON and (INTERPRETED or (x.is_cuda and _new_enough(x.device))) and bool(_programs())


def sweeps(
    blank: Float[Tensor, "d k u1"],
    label: Float[Tensor, "d k u"],
    lengths: Int[Tensor, " k"],
    both: bool = True,
) -> Float[Tensor, "w d k u1"]:
    """α, and β if ``both``, of arcs by their diagonals; see `lattice._Grid`."""
    diagonals, k, states = blank.shape
    out = blank.new_empty(1 + both, diagonals, k, states)
    if k:
        block = _power_of_two(states)
        with torch.cuda.device_of(blank):
            _programs().sweep[k, 1 + both](
                blank.contiguous(), label.contiguous(), lengths.contiguous(), out,
                diagonals, k, states,
                STATES=block, num_warps=max(1, min(WARPS, block // OF_A_WARP)),
            )  # fmt: skip
    return out


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.cache
def _programs() -> ModuleType | None:
    """Imported when first needed: it takes half a second, and few have Triton."""
    try:
        from espnet_pl.losses import programs
    except ImportError:
        return None
    return programs


@functools.cache
def _new_enough(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= OLDEST
