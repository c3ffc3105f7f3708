r"""What runs on the GPU, in Triton: imported by ``kernels`` alone, and only where Triton is.

``sweep`` is the recursion of ``lattice``.  All offsets that grow with the batch are int64.  Each
function is compiled from its source: no decorator may come between, and nothing but ``tl`` and what
is defined here may be used in them.

Source: Tillet, Kung, Cox, "Triton: An Intermediate Language and Compiler for Tiled Neural Network
Computations", 2019.
"""

import triton
import triton.language as tl


@triton.jit
def log_add_exp(x, y):
    """log(e^x + e^y); −inf of two −inf; what is not a number comes out again."""
    # A maximum of the GPU would drop what is not a number; 'where' does not.
    great, small = tl.where(x > y, x, y), tl.where(x > y, y, x)
    # −inf − −inf is no number.  A log1p would be lost in the rounding of what it is added to.
    return great + tl.log(1.0 + tl.exp(tl.where(great == small, 0.0, small - great)))


# Not compiled again for numbers that are 1, or multiples of 16, and change with every batch.
@triton.jit(do_not_specialize=["diagonals", "hypotheses", "states"])
def sweep(blank, label, lengths, out, diagonals, hypotheses, states, STATES: tl.constexpr):
    """α of one hypothesis, or β: program (k, 0) or (k, 1); ``out`` is (2, d, k, u1).

    A sum over all u of a frame at once would take log₂ U steps in place of one, and T of them are
    no fewer than T + U: hence diagonals, as on the CPU.  What a state needs of its neighbour is
    fetched from another thread's register.
    """
    k, direction = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ahead = 1 - 2 * direction
    u = tl.arange(0, STATES)
    # α(u) comes from u − 1, by the label arc u − 1; β(u) from u + 1, by the label arc u.
    neighbour = u - ahead
    arc = tl.minimum(u, neighbour)
    real, has_arc = u < states, (arc >= 0) & (arc < states - 1)
    neighbour = tl.where(has_arc, neighbour, u)
    start = tl.load(lengths + k) * direction
    here = tl.where(u == start, 0.0, float("-inf")).to(tl.float64)
    row = (direction * (diagonals - 1)).to(tl.int64)
    out += direction.to(tl.int64) * diagonals * hypotheses * states
    tl.store(out + (row * hypotheses + k) * states + u, here, mask=real)
    for _ in range(diagonals - 1):
        place = (row - direction) * hypotheses + k  # of the arcs, on the earlier diagonal
        b = tl.load(blank + place * states + u, mask=real, other=float("-inf"))
        y = tl.load(label + place * (states - 1) + arc, mask=has_arc, other=float("-inf"))
        here = log_add_exp(here + b, tl.gather(here, neighbour, 0) + y)
        row += ahead
        tl.store(out + (row * hypotheses + k) * states + u, here, mask=real)
