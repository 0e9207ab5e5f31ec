"""Models measured by engines on a Ray cluster: each takes the next piece when it is free, the store keeps what they find."""

from __future__ import annotations

import os
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from counterpoise.checkpoints.preflight import preflight
from counterpoise.evaluation.panel import Panel
from counterpoise.evaluation.workbench import Piece, Workbench
from counterpoise.records import Store, digest
from counterpoise.restoration.request import Request

Values = dict[str, tuple[Mapping[str, Any], Any]]
"""What a store holds as it travels: key and value, by the digest of the key."""
ROOM, ANSWER = 60.0, 1800.0
"""Seconds that the cluster may take to find room for the engines, and all engines to say that they are there."""
TRIES = 3
"""So many engines may be lost at one piece."""


@dataclass(frozen=True)
class Cluster:
    """Engines that measure for a restore: actors of Ray, each with a model of its own.

    Every node must find PRE, POST, prompts and abilities where the driver finds them, in the same version; the work folder
    is the driver's alone. The numbers are those of a restore without Ray. Searches and healing run in the driver, which also
    measures what was healed: those weights lie in its work folder. On GPUs the driver and the engines take turns.

    Attributes:
        load: the panel for a device, in each engine: `PanelFiles.load`.
        address: HOST:PORT of a cluster, or "auto": the one that runs here, else one that is started for the restore.
        replicas: engines. Each has a bundle of one placement group, so all its devices are on one node.
        needs: resources of an engine, as Ray names them; by default its GPUs, or the cores that torch uses in the driver.
    """

    load: Callable[[str], Panel]
    address: str = "auto"
    replicas: int = 1
    needs: Mapping[str, float] | None = None

    def check(self, device: str) -> None:
        """Raise where there can be no engines.

        Raises:
            ValueError: no replicas; a device that is one of several.
            ModuleNotFoundError: Ray is not installed.
        """
        if self.replicas < 1:
            raise ValueError(f"replicas: expected at least 1 engine, found {self.replicas}")
        if ":" in device:
            raise ValueError(f"ray: expected --device cuda or cpu, found {device}; Ray gives each engine its own GPUs")
        try:
            import ray  # noqa: F401
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "ray: expected the package, found none; pip install 'counterpoise[ray]'"
            ) from error

    @contextmanager
    def measuring(self, bench: Workbench, request: Request) -> Iterator[None]:
        """Inside, engines measure for `bench` what its store lacks.

        Raises:
            ValueError: the cluster has no room for the engines, or one of them sees another pair or panel.
            ConnectionError: no cluster at the address.
        """
        self.check(bench.device)
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        with ExitStack() as after:
            if not ray.is_initialized():
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
                at = None if self.address == "auto" else self.address
                ray.init(at, log_to_driver=False, logging_level="ERROR")
                after.callback(ray.shutdown)
            usual = (
                {"GPU": request.engine.tensor_parallel}
                if torch.device(bench.device).type == "cuda"
                else {"CPU": torch.get_num_threads()}
            )
            needs = dict(self.needs or usual)
            room = placement_group([needs] * self.replicas, strategy="SPREAD")
            after.callback(remove_placement_group, room)  # and with it the engines
            if not room.wait(ROOM):
                found = {name: ray.cluster_resources().get(name, 0) for name in needs}
                raise ValueError(
                    f"ray: expected room for {self.replicas} times {needs}, found {found} in all, of which others may hold "
                    "some; give fewer --replicas, or on processors a smaller OMP_NUM_THREADS"
                )
            how: dict[str, Any] = {"num_cpus": needs.pop("CPU", 0), "num_gpus": needs.pop("GPU", 0), "resources": needs}
            how["runtime_env"] = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}
            asked = replace(request, device=bench.device, dtype=bench.dtype), self.load, bench.panel.looks, os.getcwd()
            places = [PlacementGroupSchedulingStrategy(room, number) for number in range(self.replicas)]
            made = [ray.remote(Engine).options(**how, scheduling_strategy=p, max_restarts=-1) for p in places]
            engines = [make.remote(*asked) for make in made]
            bench.elsewhere = partial(_measure, bench, engines)
            after.callback(setattr, bench, "elsewhere", None)
            yield


class Engine:
    """One replica: a workbench with a store in memory, in a process of its own."""

    def __init__(self, request: Request, load: Callable[[str], Panel], looks: tuple[float, ...], folder: str) -> None:
        self.request, self.load, self.looks, self.folder = request, load, looks, folder

    @cached_property
    def bench(self) -> Workbench:
        """The pair and the panel as this node has them."""
        with suppress(FileNotFoundError):  # then whole paths alone can be found
            os.chdir(self.folder)  # paths are meant from there
        asked = self.request
        panel = replace(self.load(asked.device), looks=self.looks)
        on: dict[str, Any] = {
            "donor": asked.donor,
            "device": asked.device,
            "dtype": asked.dtype,
            "engine": asked.engine,
        }
        return Workbench(preflight(asked.pre, asked.post, drop=asked.drop), panel, _Carried({}), **on)

    def sees(self) -> tuple[str, dict[str, Any]]:
        """Its place, and what decides its numbers."""
        return f"{socket.gethostname()}, process {os.getpid()}", _decides(self.bench)

    def measure(self, piece: Piece, held: Values) -> Values:
        """What a piece adds to that which is held of it already."""
        self.bench.store = store = _Carried(dict(held))
        self.bench.piece(piece)
        return {name: store.values[name] for name in store.values.keys() - held.keys()}

    def rest(self) -> None:
        """Leave the devices to the driver."""
        self.bench.free()


class _Carried(Store):
    """A store in memory, in front of another one where there is one."""

    def __init__(self, values: Values, behind: Store | None = None) -> None:
        super().__init__("")  # no folder is made before something is kept, and here nothing is
        self.values, self.behind = values, behind

    def once(self, key: Mapping[str, Any], work: Callable[[], Any]) -> Any:
        name = digest(key)
        if name not in self.values:
            self.values[name] = key, work() if self.behind is None else self.behind.once(key, work)
        return self.values[name][1]


class _Lacking(Exception):
    """A model would have to be asked."""


def _held(bench: Workbench, piece: Piece) -> Values | None:
    """What the store holds of a piece for which a model is to be asked; None of one that it holds whole."""

    def refuse() -> nn.Module:
        raise _Lacking

    store = bench.store
    bench.store = found = _Carried({}, store)
    try:
        bench.piece(piece, model=refuse)
    except _Lacking:
        return found.values
    finally:
        bench.store = store
    return None


def _decides(bench: Workbench) -> dict[str, Any]:
    return {**bench.inputs, "panel": bench.panel.fingerprint, "settings": bench.panel.settings}


def _measure(bench: Workbench, engines: Sequence[Any], pieces: Sequence[Piece]) -> None:
    """Have the engines measure what the store lacks of these; what one was at that is lost, another one does again."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    ours = [piece for piece in pieces if piece.model.instead is None]  # what was healed lies with the driver
    left = [(number, held) for number, piece in enumerate(ours) if (held := _held(bench, piece)) is not None][::-1]
    total, lost = len(left), Counter[int]()
    stage, kept = bench.stage("measuring on the cluster"), 0
    idle: list[Any] = []
    busy: dict[Any, tuple[Any, tuple[int, Values] | None]] = {}
    if total > 0:
        bench.free()
        busy |= {_sees(engine): (engine, None) for engine in engines}
    while kept < total:
        while idle and left:
            engine, (number, held) = idle.pop(), left.pop()
            busy[engine.measure.remote(ours[number], held)] = engine, (number, held)
        at_work = any(given for _, given in busy.values())
        done, _ = ray.wait([*busy], timeout=None if at_work else ANSWER)
        if not done:
            raise ConnectionError(
                f"ray: expected an engine, found none in {ANSWER:g} s; see `ray status` of the cluster"
            )
        engine, work = busy.pop(done[0])
        try:
            found: Any = ray.get(done[0])
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:  # it died, or was ended where there was no memory left
            if work is not None:
                lost[work[0]] += 1
                left.append(work)
                busy[_sees(engine)] = engine, None  # when Ray has started it again
            if not (busy or idle) or TRIES in lost.values():
                raise ConnectionError(f"ray: expected an engine that stays, found that they end: {error}") from None
            continue
        if work is None:
            _refuse_another(found, _decides(bench))
        else:
            for key, value in found.values():
                bench.store.once(key, partial(lambda it: it, value))
            kept += 1
            if stage is not None:
                stage(kept, total)
        idle.append(engine)
    if idle and torch.device(bench.device).type == "cuda":
        ray.wait([engine.rest.remote() for engine in idle], num_returns=len(idle), timeout=ANSWER)


def _sees(engine: Any) -> Any:
    return engine.sees.options(max_task_retries=-1).remote()


def _refuse_another(seen: tuple[str, Mapping[str, Any]], ours: Mapping[str, Any]) -> None:
    place, theirs = seen
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"ray: expected what the driver has on every node, found another {name} at {place}: {theirs.get(name)}, "
                f"not {value}; copy the same files there, and install the same version"
            )
