"""Clusters of frames by k-means: units of speech that no tokenizer knows, finer than its tokens.

Frames are vectors of an encoder, as in Hsu et al., "HuBERT", arXiv:2106.07447, section II.A.  The
centres are learnt from a sample of the speech, and are the same for every utterance after that.

Axes: f frames of a sample, n utterances, t frames, k clusters, d dimensions.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

ENOUGH = 100_000  # frames of the sample: 500 for each of 200 clusters, 100 MB of 256 dimensions


def learn_centres(frames: Iterable[Float[Tensor, "f d"]], k: int) -> Float[Tensor, "k d"]:
    """The centres of k clusters; of the frames, no more are asked for than are enough.

    Raises:
        ValueError: there are fewer frames than clusters.
    """
    # Half a second to import, and of all that uses this file few learn clusters.
    from sklearn.cluster import MiniBatchKMeans

    sample, count = [], 0
    for some in frames:
        sample.append(some.float().cpu())
        count += len(some)
        if count >= ENOUGH:
            break
    if count < k:
        raise ValueError(f"{k} clusters cannot be learnt from {count} frames")
    model = MiniBatchKMeans(k, batch_size=4096, n_init=3, random_state=0)
    model.fit(torch.cat(sample)[:ENOUGH].numpy())
    return torch.from_numpy(model.cluster_centers_)


def nearest(features: Float[Tensor, "n t d"], centres: Float[Tensor, "k d"]) -> Int[Tensor, "n t"]:
    """The cluster of each frame: that with the nearest centre."""
    return torch.cdist(features.float(), centres.to(features.device)[None]).argmin(2)
