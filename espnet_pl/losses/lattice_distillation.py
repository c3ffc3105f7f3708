r"""What a teacher thinks at the nodes of a transducer's lattice, as a target.

At each node (t,u) of the lattice of a label sequence y, a teacher's joint network gives p_T(k|t,u)
and a student's p_S(k|t,u): k is the blank, the next label y_{u+1}, or any other token.

    full_lattice   L(y) = Σ_{t<T, u≤U} Σ_k p_T(k|t,u) log( p_T(k|t,u) / p_S(k|t,u) )
    collapsed      the same, with k one of three classes: the blank, y_{u+1}, and the rest
    one_best       the same, of the T + U nodes on the teacher's best path only

    best path      argmax_a Σ_{arcs (t,u,k) of a} log p_T(k|t,u),   alignments a as in `lattice`

By the data-processing inequality ``collapsed`` is at most ``full_lattice``; what it leaves out is
p_T(rest) times the divergence within the rest.  In the last row, u = U, there is no next label, and
the two classes are the blank and the rest.  Gradients with respect to the student's logits are

    full_lattice   p_S(k) − p_T(k)
    collapsed      p_S(k) − p_T(k) for the blank and y_{u+1},
                   p_S(k) − p_T(rest) p_S(k) / p_S(rest) for others: how it shares out its rest is
                   its own affair

All need the same tokens, and the same frames, but for a few that subsampling may round away.  A
student that waits emits later than its teacher, and then the same node of both is not the same
question; ``one_best`` may look at the student ``shift`` frames later.

Source: ``collapsed`` is Panchapagesan et al., "Efficient Knowledge Distillation for RNN-Transducer
Models", arXiv:2011.06110, of which abstract and introduction were read, not the formula; public
code leaves out the row u = U, which is kept here: it is where a model learns to say no more.
``one_best`` is Yang, Li, Woodland, "Knowledge Distillation for Neural Transducers from Large
Self-Supervised Pre-trained Models", arXiv:2110.03334, of which only the abstract was read; the
shift is their code's, which walks the lattice greedily for its path, where this is Viterbi's.
``full_lattice`` is what both are cheaper than.
Axes: n utterances, k hypotheses, t frames, u labels, u1 = u + 1, a arcs of a path, j joint
dimensions, v vocabulary, r nodes of all lattices.  Unit: nats per hypothesis, summed over nodes.
"""

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear, pad

from espnet_pl.losses.joint import Tile, ask, planes, product_type
from espnet_pl.losses.soft_labels import SLACK, SoftLabels, divergence, kl_of_linear, soft_labels
from espnet_pl.losses.transducer import Lattices


def classes(lattices: Lattices) -> Float[Tensor, "3 k u1 t"]:
    """log-probability of the blank, of the next label, and of all other tokens; with gradient.

    Of each hypothesis at its valid nodes; −inf elsewhere, for the next label in the last row, and
    for the others where there are none.  The rest is summed up, not what is left of 1, which would
    be negative where it is little; below 1e-30, its gradient is lost in float32.  Under autocast as
    ``joint.planes``.
    """
    operands, nodes = _operands(lattices, lattices.frames, lattices.encoded.shape[1])
    log_p = planes(*operands, nodes=nodes, rest=True)
    return log_p.unflatten(1, lattices.hyps.states.shape)


def collapsed(
    student: Float[Tensor, "3 k u1 t"],
    teacher: Float[Tensor, "3 k teacher_u1 teacher_t"],
    frames: Int[Tensor, " k"],
    lengths: Int[Tensor, " k"],
) -> Float[Tensor, " k"]:
    """The divergence of three classes at all nodes, in float64; 0 without a frame.

    Args:
        student: ``classes`` of it.
        teacher: those of the teacher, of any floating type; no gradient goes there.  In half
            precision three classes do not sum to 1: they are made to.
        frames: valid ones of each hypothesis that both have, as of ``common_frames``; where the
            teacher has none, the loss is not a number.
        lengths: labels of each hypothesis.

    Raises:
        ValueError: frames or labels that the planes have no room for.
    """
    log_q = student[:, _nodes(student, frames, lengths)]
    nodes = _nodes(teacher, frames, lengths)
    log_p = teacher.detach()[:, nodes].to(log_q.dtype).log_softmax(0)
    each = divergence(log_p, log_q).sum(0, dtype=torch.float64)
    return each.new_zeros(len(frames)).index_add(0, nodes.nonzero()[:, 0], each)


@torch.no_grad()
def best_alignment(
    planes: Float[Tensor, "p k u1 t"], frames: Int[Tensor, " k"], lengths: Int[Tensor, " k"]
) -> tuple[Int[Tensor, "k a"], Int[Tensor, "k a"], Int[Tensor, " k"]]:
    """The likeliest alignment of each hypothesis, as the nodes that its arcs leave.

    Args:
        planes: the blank's and the next label's; more of them, as ``classes`` has, are not read.
        frames: T of each hypothesis.
        lengths: U of each hypothesis.

    Returns:
        t and u of each arc, and how many arcs there are: T + U, the last being the blank of
        (T − 1, U), or none without a frame.  Behind the end, the last node again.

    Of equally likely alignments it is that whose last label is earliest, then the one before, and
    so on.  Where all are impossible, it is one of them.

    Raises:
        ValueError: frames or labels that the planes have no room for.
    """
    _check_room(planes, frames, lengths)
    (k, u1, room), frames, lengths = planes.shape[1:], frames.long(), lengths.long()
    arcs = (frames + lengths).masked_fill(frames == 0, 0)
    u = torch.arange(u1, device=planes.device)
    diagonals = torch.arange(int(arcs.max()) if k else 0, device=planes.device)
    # Nodes before the first frame have no probability, those behind the last lead nowhere: what
    # is read for them does not matter.
    t = (diagonals - u[:, None]).clamp(0, max(room - 1, 0)).expand(2, k, -1, -1)
    best = planes.new_full((k, u1), -torch.inf, dtype=torch.float64)
    best[:, 0] = 0.0
    said = []  # whether the best arc to each node of a diagonal is a label; of the first, none
    for d, (blank, label) in enumerate(planes[:2].double().gather(3, t).permute(3, 0, 1, 2)):
        waited, spoke = best + blank, pad((best + label)[:, :-1], (1, 0), value=-torch.inf)
        said.append((spoke > waited) | (u == d + 1))  # there is no way to wait to the first frame
        best = torch.maximum(waited, spoke)
    path = [lengths]  # from its end
    for d in range(len(diagonals) - 1, 0, -1):
        label = said[d - 1].gather(1, path[-1][:, None])[:, 0] & (d < arcs)
        path.append(path[-1] - label.long())
    u = torch.stack(path[::-1], 1)[:, : len(diagonals)]
    return torch.minimum(diagonals - u, frames[:, None] - 1).clamp(min=0), u, arcs


def hidden_at(
    lattices: Lattices, t: Int[Tensor, "k a"], u: Int[Tensor, "k a"], shift: int = 0
) -> Float[Tensor, "k a j"]:
    """What the joint network's output layer is given at these nodes: a(e_{t + shift} + d_u).

    Args:
        t: frames; one that is not there is the nearest that is.
        u: labels said before.
        shift: frames later; earlier, if negative.
    """
    hyps = lattices.hyps
    if len(t) != len(hyps.states):
        raise ValueError(f"{len(t)} paths through the lattices of {len(hyps.states)} hypotheses")
    last = lattices.frames[hyps.utterance, None] - 1
    frame = torch.minimum(t + shift, last).clamp(min=0)
    encoded = lattices.encoded[hyps.utterance[:, None], frame]
    return lattices.joint.activation(encoded + lattices.predicted[hyps.states.gather(1, u)])


@torch.no_grad()
def path_targets(
    teacher: Lattices,
    t: Int[Tensor, "k a"],
    u: Int[Tensor, "k a"],
    arcs: Int[Tensor, " k"],
    keep: int,
) -> SoftLabels:
    """The teacher's distributions on paths of ``best_alignment``; their frames are arcs.

    Args:
        keep: likeliest tokens of each node, from 1 to all of them; see ``soft_labels``.
    """
    weight, bias = teacher.joint.weight, teacher.joint.bias
    parts = [  # logits of one hypothesis at a time
        soft_labels(linear(hidden, weight, bias), n, keep)
        for hidden, n in zip(hidden_at(teacher, t, u).split(1), arcs.split(1))
    ]
    names = [field.name for field in dataclasses.fields(SoftLabels)]
    return SoftLabels(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def one_best(
    student: Lattices,
    t: Int[Tensor, "k a"],
    u: Int[Tensor, "k a"],
    target: SoftLabels,
    shift: int = 0,
) -> Float[Tensor, " k"]:
    """The divergence at the nodes of the teacher's paths, in float32 at least; 0 without a frame.

    Args:
        t: of the teacher's path; see ``hidden_at``.
        u: the same.
        target: made by ``path_targets``.
        shift: frames that the student may be later; it is looked at in its last frame at the most.

    Raises:
        ValueError: frames of teacher and student that differ by more than two, another number of
            paths than of hypotheses, or tokens outside of the vocabulary.
    """
    if len(target.frames) != len(student.hyps.states):
        raise ValueError(
            f"soft labels of {len(target.frames)} paths for {len(student.hyps.states)} hypotheses"
        )
    frames = student.frames[student.hyps.utterance]
    common_frames(frames, (target.frames - student.hyps.lengths).clamp(min=0))
    arcs = target.frames.masked_fill(frames == 0, 0)
    return kl_of_linear(
        hidden_at(student, t, u, shift), student.joint.weight, student.joint.bias,
        arcs, dataclasses.replace(target, frames=arcs),
    )  # fmt: skip


def full_lattice(student: Lattices, teacher: Lattices) -> Float[Tensor, " k"]:
    """The divergence of all tokens at all nodes, in float64; 0 without a frame.

    Args:
        student: with gradient.
        teacher: of the same label sequences, with a joint network of any size, but for the same
            tokens; no gradient goes there.

    A tile of nodes is computed at a time, forward and backward, by both networks: nothing of the
    size of nodes times vocabulary is kept.  Infinite where the student deems impossible what the
    teacher does not, with a finite gradient.

    Raises:
        ValueError: other tokens, other label sequences, or frames that differ by more than two.
    """
    tokens, known = len(student.joint.bias), len(teacher.joint.bias)
    if tokens != known:
        raise ValueError(f"a teacher of {known} tokens for a student of {tokens}")
    frames = common_frames(student.frames, teacher.frames)
    t = int(frames.max()) if len(frames) else 0
    (asked, inputs), (asked_too, others) = (
        _asked(lattices, frames, t) for lattices in (student, teacher)
    )
    _check_same(student, teacher, asked.tokens, asked_too.tokens)
    k = len(student.hyps.states)
    return _Divergence.apply(*inputs, asked, tuple(x.detach() for x in others), asked_too, k)


def common_frames(
    frames: Int[Tensor, " n"], teacher: Int[Tensor, " teachers"]
) -> Int[Tensor, " n"]:
    """The frames that student and teacher both have: the shorter of both counts.

    Raises:
        ValueError: they differ by more than two frames.
    """
    if len(frames) != len(teacher):
        raise ValueError(f"{len(frames)} utterances for a teacher of {len(teacher)}")
    if len(frames) and int((frames - teacher).abs().max()) > SLACK:
        i = int((frames - teacher).abs().argmax())
        raise ValueError(
            f"utterance {i} has {int(frames[i])} frames, but {int(teacher[i])} in the teacher's "
            "lattice: do teacher and student subsample alike?"
        )
    return torch.minimum(frames, teacher)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, encoded, predicted, weight, bias, asked, others, asked_too, k):
        inputs = encoded, predicted, weight, bias
        ctx.save_for_backward(*inputs)
        ctx.asked, ctx.others, ctx.asked_too = asked, others, asked_too
        ctx.products = product_type(encoded), product_type(others[0])
        ctx.size = max(1, asked.nodes.numel() // max(1, k))  # of a lattice
        out = encoded.new_zeros(k, dtype=torch.float64)
        nodes = asked.nodes.flatten().nonzero()[:, 0]
        for index, _, log_q, log_p in _compare(*_tiles(ctx, inputs), nodes):
            each = divergence(log_p, log_q).sum(1, dtype=torch.float64)
            out.index_add_(0, index // ctx.size, each)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        inputs = ctx.saved_tensors
        mine, theirs = _tiles(ctx, inputs)
        sums = [torch.zeros_like(x, dtype=mine.exact) for x in inputs]
        sums[0] = sums[0].flatten(0, 1)
        nodes = ctx.asked.nodes.flatten().nonzero()[:, 0]
        nodes = nodes[grad[nodes // ctx.size] != 0]
        for index, hidden, log_q, log_p in _compare(mine, theirs, nodes):
            of_logits = log_q.exp_().sub_(log_p.exp_())
            of_logits *= grad[index // ctx.size, None]
            mine.add_gradients(sums, index, hidden, of_logits)
        sums[0] = sums[0].view(inputs[0].shape)
        return (*(s.to(x.dtype) for s, x in zip(sums, inputs)), None, None, None, None)


def _tiles(ctx, inputs) -> tuple[Tile, Tile]:
    """Of the student and of the teacher."""
    mine, theirs = ctx.products
    return Tile(*inputs, ctx.asked, mine), Tile(*ctx.others, ctx.asked_too, theirs)


def _compare(student: Tile, teacher: Tile, nodes: Int[Tensor, " r"]):
    """Which nodes, the student's hidden vectors, log p_S and log p_T, a tile at a time."""
    for index in student.split(nodes) if len(nodes) else ():
        hidden, logits, _ = student.compute(index)
        log_q = torch._log_softmax(logits, 1, False, out=logits)
        _, logits, _ = teacher.compute(index)
        log_p = torch._log_softmax(logits, 1, False, out=logits)
        yield index, hidden, log_q, log_p.to(log_q.dtype)


def _asked(lattices: Lattices, frames, t):
    """What ``joint.planes`` would be asked of these nodes, and the tensors it would be given."""
    operands, nodes = _operands(lattices, frames, t)
    joint, encoded, _, predicted, *_ = operands
    return ask(*operands, nodes), (encoded, predicted, joint.weight, joint.bias)


def _operands(lattices: Lattices, frames: Int[Tensor, " n"], t: int):
    """Of ``joint.planes``: every prefix of every hypothesis is a state, shared or not."""
    hyps = lattices.hyps
    u1 = hyps.states.shape[1]
    tokens = hyps.tokens[hyps.states]  # k u1 m
    u = torch.arange(u1, device=tokens.device)
    following = tokens[:, :-1].gather(2, hyps.columns[:, :, None])[:, :, 0]
    following = pad(following, (0, 1), value=-1).masked_fill(u >= hyps.lengths[:, None], -1)
    inside = (u <= hyps.lengths[:, None]).flatten()
    operands = (
        lattices.joint, lattices.encoded[:, :t], frames, lattices.predicted[hyps.states.flatten()],
        hyps.utterance.repeat_interleave(u1),
        torch.stack([tokens[:, :, 0], following], 2).flatten(0, 1),
    )  # fmt: skip
    return operands, inside[:, None].expand(-1, t)


def _nodes(planes, frames, lengths):
    """The valid nodes, (k, u+1, t); the same ones in the same order, whatever the padding."""
    _check_room(planes, frames, lengths)
    u, t = (torch.arange(size, device=planes.device) for size in planes.shape[2:])
    return (u[:, None] <= lengths[:, None, None]) & (t < frames[:, None, None])


def _check_room(planes, frames, lengths) -> None:
    _, k, u1, t = planes.shape
    for name, sizes, most in (("frames", frames, t), ("lengths", lengths, u1 - 1)):
        if k and not 0 <= int(sizes.min()) <= int(sizes.max()) <= most:
            raise ValueError(f"{name} {sizes.tolist()}, but the planes have room for {most}")


def _check_same(student: Lattices, teacher: Lattices, tokens, others) -> None:
    mine, theirs = student.hyps, teacher.hyps
    if mine.states.shape != theirs.states.shape:
        raise ValueError(
            f"hypotheses of shape {tuple(mine.columns.shape)}, the teacher's "
            f"{tuple(theirs.columns.shape)}: make both of the same labels"
        )
    same = (mine.lengths == theirs.lengths) & (mine.utterance == theirs.utterance)
    same &= (tokens == others).all(1).view(mine.states.shape).all(1)
    if not bool(same.all()):
        i = int((~same).nonzero()[0])
        raise ValueError(f"hypothesis {i} is another label sequence in the teacher's lattice")
