"""`align`: from a checkpoint on disk, through any method, to an aligned one, resumable on the way and atomic at its end."""

from __future__ import annotations

import inspect
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from counterpoise.alignment.settings import Settings, Teaching, drawn_of
from counterpoise.alignment.training import processes
from counterpoise.alignment.training.models import Machine, load
from counterpoise.alignment.training.run import BESIDE, FREE, Run, differing, finished_state, other_run, save_model
from counterpoise.alignment.training.stepping import Mitigation, weights_sha256
from counterpoise.checkpoints.about import about
from counterpoise.checkpoints.checkpoint import Checkpoint
from counterpoise.checkpoints.companions import of_the_tokenizer
from counterpoise.checkpoints.files import CheckpointError, refuse_occupied, staged
from counterpoise.checkpoints.opening import open_checkpoint
from counterpoise.language.loading import refuse_unmeasurable
from counterpoise.language.prompts import Prompt
from counterpoise.language.sampling import Drawing
from counterpoise.records import Result, Stages, digest, public, versions, write_json
from counterpoise.tables.card import aligned_card
from counterpoise.tables.grid import Cell, Column, Table, as_html


@dataclass(frozen=True, eq=False)
class Aligned(Result):
    """What `align` and `heal` give back; metrics.jsonl beside it has a line an iteration.

    Attributes:
        settings: all that decided the numbers.
        iterations: how many were done.
        metrics: of the last one.
        seconds: how long it took.
        already_finished: True where `out` held this very run.
    """

    settings: dict[str, Any] = field(init=False, repr=False)
    iterations: int = field(init=False)
    metrics: dict[str, Any] = field(init=False)
    seconds: float = field(init=False)
    already_finished: bool | None = field(init=False, repr=False)

    def _repr_html_(self) -> str:
        rows = tuple((k, f"{v:.4g}") for k, v in (self.metrics or {}).items() if isinstance(v, (int, float)))
        columns = Column("metric", lambda row: Cell(row[0]), numeric=False), Column("last", lambda row: Cell(row[1]))
        title = f"{self.settings.get('method')}, {self.iterations} iterations"
        return f"<p><strong>{title}</strong></p>{as_html(Table(columns, rows), title)}"


@processes.one_message()
def align(
    source: str | Path,
    out: str | Path,
    method: Callable[..., Any],
    *,
    mitigations: Sequence[Mitigation] = (),
    told: Mapping[str, Any] | None = None,
    work: str | Path | None = None,
    machine: Machine = Machine(),
    keep_checkpoints: bool = True,
    command: str | None = None,
    progress: Stages | None = None,
) -> Aligned:
    """Align the checkpoint `source` and write the result to `out`.

    Under torchrun or accelerate every process calls this with the same arguments and the first one writes. It alone tells
    of an error that all meet; the others end with SystemExit(1).

    Args:
        source: PRE, a folder or a hub id.
        out: a new folder; it appears whole or not at all, with align.json (settings, versions) and metrics.jsonl.
        method: `rsf`, `distil`, `ppo` or `dpo` with its data and settings bound by `functools.partial`.
        mitigations: see `counterpoise.alignment.training.stepping.Mitigation`; given here, not to `method`.
        told: what else decides the numbers and cannot be read off `method`, such as the reward's fingerprint; a run
            goes on only when it is equal. A `reference` that is not PRE is such a thing: a model in memory, perhaps on
            another device or cut up among processes, is not hashed.
        work: checkpoints of every iteration and the state to go on from (default OUT.work).
        machine: where and how precisely; give `method` and the mitigations references made alike.
        keep_checkpoints: keep a checkpoint of every iteration in `work`.

    Returns:
        The content of align.json.

    Raises:
        ValueError: `work` holds a run with other settings, bad data, DeepSpeed, `shard` in one process or with dpo.
        CheckpointError: no such checkpoint, or an occupied `out`.

    >>> from counterpoise.alignment.rsf import rsf
    >>> from counterpoise.language.prompts import Prompt
    >>> method = partial(rsf, prompts=[Prompt((("user", "Hi"),))], reward=lambda p, r: [0.0] * len(r), iterations=2)
    >>> align("pre", "post", method)  # doctest: +SKIP
    """
    begun = time.time()
    machine.check()
    processes.join(machine.device)
    checkpoint = open_checkpoint(source)
    out = Path(out)
    settings = {
        "pre": checkpoint.sha256,
        BESIDE: _beside(checkpoint),
        "dtype": str(machine.dtype),
        "device": machine.device,
        **describe(method),
        "mitigations": [_described(m, checkpoint) for m in mitigations],
        **(told or {}),
        **({"bf16": True} if machine.bf16 else {}),
    }
    settings = json.loads(json.dumps(settings))
    if (out / "align.json").is_file():
        found = json.loads((out / "align.json").read_text(encoding="utf-8"))
        if not (names := differing(found["settings"], settings, except_for=FREE)):
            return Aligned({**found, "already_finished": True})
        raise CheckpointError(
            f"{out}: expected a new or empty folder, or the run that it holds, {other_run(found['settings'], settings, names)}; "
            "give another -o"
        )
    refuse_occupied(out.absolute())
    refuse_unmeasurable(checkpoint.folder)
    work = Path(work or out.with_name(f"{out.name}.work"))
    run = Run(work, settings, keep_checkpoints=keep_checkpoints, stages=progress)
    model, tokenizer = load(checkpoint.folder, machine)
    method(model, tokenizer, mitigations=mitigations, run=run)
    record: dict[str, Any] = public(
        {
            "source": checkpoint.source,
            "revision": checkpoint.revision,
            "card": about(checkpoint.folder),
            "settings": settings,
            "versions": versions(),
            "command": command,
            "seconds": round(time.time() - begun, 1),
            "iterations": run.done,
            "metrics": (run.metrics() or [{}])[-1],
        }
    )

    state = finished_state(model)

    def write() -> None:
        with staged(out) as folder:
            save_model(model, state, tokenizer, folder)
            write_json(folder / "align.json", record)
            (folder / "README.md").write_text(aligned_card(record), encoding="utf-8")
            shutil.copyfile(run.folder / "metrics.jsonl", folder / "metrics.jsonl")

    processes.on_first(write)
    return Aligned(record)


def describe(method: Callable[..., Any]) -> dict[str, Any]:
    """The name and plain settings of a bound method; data by the digest of its content, other objects left out."""
    bound = method if isinstance(method, partial) else partial(method)
    parameters = inspect.signature(bound.func).parameters
    values = {name: p.default for name, p in parameters.items() if p.default is not p.empty} | bound.keywords
    found: dict[str, Any] = {"method": bound.func.__name__}
    for name, value in values.items():
        if isinstance(value, Settings):
            found |= value.told
        elif isinstance(value, Teaching):
            found |= vars(value)
        elif isinstance(value, Drawing):  # of one response a prompt
            found |= drawn_of(value)
        elif isinstance(value, (int, float, str)):
            found[name] = value
        elif isinstance(value, (list, tuple)) and value:
            found[name] = digest([_content(x) for x in value])
    return found


def _beside(checkpoint: Checkpoint) -> str:
    """Digest of what decides its tokens beside the weights: config, stop tokens, tokenizer, chat template."""
    found = checkpoint.companions.items()
    named = {n: p for n, p in found if of_the_tokenizer(n) or n in ("config.json", "generation_config.json")}
    return digest({name: checkpoint.hashed(path) for name, path in named.items()})


def _described(mitigation: Mitigation, checkpoint: Checkpoint) -> dict[str, Any]:
    """Its settings, with the fingerprint of a `pre` that is not the run's own PRE."""
    pre = getattr(mitigation, "pre", None)
    if pre is None or (isinstance(pre, Checkpoint) and pre.folder == checkpoint.folder):
        return mitigation.describe()
    return mitigation.describe() | {"pre": weights_sha256(pre)}


def _content(item: Any) -> Any:
    if isinstance(item, Prompt):
        return item.key
    return [_content(x) for x in item] if isinstance(item, tuple) else item
