"""ESPnet's transducers took padding for speech: a mask was cut where it had to be subsampled.

In a batch the frames of all utterances were those of the longest; the loss summed over them, and
attention saw them.  Recognition, one utterance at a time, was another task than training.
"""

import pytest
import torch

from espnet_pl.bridge.teachers import load
from espnet_pl.methods.base import Utterances
from test.bridge.conftest import TRANSDUCER
from test.bridge.models import model_folder


@pytest.mark.parametrize("vgg, factor", [(False, 2), (False, 4), (False, 6), (True, 4), (True, 6)])
def test_an_utterance_is_the_same_in_a_batch_and_alone(vgg, factor, tmp_path):
    conf = TRANSDUCER["encoder_conf"]
    given = {"vgg_like": vgg, "subsampling_factor": factor, "conv_size": [8, 8] if vgg else 8}
    folder = model_folder(tmp_path, "transducer", encoder_conf={**conf, "input_conf": given})
    network = load(folder).network
    samples = [*range(3000, 6100, 173)]
    speech = 0.1 * torch.randn(len(samples), max(samples), generator=torch.manual_seed(0))
    with torch.no_grad():
        together = network.hear(Utterances([*map(str, samples)], speech, torch.tensor(samples)))
        far = []
        for i, n in enumerate(samples):
            alone = network.hear(Utterances(["x"], speech[i : i + 1, :n], torch.tensor([n])))
            t = int(alone.frames)
            assert int(together.frames[i]) == t == alone.encoded.shape[1]
            far.append((together.encoded[i, : t - 2] - alone.encoded[0, : t - 2]).abs().max())
        # The last windows of the spectrum see what follows, and the mean of all frames sees them.
        assert max(far) < 0.1 * alone.encoded.std()
