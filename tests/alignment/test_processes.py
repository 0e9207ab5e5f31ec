"""Two gloo processes give what one gives, hold the same bits, go on after a kill, and end together when one fails."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from counterpoise.alignment.align import align
from counterpoise.alignment.distil import Sample, collect, distil
from counterpoise.alignment.mitigations.anchors import KD, L1, L2, OnlineMerging
from counterpoise.alignment.mitigations.ema import MovingAverage
from counterpoise.alignment.mitigations.lowrank import LowRank
from counterpoise.alignment.mitigations.replay import Replay
from counterpoise.alignment.ppo import ppo
from counterpoise.alignment.rsf import rsf
from counterpoise.alignment.settings import PPO, RSF, Distil
from counterpoise.alignment.training import processes
from counterpoise.alignment.training.models import Machine, load_frozen
from counterpoise.alignment.training.processes import shared_by_length
from counterpoise.alignment.training.run import Run
from counterpoise.alignment.training.stepping import Mitigation, Step
from counterpoise.checkpoints.opening import open_checkpoint
from counterpoise.language.generating import way_of
from counterpoise.language.prompts import Prompt
from counterpoise.language.sampling import Drawing, sample
from counterpoise.language.scoring import Example, by_length
from counterpoise.ranks import NoNumbers, from_first, gathered, turn
from tiny import save_pair, tiny, tokenizer

WORDS = ("abc", "hello", "what?", "one two", "z", "go on", "so", "why not", "yes", "and then", "left", "q")
PROMPTS = [Prompt((("user", text),)) for text in WORDS]
CORPUS = [Example((1,), (5, 6)), Example((1,), (7,)), Example((1,), (8, 9, 10))]
NAMES = ("rsf", "ppo", "distil", "lora")
SCORED: list[int] = []


class Watched(Mitigation):
    """Keeps the result of every process, and kills its process at a step when it is told to."""

    def __init__(self, result: Path | None, at: int | None) -> None:
        self.result, self.at, self.steps = result, at, 0

    def describe(self) -> dict[str, Any]:
        """The same in every run."""
        return {"name": "Watched"}

    def after_update(self, step: Step) -> None:
        """Count."""
        self.steps += 1
        if self.steps == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def finish(self, model: torch.nn.Module) -> None:
        """Save what this process holds."""
        if self.result is not None:
            torch.save([p.detach() for p in model.parameters()], self.result)


def letters(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    SCORED.append(len(responses))
    return [sum(c in "abcdefgh" for c in r) + 0.01 * len(r) for r in responses]


def job(
    name: str,
    pre: Path,
    out: Path,
    *,
    reward: Callable[..., list[float]] = letters,
    result: Path | None = None,
    die: int | None = None,
    shard: bool = False,
) -> None:
    """Two iterations in float64: there a sum in another order cannot change which token is drawn."""
    sizes = {"batch_size": 3, "micro_batch_size": 1, "learning_rate": 1e-2}
    rounds: dict[str, Any] = {"iterations": 2, "prompts_per_iteration": 10}
    data: dict[str, Any] = {"prompts": PROMPTS, "reward": reward}
    drawing = Drawing(max_new_tokens=5, batch_size=8)
    samples = [Sample(p, "abc"[: 1 + i % 3], 1.0, 0.5) for i, p in enumerate(PROMPTS)]
    before, machine = open_checkpoint(pre), Machine(torch.float64, shard=shard)
    reference = load_frozen(pre, machine) if shard else None
    ways: dict[str, tuple[Callable[..., Any], list[Mitigation]]] = {
        "rsf": (
            partial(rsf, settings=RSF(drawing=replace(drawing, n=3), epochs=1, **rounds, **sizes), **data),
            [Replay(1.0, CORPUS), KD(0.5, reference), L2(0.1, before), MovingAverage(0.5)],
        ),
        "ppo": (
            partial(ppo, settings=PPO(drawing=drawing, kl_target=1.0, **rounds, **sizes), reference=reference, **data),
            [OnlineMerging(0.1, 0.5, pre=before), L1(0.5, before)],
        ),
        "distil": (partial(distil, settings=Distil(epochs=2, **sizes), samples=samples), []),
        "lora": (partial(distil, settings=Distil(epochs=1, **sizes), samples=samples), [LowRank(2)]),
    }
    method, held = ways[name]
    align(pre, out, method, mitigations=[*held, Watched(result, die)], machine=machine)


def entry(number: int, port: int, work: Callable[..., None], *inputs: Any) -> None:
    torch.set_num_threads(1)
    place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {k: str(v) for k, v in place.items()}
    work(number, *inputs)
    if dist.is_initialized():
        dist.destroy_process_group()


@cache
def alone(name: str) -> tuple[Path, int]:
    """The result of one process, and how many responses it scored."""
    SCORED.clear()
    place = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    job(name, save_pair(place, dtype=torch.float64)[0], place / "one")
    return place / "one", sum(SCORED)


def in_two(work: Callable[..., None], *inputs: Any) -> None:
    """`work(rank, *inputs)` in two processes that find each other as under torchrun.

    They are forked from a server that has imported and not computed: this process has threads of torch, which a fork breaks.
    """
    multiprocessing.set_forkserver_preload(["trl", "peft", work.__module__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(entry, args=(port, work, *inputs), nprocs=2, start_method="forkserver")


def fails_in_second(prompts: Sequence[str], responses: Sequence[str], *, kind: type[Exception]) -> list[float]:
    if dist.get_rank() == 1:
        raise kind("the reward is ill")
    return letters(prompts, responses)


def with_dropout(number: int, folder: Path) -> list[bool]:
    """Two epochs at once, and one and one more in a fresh model: whether this process ends with the same bits."""
    results = []
    for name, stops in {"at once": (2,), "continued": (1, 2)}.items():
        for epochs in stops:
            model = tiny_with_dropout()
            torch.manual_seed(11 + number if epochs == stops[0] else 99)
            samples = [Sample(p, "abc", 1.0, 0.5) for p in PROMPTS]
            distil(model, tokenizer(), samples, Distil(epochs=epochs, learning_rate=1e-2), run=Run(folder / name, {}))
        results.append([*model.parameters()])
    return [torch.equal(a, b) for a, b in zip(*results, strict=True)]


def tiny_with_dropout() -> torch.nn.Module:
    model = tiny("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    return model


def forwards() -> int:
    """How often this process runs the model to draw three responses of one token to each of twelve prompts."""
    model, calls = tiny("llama"), []
    way_of(model)  # measured once, in every process
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    prompts = [(1, *range(5, 8 + i)) for i in range(12)]
    sample(model, tokenizer(), prompts, Drawing(n=3, max_new_tokens=1, batch_size=3), turn=turn())
    return len(calls)


def fails_alone() -> list[str]:
    """An error that the other processes need not meet."""
    processes.SILENCE = {True: 0, False: 0}
    try:
        with processes.one_message():
            raise OSError("this disk is full")
    except BaseException as error:
        return [type(error).__name__, str(error)]


def first_fails() -> list[str]:
    """An error of the first process, of a kind that cannot be sent to others."""

    class Own(Exception):
        pass

    def fails() -> None:
        raise Own("CUDA out of memory")

    try:
        with processes.one_message():
            from_first(fails)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def overflows_in_second(number: int) -> str:
    def work() -> None:
        if number:
            raise NoNumbers("expected numbers, found NaN")

    try:
        gathered(work)
    except Exception as error:
        return type(error).__name__
    return "nothing"


def everything(number: int, pre: Path, folder: Path) -> None:
    """All methods, then two failures, in one group of processes."""
    found: dict[str, Any] = {}
    for name in NAMES:
        SCORED.clear()
        job(name, pre, folder / name, result=folder / f"{name}-{number}.pt")
        found[name] = sum(SCORED)
    for kind in (ValueError, ZeroDivisionError):
        try:
            job("rsf", pre, folder / "ill", reward=partial(fails_in_second, kind=kind))
        except BaseException as error:
            found[kind.__name__] = (type(error).__name__, str(error))
    found["shares"] = gathered(lambda: [*shared_by_length([3, 1, 2, 5, 4], 2)])
    found["dropout"] = with_dropout(number, folder)
    found["forwards"] = forwards()
    found["alone"], found["first"] = fails_alone(), first_fails()
    found["overflow"] = overflows_in_second(number)
    (folder / f"{number}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def pre(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair(tmp_path_factory.mktemp("pair"), dtype=torch.float64)[0]


@pytest.fixture(scope="module")
def two(pre: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes did."""
    folder = tmp_path_factory.mktemp("two")
    in_two(everything, pre, folder)
    return folder


def told(two: Path) -> list[dict[str, Any]]:
    return [json.loads((two / f"{number}.json").read_text()) for number in range(2)]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_give_what_one_gives_and_hold_the_same_bits(name: str, pre: Path, two: Path) -> None:
    single, scored = alone(name)
    results = [torch.load(two / f"{name}-{number}.pt") for number in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    one, both, before = (open_checkpoint(p) for p in (single, two / name, pre))
    for tensor in one:
        torch.testing.assert_close(both[tensor], one[tensor], rtol=1e-9, atol=1e-9)
    assert max(float((one[n] - before[n]).abs().max()) for n in one) > 1e-3
    for a, b in zip(lines(single), lines(two / name), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6, abs=1e-7))
    shares = [each[name] for each in told(two)]
    assert sum(shares) == scored
    assert all(shares) or not scored  # each drew and scored a part


def test_rows_are_shared_from_the_longest_and_none_is_left_out(two: Path) -> None:
    for each in told(two):
        assert each["shares"] == [[[3, 0], [1]], [[4, 2]]]
    lengths = [3, 1, 2, 5, 4]
    assert list(shared_by_length(lengths, 2)) == list(by_length(lengths, 2, key=lambda n: n))


def test_a_failure_in_one_process_ends_all_with_one_message(two: Path) -> None:
    first, second = told(two)
    assert first["ValueError"] == ["ValueError", "the reward is ill"]
    assert second["ValueError"] == ["SystemExit", "1"]
    kind, message = first["ZeroDivisionError"]
    assert kind == "RuntimeError"
    assert message.startswith("process 1 failed: ZeroDivisionError: the reward is ill\nTraceback")
    assert "in fails_in_second" in message
    assert second["ZeroDivisionError"] == ["ZeroDivisionError", "the reward is ill"]
    assert not (two / "ill").exists()


def test_an_error_outside_what_is_shared_is_told_by_whoever_meets_it(two: Path) -> None:
    assert [each["alone"] for each in told(two)] == [["OSError", "this disk is full"]] * 2


def test_numbers_that_are_none_in_one_process_are_called_so_in_all(two: Path) -> None:
    assert [each["overflow"] for each in told(two)] == ["NoNumbers"] * 2  # whoever catches it does so in all


def test_what_the_first_process_fails_at_is_told_to_all_in_the_first_line(two: Path) -> None:
    first, second = (each["first"] for each in told(two))
    assert first == ["Own", "CUDA out of memory"]
    assert second[0] == "RuntimeError"
    assert second[1].split("\n")[0].startswith("process 0 failed: ")
    assert "CUDA out of memory" in second[1].split("\n")[0]  # which the commands know


def test_a_process_runs_the_model_for_its_own_batches_alone(two: Path) -> None:
    assert forwards() == 12 * 2  # a prompt is read, a token drawn
    assert [each["forwards"] for each in told(two)] == [6 * 2, 6 * 2]


def test_a_rank_without_a_world_is_the_only_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes.is_first()


def test_every_process_goes_on_with_its_own_random_state_of_dropout(two: Path) -> None:
    assert all(equal for each in told(two) for equal in each["dropout"])


def one_job(number: int, name: str, pre: Path, out: Path, die: int | None, shard: bool) -> None:
    job(name, pre, out, die=die, shard=shard)


def goes_on_after_a_kill(name: str, pre: Path, two: Path, place: Path, *, shard: bool = False) -> None:
    """Two processes killed in the second iteration end with the bits of `two`, and one alone goes on where they stood."""
    steps = {"rsf": 4, "ppo": 8}[name]
    with pytest.raises(mp.ProcessExitedException):
        in_two(one_job, name, pre, place / "out", steps + 2, shard)
    assert [p.name for p in (place / "out.work").glob("state-*")] == ["state-0001.pt"]
    shutil.copytree(place / "out.work", place / "alone.work")
    in_two(one_job, name, pre, place / "out", None, shard)
    for file in ("model.safetensors", "metrics.jsonl"):
        assert (place / "out" / file).read_bytes() == (two / name / file).read_bytes()
    job(name, pre, place / "alone")
    continued, both = open_checkpoint(place / "alone"), open_checkpoint(two / name)
    for tensor in both:
        torch.testing.assert_close(continued[tensor], both[tensor], rtol=1e-9, atol=1e-9)


def test_two_killed_processes_go_on_with_the_bits_of_two_never_killed(pre: Path, two: Path, tmp_path: Path) -> None:
    goes_on_after_a_kill("rsf", pre, two, tmp_path)  # ppo: in test_sharding, cut up


def test_one_gpu_for_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="expected cuda, of which each process of torchrun takes one, found cuda:0"):
        processes.own_device("cuda:0")
    assert processes.own_device("cuda") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # a launcher shows each process its own alone
    assert processes.own_device("cuda:0") == torch.device("cuda", 0)


@pytest.mark.parametrize("sharded", ["FSDP", "DEEPSPEED"])
def test_weights_that_are_cut_up_are_refused(sharded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{sharded}", "true")
    model, words = tiny("llama"), tokenizer()
    for method, run in {"rsf": rsf, "ppo": ppo}.items():
        with pytest.raises(ValueError, match=f"{method}: expected whole weights in every process, found {sharded}"):
            run(model, words, PROMPTS, letters)


def test_collect_stays_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="collect: expected one process, found 2"):
        collect(tiny("llama"), tokenizer(), PROMPTS, letters)
