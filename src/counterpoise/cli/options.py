"""Options that several commands have, each said once, and what their texts mean. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from counterpoise.cli.help import drawn, general, machine, matched, measured, option, searched
from counterpoise.cli.terminal import refuse_several, say

if TYPE_CHECKING:
    from counterpoise.evaluation.panel import PanelFiles
    from counterpoise.language.engine import EngineSettings

_PRE = typer.Argument(
    metavar="PRE", help="Checkpoint before alignment: a folder, or a hub id (org/name, org/name@revision)."
)
_POST = typer.Argument(metavar="POST", help="Checkpoint after alignment; may be a LoRA adapter on PRE.")
Pre = Annotated[str, _PRE]
MaybePre = Annotated[str | None, _PRE]
Post = Annotated[str, _POST]
MaybePost = Annotated[str | None, _POST]
Out = Annotated[Path, option("FOLDER", "Folder to write; it appears whole or not at all.", "-o", "--out")]
WorkFolder = Annotated[Path | None, general("FOLDER", "Where finished pieces are kept (default OUT.work).")]
Seed = Annotated[int, general("N", "Decides every random draw.")]
Quiet = Annotated[bool, general(None, "Nothing on stderr but warnings and errors.", "-q", "--quiet")]
AsJson = Annotated[bool, general(None, "Print json, and nothing else, on stdout.", "--json")]
Fast = Annotated[
    bool,
    general(None, "A rough answer in a fraction of the time: few prompts, items and points, as it says.", "--fast"),
]
DryRun = Annotated[
    bool,
    general(
        None,
        "Check everything, tell stages, memory and time, and stop: nothing is drawn, trained or written.",
        "--dry-run",
    ),
]
SpeedOption = Annotated[
    str | None,
    general(
        "F,B[,M]",
        "Dry run: FLOP/s, bytes/s and perhaps bytes of memory of a device, as 4e14,2e12,80e9 (default: timed at the model "
        "itself).",
        "--speed",
    ),
]

Blocks = Annotated[str, option("CUT", "Number of equal blocks of layers, layerwise or module.")]
RatioBlocks = Annotated[
    str | None, option("CUT", "With --ratios: number of equal blocks, layerwise or module (default 3).")
]
SearchBlocks = Annotated[
    str | None,
    searched("CUT", "Number of equal blocks, layerwise or module (default: 3 for HMA, layerwise for two-sided)."),
]
ProxySize = Annotated[int, searched("N", "Responses that the search sees, on each side.")]

DonorOption = Annotated[Literal["post", "pre"], matched(None, "Whose config, tokenizer and chat template go into OUT.")]
MaybeDonor = Annotated[
    Literal["post", "pre"] | None,
    matched(None, "Whose config, tokenizer and chat template go into OUT (default post, or the YAML's)."),
]
Drop = Annotated[
    list[str] | None, matched("PATTERN", "Tensors to leave out when one side alone has them; repeat for more.")
]
Unrelated = Annotated[bool, matched(None, "Go on when the two look like unrelated models.", "--allow-unrelated")]

_PROMPTS = measured("DATA", "jsonl, json, csv or parquet of prompts or messages; or hf:NAME:SPLIT:COLUMN.")
_REWARD = measured(
    "REWARD",
    "sentiment:FILE.csv, FILE.py:function, a model folder or hub id, or http://HOST/v1?model=NAME&rubric=FILE.",
)
_ABILITIES = measured(
    "ABILITY",
    "choices:, continue: or generate:FILE.jsonl, or an lm-eval task; ?primary=METRIC says what counts; repeat for more.",
)
Prompts = Annotated[Path, _PROMPTS]
MaybePrompts = Annotated[Path | None, _PROMPTS]
RewardOption = Annotated[str, _REWARD]
MaybeReward = Annotated[str | None, _REWARD]
Abilities = Annotated[list[str], _ABILITIES]
MaybeAbilities = Annotated[list[str] | None, _ABILITIES]
TrustTasks = Annotated[
    bool, measured(None, "Let folders of lm-eval tasks run code of their own (!function).", "--trust-tasks")
]
Limit = Annotated[int | None, measured("N", "At most so many items per ability and part.", min=1)]
PromptLimit = Annotated[int | None, measured("N", "At most so many validation and held-out prompts.", min=1)]
Replies = Annotated[int, measured("N", "Responses a prompt whose mean is its reward, where reward is measured.", min=1)]

NewTokens = Annotated[int, drawn("N", "Longest response.", "--max-new-tokens", min=1)]
Temperature = Annotated[float, drawn("T", "Of sampled responses; 0 is greedy.", min=0)]
NoChat = Annotated[bool, drawn(None, "Give prompts as plain text.", "--no-chat-template")]

Device = Annotated[str, machine("DEVICE", "auto, cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")]
ReportTo = Annotated[
    list[str] | None,
    general("NAME", "Also log to tensorboard, wandb, trackio, ... (accelerate's trackers); repeat for more."),
]
WholeDtype = Literal["float32", "bfloat16", "float16", "float64"]
WeightsDtype = Annotated[WholeDtype, machine(None, "Of the trained weights and of OUT.", "--dtype")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16", "float64"], machine(None, "Of the computation.")]
BFloat16 = Annotated[bool, machine(None, "Mixed precision: float32 weights, computed with in bfloat16.", "--bf16")]
MicroBatch = Annotated[
    int, machine("N", "Sequences through the model at once in training: memory and speed, up to rounding.")
]
BatchSize = Annotated[int, machine("N", "Sequences at once.", min=1)]
EngineName = Annotated[
    Literal["transformers", "vllm"], machine(None, "What draws and scores; searches take gradients by transformers.")
]
Shard = Annotated[bool, machine(None, "Cut the model, PRE and POST up among torchrun's processes (FSDP).", "--shard")]
TensorParallel = Annotated[int, machine("N", "With --engine vllm: devices that share each layer.", min=1)]


@dataclass(frozen=True)
class Matching:
    """How two checkpoints are brought together."""

    drop: Drop = None
    allow_unrelated: Unrelated = False

    @property
    def settings(self) -> dict[str, Any]:
        """As the functions take them."""
        return {"drop": self.drop or (), "allow_unrelated": self.allow_unrelated}


@dataclass(frozen=True)
class Amounts:
    """How much of a panel is measured."""

    limit: Limit = None
    prompt_limit: PromptLimit = None
    replies: Replies = 1
    trust_tasks: TrustTasks = False


@dataclass(frozen=True)
class Drawn:
    """How responses are drawn and scored, and on what."""

    seed: Seed = 0
    device: Device = "auto"
    dtype: Dtype = "auto"
    batch_size: BatchSize = 16
    max_new_tokens: NewTokens = 128
    temperature: Temperature = 1.0
    no_chat_template: NoChat = False

    def panel(
        self, prompts: Path, reward: str, abilities: Sequence[str] = (), amounts: Amounts = Amounts()
    ) -> PanelFiles:
        """What is measured, as it is typed."""
        from counterpoise.evaluation.panel import PanelFiles
        from counterpoise.language.sampling import Drawing

        a, chat = amounts, not self.no_chat_template
        drawing = Drawing(a.replies, self.max_new_tokens, self.temperature, chat, self.batch_size, self.seed)
        return PanelFiles(prompts, reward, abilities, a.limit, a.prompt_limit, drawing, a.trust_tasks)


@dataclass(frozen=True)
class Engines:
    """What draws and scores."""

    engine: EngineName = "transformers"
    tensor_parallel: TensorParallel = 1

    @property
    def settings(self) -> EngineSettings:
        """As the functions take them; refused where several processes would each start an engine."""
        from counterpoise.language.engine import EngineSettings

        if self.engine != "transformers":
            refuse_several("--engine vllm", "; one drives the engine, which takes several devices by --tensor-parallel")
        return EngineSettings(self.engine, self.tensor_parallel)


YAML = (".yml", ".yaml")
"""Endings of mergekit's recipes."""


def shares(shard: bool, *, dry_run: bool = False) -> int:
    """Among how many processes --shard cuts weights up, 1 without it; a dry run takes some for granted without torchrun."""
    from counterpoise.alignment.training import processes
    from counterpoise.ranks import ALONE

    found = processes.expected(shard)
    if found is None and not dry_run:
        raise ValueError(ALONE)
    return found or processes.ASSUMED_SHARES


def numbers(text: str, option: str) -> list[float]:
    """The numbers of `0,0.44,0.76`, which stand behind an option."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option}: expected numbers with commas between them, found {text!r}") from None


def ramps(text: str) -> list[float | str]:
    """The slopes of `1,2,step`."""
    try:
        return [word if word == "step" else float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--slopes: expected numbers or step, with commas between them, found {text!r}") from None


def dtype_of(name: str) -> Any:
    """The torch dtype; None for auto."""
    import torch

    return None if name == "auto" else getattr(torch, name)


def given(**options: Any) -> dict[str, Any]:
    """The options that were typed, by name."""
    return {name: value for name, value in options.items() if value is not None}


def refuse_without(partner: str, options: Mapping[str, Any]) -> None:
    """Raise a ValueError for the first of some options that were typed: it does nothing without `partner`."""
    for name in options:
        raise ValueError(f"--{name.replace('_', '-')}: does nothing here; add {partner}, or leave it out")


def speed_of(text: str | None) -> list[float] | None:
    """Operations and bytes a second, and perhaps bytes of memory; None to probe.

    >>> speed_of("4e14,2e12")
    [400000000000000.0, 2000000000000.0]
    """
    if text is None:
        return None
    found = numbers(text, "--speed")
    if len(found) not in (2, 3) or not all(0 < x < float("inf") for x in found):
        raise ValueError(f"--speed: expected FLOP/s, bytes/s and perhaps bytes, as 4e14,2e12,80e9, found {text!r}")
    return found


def memory_of(text: str | None) -> float:
    """Bytes of memory of the device that --speed describes; infinite where nothing says.

    >>> memory_of("4e14,2e12,80e9"), memory_of("4e14,2e12")
    (80000000000.0, inf)
    """
    return next(iter((speed_of(text) or [])[2:]), float("inf"))


def devices_like(device: str, speed: str | None) -> int:
    """How many devices with a memory of their own a machine has: a host is one; 8 where --speed tells of another machine."""
    import torch

    if speed is not None:
        return 8
    return torch.cuda.device_count() if device.startswith("cuda") else 1


def device_of(name: str) -> str:
    """The device of --device: for auto the GPU that is here, else the cpu, and it is said which."""
    if name != "auto":
        return name
    import torch

    name = "cuda" if torch.cuda.is_available() else "cpu"
    say(f"device: {name}")
    return name


def usable_device(name: str) -> str:
    """The device, refused here when it cannot be used."""
    import torch

    from counterpoise.alignment.training.processes import own_device
    from counterpoise.language.dtypes import why_unusable

    name = device_of(name)
    if why := why_unusable(name):
        raise ValueError(f"--device: {name!r} cannot be used here ({why})")
    if (own := own_device(name)) != torch.device(name):  # of several processes each has a GPU, "cuda" to itself
        torch.cuda.set_device(own)
    return name
