"""What a dry run looks at: checkpoints, prompts, reward and abilities, read as a run would read them, with no model run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from counterpoise.averaging.mix import Donor
from counterpoise.averaging.places import refuse_unmeasured
from counterpoise.checkpoints.checkpoint import Checkpoint, left_behind, short
from counterpoise.checkpoints.configs import understood
from counterpoise.checkpoints.files import (
    CheckpointError,
    first_line,
    free_bytes,
    hub_id,
    pickles,
    read_json,
    resolve,
    weight_files,
)  # fmt: skip
from counterpoise.checkpoints.naming import writer_of
from counterpoise.checkpoints.opening import open_checkpoint
from counterpoise.checkpoints.preflight import preflight
from counterpoise.evaluation.abilities import is_file, load_abilities, refuse_repeats
from counterpoise.evaluation.classifiers import adapter_of, refuse_labels
from counterpoise.evaluation.grader import Grader
from counterpoise.evaluation.items import FileAbility
from counterpoise.evaluation.parts import Part
from counterpoise.evaluation.rewards import python_reward, read_labelled
from counterpoise.evaluation.specs import RewardSpec, fewest
from counterpoise.language.costs import Lengths
from counterpoise.language.loading import without_bars
from counterpoise.language.memory import free_memory
from counterpoise.language.prompts import Prompt, encode_prompt, refuse_long_prompts
from counterpoise.language.sampling import Drawing
from counterpoise.language.shapes import Items, Shape, shape_of
from counterpoise.language.ways import context_of

CHARACTERS = 4
"""Characters a token, where there is no tokenizer to ask."""
UNSEEN = {"items": 1000, "prompt": 300, "choices": 4, "continuation": 10, "generated": 256}
"""Of an lm-eval task, whose data set is not loaded: items a part where no limit is given, and tokens an item."""


@dataclass(frozen=True)
class Source:
    """A checkpoint as far as it is at hand.

    Attributes:
        weights: None where there is a config.json alone, and of a reward model.
        model: its architecture on the meta device: shapes without numbers.
        dtype: in which it is stored, or its config says it is.
    """

    name: str
    folder: Path
    weights: Checkpoint | None
    model: nn.Module
    dtype: torch.dtype

    @property
    def shape(self) -> Shape:
        """What decides its cost."""
        return shape_of(self.model)

    @property
    def resident(self) -> int:
        """Bytes of its weights in memory, in its own dtype."""
        return self.shape.parameters * self.dtype.itemsize

    @property
    def mapped(self) -> int:
        """Bytes of its weight files."""
        return 0 if self.weights is None else sum(f.stat().st_size for f in self.weights.files)


def look(source: str, *, base: Source | None = None, classifier: bool = False) -> Source:
    """A checkpoint's shapes from its files' headers, or from config.json where that is all there is.

    Of a hub id that is not in the local cache only the small files are fetched.

    Raises:
        CheckpointError: nothing there, pickled weights, a missing shard, a config that gives no language model.
    """
    folder, ours = folder_of(source)
    weights: Checkpoint | None = None
    adapter = (folder / "adapter_config.json").is_file()
    if adapter and base is not None and (base.weights is None or not any(folder.glob("adapter_model*"))):
        return replace(base, name=source, weights=None)  # its shapes are the base's
    if not classifier and (adapter or _has_weights(folder, ours)):
        weights = open_checkpoint(folder, base=None if base is None else base.weights)
    if adapter and base is not None:
        folder = base.folder
    if (place := folder / "config.json").is_file():
        understood(read_json(place), place)
    model, config = _on_meta(folder, source, classifier)
    stored = getattr(config, "dtype", None)
    if weights is not None:
        stored = next((weights.dtype(n) for n in weights if weights.dtype(n).is_floating_point), stored)
    return Source(source, folder, weights, model, stored if isinstance(stored, torch.dtype) else torch.float32)


def folder_of(source: str) -> tuple[Path, bool]:
    """The folder, and whether it is the user's own: all that should be in it is."""
    from huggingface_hub import snapshot_download

    if (found := hub_id(source)) is None:
        return resolve(source), True
    with contextlib.suppress(Exception):
        return Path(snapshot_download(found[0], revision=found[1], local_files_only=True)), False
    return resolve(source, weights=False), False


def _has_weights(folder: Path, ours: bool) -> bool:
    try:
        weight_files(folder)
    except CheckpointError:
        if not (folder / "config.json").is_file() or (ours and (pickles(folder) or any(folder.glob("*.safetensors*")))):
            raise
        return False
    return True


def _on_meta(folder: Path, source: str, classifier: bool) -> tuple[nn.Module, Any]:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        with without_bars(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            build = AutoModelForSequenceClassification.from_config if classifier else writer_of(config, source)
            made: nn.Module = build(config)
    except CheckpointError:
        raise
    except (ValueError, KeyError, OSError) as error:
        wanted = "sequence-classification" if classifier else "causal language"
        said = first_line(error)
        raise CheckpointError(f"{source}: expected the config of a {wanted} model, found: {said}") from None
    return made, config


def fit(
    pre: Source, post: Source, drop: Sequence[str], out: Path, donor: Donor, *, shard: int = 1
) -> tuple[list[str], int]:
    """What `preflight` says of two checkpoints, as far as they are at hand, and the bytes that are mapped.

    Args:
        shard: among how many processes they are cut up.

    Raises:
        CheckpointError: see `preflight`; without weights two architectures, or a parameter of two shapes.
    """
    if pre.weights is not None and post.weights is not None:
        folders = [folder_of(source.name)[0] for source in (pre, post)]  # a hub id is not fetched again
        pair = preflight(*folders, drop=drop, out=out)
        refuse_unmeasured(pair, donor, shard=shard)
        told = [
            f"preflight: {len(pair.names)} tensors fit",
            *(f"warning: {w}" for w in (*pair.warnings, *left_behind(pair.giver(donor)))),
        ]
        return told, sum(f.stat().st_size for c in (pair.pre, pair.post) for f in c.files)
    kinds = [s.model.config.model_type for s in (pre, post)]  # type: ignore[union-attr]
    shapes = [{n: tuple(p.shape) for n, p in s.model.named_parameters()} for s in (pre, post)]
    if kinds[0] != kinds[1] or shapes[0].keys() != shapes[1].keys():
        raise CheckpointError(
            f"PRE is a {kinds[0]} model of {len(shapes[0])} tensors, POST a {kinds[1]} one of {len(shapes[1])}; expected "
            "one model before and after training"
        )
    for name, shape in shapes[0].items():
        if shape != (other := shapes[1][name]):
            raise CheckpointError(f"{name} has the shape {shape} in PRE and {other} in POST; expected one model")
    lacking = ", ".join(s.name for s in (pre, post) if s.weights is None)
    return [f"no weights: preflight on shapes only ({lacking})", *room_for(out, post.resident)], 0


@dataclass(frozen=True)
class Words:
    """Counts tokens: with a checkpoint's tokenizer, or by characters where it has none."""

    tokenizer: Any

    @classmethod
    def of(cls, folder: Path) -> Words:
        """The tokenizer of a folder, if it holds one."""
        files = sorted((*folder.glob("tokenizer*"), *folder.glob("*.model")))
        return cls(_tokenizer(folder, *((f, f.stat().st_mtime_ns) for f in files)) if files else None)

    def prompts(self, prompts: Sequence[Prompt], *, chat: bool) -> list[int]:
        """Tokens of each prompt, through the chat template if there is one."""
        if self.tokenizer is None:
            return self.lengths([p.text for p in prompts])
        return [len(encode_prompt(self.tokenizer, p, chat=chat)) for p in prompts]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text."""
        if self.tokenizer is None:
            return [math.ceil(len(t) / CHARACTERS) for t in texts]
        return [len(self.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]

    def mean(self, texts: Sequence[str], most: int = 200) -> float:
        """Mean tokens of the first texts."""
        found = self.lengths(texts[:most])
        return sum(found) / max(1, len(found))


@lru_cache(maxsize=2)
def _tokenizer(folder: Path, *files: tuple[Path, int]) -> Any:
    """The tokenizer of these files, read once: a dry run asks for it at every step."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        said = first_line(error)
        raise CheckpointError(f"{folder}: expected a tokenizer that can be read, found: {said}") from None


def look_at_reward(spec: str) -> Source | None:
    """Check a reward without loading it; its architecture when it is a model.

    Raises:
        ValueError: an unreadable file, nothing to import, a model that is no sequence classifier of one or two labels.
        CheckpointError: no such model.
    """
    kind, head, tail = RewardSpec.read(spec)
    if kind == "sentiment":
        read_labelled(Path(tail))
        return None
    if kind == "function":
        python_reward(head, tail)
        return None
    if kind == "endpoint":
        Grader.read(spec)
        return None
    adapter = adapter_of(spec)
    found = look(adapter.base if adapter else spec, classifier=True)
    config: Any = found.model.config
    kinds, labels = config.architectures or [], adapter and adapter.labels
    if kinds and not labels and not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ValueError(
            f"reward {spec}: expected a sequence-classification model, found {kinds[0]}, whose head transformers does not "
            "know; wrap it in a Python function (module:function)"
        )
    refuse_labels(spec, labels or config.num_labels)
    return found


def look_at_abilities(
    specs: Sequence[str], source: Source, *, limit: int | None, drawing: Drawing, trust_tasks: bool = False
) -> tuple[dict[Part, list[Items]], list[str]]:
    """The items of every ability on validation and held-out data, and what had to be taken for granted.

    Raises:
        ValueError: an unreadable file, an item that does not fit the context, no such task of lm-eval, one that runs
            code and is not trusted, two abilities of one name.
    """
    words, new = Words.of(source.folder), drawing.max_new_tokens
    loaded = [a for a in load_abilities([s for s in specs if is_file(s)]) if isinstance(a, FileAbility)]
    for ability in loaded if words.tokenizer else ():
        ability.refuse_long(words.tokenizer, drawing, context_of(source.model.config), limit)
    tasks = [_of_harness(spec, limit, trust_tasks) for spec in specs if not is_file(spec)]
    parts: tuple[Part, ...] = ("validation", "held-out")
    found = {p: [*(_of_file(a, p, words, limit, new) for a in loaded), *(items for items, _ in tasks)] for p in parts}
    refuse_repeats([i.name for i in found["validation"]])
    return found, [line for _, told in tasks for line in told]


def _of_file(ability: FileAbility, part: Part, words: Words, limit: int | None, new: int) -> Items:
    read = [ability.wording(item.fields) for item in ability.items_of(part, fewest(limit, ability.limit))]
    following = [c for wording in read for c in wording.continuations]
    context, answer = words.mean([wording.context for wording in read]), words.mean(following)
    each = len(following) / len(read)
    return Items(ability.name, len(read), context, each, answer, generated=new if ability.draws else 0)


def _of_harness(spec: str, limit: int | None, trusted: bool) -> tuple[Items, list[str]]:
    from counterpoise.evaluation.harness_tasks import find_task

    task = find_task(spec, trusted=trusted)
    most = fewest(limit, task.limit)
    count, told = task.tasks * (most or UNSEEN["items"]), []
    if most is None:
        told.append(f"{task.name}: {count:,} items a part (data sets of lm-eval are not loaded; --limit bounds them)")
    if not task.output_type:
        told.append(f"{task.name}: written in Python, so taken to draw one answer an item; whether its metrics are numbers "
                    "per item, as they must be, shows when it is run")  # fmt: skip
    told.append(f"{task.name}: {UNSEEN['prompt']} tokens a prompt, {UNSEEN['generated']} of a drawn answer")
    items = Items(task.name, count, UNSEEN["prompt"], shared=False)
    if task.output_type not in ("multiple_choice", "loglikelihood", "loglikelihood_rolling"):
        return replace(items, generated=UNSEEN["generated"]), told
    choices = UNSEEN["choices"] if task.output_type == "multiple_choice" else 1
    return replace(items, choices=choices, continuation=UNSEEN["continuation"]), told


def room_for(out: Path, needed: int) -> list[str]:
    """A warning where the disk cannot hold what would be written: an estimate refuses nothing, `preflight` does."""
    free = free_bytes(out)
    if free >= needed:
        return []
    return [f"warning: {out}: {needed / 1e9:.2f} GB would be written, {free / 1e9:.2f} GB are free here; make room"]


def lengths(
    source: Source,
    prompts: Sequence[Prompt],
    drawing: Drawing,
    itemsize: int,
    batch: int,
    *,
    longest_refused: bool = True,
) -> tuple[Lengths, list[str]]:
    """How long these prompts and responses are, `batch` at once in training, and what is said of them.

    Raises:
        ValueError: a prompt that does not fit the context with its response, unless not `longest_refused`.
    """
    words, new = Words.of(source.folder), drawing.max_new_tokens
    found = words.prompts(prompts, chat=drawing.chat)
    if longest_refused:
        refuse_long_prompts(prompts, found, new, context_of(source.model.config))
    assumed = [] if words.tokenizer else [f"no tokenizer: {CHARACTERS} characters a token, no chat template"]
    mean = sum(found) / len(found)
    told = [f"prompts of {mean:.0f} tokens in the mean, the longest {max(found)}", *assumed]
    return Lengths(mean, max(found), new, max(1, batch), itemsize), told


def room(device: str, present: bool, memory: float, taken: float) -> float | None:
    """Bytes that a device has beside those that are taken: it is here, or has so many; None where nobody knows."""
    free = free_memory(device) if present else memory
    return None if free is None or math.isinf(free) else free - taken


def judged(judge: Source | None) -> dict[str, int]:
    """What lies in memory for a reward or preference that is a model."""
    return {} if judge is None else {"reward model": judge.resident}


def said_of(reward: str, judge: Source | None) -> str:
    """What a dry run says of a reward; `judge` of one that is a model."""
    if judge is None:
        calls = "; one call a response, none was made" if RewardSpec.read(reward).kind == "endpoint" else ""
        return f"reward {reward}: found{calls}; its time is not counted"
    return f"reward {reward}: {judge.shape.parameters / 1e9:.3g} billion parameters in {short(judge.dtype)}"
