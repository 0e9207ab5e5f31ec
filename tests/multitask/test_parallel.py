"""Two gloo ranks do what one rank does: the module in a plain loop, and inside the Trainer."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from counterpoise.multitask import MGDA, BanditMTL, UncertaintyWeighting
from counterpoise.ranks import sum_over_ranks, world_size

from .toy import TASKS, Toy, gradients, rows

MICRO = 2
# The last step has a task that one rank never sees, and one that nobody sees.
PLACES = [[0, 1, 1, 2, 0, 2, 2, 0]] * 4 + [[0, 2, 0, 2, 0, 0, 0, 0]]
ROWS = [rows(8, seed, tasks=tasks) for seed, tasks in enumerate(PLACES)]
ONE_TASK_A_BATCH = [rows(8, seed, tasks=[seed % 3] * 8) for seed in range(7)]


def loop(rank: int, world: int, *, counted: bool, method=BanditMTL, given=ROWS) -> dict:
    """Train the toy on this rank's rows, in micro-batches when the window is counted beforehand."""
    toy = Toy()
    weighting = method(TASKS, **({"rho": 0.4} if method is BanditMTL else {})).double()
    everything = torch.nn.ModuleList([toy, weighting])
    optimizer = torch.optim.SGD(everything.parameters(), lr=0.1)
    history = []
    for x, y, task in given:
        optimizer.zero_grad()
        mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
        totals = [float((task == i).sum()) for i in range(3)] if counted else None
        for part in torch.arange(8)[mine].chunk(MICRO if counted else 1):
            weighting(*toy.losses(x[part], y[part], task[part]), totals).backward()
        if world > 1:  # what DDP does
            for parameter in everything.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(parameter.grad)
                parameter.grad /= world
        optimizer.step()
        weighting.step()
        history.append(torch.tensor(weighting.weights(), dtype=torch.float64))
    return {"weights": torch.stack(history), "gradients": gradients(toy), "metrics": weighting.metrics()}


class Through(nn.Module):
    """The toy as DDP wants it: losses from its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.toy = Toy()

    def forward(self, x, y, task):
        return self.toy.losses(x, y, task)


def accelerated(rank: int, world: int) -> dict:
    """A plain accelerate loop with DDP on this rank's rows, every task on every rank; without accelerate on one rank."""
    model, balance = Through(), BanditMTL(TASKS, rho=0.4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward, wrapped = torch.Tensor.backward, model
    if world > 1:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        backward = accelerator.backward
        assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    for seed in range(4):
        x, y, task = rows(8, seed, tasks=[0, 1, 2, 0, 1, 2, 0, 1])
        optimizer.zero_grad()
        backward(balance(*wrapped(x[mine], y[mine], task[mine])))
        optimizer.step()
        balance.step()
    return {"weights": balance.weights(), "parameters": [p.detach().clone() for p in model.parameters()]}


def own_parameters(rank: int, world: int) -> dict:
    """A user's own DDP loop that only hands the optimiser the weighting's parameters."""
    model = Through()
    balance = UncertaintyWeighting(TASKS).double()
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True) if world > 1 else model
    optimizer = torch.optim.Adam([*model.parameters(), *balance.parameters()], lr=0.05)
    for x, y, task in ROWS:
        optimizer.zero_grad()
        totals = [float((task == i).sum()) for i in range(3)]
        for part in torch.arange(8)[rank * 8 // world : (rank + 1) * 8 // world].chunk(MICRO):
            balance(*wrapped(x[part], y[part], task[part]), totals).backward()
        optimizer.step()
        balance.step()
    return {"model": list(model.state_dict().values()), "balance": [p.detach() for p in balance.parameters()]}


def drawing() -> BanditMTL:
    return BanditMTL(TASKS, rho=0.8, eta=20.0, drawn_by="p")


def refusal(rank: int) -> str:
    theta = torch.ones(2, requires_grad=True)
    try:
        MGDA(2, shared=[theta])(theta.square())
    except RuntimeError as error:
        return str(error)
    return ""


def non_finite_on_one_rank(rank: int) -> tuple[int, list[float]]:
    weighting = BanditMTL(2, rho=0.3)
    weighting(torch.tensor([1.0, float("nan") if rank == 1 else 2.0]))
    weighting.step()
    return weighting.skipped, weighting.weights()


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {k: str(v) for k, v in place.items()}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = {
        "world": world_size(),
        "sum": sum_over_ranks([1.0 + rank, 1e-9 * rank]),
        "counted": loop(rank, 2, counted=True),
        "uncounted": loop(rank, 2, counted=False),
        "alternating": loop(rank, 2, counted=True, given=ONE_TASK_A_BATCH),
        "uncertainty": loop(rank, 2, counted=True, method=UncertaintyWeighting),
        "accelerate": accelerated(rank, 2),
        "own_parameters": own_parameters(rank, 2),
        "refusal": refusal(rank),
        "skipped": non_finite_on_one_rank(rank),
    }
    from .hf import parameters, token_rows, train

    trainer = train(f"{folder}/hf", batch=2, accumulate=2, steps=3, ddp_backend="gloo")
    found["trainer"] = {"parameters": parameters(trainer), "weights": trainer.weighting.weights()}
    found["trainer_world"] = trainer.args.world_size
    trainer = train(
        f"{folder}/hf", batch=2, accumulate=2, steps=3, ddp_backend="gloo", weighting=UncertaintyWeighting(TASKS)
    )
    found["trainer_uncertainty"] = {"parameters": parameters(trainer), "weights": trainer.weighting.weights()}
    # 9 of 32 rows have labels: micro-batches without any on one rank only, so unequal backward passes.
    trainer = train(
        f"{folder}/hf", batch=2, accumulate=2, steps=3, ddp_backend="gloo", weighting=UncertaintyWeighting(TASKS),
        dataset=token_rows(labelled=9),
    )  # fmt: skip
    found["trainer_masked"] = {"parameters": parameters(trainer), "weights": trainer.weighting.weights()}
    trainer = train(f"{folder}/hf", batch=2, accumulate=2, steps=3, ddp_backend="gloo", mixture=drawing())
    found["trainer_mixture"] = {"parameters": parameters(trainer), "rounds": trainer.schedule.rounds}
    found["trainer_mixture"] |= {"weights": trainer.mixture.weights(), "metrics": trainer.mixture.metrics()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(port, str(folder)), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_there_were_two_ranks_and_sums_are_float64(ranks):
    assert [r["world"] for r in ranks] == [2, 2] == [r["trainer_world"] for r in ranks]
    assert ranks[0]["sum"] == ranks[1]["sum"] == [3.0, 1e-9]
    assert world_size() == 1


@pytest.mark.parametrize("way", ["counted", "uncounted", "uncertainty", "alternating"])
def test_two_ranks_are_one_rank(ranks, way):
    method = UncertaintyWeighting if way == "uncertainty" else BanditMTL
    given = ONE_TASK_A_BATCH if way == "alternating" else ROWS
    one = loop(0, 1, counted=way != "uncounted", method=method, given=given)
    for rank in ranks:
        torch.testing.assert_close(rank[way]["weights"], one["weights"], rtol=0, atol=1e-12)
        for a, b in zip(rank[way]["gradients"], one["gradients"], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        assert rank[way]["metrics"] == {k: pytest.approx(v, abs=1e-12) for k, v in one["metrics"].items()}
    if way != "uncertainty":
        assert torch.equal(ranks[0][way]["weights"], ranks[1][way]["weights"])
    assert (one["weights"][0] - one["weights"][-1]).abs().max() > 1e-2


def test_accelerate_on_two_ranks_is_one_rank(ranks):
    one = accelerated(0, 1)
    for rank in ranks:
        assert rank["accelerate"]["weights"] == pytest.approx(one["weights"], abs=1e-12)
        for a, b in zip(rank["accelerate"]["parameters"], one["parameters"], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert max(abs(w - 1 / 3) for w in one["weights"]) > 1e-2


def test_own_parameters_on_two_ranks_are_those_on_one(ranks):
    one = own_parameters(0, 1)
    for rank in ranks:
        for what in ("model", "balance"):
            torch.testing.assert_close(rank["own_parameters"][what], one[what], rtol=0, atol=1e-9)
    assert all(map(torch.equal, ranks[0]["own_parameters"]["balance"], ranks[1]["own_parameters"]["balance"]))
    assert one["balance"][0].abs().min() > 0.01


def test_methods_on_gradients_refuse_several_ranks(ranks):
    for rank in ranks:
        assert "MGDA needs the whole batch" in rank["refusal"]
        assert "2 processes" in rank["refusal"]


def test_a_non_finite_loss_on_one_rank_is_skipped_on_all(ranks):
    for rank in ranks:
        assert rank["skipped"] == (1, [0.5, 0.5])


def test_the_trainer_on_two_ranks_is_the_trainer_on_one(ranks, tmp_path):
    from .hf import parameters, token_rows, train

    for way, method, labelled in (
        ("trainer", None, 32),
        ("trainer_uncertainty", UncertaintyWeighting(TASKS), 32),
        ("trainer_masked", UncertaintyWeighting(TASKS), 9),
    ):
        one = train(str(tmp_path), batch=8, steps=3, weighting=method, dataset=token_rows(labelled=labelled))
        for rank in ranks:
            torch.testing.assert_close(rank[way]["parameters"], parameters(one), rtol=1e-5, atol=1e-6)
            assert rank[way]["weights"] == pytest.approx(one.weighting.weights(), rel=1e-5)
        assert ranks[0][way]["weights"] == ranks[1][way]["weights"]
        assert max(abs(w - one.weighting.weights()[0]) for w in one.weighting.weights()) > 1e-4


def test_a_mixture_on_two_ranks_draws_and_learns_as_on_one(ranks, tmp_path):
    from .hf import parameters, train

    one = train(str(tmp_path), batch=8, steps=3, mixture=drawing())
    for rank in ranks:
        found = rank["trainer_mixture"]
        torch.testing.assert_close(found["parameters"], parameters(one), rtol=1e-5, atol=1e-6)
        assert found["weights"] == pytest.approx(one.mixture.weights(), rel=1e-4)
        assert found["rounds"] == one.schedule.rounds
    assert ranks[0]["trainer_mixture"]["metrics"] == ranks[1]["trainer_mixture"]["metrics"]
    assert len({tuple(counts) for counts in one.schedule.rounds}) > 1
