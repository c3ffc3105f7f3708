"""parts/clusters: clusters that are there are found, from no more than is enough."""

import pytest
import torch

from espnet_pl.parts import clusters
from espnet_pl.parts.clusters import learn_centres, nearest

FAR = torch.tensor([[0.0, 0.0, 9.0], [9.0, 0.0, 0.0], [0.0, -9.0, 0.0], [5.0, 5.0, 5.0]])


def around(centres, each, seed=0):
    noise = torch.randn(each, *centres.shape, generator=torch.Generator().manual_seed(seed))
    return (centres + 0.1 * noise).flatten(0, 1)


def test_clusters_that_are_there_are_found():
    found = learn_centres([around(FAR, 20, seed) for seed in range(5)], 4)
    own = nearest(found[None], FAR)[0]  # to which of them each is nearest
    assert sorted(own.tolist()) == [0, 1, 2, 3]
    assert torch.allclose(found[own.argsort()], FAR, atol=0.1)
    assert torch.equal(found, learn_centres([around(FAR, 20, seed) for seed in range(5)], 4))


def test_the_nearest_is_that_of_the_smallest_distance():
    features = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))
    expected = [[min(range(4), key=lambda k: (v - FAR[k]).norm()) for v in u] for u in features]
    assert nearest(features, FAR).tolist() == expected
    assert nearest(features.half(), FAR).shape == (2, 5)


def test_no_more_is_heard_than_is_enough(monkeypatch):
    monkeypatch.setattr(clusters, "ENOUGH", 100)
    heard = []

    def speech():
        for seed in range(50):
            heard.append(seed)
            yield around(FAR, 10, seed)

    assert learn_centres(speech(), 4).shape == (4, 3)
    assert heard == [0, 1, 2]  # of forty frames each


def test_fewer_frames_than_clusters():
    with pytest.raises(ValueError, match="5 clusters cannot be learnt from 4 frames"):
        learn_centres([FAR], 5)
    with pytest.raises(ValueError, match="from 0 frames"):
        learn_centres([], 1)
