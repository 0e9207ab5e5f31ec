"""A run that can be stopped at any moment and goes on: its folder of checkpoints, state, metrics and finished pieces."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from counterpoise.alignment.mitigations.lowrank import is_low_rank, merged
from counterpoise.alignment.training import processes, tracking
from counterpoise.alignment.training.sharding import moments_like, part_like, whole
from counterpoise.alignment.training.stepping import Mitigation, told_of
from counterpoise.checkpoints.files import replacing, staged
from counterpoise.language.loading import without_bars
from counterpoise.language.sharded import own_part
from counterpoise.ranks import gathered, is_sharded
from counterpoise.records import Progress, Stages, Store, digest, named, read_lines, write_json, write_whole

T = TypeVar("T")
FREE = ("micro_batch_size", "draw_batch_size")
"""Settings that change last bits alone, which may turn a drawn token (in DPO also how the pairs of an epoch's smaller last
step are weighed); a run may go on with others, after a lack of memory say."""
BESIDE = "beside"
"""The setting that has the digest of the files that decide a run's tokens beside its weights."""
EXTENDED = ("iterations", *FREE)
"""Settings that may differ when a run goes on: more iterations continue it."""


class Run:
    """The working folder of one alignment.

    Holds settings.json, metrics.jsonl (a line an iteration), iteration-0001/ and so on (whole checkpoints, ready for
    `restore` and `front`), state-0001.pt (the last iteration's: weights, optimiser, mitigations, random numbers) and
    the pieces of work of an iteration in progress. An iteration counts once its state is written; what a kill left of a
    later one is done again, with the same numbers.

    Args:
        folder: made when missing.
        settings: json of all that decides the numbers; a folder with iterations of other settings is refused.
        keep_checkpoints: keep iteration-*/ of every iteration, not of the last alone.
        stages: progress callback of (stage, done, total).

    Raises:
        ValueError: the folder holds iterations of a run with other settings, or more iterations than are asked for.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], *, keep_checkpoints: bool = True, stages: Stages | None = None
    ) -> None:
        self.folder, self.keep_checkpoints, self._stages = folder, keep_checkpoints, stages
        self.settings = json.loads(json.dumps(settings))
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "settings.json"
        if path.is_file() and self.done:
            self._refuse_other(json.loads(path.read_text(encoding="utf-8")))
        if processes.is_first():
            write_json(path, self.settings)
        self._store = Store(self.folder / "pieces")
        self._key = digest({k: v for k, v in self.settings.items() if k not in EXTENDED})

    def _refuse_other(self, kept: Mapping[str, Any]) -> None:
        if names := differing(kept, self.settings, except_for=EXTENDED):
            raise ValueError(
                f"{self.folder}: expected the run that was begun there, {other_run(kept, self.settings, names)}; give the same "
                "settings to go on, or another --out or --work"
            )
        asked = self.settings.get("iterations", self.done)
        if asked < self.done:
            earlier = self.checkpoint(asked)
            whole_one = f"{earlier} is the model after {asked}, a whole checkpoint"
            kept_as = f"{whole_one} to be copied or given to restore and front as it is"
            lost = f"no checkpoint of iteration {asked} was kept, so it takes another --work to train it again"
            raise ValueError(
                f"{self.folder}: expected at least {self.done} iterations, which are done there, found {asked}; "
                f"{kept_as if earlier.is_dir() else lost}"
            )

    @property
    def done(self) -> int:
        """Iterations that are finished."""
        return max((int(path.stem.rpartition("-")[2]) for path in self.folder.glob("state-*.pt")), default=0)

    def once(self, what: str, iteration: int, work: Callable[[], T]) -> T:
        """The json value of a piece of an iteration's work, done at most once."""
        return self._store.once({"what": what, "iteration": iteration, "run": self._key}, work)

    def stage(self, name: str) -> Progress | None:
        """A progress callback for one stage, in the first process."""
        return named(self._stages if processes.is_first() else None, name)

    def load(
        self, model: nn.Module, tokenizer: Any, optimizer: torch.optim.Optimizer, mitigations: Sequence[Mitigation]
    ) -> dict[str, Any] | None:
        """Put the last finished iteration's state back and drop what came after it; None at the very start.

        Call it after every mitigation has started: `save` keeps what was given here. Returns what the loop itself gave
        to `save`.
        """
        self._model, self._tokenizer, self._optimizer, self._mitigations = model, tokenizer, optimizer, mitigations
        processes.on_first(lambda: self.drop_after(self.done))
        if not self.done:
            return None
        state = torch.load(self._state(self.done), map_location="cpu", weights_only=True, mmap=True)
        with torch.no_grad():
            parameters = dict(model.named_parameters())
            for name, tensor in state["weights"].items():
                own_part(parameters[name]).copy_(part_like(tensor, parameters[name]))
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.load_state_dict(moments_like(state["optimizer"], trained))
        for mitigation, kept in zip(mitigations, state["mitigations"], strict=True):
            mitigation.load_state_dict(kept)
        random = [state["torch"], *state.get("torch of others", [])]
        torch.set_rng_state(random[processes.rank()] if processes.rank() < len(random) else random[0])
        cuda, device = state.get("cuda", []), next(model.parameters()).device
        if device.type == "cuda" and processes.rank() < len(cuda) and cuda[processes.rank()] is not None:
            torch.cuda.set_rng_state(cuda[processes.rank()], device)
        return state["loop"]  # type: ignore[no-any-return]

    def save(self, iteration: int, *, metrics: Mapping[str, Any], loop: Mapping[str, Any]) -> None:
        """Write iteration number `iteration` (from 1): checkpoint, a line of metrics, and last the state.

        Of several processes the first writes, and the others wait. A full disk or the like is an OSError; what was
        finished before stays as it was.
        """
        device = next(self._model.parameters()).device
        random, *others = gathered(torch.get_rng_state)
        cuda = gathered(lambda: torch.cuda.get_rng_state(device) if device.type == "cuda" else None)
        self.save_checkpoint(iteration, self._model, self._tokenizer, self._mitigations)
        state = whole({
            "weights": {n: p.data for n, p in self._model.named_parameters() if p.requires_grad},
            "optimizer": self._optimizer.state_dict(),
            "mitigations": [m.state_dict() for m in self._mitigations],
            "torch": random,
            "torch of others": others,
            "cuda": cuda,
            "loop": dict(loop),
        })  # fmt: skip

        def write() -> None:
            with telling(f"iteration {iteration}: expected to write to {self.folder}"):
                self.log({"iteration": iteration, **metrics, **told_of(self._mitigations)})
                self.mark(iteration, state)

        processes.on_first(write)

    def mark(self, iteration: int, state: Mapping[str, Any]) -> None:
        """Count the iteration as finished, with the state from which the next one goes on."""
        with replacing(self._state(iteration)) as partial:
            torch.save(dict(state), partial)
        for path in {*self.folder.glob("state-*.pt")} - {self._state(iteration)}:
            path.unlink()

    def save_checkpoint(
        self, iteration: int, model: nn.Module, tokenizer: Any, mitigations: Sequence[Mitigation]
    ) -> None:
        """Write iteration-NNNN/, the model as it would be if training ended now; all processes call it."""

        def write() -> None:
            with telling(f"iteration {iteration}: expected to write to {self.folder}"):
                with staged(self.checkpoint(iteration)) as folder:
                    save_model(model, state, tokenizer, folder)
                if not self.keep_checkpoints:
                    for path in {*self.folder.glob("iteration-*")} - {self.checkpoint(iteration)}:
                        shutil.rmtree(path)

        with ExitStack() as stack:
            for mitigation in mitigations:
                stack.enter_context(mitigation.as_finished(model))
            state = finished_state(model)
            processes.on_first(write)

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl, and tell it to the trackers of `tracking.reporting`."""
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        tracking.tell(line, self.settings)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_lines(self.folder / "metrics.jsonl")

    def checkpoint(self, iteration: int) -> Path:
        """Where the checkpoint of an iteration lies."""
        return self.folder / f"iteration-{iteration:04d}"

    def _state(self, iteration: int) -> Path:
        return self.folder / f"state-{iteration:04d}.pt"

    def drop_after(self, iteration: int) -> None:
        """Remove what was written of later iterations."""
        for path in self.folder.glob("iteration-*"):
            if int(path.name.rpartition("-")[2]) > iteration:
                shutil.rmtree(path)
        kept = [line for line in self.metrics() if line.get("iteration", 0) <= iteration]
        if (self.folder / "metrics.jsonl").is_file():
            write_whole(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))


def finished_state(model: nn.Module) -> dict[str, Any] | None:
    """What `save_model` writes: tensors whole, any LoRA update added in. None says: the model's own; all processes call it."""
    adapted = is_low_rank(model)
    if not adapted and not is_sharded(model):
        return None
    # Tied weights stay one tensor under two names, so that they are written once.
    state = whole(model.state_dict(keep_vars=True))
    return merged(model, state) if adapted and processes.is_first() else state


def save_model(model: nn.Module, state: Mapping[str, Any] | None, tokenizer: Any, folder: Path) -> None:
    """A checkpoint in safetensors of `finished_state(model)`, with its tokenizer."""
    with without_bars():
        model.save_pretrained(folder, state_dict=state)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)


@contextmanager
def telling(place: str) -> Iterator[None]:
    """torch and safetensors report a failed write as errors of their own kinds; make them an OSError with its place."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(f"{place}, found: {error}; make room, earlier iterations are whole") from error


def differing(kept: Mapping[str, Any], settings: Mapping[str, Any], *, except_for: Sequence[str]) -> list[str]:
    """Names of the settings in which two runs differ; one that is missing is None.

    Runs of before they looked at what lies `BESIDE` the weights are those of whatever lies there.
    """
    kept = {BESIDE: settings.get(BESIDE), **kept}
    return [n for n in {**kept, **settings} if n not in except_for and kept.get(n) != settings.get(n)]


def other_run(kept: Mapping[str, Any], settings: Mapping[str, Any], names: Sequence[str]) -> str:
    """In which of these settings they differ, in words."""
    first, more = names[0], f" (and {len(names) - 1} more differ)" if names[1:] else ""
    if first == BESIDE:
        return f"with its config, stop tokens, tokenizer and chat template, found another of them{more}"
    return f"with {first} = {kept.get(first)!r}, found {settings.get(first)!r}{more}"
