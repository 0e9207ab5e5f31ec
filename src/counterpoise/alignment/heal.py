"""`heal`: a checkpoint between two others, taught by both; resumable on the way and atomic at its end. See teaching.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from counterpoise.alignment.align import Aligned, align
from counterpoise.alignment.settings import Teaching, refuse_settings
from counterpoise.alignment.teaching import DRAWN_BY, PRE, Asked, Ids, Teachers, answers, best_of, how_it_ended, teach
from counterpoise.alignment.training import processes
from counterpoise.alignment.training.models import Machine
from counterpoise.averaging.line import beside
from counterpoise.checkpoints.files import CheckpointError, first_line, refuse_occupied
from counterpoise.checkpoints.lora import LoraCheckpoint
from counterpoise.checkpoints.matching import refuse_moved_tokens
from counterpoise.checkpoints.preflight import Pair, preflight
from counterpoise.evaluation.abilities import Ability, load_abilities, refuse_repeats
from counterpoise.evaluation.panel import Panel
from counterpoise.evaluation.parts import PARTS
from counterpoise.language.loading import refuse_unmeasurable
from counterpoise.language.memory import free_memory
from counterpoise.language.prompts import Prompt, begins, encode_prompts, read_prompts
from counterpoise.language.sampling import Drawing
from counterpoise.language.ways import context_of
from counterpoise.records import Stages, public, read_lines, write_json, write_whole

DRAWING = Drawing(max_new_tokens=64)
CHECKED = 64
"""Validation prompts that a point is judged by, on each side."""
OPENINGS, OPENING = 256, 8
"""Openings that PRE draws from its start token, and tokens of the longest one."""
CARD = """# Healed checkpoint

This is no average. It began as `{start}` and answered alignment prompts and questions of abilities; on its own answers it
learned from two teachers, `{post}` where alignment is asked and `{pre}` elsewhere ({divergence} divergence, {after[step]} of
{steps} steps, {trained:,} tokens). No reward, label or reference was read. On validation prompts it went from
{before[align]:.4f} to {after[align]:.4f} nats per token from the first teacher, and from {before[keep]:.4f} to
{after[keep]:.4f} from the second. {where} {how}
`align.json` has all settings and hashes, `metrics.jsonl` every point.
"""


@dataclass(frozen=True)
class Healing:
    """A student, its two teachers, what it is asked, and where the result goes.

    Attributes:
        start: the student: POST, PRE, an average of them; another model of the same shapes is warned of and allowed.
        post, pre: the teachers of alignment and of what there was before.
        prompts: of alignment, a file or read; the proxy part is taught on, the validation part looked at.
        abilities: specs or loaded; the questions of their items are asked, split likewise, and no answer is read.
        openings: so many openings of PRE's own are continued as questions of one ability more; None: `OPENINGS` of them where
            no ability can be asked, else none.
        teaching: how long, how fast and by what.
    """

    start: str | Path
    post: str | Path
    pre: str | Path
    out: Path
    prompts: str | Path | Sequence[Prompt]
    abilities: Sequence[str | Ability] = ()
    openings: int | None = None
    teaching: Teaching = Teaching()
    drawing: Drawing = DRAWING
    machine: Machine = Machine()
    work: Path | None = None
    trust_tasks: bool = False

    def check(self) -> None:
        """Raise for what can be seen to be wrong before anything is read.

        Raises:
            ValueError: a setting out of range, mixed precision of other weights than float32, float16 weights.
            CheckpointError: `out` is occupied, a model that cannot be sampled from.
        """
        self.drawing.check()
        if self.drawing.n != 1:
            raise ValueError(f"n: expected 1, as the student answers every prompt once, found {self.drawing.n}")
        self.teaching.check()
        refuse_settings(openings=self.openings)
        self.machine.check()
        if not (self.out / "align.json").is_file():
            refuse_occupied(self.out.absolute())
        refuse_unmeasurable(self.start, self.post, self.pre)

    def pairs(self) -> tuple[Pair, Pair]:
        """PRE with POST, and with the student; other names, shapes or tokenizers, and adapters, are a CheckpointError."""
        first = preflight(self.pre, self.post)
        with as_student(self.start):
            found = first, preflight(self.pre, self.start, out=self.out)
        for pair in found:
            if isinstance(pair.post, LoraCheckpoint):  # whose model would be loaded without it
                raise CheckpointError(
                    f"{pair.post.source}: expected whole weights to heal or to teach by, found a LoRA adapter; write them "
                    f"first: counterpoise average {pair.pre.source} {pair.post.source} --ratio 1 -o FOLDER"
                )
            refuse_moved_tokens(pair.pre, pair.post)
        return found

    def sources(self, student: Path) -> tuple[Any, list[Asked], list[str]]:
        """The student's tokenizer, the alignment prompts before the questions of each ability that has some, and warnings.

        Raises:
            CheckpointError: no tokenizer in the student's folder.
            ValueError: no prompts in a part, one that does not fit, and nothing to keep abilities by: no question, and no
                token by which PRE would begin a text of its own.
        """
        from transformers import AutoConfig, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(student, trust_remote_code=False)
        except (ValueError, OSError, KeyError) as error:
            told = f"{student}: expected a tokenizer beside the student's weights, found: {first_line(error)}"
            raise CheckpointError(told) from None
        context = context_of(AutoConfig.from_pretrained(student, trust_remote_code=False))
        how, parts, prompts = self.drawing, PARTS[:2], self.prompts
        if isinstance(prompts, (str, Path)):
            prompts = read_prompts(prompts)
        if other := [p for p in prompts if not isinstance(p, Prompt)]:
            raise ValueError(f"prompts: expected a file, or what `read_prompts` gives, found {other[0]!r}")
        panel = Panel(prompts, lambda *_: [], ())
        room: dict[str, Any] = {"chat": how.chat, "new": how.max_new_tokens, "limit": context}
        cut = [tuple(encode_prompts(tokenizer, panel.prompts_of(part), **room)) for part in parts]
        found = [Asked("alignment", cut[0], cut[1][:CHECKED])]
        loaded = load_abilities(self.abilities, trust_tasks=self.trust_tasks)
        warned: list[str] = []
        for ability in loaded:
            asked = [ability.questions(tokenizer, part, how) for part in parts]
            cut = [tuple(q for q in qs if context is None or len(q) + how.max_new_tokens <= context) for qs in asked]
            if all(cut):
                found.append(Asked(ability.name, cut[0], cut[1][: max(8, CHECKED // len(loaded))]))
            else:
                why = f"no question leaves room for {how.max_new_tokens} tokens more in a context of {context}"
                warned.append(
                    f"{ability.name}: {why if all(asked) else 'it has no questions in words'}; it is not asked"
                )
        continued = self.asked_to_continue(len(found))
        if continued and begins(tokenizer) is None:
            raise ValueError(
                "heal: expected questions to keep abilities by, or a tokenizer with a token that begins or ends texts, from "
                "which PRE draws openings of its own, found neither; give --abilities"
            )
        if len(found) == 1 and loaded:
            warned.append(f"no ability can be asked: {continued} openings that PRE draws stand in for their questions")
        if continued:
            refuse_repeats([*(source.name for source in found), "openings"])
        if self.teaching.keep_by == "bandit" and len(found) + bool(continued) < 3:
            warned.append("keep_by bandit: fewer than two abilities can be asked, so that nothing is weighed")
        return tokenizer, found, warned

    def asked_to_continue(self, sources: int) -> int:
        """How many openings are continued beside so many sources, the alignment prompts among them."""
        return self.openings or (OPENINGS if sources == 1 else 0)

    def run(self, *, command: str | None = None, progress: Stages | None = None) -> Aligned:
        """Heal, from files to files; see `heal`."""
        processes.join(self.machine.device)
        self.check()
        pair, own = self.pairs()
        warned = [*dict.fromkeys([*pair.warnings, *own.warnings, *off_line(pair, own)])]
        student = own.post.folder
        tokenizer, sources, told = self.sources(student)
        warned += told
        teachers = Teachers(pair.post.folder, pair.pre.folder, self.machine, turns=too_large(pair, self))
        if continued := self.asked_to_continue(len(sources)):
            drawn = openings(teachers(PRE), tokenizer, continued + CHECKED, self.drawing.seed)
            sources.append(Asked("openings", tuple(drawn[CHECKED:]), tuple(drawn[:CHECKED])))
        how: dict[str, Any] = {"drawing": self.drawing, "teaching": self.teaching}
        method = partial(teach, asked=sources, teachers=teachers, start=student, **how)
        kept: dict[str, Any] = {"work": self.work, "command": command, "progress": progress}
        by: dict[str, Any] = {"align_teacher": pair.post.sha256, "keep_teacher": pair.pre.sha256}
        if self.teaching.keep_by == "bandit":
            by["drawn by"] = DRAWN_BY
        record = align(student, self.out, method, machine=self.machine, told=by, **kept)
        looked = read_lines(self.out / "metrics.jsonl")
        warned += not_to_its_end(looked, self.teaching)
        line = beside(pair, preflight(self.pre, self.out)).told()
        healed: dict[str, Any] = public({
            "start": str(self.start), "post": str(self.post), "pre": str(self.pre),
            "before": looked[0],
            "after": looked[best_of(looked)],
            "learning_rate": looked[0].get("learning_rate"),
            "ended": how_it_ended(looked, self.teaching),
            "warnings": warned,
            **{k: sum(line[k] for line in looked) for k in ("drawn", "trained", "seconds")},
            "line": line,
        })  # fmt: skip
        if processes.is_first() and not (self.out / "heal.json").is_file():
            front = (self.out / "README.md").read_text(encoding="utf-8").partition("# Aligned checkpoint")[0]
            write_whole(
                self.out / "README.md",
                front + CARD.format(**{**record["settings"], **healed, "where": lies(line), "how": how_told(warned)}),
            )
            write_json(self.out / "heal.json", healed)
        return Aligned({**record, "healed": healed, "warnings": warned})


def heal(
    start: str | Path,
    out: str | Path,
    align_teacher: str | Path,
    keep_teacher: str | Path,
    prompts: str | Path | Sequence[Prompt],
    *,
    abilities: Sequence[str | Ability] = (),
    openings: int | None = None,
    teaching: Teaching = Teaching(),
    drawing: Drawing = DRAWING,
    work: str | Path | None = None,
    machine: Machine = Machine(),
    progress: Stages | None = None,
) -> Aligned:
    """Heal the checkpoint `start` with two teachers, POST for alignment and PRE for what there was before.

    The student answers alignment prompts and questions of the abilities itself; on each answer it learns from the teacher of
    its side, by the whole distribution at every token. No reward, label or reference is read. See docs/how-to/heal.md.

    Args:
        start, align_teacher, keep_teacher, prompts, abilities, openings, teaching: see `Healing`.
        out: a new folder; it appears whole or not at all, with align.json and metrics.jsonl.
        drawing: how the student answers.
        work: points on the way and the state to go on from (default OUT.work).

    Returns:
        The content of align.json, with the warnings.

    Raises:
        ValueError, CheckpointError: see `Healing.check`, `Healing.pairs` and `Healing.sources`.

    >>> heal("post", "healed", "post", "pre", "prompts.jsonl", abilities=["choices:arc.jsonl"])  # doctest: +SKIP
    """
    return Healing(
        start, align_teacher, keep_teacher, Path(out), prompts, abilities, openings, teaching, drawing, machine,
        None if work is None else Path(work),
    ).run(progress=progress)  # fmt: skip


@contextmanager
def as_student(start: str | Path) -> Iterator[None]:
    """Say that what is told of POST is told of the student in its place, where a message does not name it."""
    try:
        yield
    except CheckpointError as error:
        if str(error).startswith(f"{start}:"):
            raise
        raise CheckpointError(f"{start}: expected a student like its teachers; in POST's place: {error}") from None


def lies(line: Mapping[str, float | None]) -> str:
    """Where a healed model lies, in words."""
    if (far := line["distance"]) is None:
        return "Both teachers are one model."
    return f"It lies {far:.2f} times the distance of the two from the line between them."


def off_line(pair: Pair, model: Pair) -> list[str]:
    """A warning where the student is no average of the two."""
    found = beside(pair, model)
    if math.isinf(found.spread):
        return ["both teachers are the same model, and the student another: it is healed towards that one"]
    if pair.pre.sha256 == pair.post.sha256:
        return ["both teachers are the same model, and so is the student: there is nothing to learn"]
    if found.spread <= 0.01:
        return []
    return [
        f"the student is no average of the two teachers: it lies {found.distance:.2f} times |POST - PRE| away from the line "
        "between them; it is healed all the same"
    ]


def not_to_its_end(looked: Sequence[Mapping[str, float]], teaching: Teaching) -> list[str]:
    """Warnings of a healing that overflowed, and of one that found nothing better than its start."""
    found, last = [], int(looked[-1]["step"])
    if how_it_ended(looked, teaching) == "overflow":
        found.append(
            f"a number overflowed {f'after step {last}' if last else 'before the first point'}: healing ended there, and what "
            "was drawn since is not counted; try a smaller --learning-rate"
        )
    if last and best_of(looked) == 0:
        found.append(f"no point was better than the start in {last} steps: the weights are those of the start")
    return found


def how_told(warned: Sequence[str]) -> str:
    """Warnings in a card's text."""
    return "".join(f"\n- Warning: {line}" for line in warned) + ("\n" if warned else "")


def too_large(pair: Pair, wanted: Healing) -> bool:
    """Whether both teachers do not fit beside what is trained, so that they take turns from disk."""
    size = sum(math.prod(shape) for shape in pair.shapes.values()) * wanted.machine.dtype.itemsize
    first = pair.names[0]
    held = held_in(wanted.machine, pair.pre.dtype(pair.elsewhere.get(first, first)), pair.post.dtype(first))
    return take_turns(held, size, free_memory(wanted.machine.device))


def held_in(machine: Machine, *stored: torch.dtype) -> int:
    """How many teachers of these stored dtypes take memory: what is mapped does not, on the CPU in the dtype of its file."""
    on_cpu = torch.device(machine.device).type == "cpu"
    return sum(not on_cpu or dtype != machine.dtype for dtype in stored)


def take_turns(held: int, size: int, room: float | None) -> bool:
    """Whether so many teachers, each of `size` bytes, do not fit at once into the `room` there is."""
    return held == 2 and room is not None and room < 6 * size  # weights, gradients, two moments, two teachers


def openings(pre: torch.nn.Module, tokenizer: Any, count: int, seed: int) -> list[Ids]:
    """PRE's own beginnings of texts: what it draws from its start token, cut after 1, 2, ... OPENING tokens in turn."""
    first = begins(tokenizer)
    drawn = answers(pre, tokenizer, [(first,)] * count, Drawing(max_new_tokens=OPENING, seed=seed))
    ends = tokenizer.eos_token_id
    return [(first, *(t for t in e.response[: 1 + i % OPENING] if t != ends)) for i, e in enumerate(drawn)]
