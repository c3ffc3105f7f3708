r"""The sweeps of ``lattice`` and the planes of ``joint`` as programs of the GPU.

On a CPU, PyTorch's own operations spend next to nothing on a lattice.  On a GPU each of them is a
launch, and a lattice has T + U diagonals; and a tile's logits, which a CPU has in its cache, are
written and read again several times.  Here all diagonals are one launch, in both directions at
once, and all nodes' planes another, which never writes a logit.

They compute what PyTorch computes where they cannot run: that is their fallback, and what they are
compared with.  The backward pass of the tiles is PyTorch's everywhere: three matrix products for
each, which it leaves to the vendor's library.

Source: ``programs``.  Axes: d diagonals, k hypotheses, u labels, u1 = u + 1 predictor states, n
utterances, t frames, s predictor states of all utterances, m tokens asked for, r nodes asked for,
j joint dimensions, v vocabulary, w sweeps.
"""

import functools
import os
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # by Triton itself, on a CPU
# They have been compiled and interpreted, but not yet run on a GPU: there they wait to be asked.
ON = INTERPRETED or os.environ.get("ESPNET_PL_KERNELS") == "1"
OLDEST = (8, 0)  # of NVIDIA's: the first with bfloat16, and that the programs are compiled for

# Nodes, tokens and dimensions of a block, by the bytes of a factor; states of a lattice for a warp,
# four for each thread.  By reasoning, NOT MEASURED: so compiled, all sums of a program stay in its
# registers, and its blocks fit the shared memory of every GPU that is new enough.
BLOCKS, WARPS = {2: (64, 128, 64), 4: (64, 128, 32), 8: (32, 64, 16)}, 8
OF_A_WARP = 128


def available(x: Tensor) -> bool:
    """Whether the kernels can run for x: on a GPU with Triton, or in Triton's interpreter.

    The interpreter is for tests: ``TRITON_INTERPRET=1``, set before anything imports Triton.
    On a GPU only with ``ESPNET_PL_KERNELS=1``.
    """
    # The interpreter would multiply the bits of bfloat16 as if they were integers.
    interpreted = INTERPRETED and x.dtype != torch.bfloat16
    return ON and (interpreted or (x.is_cuda and _new_enough(x.device))) and bool(_programs())


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


def fill_planes(
    out: Float[Tensor, "m nodes"],
    index: Int[Tensor, " r"],
    encoded: Float[Tensor, "nt j"],
    predicted: Float[Tensor, "s j"],
    weight: Float[Tensor, "v j"],
    bias: Float[Tensor, " v"],
    utterance: Int[Tensor, " s"],
    tokens: Int[Tensor, "s m"],
) -> None:
    """Write log p of the tokens at these nodes, with tanh for activation; see `joint.Tile`.

    Args:
        out: for each token and node; other nodes stay as they are.
        encoded: float32 or float64, as predicted, bias and ``out``; sums are in that type.
        weight: its type is that of the products.
        tokens: padded with −1, which gives −inf.
    """
    (asked, nodes), (vocabulary, j) = out.shape, weight.shape
    if not len(index):
        return
    rows, of_vocabulary, dimensions = BLOCKS[weight.element_size()]
    tensors = encoded, predicted, weight, bias, utterance, tokens, index
    # As a matrix product of PyTorch: shorter factors only for those who asked for them.
    short = weight.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    with torch.cuda.device_of(encoded):
        _programs().planes[(-(-len(index) // rows),)](
            *(x.contiguous() for x in tensors), out,
            len(index), nodes // len(tokens), nodes, j, vocabulary, asked,
            ROWS=rows, VOCABULARY=of_vocabulary, DIMENSIONS=dimensions,
            ASKED=_power_of_two(asked), PRECISION="tf32" if short else "ieee", num_warps=WARPS,
        )  # fmt: skip


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
