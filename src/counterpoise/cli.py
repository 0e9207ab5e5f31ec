"""The command line: parse, call, print. Everything heavy is imported inside a command, so that --help is quick."""

from __future__ import annotations

import gc
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from counterpoise.alignment.commands import app as align
from counterpoise.classification.commands import app as multitask
from counterpoise.evaluation.judge_commands import app as judge
from counterpoise.merging.commands import merge
from counterpoise.options import (
    Abilities,
    Alignment,
    BatchSize,
    Blocks,
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
from counterpoise.report.front_command import front
from counterpoise.search.search_command import search
from counterpoise.terminal import bars, plain_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from counterpoise.evaluation.panel import Panel

app = typer.Typer(
    name="counterpoise",
    help="Keep a model good at everything at once: average the weights before and after alignment, or balance many tasks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
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
            from counterpoise.planning.dry_run import plan_restore, tell

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
            command=_command(),
            progress=progress,
        )
    _show_result(result, out, work)


@app.command()
def average(
    pre: Pre,
    post: Post,
    out: Out,
    ratio: Annotated[
        float | None, typer.Option(help="Share of the update to keep; above 1 extrapolates (ExPO).")
    ] = None,
    ratios: Annotated[str | None, typer.Option(help="One share per block, from input to output: 0,0.44,0.76.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe.json.")] = None,
    blocks: Blocks = "3",
    donor: DonorOption = "post",
    drop: Drop = None,
    allow_unrelated: Unrelated = False,
    quiet: Quiet = False,
) -> None:
    """Write pre + ratio * (post - pre), streaming from disk to disk."""
    with plain_errors("nothing was written"), bars(quiet) as progress:
        if sum(x is not None for x in (ratio, ratios, recipe)) != 1:
            raise ValueError("average: expected exactly one of --ratio, --ratios and --recipe")
        from counterpoise.checkpoints.files import hash_early

        hash_early(pre, post)  # torch takes longer to import than a gigabyte to hash
        gc.disable()  # the collector would look through all that is imported, again and again: a tenth of the time
        from counterpoise.averaging.average import average as run
        from counterpoise.averaging.recipe import Recipe

        gc.enable()
        plan: Any = Recipe.read(recipe) if recipe else numbers(ratios) if ratios else ratio
        made = run(
            pre,
            post,
            out,
            plan,
            blocks=blocks,
            donor=donor_side(donor),
            drop=drop or (),
            allow_unrelated=allow_unrelated,
            progress=progress and (lambda done, total: progress("averaging", done, total)),
        )
    _warn(made.warnings)
    print(f"{out}: {len(made.ratios)} {'ratio' if len(made.ratios) == 1 else 'ratios'}, mean {made.mean:g}")


@app.command()
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
    _warn(warnings)
    _show_tax({"tax": rows})


@app.command()
def diff(
    pre: Pre,
    post: Post,
    blocks: Blocks = "3",
    drop: Drop = None,
    allow_unrelated: Unrelated = False,
    quiet: Quiet = False,
) -> None:
    """How far POST moved from PRE: relative change per block and per kind of module."""
    with plain_errors("nothing was written"), bars(quiet) as progress:
        from counterpoise.averaging.diff import diff as run

        rows, warnings = run(
            pre,
            post,
            blocks=blocks,
            drop=drop or (),
            allow_unrelated=allow_unrelated,
            progress=progress and (lambda done, total: progress("reading both", done, total)),
        )
    from rich.console import Console
    from rich.table import Table

    table = Table("", "part", "parameters", "|post - pre| / |pre|", "elements changed", box=None)
    for row in rows:
        table.add_row(row.kind, row.name, f"{row.parameters:,}", f"{row.change:.3e}", f"{row.changed:.1%}")
    Console().print(table)
    _warn(warnings)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")] = Path("counterpoise-demo"),
    seed: Seed = 0,
    open_page: Annotated[bool, typer.Option("--open", help="Open the report in a browser at the end.")] = False,
    quiet: Quiet = False,
) -> None:
    """The whole story from nothing, offline, in about two minutes: train, align, measure the tax, give it back."""
    with plain_errors("nothing was kept"), bars(quiet) as progress:
        from counterpoise.demo import run

        result = run(out, seed=seed, progress=progress)
    _show_result(result["restore"], out / "restored", None)
    if open_page:
        import webbrowser

        webbrowser.open((out / "restored" / "report.html").absolute().as_uri())


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as of

    print(of("counterpoise"))


app.add_typer(align)
app.add_typer(multitask)
app.add_typer(judge)
app.command()(search)
app.command()(merge)
app.command()(front)


def _panel(prompts: Path, reward: str, abilities: list[str], **settings: Any) -> Panel:
    from counterpoise.evaluation.panel import Panel

    return Panel.load(prompts, reward, abilities, **settings)


def _warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _show_result(result: dict[str, Any], out: Path, work: Path | None) -> None:
    _warn(result["warnings"])
    _show_tax(result)
    if result.get("already_finished"):
        print(f"{out} holds the result of this very run already; nothing was done again.")
    print(result["verdict"])
    place = out if result.get("out") else work or out.with_name(out.name + ".work")
    print(f"report: {place / 'report.html'}")
    if result.get("out"):
        print(f"checkpoint: {out}")


def _show_tax(result: dict[str, Any]) -> None:
    from rich.console import Console

    from counterpoise.tables.tables import tax_rich

    Console().print(tax_rich(result))


def _command() -> str:
    return shlex.join(["counterpoise", *sys.argv[1:]])


def main() -> None:
    """Entry point of the `counterpoise` command."""
    app()


if __name__ == "__main__":
    main()
