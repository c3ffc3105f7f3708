"""A method that is taught: the student learns the best of the teacher's sequences that it can say.

Its path is its name: ``method: test.bridge.taught``.
"""

from dataclasses import dataclass

import torch

from espnet_pl.data.pairing import Pairing
from espnet_pl.methods import base
from espnet_pl.parts.decoding import pad


@dataclass(frozen=True)
class Config:
    """Settings; only the first changes what a teacher is asked."""

    beam: int = 2
    weight: float = 1.0


class Method(base.Method):
    """Hard labels, without anything around them."""

    requires = frozenset({"score"})
    taught = True
    seen = None  # the last one made, for the tests

    def __init__(self, config, student, resources):
        super().__init__(config, student, resources)
        Method.seen = self

    @classmethod
    def pairing(cls, config):
        return Pairing(unlabelled=1)

    @classmethod
    def asked(cls, config):
        return {"beam": config.beam}

    @classmethod
    def ask(cls, config, teacher, x, known=base.NOTHING):
        assert not torch.is_grad_enabled() and not teacher.training
        records = []
        for own in teacher.hear(x).propose(config.beam):
            text, lengths = pad([p.labels for p in own])
            log_p = torch.tensor([p.log_p for p in own], dtype=torch.float16)
            records.append({"labels": text, "lengths": lengths, "log_p": log_p})
        return records

    def unlabelled(self, student, x):
        if records := self.resources["records"]:
            said = [records.get(utt_id) for utt_id in x.utt_id]
        else:
            with torch.no_grad():
                said = self.ask(self.config, self.resources["teacher"], x)
        labels = []
        for own in said:
            rows = zip(own["labels"].tolist(), own["lengths"].tolist())
            ours = [self.resources["translate"](row[:length]) for row, length in rows]
            labels.append(next((y for y in ours if y), []))
        score = student.hear(x).score(labels)
        loss = -torch.where(score.isneginf(), 0.0, score).mean()
        return {"taught": base.Term(loss, self.config.weight, len(x))}
