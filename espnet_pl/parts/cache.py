"""Pseudo-labels kept for a while, by utterance id.

Which utterances are in the cache at which step, and when they are replaced, is
decided by ``data/pairing.py`` before training starts: it depends on the seed
only.  Here is what was said about them, and when.

Source: the released slimIPL recipe stores pseudo-labels per utterance id, and a
re-entering utterance overwrites its label
(flashlight/wav2letter recipes/slimIPL/src/Train.cpp).
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

Record = dict[str, Tensor]  # of one utterance, on the CPU
NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class PseudoLabelCache(nn.Module):
    """A dictionary utterance id → (label sequence, step at which it was made, what else is known).

    It is a module so that it travels in the checkpoint, as tensors only: ids as
    UTF-8 bytes, labels one behind the other.
    """

    def __init__(self) -> None:
        super().__init__()
        self._labels: dict[str, list[int]] = {}
        self._made_at: dict[str, int] = {}
        self._records: dict[str, Record] = {}

    def __len__(self) -> int:
        return len(self._labels)

    def __contains__(self, utt_id: str) -> bool:
        return utt_id in self._labels

    def put(
        self, utt_id: str, label: list[int], step: int, record: Mapping[str, Tensor] = NOTHING
    ) -> None:
        """Keep a label; an older one of the same utterance is replaced.

        Args:
            record: what else is known of the utterance; all records have the same names.
        """
        self._labels[utt_id] = list(label)
        self._made_at[utt_id] = step
        self.forget([utt_id])
        if record:
            self._records[utt_id] = dict(record)

    def get(self, utt_id: str) -> list[int]:
        """The label of an utterance.

        Raises:
            KeyError: it was never labelled.  The plan labels every utterance before it
                is used, so this means that checkpoint and data do not belong together.
        """
        try:
            return self._labels[utt_id]
        except KeyError:
            raise KeyError(
                f"no pseudo-label for utterance {utt_id!r} among the {len(self)} in the cache: "
                "was the checkpoint written with other data, another seed or another "
                "number of processes or num_workers?  Start the run anew, or give it what it had"
            ) from None

    def made_at(self, utt_id: str) -> int:
        """The step at which the label was made."""
        return self._made_at[utt_id]

    def record(self, utt_id: str) -> Record:
        """What else was known of the utterance when it was labelled."""
        return self._records.get(utt_id, {})

    def forget(self, utt_ids: Iterable[str]) -> None:
        """Keep no records of utterances that will not be used: they are large, labels are not."""
        for utt_id in utt_ids:
            self._records.pop(utt_id, None)

    def get_extra_state(self) -> dict[str, Tensor]:
        """Everything, as tensors."""
        ids = [utt_id.encode() for utt_id in self._labels]
        labels = list(self._labels.values())
        records = [self._records[i] for i in self._labels if i in self._records]
        names = sorted({name for record in records for name in record})
        columns = {name: [record[name] for record in records] for name in names}
        return {
            "id_bytes": torch.tensor(list(b"".join(ids)), dtype=torch.uint8),
            "id_lengths": torch.tensor([len(i) for i in ids], dtype=torch.long),
            "labels": torch.tensor([k for y in labels for k in y], dtype=torch.int32),
            "label_lengths": torch.tensor([len(y) for y in labels], dtype=torch.long),
            "made_at": torch.tensor(list(self._made_at.values()), dtype=torch.long),
            "recorded": torch.tensor([i in self._records for i in self._labels], dtype=torch.bool),
            **{f"record {name}": torch.cat([x.flatten() for x in columns[name]]) for name in names},
            **{f"shape {name}": torch.tensor([x.shape for x in columns[name]]) for name in names},
        }

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``get_extra_state``."""
        ids = state["id_bytes"].numpy(force=True).tobytes()
        ids = [i.decode() for i in _split(ids, state["id_lengths"])]
        labels = _split(state["labels"].tolist(), state["label_lengths"])
        self._labels = dict(zip(ids, labels))
        self._made_at = dict(zip(ids, state["made_at"].tolist()))
        self._records = {i: {} for i, there in zip(ids, state["recorded"].tolist()) if there}
        for name in (key.removeprefix("record ") for key in state if key.startswith("record ")):
            shapes = state[f"shape {name}"]
            rows = _split(state[f"record {name}"], shapes.prod(1))
            for i, row, shape in zip(self._records, rows, shapes.tolist()):
                self._records[i][name] = row.view(shape).clone()


def _split(sequence, lengths: Tensor) -> list:
    ends = lengths.cumsum(0).tolist()
    return [sequence[a:b] for a, b in zip([0, *ends], ends)]
