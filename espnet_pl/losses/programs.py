r"""What runs on the GPU, in Triton: imported by ``kernels`` alone, and only where Triton is.

``sweep`` is the recursion of ``lattice``, ``planes`` the equation of ``joint``.  All offsets that
grow with the batch are int64.  Each function is compiled from its source: no decorator may come
between, and nothing but ``tl`` and what is defined here may be used in them.

Source: Tillet, Kung, Cox, "Triton: An Intermediate Language and Compiler for Tiled Neural Network
Computations", 2019.  The sum of exponentials that is corrected when a greater logit comes is
Milakov, Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867.
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


@triton.jit
def tanh(x):
    """Triton has none of its own; where e^{2x} overflows this is 1."""
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


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


@triton.jit(do_not_specialize=["rows", "frames", "nodes", "asked"])
def planes(
    encoded, predicted, weight, bias, utterance, tokens, index, out,
    rows, frames, nodes, dimensions, vocabulary, asked,
    ROWS: tl.constexpr, VOCABULARY: tl.constexpr, DIMENSIONS: tl.constexpr,
    ASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """log p of the tokens asked for at some nodes of ``out``, (asked, nodes); logits stay here.

    A program has ``ROWS`` nodes and goes through the vocabulary, ``VOCABULARY`` tokens at a time.
    Their hidden vectors are computed again for each: that is an exponential for so many products,
    and needs no memory.
    """
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = r < rows
    node = tl.load(index + r, mask=real, other=0)
    state = node // frames
    frame = tl.load(utterance + state).to(tl.int64) * frames + node % frames
    m = tl.arange(0, ASKED)
    exact: tl.constexpr = encoded.dtype.element_ty
    picked = tl.zeros((ROWS, ASKED), exact)
    greatest = tl.full((ROWS,), float("-inf"), exact)
    total = tl.zeros((ROWS,), exact)
    for first in range(0, vocabulary, VOCABULARY):
        v = first + tl.arange(0, VOCABULARY)
        logits = tl.zeros((ROWS, VOCABULARY), exact)
        for start in range(0, dimensions, DIMENSIONS):
            j = start + tl.arange(0, DIMENSIONS)
            inside = j < dimensions
            e = tl.load(encoded + frame[:, None] * dimensions + j, mask=inside[None, :], other=0.0)
            d = tl.load(
                predicted + state[:, None] * dimensions + j, mask=inside[None, :], other=0.0
            )
            w = tl.load(
                weight + v[None, :].to(tl.int64) * dimensions + j[:, None],
                mask=(v < vocabulary)[None, :] & inside[:, None],
                other=0.0,
            )
            hidden = tanh(e + d).to(weight.dtype.element_ty)
            logits = tl.dot(hidden, w, logits, input_precision=PRECISION, out_dtype=exact)
        logits += tl.load(bias + v, mask=v < vocabulary, other=float("-inf"))[None, :]
        # Until a token is possible the greatest is −inf, which cannot be taken from itself.
        before, greatest = greatest, tl.maximum(greatest, tl.max(logits, 1))
        zero = tl.where(greatest == float("-inf"), 0.0, greatest)
        total = total * tl.exp(before - zero) + tl.sum(tl.exp(logits - zero[:, None]), 1)
        for i in range(asked):
            token = tl.load(tokens + state * asked + i)
            logit = tl.sum(tl.where(v[None, :] == token[:, None], logits, 0.0), 1)
            picked += tl.where(m[None, :] == i, logit[:, None], 0.0)
    token = tl.load(
        tokens + state[:, None] * asked + m[None, :], mask=(m < asked)[None, :], other=-1
    )
    log_sum = tl.where(greatest == float("-inf"), 0.0, greatest) + tl.log(total)
    log_p = tl.where(token < 0, float("-inf"), picked - log_sum[:, None])
    places = out + m[None, :].to(tl.int64) * nodes + node[:, None]
    tl.store(places, log_p, mask=real[:, None] & (m < asked)[None, :])
