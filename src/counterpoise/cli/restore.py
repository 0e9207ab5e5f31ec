"""`counterpoise restore` and `counterpoise tax`. Heavy imports inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from counterpoise.cli.options import (
    Abilities,
    Alignment,
    BatchSize,
    Device,
    DonorOption,
    Drop,
    DryRun,
    Dtype,
    Limit,
    NewTokens,
    NoChat,
    Out,
    Post,
    Pre,
    PromptLimit,
    Prompts,
    ProxySize,
    Quiet,
    Replies,
    RewardOption,
    SearchBlocks,
    Seed,
    SpeedOption,
    Temperature,
    Unrelated,
    donor_side,
    dtype_of,
    numbers,
    search_kind,
    speed_of,
    usable_device,
)
from counterpoise.cli.terminal import bars, command_line, plain_errors, show_result, show_tax, warn

if TYPE_CHECKING:
    from counterpoise.evaluation.panel import Panel


def restore(
    pre: Pre,
    post: Post,
    out: Out,
    prompts: Prompts,
    reward: RewardOption,
    abilities: Abilities,
    search: Annotated[str, typer.Option(help="hma, two-sided in its place, or both.")] = "hma",
    blocks: SearchBlocks = None,
    mean: Annotated[float | None, typer.Option(help="Write HMA at this mean ratio instead of picking.")] = None,
    keep_reward: Annotated[float, typer.Option(help="Share of the reward gain that the pick must keep.")] = 0.95,
    means: Annotated[
        str, typer.Option(help="Mean ratios of the grid; above 1 extrapolates (ExPO), with MA alone.")
    ] = "0.2,0.4,0.6,0.8",
    lambdas: Annotated[
        str, typer.Option(help="Two-sided: prices of what PRE could do, in units of alignment.")
    ] = "0.25,0.5,1,2,4",
    alignment: Alignment = "imitation",
    calibrate: Annotated[
        int, typer.Option(min=0, help="Two-sided: also retain the answers of so many validation items an ability.")
    ] = 0,
    min_effective_sets: Annotated[
        float | None, typer.Option(help="Two-sided: guard the worst retention set, at least so many always counting.")
    ] = None,
    proxy_size: ProxySize = 256,
    controls: Annotated[bool, typer.Option(help="Also measure LiNeS, a reversed ramp and random ratios.")] = True,
    dry_run: DryRun = False,
    speed: SpeedOption = None,
    work: Annotated[Path | None, typer.Option(help="Where finished pieces are kept (default OUT.work).")] = None,
    donor: DonorOption = "post",
    drop: Drop = None,
    allow_unrelated: Unrelated = False,
    limit: Limit = None,
    prompt_limit: PromptLimit = None,
    replies: Replies = 1,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 16,
    max_new_tokens: NewTokens = 128,
    temperature: Temperature = 1.0,
    no_chat_template: NoChat = False,
    quiet: Quiet = False,
) -> None:
    """Measure the alignment tax, find the average that gives it back, write it with a report."""
    with (
        plain_errors(f"finished pieces are in {work or f'{out}.work'}; the same command goes on from there"),
        bars(quiet or dry_run) as progress,
    ):
        settings: dict[str, Any] = {
            "search": search_kind(search),
            "blocks": blocks,
            "mean": mean,
            "means": numbers(means),
            "lambdas": numbers(lambdas),
            "alignment": alignment,
            "calibrate": calibrate,
            "min_effective_sets": min_effective_sets,
            "keep_reward": keep_reward,
            "proxy_size": proxy_size,
            "controls": controls,
        }
        drawing: dict[str, Any] = {
            "limit": limit,
            "prompt_limit": prompt_limit,
            "replies": replies,
            "seed": seed,
            "batch_size": batch_size,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "chat": not no_chat_template,
        }
        if dry_run:
            donor_side(donor)
            from counterpoise.cli.plan import tell
            from counterpoise.planning.restore import plan_restore

            data = (pre, post, out, prompts, reward, abilities)
            here = device if speed is None else None
            plan = plan_restore(*data, settings, drawing, drop=drop or (), dtype=dtype_of(dtype), device=here)
            tell(plan, speed_of(speed), device)
            return
        from counterpoise.restoration.restore import restore as run

        result = run(
            pre,
            post,
            out,
            _panel(prompts, reward, abilities, device=usable_device(device), **drawing),
            **settings,
            work=work,
            donor=donor_side(donor),
            drop=drop or (),
            allow_unrelated=allow_unrelated,
            device=usable_device(device),
            dtype=dtype_of(dtype),
            command=command_line(),
            progress=progress,
        )
    show_result(result, out, work)


def tax(
    pre: Pre,
    post: Post,
    prompts: Prompts,
    reward: RewardOption,
    abilities: Abilities,
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write the table as json.")] = None,
    work: Annotated[Path | None, typer.Option(help="Keep finished pieces here and go on from them.")] = None,
    drop: Drop = None,
    allow_unrelated: Unrelated = False,
    limit: Limit = None,
    prompt_limit: PromptLimit = None,
    replies: Replies = 1,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 16,
    max_new_tokens: NewTokens = 128,
    temperature: Temperature = 1.0,
    no_chat_template: NoChat = False,
    quiet: Quiet = False,
) -> None:
    """Reward and abilities of PRE and POST on held-out data, with intervals and paired tests."""
    with plain_errors("nothing was written"), bars(quiet) as progress:
        if json_out and not json_out.absolute().parent.is_dir():
            raise ValueError(
                f"--json {json_out}: expected a folder {json_out.absolute().parent}, found none; make it first"
            )
        from counterpoise.records import write_json
        from counterpoise.restoration.restore import measure_tax

        panel = _panel(
            prompts,
            reward,
            abilities,
            device=usable_device(device),
            limit=limit,
            prompt_limit=prompt_limit,
            replies=replies,
            seed=seed,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            chat=not no_chat_template,
        )
        rows, warnings = measure_tax(
            pre,
            post,
            panel,
            work=work,
            drop=drop or (),
            allow_unrelated=allow_unrelated,
            device=usable_device(device),
            dtype=dtype_of(dtype),
            progress=progress,
        )
        if json_out:
            write_json(json_out, rows)
    warn(warnings)
    show_tax({"tax": rows})


def _panel(prompts: Path, reward: str, abilities: list[str], **settings: Any) -> Panel:
    from counterpoise.evaluation.panel import Panel

    return Panel.load(prompts, reward, abilities, **settings)
