r"""Log-probabilities of a few tokens at the nodes of transducer lattices, without the logits.

A transducer's joint network gives each pair of a frame t and a predictor state s a distribution,

    z(s,t) = W · a(e_t + d_s) + b,        log p(k|s,t) = z_k(s,t) − log Σ_j exp z_j(s,t)

A lattice asks for few tokens of it: the blank, and the labels that may follow s.  ``planes`` gives
those, computing a tile of nodes at a time; what it keeps is (tokens asked for · states · frames)
numbers, nothing with the size of the vocabulary.  The backward pass computes each tile again; if
g_m is the gradient of plane m at a node,

    ∂/∂z_k = Σ_m g_m (1[k = k_m] − p(k))

and nodes whose gradient is nothing, or next to it, are left out: of a trained model's lattice few
are on any likely alignment.

Source: computing again instead of keeping is Chen et al., "Training Deep Nets with Sublinear Memory
Cost", arXiv:1604.06174.  Leaving out nodes by their gradient is ours.
Axes: n utterances, t frames, s predictor states of all utterances, m tokens asked for, p planes, j
joint dimensions, v vocabulary.  Unit: nats.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from espnet_pl.losses import kernels

LOGITS = 2**20  # of a tile: 4 MB in float32, about what a core has as its own cache
LEAST, ROWS = 64, 1024  # nodes of a tile
ON_GPU = 8  # times as many there, where a launch takes as long as many nodes; NOT MEASURED


@dataclass(frozen=True)
class Joint:
    """A joint network behind its two projections: W · a(·) + b.

    Args:
        activation: a function of each element, without parameters.
    """

    weight: Float[Tensor, "v j"]
    bias: Float[Tensor, " v"]
    activation: Callable[[Tensor], Tensor] = torch.tanh


def planes(
    joint: Joint,
    encoded: Float[Tensor, "n t j"],
    frames: Int[Tensor, " n"],
    predicted: Float[Tensor, "s j"],
    utterance: Int[Tensor, " s"],
    tokens: Int[Tensor, "s m"],
    *,
    nodes: Bool[Tensor, "s t"] | None = None,
    known: Float[Tensor, "p s t"] | None = None,
    rest: bool = False,
    skip: float = 0.0,
) -> Float[Tensor, "p s t"]:
    """log p(tokens[s, m] | s, t) at every valid node; −inf elsewhere.

    Args:
        encoded: projected encoder output e.
        frames: valid frames of each utterance.
        predicted: projected predictor output d, one row for each state.
        utterance: whose frames a state meets.
        tokens: asked for in each state; −1 is padding, and gives −inf.
        nodes: compute these only; the others are −inf too.
        known: the values of ``nodes``, if they have been computed before.
        rest: one plane more, the last: log of the probability of all tokens not asked for.
        skip: nodes with at most this share of their utterance's greatest gradient are left out
            of the backward pass; with 0 it is exact.

    Under autocast, products are in its type; sums and planes are in float32.

    Raises:
        ValueError: shapes that do not fit together, or a token outside of the vocabulary.
    """
    asked = ask(joint, encoded, frames, predicted, utterance, tokens, nodes, rest, skip)
    return _Planes.apply(encoded, predicted, joint.weight, joint.bias, asked, known)


@dataclass(frozen=True)
class Asked:
    """What is asked of a joint network, beside the tensors that may have a gradient."""

    activation: Callable[[Tensor], Tensor]
    utterances: int
    utterance: Int[Tensor, " s"]
    tokens: Int[Tensor, "s m"]
    nodes: Bool[Tensor, "s t"]
    rest: bool = False
    skip: float = 0.0

    @property
    def padding(self) -> Bool[Tensor, "m s 1"]:
        """True where no token is asked for."""
        return (self.tokens.t() < 0)[:, :, None]

    def carrying(self, grad: Float[Tensor, "p s t"]) -> Bool[Tensor, "s t"]:
        """The nodes that the backward pass must visit."""
        size = grad.abs().sum(0)
        greatest = size.new_zeros(self.utterances)
        greatest.scatter_reduce_(0, self.utterance, size.amax(1), "amax")
        # Not '>': what is not a number must be seen, not left out.
        return self.nodes & ~(size <= self.skip * greatest[self.utterance, None])


def ask(
    joint, encoded, frames, predicted, utterance, tokens, nodes=None, rest=False, skip=0.0
) -> Asked:
    """What ``planes`` with these arguments is about, checked."""
    _check(joint, encoded, frames, predicted, utterance, tokens)
    valid = torch.arange(encoded.shape[1], device=encoded.device) < frames[utterance, None]
    nodes = valid if nodes is None else valid & nodes
    return Asked(joint.activation, len(frames), utterance, tokens, nodes, rest, skip)


class _Planes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, encoded, predicted, weight, bias, asked, known):
        ctx.asked, ctx.product = asked, product_type(encoded)
        m = asked.tokens.shape[1]
        out = known.clone() if known is not None else None
        if out is None:
            tile = Tile(encoded, predicted, weight, bias, asked, ctx.product)
            out = tile.empty_planes()
            tile.fill(out, asked.nodes.flatten().nonzero()[:, 0])
            out = out.unflatten(1, asked.nodes.shape)
        ctx.save_for_backward(encoded, predicted, weight, bias, out[m:].clone())
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        *inputs, rest = ctx.saved_tensors
        asked = ctx.asked
        m = asked.tokens.shape[1]
        grad = torch.cat([grad[:m].masked_fill(asked.padding, 0.0), grad[m:]])
        nodes = asked.carrying(grad)
        tile = Tile(*inputs, asked, ctx.product)
        sums = [torch.zeros_like(x, dtype=tile.exact) for x in inputs]
        sums[0] = sums[0].flatten(0, 1)
        grad, rest = grad.flatten(1), rest.flatten()
        for index in tile.split(nodes.flatten().nonzero()[:, 0]):
            before, logits, tokens = tile.compute(index)
            p = torch.softmax(logits, 1, out=logits)
            g = grad[:, index].t()
            total = g.sum(1, keepdim=True)
            if asked.rest:
                # Only tokens not asked for share the gradient of the rest.  Where it is less
                # than 1e-30, that gradient is lost in float32.
                said = p.gather(1, tokens).mul_(-total)
                share = g[:, m:] / rest[index, None].exp().clamp(min=1e-30)
                p.mul_(share - total).scatter_(1, tokens, said)
            else:
                p.mul_(-total)
            tile.add_gradients(sums, index, before, p.scatter_add_(1, tokens, g[:, :m]))
        sums[0] = sums[0].view(inputs[0].shape)
        return (*(s.to(x.dtype) for s, x in zip(sums, inputs)), None, None)


class Tile:
    """Computes some nodes at a time, always in the same memory.

    Sums are taken in the type ``exact``; products in ``product``, which autocast may make shorter.
    """

    fused = False  # whether the planes are a kernel's

    def __init__(self, encoded, predicted, weight, bias, asked: Asked, product: torch.dtype):
        self.exact = torch.promote_types(encoded.dtype, torch.float32)
        self.encoded = encoded.detach().to(self.exact).flatten(0, 1)
        self.predicted = predicted.detach().to(self.exact)
        self.weight, self.bias = weight.detach().to(product), bias.detach().to(self.exact)
        self.asked, self.product, self.t = asked, product, encoded.shape[1]
        # A padded token is asked for as the first one is, and not listened to.
        self.tokens = torch.where(asked.tokens < 0, asked.tokens[:, :1].clamp(min=0), asked.tokens)
        rows = max(LEAST, min(ROWS, LOGITS // weight.shape[0]))
        self.rows = ON_GPU * rows if encoded.is_cuda else rows
        tanh = asked.activation is torch.tanh or isinstance(asked.activation, nn.Tanh)
        self.activation = _Tanh() if tanh else _Elementwise(asked.activation)
        self.fused = tanh and not asked.rest and kernels.available(self.weight)

    @functools.cached_property
    def room(self) -> tuple[Tensor, Tensor, Tensor]:
        """For two sums and the logits of a tile; a kernel does not need it."""
        v, j = self.weight.shape
        sums = self.encoded.new_empty(2, self.rows, j)
        return *sums, self.encoded.new_empty(self.rows, v)

    def release(self) -> None:
        """Give the room back until it is needed again."""
        self.__dict__.pop("room", None)

    def split(self, index: Int[Tensor, " r"]) -> Sequence[Tensor]:
        """These nodes, some at a time."""
        return index.split(self.rows)

    def empty_planes(self) -> Float[Tensor, "p r"]:
        """Of no node yet: −inf."""
        planes, nodes = self.tokens.shape[1] + self.asked.rest, self.asked.nodes.numel()
        return self.encoded.new_full((planes, nodes), -torch.inf)

    def fill(self, planes: Float[Tensor, "p nodes"], index: Int[Tensor, " r"]) -> None:
        """Write the planes at these nodes, however many."""
        if self.fused:
            kernels.fill_planes(
                planes, index, self.encoded, self.predicted, self.weight, self.bias,
                self.asked.utterance, self.asked.tokens,
            )  # fmt: skip
            return
        for part in self.split(index):
            planes[:, part] = self.log_probs(part)

    def log_probs(self, index: Int[Tensor, " r"]) -> Float[Tensor, "p r"]:
        """The planes at these nodes; −inf for padded tokens."""
        _, logits, tokens = self.compute(index)
        log_p = torch._log_softmax(logits, 1, False, out=logits)
        padding = self.asked.tokens[index // self.t] < 0
        planes = [log_p.gather(1, tokens).masked_fill_(padding, -torch.inf)]
        if self.asked.rest:
            planes.append(log_p.scatter_(1, tokens, -torch.inf).logsumexp(1, keepdim=True))
        return torch.cat(planes, 1).t()

    def compute(self, index: Int[Tensor, " r"]):
        """Hidden vectors, logits, and the tokens asked for at these nodes."""
        state, frame = self._places(index)
        before, other, logits = (x[: len(index)] for x in self.room)
        torch.index_select(self.encoded, 0, frame, out=before)
        before += torch.index_select(self.predicted, 0, state, out=other)
        hidden = self.activation(before)
        if self.product == self.exact:
            torch.addmm(self.bias, hidden, self.weight.t(), out=logits)
        else:
            torch.add(hidden.to(self.product) @ self.weight.t(), self.bias, out=logits)
        return hidden, logits, self.tokens[state]

    def add_gradients(self, sums, index, hidden, grad: Float[Tensor, "r v"]) -> None:
        """Add what the gradient of these nodes' logits means for what they are made of."""
        encoded, predicted, weight, bias = sums
        state, frame = self._places(index)
        bias += grad.sum(0)
        if self.product == self.exact:
            weight.addmm_(grad.t(), hidden)
        else:
            grad = grad.to(self.product)
            weight += grad.t() @ hidden.to(self.product)
        back = self.activation.backward(grad @ self.weight)
        encoded.index_add_(0, frame, back)
        predicted.index_add_(0, state, back)

    def _places(self, index):
        state = index // self.t
        return state, self.asked.utterance[state] * self.t + index % self.t


class _Tanh:
    """In place."""

    def __call__(self, x: Tensor) -> Tensor:
        # In float32, torch's sigmoid takes a sixth of the time of its tanh.
        fast = x.dtype == torch.float32 and x.device.type == "cpu"
        self.y = x.mul_(2).sigmoid_().mul_(2).sub_(1) if fast else x.tanh_()
        return self.y

    def backward(self, grad: Tensor) -> Tensor:
        return self.y.square_().neg_().add_(1).mul_(grad)


class _Elementwise:
    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function = function

    def __call__(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            self.x = x.detach().requires_grad_()
            self.y = self.function(self.x)
        return self.y.detach()

    def backward(self, grad: Tensor) -> Tensor:
        return torch.autograd.grad(self.y, self.x, grad.to(self.y.dtype))[0]


def product_type(x: Tensor) -> torch.dtype:
    """The type of matrix products with x: its own, or that of autocast."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _check(joint, encoded, frames, predicted, utterance, tokens) -> None:
    v, j = joint.weight.shape
    if encoded.shape[-1] != j or predicted.shape[-1] != j or len(joint.bias) != v:
        raise ValueError(
            f"joint network of {j} dimensions and {v} tokens, but encoder {tuple(encoded.shape)}, "
            f"predictor {tuple(predicted.shape)}, bias {tuple(joint.bias.shape)}"
        )
    if len(frames) != len(encoded) or not len(utterance) == len(predicted) == len(tokens):
        raise ValueError(
            f"{len(encoded)} utterances with {len(frames)} lengths; {len(predicted)} states with "
            f"{len(utterance)} utterances and {len(tokens)} rows of tokens"
        )
    if frames.numel() and int(frames.max()) > encoded.shape[1]:
        raise ValueError(f"{int(frames.max())} frames, but the encoder gave {encoded.shape[1]}")
    if tokens.numel() and int(tokens.max()) >= v:
        raise ValueError(f"token {int(tokens.max())}, but the vocabulary has {v}")
