"""Reading losses and counts: names, order, absence, and clear errors."""

import pytest
import torch

from counterpoise.multitask.losses import by_task, gather, task_names

TASKS = ("books", "dvd", "kitchen")


def test_a_mapping_a_sequence_and_a_tensor_read_the_same():
    values = torch.tensor([1.0, 2.0, 3.0])
    named = {"kitchen": values[2], "books": values[0], "dvd": values[1]}
    for losses in (values, list(values), named):
        batch = gather(TASKS, losses, [4, 5, 6])
        assert batch.values_K.tolist() == [1.0, 2.0, 3.0]
        assert batch.present is None
        assert batch.counts == [4.0, 5.0, 6.0]


@pytest.mark.parametrize(
    ("losses", "counts"),
    [
        ({"books": torch.tensor(1.0), "dvd": None, "kitchen": torch.tensor(3.0)}, None),
        ([torch.tensor(1.0), None, torch.tensor(3.0)], None),
        (torch.tensor([1.0, float("nan"), 3.0]), {"dvd": 0, "books": 1, "kitchen": 1}),
        ([torch.tensor(1.0), torch.tensor(9.0), torch.tensor(3.0)], torch.tensor([1, 0, 1])),
    ],
)
def test_absence_is_said_by_none_or_a_count_of_zero(losses, counts):
    batch = gather(TASKS, losses, counts)
    assert batch.values_K.tolist() == [1.0, 3.0]
    assert batch.present == [0, 2]
    assert batch.counts in (None, [1.0, 1.0])


@pytest.mark.parametrize(
    ("losses", "counts", "error", "words"),
    [
        ({"books": torch.tensor(1.0), "toys": torch.tensor(1.0)}, None, KeyError, "toys"),
        ({"books": torch.tensor(1.0), "dvd": torch.tensor(1.0)}, None, KeyError, "kitchen"),
        (torch.ones(2), None, ValueError, r"\(3,\).*\(2,\)"),
        ([torch.tensor(1.0)] * 2, None, ValueError, "expected 3, found 2"),
        ([torch.ones(2)] * 3, None, ValueError, "books.*scalar|scalar.*books"),
        ([torch.ones(1), torch.ones(2), torch.ones(1)], None, ValueError, "dvd.*2"),
        ([1.0, torch.tensor(1.0), torch.tensor(1.0)], None, ValueError, "float"),
        ([None, None, None], None, ValueError, "no task"),
        (torch.ones(3), [0, 0, 0], ValueError, "no task"),
        (torch.ones(3), [1, 1], ValueError, "expected 3, found 2"),
        (torch.ones(3), [1, -1, 1], ValueError, "-1.*dvd"),
        (torch.ones(3), [1, float("inf"), 1], ValueError, "inf.*dvd"),
        (torch.ones(3), {"books": 1, "dvd": 1}, KeyError, "kitchen"),
        ([torch.tensor(1.0), None, torch.tensor(1.0)], [1, 1, 1], ValueError, "dvd.*count"),
    ],
)
def test_bad_losses_and_counts_are_named(losses, counts, error, words):
    with pytest.raises(error, match=words):
        gather(TASKS, losses, counts)


def test_task_names():
    assert task_names(2) == ("0", "1")
    assert task_names(["a", "b"]) == ("a", "b")
    for bad, error, words in [
        (["a", "b", "a"], ValueError, "'a'"),
        (0, ValueError, "at least one"),
        ([], ValueError, "at least one"),
        ("books", TypeError, "'books'"),
        (["a", 1], TypeError, "1"),
    ]:
        with pytest.raises(error, match=words):
            task_names(bad)


def test_by_task_reads_names_in_task_order():
    assert by_task(TASKS, {"kitchen": 3, "books": 1, "dvd": 2}, "counts") == [1.0, 2.0, 3.0]
