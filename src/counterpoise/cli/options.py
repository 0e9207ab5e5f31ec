"""Options that several commands have, each said once, and what their texts mean. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

Pre = Annotated[
    str, typer.Argument(help="Checkpoint before alignment: a folder, or a hub id (org/name, org/name@revision).")
]
Post = Annotated[str, typer.Argument(help="Checkpoint after alignment; may be a LoRA adapter on PRE.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Folder to write; it appears whole or not at all.")]
Blocks = Annotated[str, typer.Option(help="Number of equal blocks of layers, 'layerwise' or 'module'.")]
RatioBlocks = Annotated[
    str | None, typer.Option(help="With --ratios: number of equal blocks, 'layerwise' or 'module' (default 3).")
]
SearchBlocks = Annotated[
    str | None,
    typer.Option(help="Number of equal blocks, 'layerwise' or 'module' (default: 3 for HMA, layerwise for two-sided)."),
]
AlignmentForm = Annotated[
    str | None,
    typer.Option(help="Two-sided: what alignment means: imitation, contrast or reward (default imitation)."),
]
ProxySize = Annotated[int, typer.Option(help="Responses that the search sees, on each side.")]
DonorOption = Annotated[str, typer.Option(help="Whose config, tokenizer and chat template go into OUT: post or pre.")]
Drop = Annotated[list[str] | None, typer.Option(help="Pattern of tensors to leave out when one side alone has them.")]
Unrelated = Annotated[bool, typer.Option("--allow-unrelated", help="Go on when the two look like unrelated models.")]
_PROMPTS = typer.Option(help='jsonl: {"prompt": str} or {"messages": [...]} a line.')
_REWARD = typer.Option(help="sentiment:FILE.csv, module:function, a model folder or a hub id.")
_ABILITIES = typer.Option(help="choices:, continue: or generate:FILE.jsonl, or an lm-eval task; repeat for more.")
Prompts = Annotated[Path, _PROMPTS]
MaybePrompts = Annotated[Path | None, _PROMPTS]
RewardOption = Annotated[str, _REWARD]
MaybeReward = Annotated[str | None, _REWARD]
Abilities = Annotated[list[str], _ABILITIES]
MaybeAbilities = Annotated[list[str] | None, _ABILITIES]
TrustTasks = Annotated[
    bool, typer.Option("--trust-tasks", help="Let folders of lm-eval tasks run code of their own (!function).")
]
Seed = Annotated[int, typer.Option(help="Decides every random draw.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="Of the computation: auto, float32, bfloat16, float16 or float64.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences at once.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest response.")]
Temperature = Annotated[float, typer.Option(min=0, help="Of sampled responses; 0 is greedy.")]
NoChat = Annotated[bool, typer.Option("--no-chat-template", help="Give prompts as plain text.")]
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many items per ability and part.")]
PromptLimit = Annotated[int | None, typer.Option(min=1, help="At most so many validation and held-out prompts.")]
Replies = Annotated[
    int, typer.Option(min=1, help="Responses a prompt whose mean is its reward, where reward is measured.")
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check everything, tell stages, memory and time, and stop: nothing is drawn, trained or written.",
    ),
]
SpeedOption = Annotated[
    str | None,
    typer.Option(
        "--speed", help="Dry run: FLOP/s and bytes/s of the device, as 4e14,2e12 (default: a short probe of it)."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


def numbers(text: str, option: str) -> list[float]:
    """The numbers of `0,0.44,0.76`, which stand behind an option."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option}: expected numbers with commas between them, found {text!r}") from None


def dtype_of(name: str, *, auto: bool = True) -> Any:
    """The torch dtype; None for auto, where that is a choice."""
    import torch

    names = (*["auto"] * auto, "float32", "bfloat16", "float16", "float64")
    if name not in names:
        raise ValueError(f"--dtype: expected {', '.join(names)}, found {name!r}")
    return None if name == "auto" else getattr(torch, name)


def given(**options: Any) -> dict[str, Any]:
    """The options that were typed, by name."""
    return {name: value for name, value in options.items() if value is not None}


def refuse_without(partner: str, options: Mapping[str, Any]) -> None:
    """Raise a ValueError for the first of some options that were typed: it does nothing without `partner`."""
    for name in options:
        raise ValueError(f"--{name.replace('_', '-')}: does nothing here; add {partner}, or leave it out")


def speed_of(text: str | None) -> tuple[float, float] | None:
    """Operations and bytes a second; None to probe.

    >>> speed_of("4e14,2e12")
    (400000000000000.0, 2000000000000.0)
    """
    if text is None:
        return None
    found = numbers(text, "--speed")
    if len(found) != 2 or not all(0 < x < float("inf") for x in found):
        raise ValueError(f"--speed: expected FLOP/s and bytes/s, as 4e14,2e12, found {text!r}")
    return found[0], found[1]


def usable_device(name: str) -> str:
    """The device, refused here when it cannot be used."""
    from counterpoise.language.dtypes import why_unusable

    if why := why_unusable(name):
        raise ValueError(f"--device: {name!r} cannot be used here ({why})")
    return name
