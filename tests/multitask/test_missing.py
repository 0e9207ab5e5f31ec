"""Loaders that give one task a batch: absent tasks count with what is known of them, and silence is not an answer."""

import copy
import statistics
import warnings

import pytest
import torch

from counterpoise.multitask import FAMO, BanditMTL, GroupDRO, SmoothTchebycheff, Tchebycheff, best_response
from counterpoise.multitask.weighting import ALONE

from .hf import train as hf_train
from .test_weightings import build, same
from .toy import METHODS, TASKS, rows

LOSSES = [0.5, 0.5, 1.5]
COMPARE_WITHIN_A_WINDOW = {"mgda", "pcgrad", "cagrad", "upgrad", "aligned", "imtl_g", "fairgrad", "nash"}
COMPARE_NOTHING = {"uniform", "uncertainty", "bandit_importance", "rlw", "imtl_l"}


def alone(i: int, loss: float) -> list[torch.Tensor | None]:
    return [torch.tensor(loss, dtype=torch.float64) if j == i else None for j in range(3)]


def one_task_a_batch(weighting, order, losses=LOSSES):
    for i in order:
        weighting(alone(i, losses[i]))
        weighting.step()
    return weighting.weights()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("half_life", [0.0, 4.0])
def test_one_task_a_batch_moves_the_bandit_to_the_best_response_of_full_batches(half_life, normalize):
    balance = BanditMTL(TASKS, rho=0.3, half_life=half_life, normalize=normalize)
    if normalize:  # the first losses are the units
        one_task_a_batch(balance, [0, 1, 2], [1.0, 1.0, 1.0])
    generator = torch.Generator().manual_seed(0)
    found = one_task_a_batch(balance, torch.randint(0, 3, (3000,), generator=generator).tolist())
    assert found == pytest.approx(best_response(torch.tensor(LOSSES), 0.3).tolist(), abs=1e-6)


def test_the_bandit_that_holds_never_moves_and_says_so_once():
    balance = BanditMTL(TASKS, rho=0.3, missing="hold")
    with pytest.warns(
        UserWarning, match=rf"BanditMTL: {ALONE} windows in a row held one task .*missing='last'"
    ) as said:
        assert one_task_a_batch(balance, [0, 1, 2] * 100) == pytest.approx([1 / 3] * 3)
    assert len(said) == 1


def test_group_dro_fed_in_turn_is_group_dro_fed_together():
    turns, together = GroupDRO(TASKS, eta=0.1), GroupDRO(TASKS, eta=0.1)
    one_task_a_batch(turns, [0, 1, 2])
    turns._log_p = list(together._log_p)
    for i in range(30):
        one_task_a_batch(turns, [i % 3])
        together(torch.tensor(LOSSES, dtype=torch.float64))
        together.step()
    assert turns.weights() == pytest.approx(together.weights(), rel=1e-12)
    assert turns.weights()[2] > 0.8


@pytest.mark.parametrize("method", ["gradnorm", "bandit_normalized", "dwa"])
def test_the_weights_fed_in_turn_end_where_full_batches_bring_them(method):
    """No optimiser steps: the losses stand still but for two levels, so that only how they are fed differs."""
    (toy, turns, _), (too, together, _) = build(method), build(method)
    for level in (1.0, 0.7):
        for i in range(150):
            powers = [level ** (j + 1) for j in range(3)]
            losses = [x * p for x, p in zip(toy.losses(*rows(6, 0))[0].values(), powers, strict=True)]
            turns([x if j == i % 3 else None for j, x in enumerate(losses)])
            together([x * p for x, p in zip(too.losses(*rows(6, 0))[0].values(), powers, strict=True)])
            turns.step()
            together.step()
    assert turns.weights() == pytest.approx(together.weights(), rel=0.05)
    if method != "dwa":  # DWA, of losses that stand still again, is back at equal weights in both
        assert max(turns.weights()) > 1.2 * min(turns.weights())


def test_dwa_keeps_the_rate_of_a_task_that_an_epoch_did_not_see():
    weighting = METHODS["dwa"]([])
    weighting.steps_per_epoch = 1
    for losses in ([1.0, 1.0, 1.0], [0.5, 1.0, 1.0], [None, 1.0, 1.0], [None, 1.0, 1.0]):
        weighting([None if x is None else torch.tensor(x) for x in losses])
        weighting.step()
    assert weighting.weights()[0] < 0.9


def test_famo_fed_in_turn_moves_away_from_the_task_that_falls_and_weighs_by_it():
    weighting, losses = FAMO(TASKS), [1.0, 1.0, 1.0]
    for _ in range(40):
        one_task_a_batch(weighting, [0, 1, 2], losses)
        losses[0] *= 0.8
    share = weighting.weights()
    assert share[0] < 0.8 * share[1]
    weighting.eval()
    value = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    weighting([None, value, None]).backward()
    assert float(value.grad) < 0.1  # c is small while another task's loss is: not that of a batch of one task, 1
    full = torch.tensor([weighting.last_losses[0], 1.0, 1.0], dtype=torch.float64, requires_grad=True)
    weighting(full).backward()
    assert float(value.grad) == pytest.approx(float(full.grad[1]), rel=1e-6)


@pytest.mark.parametrize("method", [Tchebycheff, SmoothTchebycheff])
def test_the_worst_task_is_the_worst_of_all_that_are_known(method):
    weighting = method(TASKS)
    one_task_a_batch(weighting, [0, 1, 2])
    for i, loss in ((0, 0.4), (0, 2.0), (2, 1.4)):
        value = torch.tensor(loss, dtype=torch.float64, requires_grad=True)
        full = torch.tensor([loss if j == i else x for j, x in enumerate(LOSSES)], requires_grad=True)
        scalar, expected = weighting([value if j == i else None for j in range(3)]), weighting.eval()(full)
        weighting.train().discard()
        scalar.backward()
        expected.backward()
        assert float(scalar.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
        assert float(value.grad) == pytest.approx(float(full.grad[i]), rel=1e-5)
    held = method(TASKS, missing="hold")
    one_task_a_batch(held, [0, 1])
    assert float(held(alone(0, 0.1))) == pytest.approx(0.1 / 3, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_sees_one_task_alone_says_once_that_nothing_is_learned(method):
    toy, weighting, _ = build(method)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2 * ALONE + 5):
            weighting([toy.losses(*rows(6, 0))[0]["books"], None, None])
            weighting.step()
    mine = [str(w.message) for w in said if "windows in a row held one task alone" in str(w.message)]
    assert len(mine) == (0 if method in COMPARE_NOTHING else 1)
    assert all("'books'" in text and type(weighting).__name__ in text for text in mine)


@pytest.mark.parametrize("method", METHODS)
def test_tasks_in_turn_are_warned_of_only_where_nothing_is_remembered(method):
    toy, weighting, _ = build(method)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for i in range(2 * ALONE):
            weighting([x if j == i % 3 else None for j, x in enumerate(toy.losses(*rows(6, 0))[0].values())])
            weighting.step()
    found = any("windows in a row" in str(w.message) for w in said)
    assert found == (method in COMPARE_WITHIN_A_WINDOW)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_known_of_absent_tasks_is_resumed_bitwise_and_older_states_load(method):
    def go_on(toy, weighting, optimizer, steps):
        for i in steps:
            torch.manual_seed(i)
            optimizer.zero_grad()
            weighting(*toy.losses(*rows(6, i, tasks=[i % 3] * 6))).backward()
            optimizer.step()
            weighting.step()

    straight, first, second = build(method), build(method), build(method)
    go_on(*straight, range(8))
    go_on(*first, range(4))
    for new, old in zip(second, first, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    go_on(*second, range(4, 8))
    assert same([x.state_dict() for x in straight], [x.state_dict() for x in second])
    state = copy.deepcopy(first[1].state_dict())
    for name in ("known", "alone", "falls", "known_norms"):  # what states of before they existed lack
        state["_extra_state"].pop(name, None)
    older = build(method)
    older[1].load_state_dict(state)
    assert older[1].compared(older[1]._window.close())[0] == (
        [0.0] * 3 if method in COMPARE_WITHIN_A_WINDOW else first[1].last_losses
    )
    go_on(*older, range(4, 8))
    assert older[1].updates == 8


def test_a_half_life_calms_the_weights_of_noisy_batches():
    def spread(half_life):
        balance = BanditMTL(TASKS, rho=0.3, eta=2.0, half_life=half_life)
        generator = torch.Generator().manual_seed(0)
        found = []
        for i in range(1500):
            noisy = [x + 0.5 * float(torch.randn((), generator=generator)) for x in LOSSES]
            found.append(one_task_a_batch(balance, [i % 3], noisy)[2])
        return statistics.stdev(found[300:])

    assert spread(8.0) < 0.8 * spread(0.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"missing": "drop"}, "missing"),
        ({"half_life": -1.0}, "half_life"),
        ({"missing": "hold", "half_life": 2.0}, "half"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    for method in (lambda **k: BanditMTL(TASKS, rho=0.3, **k), lambda **k: GroupDRO(TASKS, **k)):
        with pytest.raises(ValueError, match=words):
            method(**settings)


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_moves_the_weights_on_batches_of_one_row(tmp_path):
    moved = hf_train(str(tmp_path), batch=1, steps=12, weighting=BanditMTL(TASKS, rho=0.3))
    held = hf_train(str(tmp_path), batch=1, steps=12, weighting=BanditMTL(TASKS, rho=0.3, missing="hold"))
    assert held.weighting.weights() == pytest.approx([1 / 3] * 3)
    assert max(moved.weighting.weights()) > 0.34
