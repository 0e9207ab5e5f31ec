"""A run that is killed with SIGKILL goes on, and ends with the very bits of one that was never killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from counterpoise.alignment.align import align
from counterpoise.alignment.distil import Sample, distil
from counterpoise.alignment.dpo import dpo
from counterpoise.alignment.mitigations.anchors import L2, OnlineMerging
from counterpoise.alignment.mitigations.ema import MovingAverage
from counterpoise.alignment.mitigations.replay import Replay
from counterpoise.alignment.ppo import ppo
from counterpoise.alignment.preferences import Preference
from counterpoise.alignment.rsf import rsf
from counterpoise.alignment.settings import DPO, PPO, RSF, Distil
from counterpoise.alignment.training.models import Machine
from counterpoise.alignment.training.run import Run
from counterpoise.alignment.training.stepping import Mitigation, Step
from counterpoise.checkpoints.files import CheckpointError
from counterpoise.checkpoints.opening import open_checkpoint
from counterpoise.language.prompts import Prompt
from counterpoise.language.sampling import Drawing
from counterpoise.language.scoring import Example
from tiny import save_pair, tiny, tokenizer

PROMPTS = [Prompt((("user", text),)) for text in ("abc", "hello", "what?", "one two", "z", "go on")]
CALLS = {"reward": 0}
DATA: dict[str, Any] = {"prompts": PROMPTS}


class Dies(Mitigation):
    """Kills its own process at an optimiser step; until then it does nothing."""

    def __init__(self, at: int | None) -> None:
        self.at, self.steps = at, 0

    def after_update(self, step: Step) -> None:
        """Count."""
        self.steps += 1
        if self.steps == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


class Stops(Mitigation):
    """Ends its run at an optimiser step, as Ctrl-C does."""

    def __init__(self, at: int | None) -> None:
        self.at, self.steps = at, 0

    def after_update(self, step: Step) -> None:
        """Count."""
        self.steps += 1
        if self.steps == self.at:
            raise KeyboardInterrupt


def early(prompts: Sequence[str], responses: Sequence[str], *, die: int | None = None) -> list[float]:
    CALLS["reward"] += 1
    if CALLS["reward"] == die:
        os.kill(os.getpid(), signal.SIGKILL)
    return [sum(c in "abcdefgh" for c in r) + 0.01 * len(r) for r in responses]


DATA["reward"] = early


def job(name: str, pre: Path, out: Path, *, step: int | None = None, call: int | None = None) -> None:
    """Three iterations of a method with mitigations that have state; killed at a step or at a call of the reward."""
    sizes = {"epochs": 2, "batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-2}
    rounds = {"iterations": 3, "prompts_per_iteration": 4}
    drawing = Drawing(max_new_tokens=5)
    pairs = [Preference(p, "abc", "xyz") for p in PROMPTS]
    samples = [Sample(p, "abc", 1.0, 0.5) for p in PROMPTS]
    methods: dict[str, Callable[..., object]] = {
        "rsf": partial(
            rsf,
            settings=RSF(drawing=replace(drawing, n=3), **rounds, **sizes),
            prompts=PROMPTS,
            reward=partial(early, die=call),
        ),
        "ppo": partial(
            ppo,
            settings=PPO(drawing=drawing, kl_target=1.0, **rounds, **sizes),
            prompts=PROMPTS,
            reward=partial(early, die=call),
        ),
        "distil": partial(distil, settings=Distil(**{**sizes, "epochs": 3}), samples=samples),
        "dpo": partial(dpo, settings=DPO(**{**sizes, "epochs": 3}, saves=3), preferences=pairs),
    }
    held = [
        Replay(1.0, [Example((1,), (5, 6)), Example((1,), (7,))]),
        L2(0.1, open_checkpoint(pre)),
        MovingAverage(0.5),
    ]
    CALLS["reward"] = 0
    align(pre, out, methods[name], mitigations=[*held, Dies(step)])


def killed(*args: object, **settings: object) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=job, args=args, kwargs=settings)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.fixture(scope="module")
def pre(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair(tmp_path_factory.mktemp("pair"))[0]


@pytest.fixture(scope="module")
def whole(pre: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What a method that was never killed leaves."""

    @cache
    def made(name: str) -> Path:
        job(name, pre, out := tmp_path_factory.mktemp(name) / "whole")
        return out

    return made


@pytest.mark.parametrize(
    ("name", "death", "finished"),
    [
        ("rsf", {"step": 6}, 1),  # 4 steps an iteration: in the training of the second
        ("rsf", {"call": 3}, 2),  # before the third iteration has its samples
        ("ppo", {"step": 6}, 1),
        ("ppo", {"call": 3}, 2),
        ("distil", {"step": 5}, 1),
        ("dpo", {"step": 5}, 1),
    ],
)
def test_killed_and_continued_is_bitwise_never_killed(
    name: str, death: dict[str, int], finished: int, pre: Path, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    begun = whole(name)
    assert killed(name, pre, tmp_path / "out", **death) == -signal.SIGKILL
    work = tmp_path / "out.work"
    assert not (tmp_path / "out").exists()
    assert [p.name for p in sorted(work.glob("iteration-*"))] == [f"iteration-{i + 1:04d}" for i in range(finished)]
    job(name, pre, tmp_path / "out")
    files = ("model.safetensors", "metrics.jsonl")
    assert all((begun / f).read_bytes() == (tmp_path / "out" / f).read_bytes() for f in files)
    last, continued = (open_checkpoint(p / "iteration-0003") for p in (begun.with_name("whole.work"), work))
    assert all(torch.equal(last[n], continued[n]) for n in last)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3]


def test_what_a_kill_left_half_written_is_done_again(pre: Path, whole: Callable[[str], Path], tmp_path: Path) -> None:
    killed("rsf", pre, tmp_path / "out", call=3)
    work = tmp_path / "out.work"
    # As if the kill had come after the third checkpoint and its line, before its state; and in the middle of a line.
    shutil.copytree(work / "iteration-0002", work / "iteration-0003")
    with (work / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "reward": 9.0}\n{"iteration": 3, "rew')
    job("rsf", pre, tmp_path / "out")
    assert (whole("rsf") / "metrics.jsonl").read_bytes() == (tmp_path / "out" / "metrics.jsonl").read_bytes()
    assert len(list(work.glob("iteration-*"))) == 3


def test_a_finished_run_is_not_done_again_and_more_iterations_continue_it(pre: Path, tmp_path: Path) -> None:
    settings = {"drawing": Drawing(n=2, max_new_tokens=4), "prompts_per_iteration": 4}
    work = tmp_path / "work"
    first = align(pre, tmp_path / "two", partial(rsf, settings=RSF(iterations=2, **settings), **DATA), work=work)
    calls = CALLS["reward"]
    again = align(pre, tmp_path / "two", partial(rsf, settings=RSF(iterations=2, **settings), **DATA), work=work)
    assert again == {**first, "already_finished": True}
    assert CALLS["reward"] == calls
    more = align(pre, tmp_path / "four", partial(rsf, settings=RSF(iterations=4, **settings), **DATA), work=work)
    assert CALLS["reward"] == calls + 2
    align(pre, tmp_path / "whole", partial(rsf, settings=RSF(iterations=4, **settings), **DATA))
    assert more["iterations"] == 4
    files = [tmp_path / n / "model.safetensors" for n in ("four", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_fewer_iterations_than_are_done_are_refused_with_where_they_lie(pre: Path, tmp_path: Path) -> None:
    settings = {"drawing": Drawing(n=2, max_new_tokens=4), "prompts_per_iteration": 2}
    work = tmp_path / "work"
    align(pre, tmp_path / "three", partial(rsf, settings=RSF(iterations=3, **settings), **DATA), work=work)
    with pytest.raises(ValueError, match=r"at least 3 iterations, .*found 2; .*/iteration-0002 is the model after 2"):
        align(pre, tmp_path / "two", partial(rsf, settings=RSF(iterations=2, **settings), **DATA), work=work)
    align(pre, tmp_path / "alone", partial(rsf, settings=RSF(iterations=2, **settings), **DATA))
    files = [f / "model.safetensors" for f in (work / "iteration-0002", tmp_path / "alone")]
    assert files[0].read_bytes() == files[1].read_bytes()
    shutil.rmtree(work / "iteration-0002")
    with pytest.raises(ValueError, match="found 2; no checkpoint of iteration 2 was kept"):
        align(pre, tmp_path / "two", partial(rsf, settings=RSF(iterations=2, **settings), **DATA), work=work)


@pytest.mark.parametrize("name", ["rsf", "ppo", "distil", "dpo"])
def test_a_run_goes_on_with_smaller_micro_batches(name: str, pre: Path, tmp_path: Path) -> None:
    def go(out: str, micro: int, die: int | None = None) -> None:
        sizes = {"batch_size": 4, "micro_batch_size": micro, "learning_rate": 1e-3}
        methods: dict[str, Callable[..., object]] = {
            "rsf": partial(
                rsf,
                settings=RSF(drawing=Drawing(n=3, max_new_tokens=5), iterations=2, **sizes),
                prompts=PROMPTS,
                reward=early,
            ),
            "ppo": partial(
                ppo,
                settings=PPO(drawing=Drawing(max_new_tokens=5), iterations=2, **sizes),
                prompts=PROMPTS,
                reward=early,
            ),
            "distil": partial(distil, settings=Distil(**sizes), samples=[Sample(p, "abc", 1.0, 0.5) for p in PROMPTS]),
            "dpo": partial(
                dpo, settings=DPO(epochs=2, saves=2, **sizes), preferences=[Preference(p, "ab", "xyz") for p in PROMPTS]
            ),
        }
        align(pre, tmp_path / out, methods[name], mitigations=[Stops(die)], machine=Machine(torch.float64))

    go("whole", 4)
    with pytest.raises(KeyboardInterrupt):
        go("out", 4, {"rsf": 5, "ppo": 5, "distil": 3, "dpo": 3}[name])
    go("out", 2)
    whole, out = (open_checkpoint(tmp_path / n) for n in ("whole", "out"))
    assert all(torch.allclose(out[n], whole[n], rtol=0, atol=1e-9) for n in whole)
    assert json.loads((tmp_path / "out" / "align.json").read_text())["settings"]["micro_batch_size"] == 2
    go("out", 1)  # finished already


def test_what_is_drawn_does_not_depend_on_batches(pre: Path, tmp_path: Path) -> None:
    def drawn(micro: int, **more: int) -> list[Example]:
        how = RSF(iterations=1, drawing=Drawing(n=2, max_new_tokens=4, **more), micro_batch_size=micro)
        return list(rsf(tiny("llama"), tokenizer(), PROMPTS, early, how)[0].kept)

    assert drawn(8) == drawn(1) == drawn(8, batch_size=64) == drawn(8, batch_size=2)
    assert drawn(8) != drawn(8, seed=1)


@pytest.mark.parametrize("name", ["base", "pre"])
def test_other_weights_of_a_mitigation_make_another_run(name: str, pre: Path, tmp_path: Path) -> None:
    method = partial(
        rsf,
        settings=RSF(drawing=Drawing(n=2, max_new_tokens=4), prompts_per_iteration=2, iterations=1),
        prompts=PROMPTS,
        reward=early,
    )
    other = save_pair(tmp_path)[1]

    def go(out: str, weights: Path) -> dict[str, object]:
        held = [OnlineMerging(0.1, **{name: open_checkpoint(weights)})]
        return align(pre, tmp_path / out, method, mitigations=held, work=tmp_path / "work")

    go("out", pre)
    assert go("out", pre)["already_finished"]
    with pytest.raises(CheckpointError, match="or the run that it holds, with mitigations = "):
        go("out", other)
    with pytest.raises(ValueError, match="with mitigations = "):
        go("more", other)
    plain = align(pre, tmp_path / "plain", method, mitigations=[OnlineMerging(0.1)])
    assert name not in plain["settings"]["mitigations"][0]


def test_another_run_in_the_same_folder_and_an_occupied_out_are_refused(pre: Path, tmp_path: Path) -> None:
    settings = {"drawing": Drawing(n=2, max_new_tokens=4), "prompts_per_iteration": 2}
    other = {**settings, "drawing": Drawing(n=2, max_new_tokens=4, seed=1)}
    align(pre, tmp_path / "out", partial(rsf, settings=RSF(iterations=1, **settings), **DATA))
    with pytest.raises(CheckpointError, match="or the run that it holds, with seed = 0, found 1; give another -o"):
        align(pre, tmp_path / "out", partial(rsf, settings=RSF(iterations=1, **other), **DATA))
    with pytest.raises(ValueError, match="with seed = 0, found 1; give the same settings to go on"):
        align(
            pre,
            tmp_path / "o2",
            partial(rsf, settings=RSF(iterations=1, **other), **DATA),
            work=tmp_path / "out.work",
        )
    with pytest.raises(ValueError, match="with mitigations = "):
        align(
            pre,
            tmp_path / "o2",
            partial(rsf, settings=RSF(iterations=1, **settings), **DATA),
            mitigations=[L2(0.1)],
            work=tmp_path / "out.work",
        )


def test_one_checkpoint_may_be_kept_and_each_is_the_model_so_far(pre: Path, tmp_path: Path) -> None:
    settings = {"drawing": Drawing(n=2, max_new_tokens=4), "prompts_per_iteration": 4}
    method = partial(rsf, settings=RSF(iterations=2, learning_rate=1e-2, **settings), **DATA)
    align(pre, tmp_path / "out", method, mitigations=[MovingAverage(0.5)], keep_checkpoints=False)
    assert [p.name for p in (tmp_path / "out.work").glob("iteration-*")] == ["iteration-0002"]
    files = [tmp_path / "out", tmp_path / "out.work" / "iteration-0002"]  # the average in both, not the weights
    assert (files[0] / "model.safetensors").read_bytes() == (files[1] / "model.safetensors").read_bytes()


def test_random_state_of_dropout_goes_on_too(tmp_path: Path) -> None:
    def loop(model: torch.nn.Module, run: Run, iterations: int) -> None:
        rsf(
            model,
            tokenizer(),
            PROMPTS,
            early,
            RSF(drawing=Drawing(n=2, max_new_tokens=3), iterations=iterations, learning_rate=1e-2),
            run=run,
        )

    def fresh() -> torch.nn.Module:
        model = tiny("gpt2")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        torch.manual_seed(11)
        return model

    whole, first, second = fresh(), fresh(), fresh()
    torch.manual_seed(11)
    loop(whole, Run(tmp_path / "whole", {}), 2)
    torch.manual_seed(11)
    loop(first, Run(tmp_path / "part", {}), 1)
    torch.manual_seed(99)
    loop(second, Run(tmp_path / "part", {}), 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
