r"""Upper bounds of a joint network's log-probabilities, without its logits.

With logits z = W · h + b and p = softmax(z), for any distribution q

    log Σ_j exp z_j = Σ_j q_j z_j + H(q) + KL(q‖p) ≥ Σ_j q_j z_j + H(q)

    log p(k) ≤ z_k − h · (Wᵀq) − b · q − H(q)

For a q that many nodes share, that takes a product of h with two vectors in place of all rows of W.
Each frame has a q of its own, the distribution at the mean hidden vector of some of its nodes: what
is too much is KL(q‖p), and two nodes of a frame often have much the same to say.

Source: Gibbs' inequality; its use here is ours.
Axes: s predictor states of all utterances, t frames, m tokens asked for, c states at a time.  Unit:
nats.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from espnet_pl.losses.joint import Tile

SOME = 8  # nodes of a frame, for its q: more make the bound no tighter


def upper_planes(tile: Tile, states: Bool[Tensor, " s"]) -> Float[Tensor, "m s t"]:
    """At least log p(tokens[s, m] | s, t), at the nodes asked for in these states; −inf elsewhere.

    Weights are the tile's, in autocast's type if there is one; sums and products are in
    ``tile.exact``, so that what autocast does to products is no part of it.
    """
    asked, exact = tile.asked, tile.exact
    weight, bias = tile.weight.to(exact), tile.bias
    planes = tile.encoded.new_full((asked.tokens.shape[1], *asked.nodes.shape), -torch.inf)
    for n in asked.utterance[states].unique().tolist():
        encoded = tile.encoded[n * tile.t : (n + 1) * tile.t]
        own = (states & (asked.utterance == n)).nonzero()[:, 0]
        few = own[:: -(-len(own) // SOME)]
        mean = torch.zeros_like(encoded)
        for state in few:
            mean += tile.activation(encoded + tile.predicted[state])
        q = torch.addmm(bias, mean.div_(len(few)), weight.t()).softmax(1)
        direction, level = q @ weight, q @ bias + torch.special.entr(q).sum(1)
        del q
        for part in own.split(max(1, tile.rows // tile.t)):
            hidden = tile.activation(encoded + tile.predicted[part, None])  # c t j
            tokens = tile.tokens[part]
            logits = torch.baddbmm(bias[tokens][:, None], hidden, weight[tokens].transpose(1, 2))
            least = hidden.mul_(direction).sum(2) + level
            planes[:, part] = (logits - least[:, :, None]).permute(2, 0, 1)
    return planes.masked_fill_(asked.padding | ~asked.nodes, -torch.inf)
