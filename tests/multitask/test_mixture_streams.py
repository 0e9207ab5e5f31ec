"""Streams in with_mixture: each is prepared alone, and they are one epoch long."""

import pytest
import torch
from datasets import IterableDataset
from torch.utils.data import IterableDataset as Stream

from .hf import parameters, token_rows
from .mixtures import bandit, run, stream
from .toy import TASKS


def prompts(length):
    rows = [{"prompt": " ".join(["w4"] * length(i)), "completion": " w5 w6"} for i in range(200)]
    return IterableDataset.from_generator(lambda: iter(rows))


def test_rows_that_trl_drops_are_dropped_before_they_are_drawn(tmp_path):
    """Of kitchen truncation masks nine rows of ten."""
    streams = {t: prompts((lambda i: 12 if i % 10 else 2) if t == "kitchen" else (lambda i: 2)) for t in TASKS}
    trainer = run("SFT", tmp_path, dataset=streams, max_steps=10, max_length=8, mixture=bandit(rho=0.0))
    drawn = trainer.schedule.drawn()
    assert max(drawn) - min(drawn) <= 3
    assert 10 * 8 <= sum(drawn) <= 12 * 8  # data loaders read ahead
    assert trainer.mixture.updates == 10


class Rows(Stream):
    """torch's, which is told each time that it begins anew."""

    def __init__(self):
        self.told = []

    def set_epoch(self, epoch):
        self.told.append(epoch)

    def __iter__(self):
        yield from ({"text": f"w{i} w3"} for i in range(5, 9))


def test_streams_of_torch_are_prepared_too(tmp_path):
    streams = {t: Rows() for t in TASKS}
    trainer = run("SFT", tmp_path, dataset=streams)
    assert trainer.mixture.updates == 4
    assert max(streams["books"].told) >= 2


def test_a_stream_that_was_trained_to_its_end_goes_on_bit_for_bit(tmp_path):
    rows = stream(token_rows(12).remove_columns("task").to_list())
    given = {"dataset": rows, "save_strategy": "steps", "save_steps": 2}
    whole = run("Trainer", tmp_path / "whole", **given)
    run("Trainer", tmp_path / "half", max_steps=2, **given)
    extended = run("Trainer", tmp_path / "half", resume=str(tmp_path / "half" / "checkpoint-2"), **given)
    assert all(map(torch.equal, parameters(whole), parameters(extended)))
    assert whole.schedule.drawn() == extended.schedule.drawn()


@pytest.mark.parametrize("kind", ["SFT", "GRPO"])
def test_a_buffer_between_the_weights_and_the_rows_is_refused(tmp_path, kind):
    with pytest.raises(ValueError, match="shuffle_dataset=True reads streams far ahead of the weights"):
        run(kind, tmp_path, dataset=stream([{"text": "w3", "prompt": "w3"}]), shuffle_dataset=True)
