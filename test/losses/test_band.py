"""losses/band: never a wrong bound · few nodes where few matter · traps · hostile input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espnet_pl.losses import band as module
from espnet_pl.losses.band import band
from espnet_pl.losses.joint import Asked, Joint, Tile, planes
from espnet_pl.losses.lattice import full_sum
from espnet_pl.losses.transducer import hypotheses, log_probability

TOLERANCE = 1e-6


class Given(Tile):
    """Planes that are there already, (2, k, u1, t), one state for each prefix; counts the nodes.

    Args:
        slack: of the upper bounds, in nats; of infinity, that no probability is above 1.
    """

    def __init__(self, log_p, slack=torch.inf):
        self.k, self.u1, self.t = log_p.shape[1:]
        self.log_p, self.slack = log_p.flatten(1), slack
        self.computed = torch.zeros(log_p[0].numel(), dtype=torch.long)

    def empty_planes(self):
        return torch.full_like(self.log_p, -torch.inf)

    def split(self, index):
        return index.split(7)

    def log_probs(self, index):
        self.computed[index] += 1
        return self.log_p[:, index]

    def upper(self):
        return (self.log_p + self.slack).clamp(max=0.0).view(2, -1, self.t)

    def band(self, frames, lengths, tolerance=TOLERANCE):
        states = torch.arange(self.k * self.u1).view(self.k, self.u1)
        columns = torch.ones(self.k, self.u1 - 1, dtype=torch.long)
        found, done, gap = band(self, states, columns, frames, lengths, tolerance)
        assert (self.computed <= 1).all() and (self.computed == done.flatten()).all()
        assert found.flatten(1)[:, ~done.flatten()].isneginf().all()
        return found.unflatten(1, (self.k, self.u1)), gap

    def log_probability(self, frames, lengths, log_p=None):
        blank, label = self.log_p.view(2, self.k, self.u1, self.t) if log_p is None else log_p
        return full_sum(blank, label[:, :-1], frames, lengths)


@pytest.fixture(autouse=True)
def _bounds_of_what_is_given(monkeypatch):
    bounds = module.upper_planes

    def own(tile, states):
        return tile.upper() if isinstance(tile, Given) else bounds(tile, states)

    monkeypatch.setattr(module, "upper_planes", own)


def lattice(k, t, u, sharp, seed):
    """Blank and next label of a random alignment are likely, the more the sharper."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, k, u + 1, t, generator=g, dtype=torch.float64)
    when = torch.rand(k, u, generator=g).sort(1).values * t  # a frame for each label
    late = torch.arange(t) - torch.nn.functional.pad(when, (0, 1), value=2.0 * t)[:, :, None]
    logits[0] -= sharp * late.clamp(-3, 3)
    logits[1] += sharp * late.clamp(-3, 3)
    return logits.log_softmax(0)[:2]


@settings(deadline=None, max_examples=80, derandomize=True)
@given(
    st.integers(1, 3), st.integers(1, 50), st.integers(0, 12), st.floats(0, 12),
    st.integers(0, 10**6), st.sampled_from([1e-2, 1e-6, 1e-9]),
    st.sampled_from([0.0, 0.05, 0.5, torch.inf]),
)  # fmt: skip
def test_what_is_left_out_is_within_the_bound(k, t, u, sharp, seed, tolerance, slack):
    g = torch.Generator().manual_seed(seed)
    frames, lengths = (torch.randint(1, t + 1, (k,), generator=g) for _ in range(2))
    lengths = torch.randint(0, u + 1, (k,), generator=g)
    tile = Given(lattice(k, t, u, sharp, seed), slack)
    found, gap = tile.band(frames, lengths, tolerance)
    less = tile.log_probability(frames, lengths) - tile.log_probability(frames, lengths, found)
    assert (less >= -1e-9).all() and (less <= gap + 1e-9).all() and (gap <= tolerance).all()


@pytest.mark.parametrize("slack", [0.05, torch.inf])
@pytest.mark.parametrize("sharp", [2.0, 5.0])
def test_what_leaves_a_loose_band_counts(sharp, slack):
    """With much to lose, something is left out of nearly every lattice."""
    tile = Given(lattice(50, 50, 12, sharp, seed=0), slack)
    frames, lengths = torch.full((50,), 50), torch.full((50,), 12)
    found, gap = tile.band(frames, lengths, 1e-2)
    less = tile.log_probability(frames, lengths) - tile.log_probability(frames, lengths, found)
    assert (less <= gap + 1e-9).all() and (less > 1e-9).sum() > 10


def test_a_sharp_lattice_needs_few_nodes_and_a_flat_one_without_bounds_all():
    frames, lengths = torch.tensor([400]), torch.tensor([100])
    sharp, flat = (Given(lattice(1, 400, 100, s, seed=0)) for s in (8.0, 0.0))
    _, gap = sharp.band(frames, lengths)
    assert 0 < gap.item() <= TOLERANCE and sharp.computed.sum() < 0.2 * 400 * 101
    _, gap = flat.band(frames, lengths)
    assert gap.item() == 0 and flat.computed.sum() == 400 * 101


def test_a_flat_lattice_with_tight_bounds_needs_less_than_half():
    frames, lengths = torch.tensor([400, 300]), torch.tensor([100, 60])
    tile = Given(lattice(2, 400, 100, 0.0, seed=0), slack=0.02)
    found, gap = tile.band(frames, lengths)
    assert (gap > 0).all() and (gap <= TOLERANCE).all()
    assert tile.computed.sum() < 0.5 * (400 * 101 + 300 * 61)
    less = tile.log_probability(frames, lengths) - tile.log_probability(frames, lengths, found)
    assert (less >= -1e-9).all() and (less <= gap + 1e-9).all()


def test_a_flat_lattice_whose_likely_part_the_bounds_hide_is_computed_completely():
    """The least that a bound may be: above all of the nodes that matter, and no less."""
    log_p = lattice(1, 100, 20, 0.0, seed=0)
    tile = Given(log_p)
    # Bounds of 1 where nothing is likely: the occupancy is all there.
    upper = log_p.clone()
    upper[:, :, 15:, :60] = 0.0
    tile.upper = lambda: upper.view(2, -1, 100)
    frames, lengths = torch.tensor([100]), torch.tensor([20])
    found, gap = tile.band(frames, lengths)
    torch.testing.assert_close(
        tile.log_probability(frames, lengths, found),
        tile.log_probability(frames, lengths),
        rtol=0,
        atol=TOLERANCE,
    )


def trap(doubt):
    """First the labels are all but certain; later only who has none of them can go on."""
    log_p = torch.full((2, 1, 6, 64), 0.5, dtype=torch.float64).log()
    log_p[0, 0, 0, :32], log_p[1, 0, 0, :32] = doubt, -1e-9
    log_p[0, 0, 1:, 40:] = -1000.0
    log_p[0, 0, 5, 60:] = -1e-3
    return log_p


@pytest.mark.parametrize("doubt", [-5.0, -1.0, -0.1])
def test_a_path_that_looks_hopeless_at_first_is_found(doubt):
    tile = Given(trap(doubt))
    frames, lengths = torch.tensor([64]), torch.tensor([5])
    whole = tile.log_probability(frames, lengths)
    found, gap = tile.band(frames, lengths)
    torch.testing.assert_close(
        tile.log_probability(frames, lengths, found), whole, rtol=0, atol=TOLERANCE
    )


def test_a_search_that_starts_too_narrow_ends_with_the_whole(monkeypatch):
    monkeypatch.setattr(module, "SHARE", 0.0)  # follow the best state only
    monkeypatch.setattr(module, "REACH", 1)
    monkeypatch.setattr(module, "WALKS", 1)
    monkeypatch.setattr(module, "OCCUPANCIES", ())
    tile = Given(lattice(2, 60, 12, 3.0, seed=0))
    frames, lengths = torch.tensor([60, 48]), torch.tensor([12, 10])
    found, gap = tile.band(frames, lengths)
    assert (gap == 0).all() and tile.computed.sum() == 60 * 13 + 48 * 11
    torch.testing.assert_close(
        tile.log_probability(frames, lengths, found), tile.log_probability(frames, lengths)
    )


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
def test_impossible_arcs_and_what_is_not_a_number(value):
    log_p = lattice(1, 30, 5, 6.0, seed=1)
    log_p[1, 0, 2] = value  # nobody can say the third label
    tile = Given(log_p)
    frames, lengths = torch.tensor([30]), torch.tensor([5])
    found, gap = tile.band(frames, lengths)
    whole = tile.log_probability(frames, lengths, found)
    assert whole.isneginf().all() if value == -torch.inf else whole.isnan().all()
    assert gap.item() == 0


def test_nothing_at_all():
    none = torch.zeros(0, dtype=torch.long)
    found, gap = Given(torch.zeros(2, 0, 3, 4)).band(none, none)
    assert found.shape == (2, 0, 3, 4) and gap.shape == (0,)
    found, gap = Given(torch.zeros(2, 1, 3, 4)).band(torch.tensor([0]), torch.tensor([2]))
    assert found.isneginf().all()


def network(v=20, j=16, t=120, u=30, seed=0):
    """A joint network whose blank and labels are as sharp as a trained one's."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(1, v, (2, u), generator=g)
    hyps = hypotheses(labels, torch.tensor([u, u - 7]))
    weight = torch.zeros(v, j)
    weight[0, 0], weight[:, 1] = 14.0, torch.randn(v, generator=g)
    # The first dimension says whether the next label is due.
    due = torch.arange(t) * u / t
    encoded = torch.randn(2, t, j, generator=g) * 0.1
    encoded[:, :, 0] = -due
    place = torch.cat([torch.arange(u + 1), torch.arange(u - 6)])
    predicted = torch.randn(len(place), j, generator=g) * 0.1
    predicted[:, 0] = place
    tensors = [x.requires_grad_() for x in (encoded, predicted, weight, torch.zeros(v))]
    return tensors, torch.tensor([t, t - 21]), hyps


@pytest.mark.parametrize("autocast", [False, True])
def test_value_and_gradient_of_a_banded_network_are_those_of_the_whole(monkeypatch, autocast):
    from espnet_pl.losses import transducer

    (encoded, predicted, weight, bias), frames, hyps = network()
    monkeypatch.setattr(transducer, "LARGE", 0)
    results = []
    for exact in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = log_probability(
                Joint(weight, bias), encoded, frames, predicted, hyps, exact=exact
            )
        results.append(
            (value, torch.autograd.grad(value.sum(), (encoded, predicted, weight, bias)))
        )
    (value, gradient), (whole, expected) = results
    torch.testing.assert_close(value, whole, rtol=0, atol=TOLERANCE)
    for mine, theirs in zip(gradient, expected):
        assert (mine - theirs).norm() <= (1e-2 if autocast else 1e-5) * theirs.norm()


def test_a_tile_computes_the_band_as_it_computes_the_whole():
    (encoded, predicted, weight, bias), frames, hyps = network()
    valid = torch.arange(encoded.shape[1]) < frames[hyps.owner, None]
    asked = Asked(torch.tanh, 2, hyps.owner, hyps.tokens, valid)
    tile = Tile(encoded, predicted, weight, bias, asked, torch.float32)
    found, done, gap = band(tile, hyps.states, hyps.columns, frames, hyps.lengths, TOLERANCE)
    whole = planes(Joint(weight, bias), encoded, frames, predicted, hyps.owner, hyps.tokens)
    assert done.sum() < 0.6 * valid.sum() and not (done & ~valid).any() and (gap > 0).all()
    torch.testing.assert_close(found[:, done], whole.detach()[:, done])
