"""`counterpoise average` and `counterpoise diff`. Heavy imports inside the commands."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from counterpoise.cli import options
from counterpoise.cli.help import option
from counterpoise.cli.push import Push, check_push, push
from counterpoise.cli.terminal import bars, plain_errors, print_json, uncollected, warn


def average(
    *,
    ctx: typer.Context,
    out: options.Out,
    pre: options.MaybePre = None,
    post: options.MaybePost = None,
    ratio: Annotated[float | None, option("X", "Share of the update to keep; above 1 extrapolates (ExPO).")] = None,
    ratios: Annotated[str | None, option("X,X", "One share per block, from input to output: 0,0.44,0.76.")] = None,
    recipe: Annotated[
        Path | None, option("FILE", "A recipe.json, or a YAML of mergekit, which names its models itself.")
    ] = None,
    blocks: options.RatioBlocks = None,
    donor: options.MaybeDonor = None,
    matching: options.Matching,
    push_to: Push = None,
    quiet: options.Quiet = False,
) -> None:
    """Write pre + ratio * (post - pre), streaming from disk to disk.

    Example:
      counterpoise average pre post -o averaged --ratio 0.6
      counterpoise average pre post -o averaged --ratios 0,0.44,0.76
      counterpoise average --recipe merge.yml -o averaged
    """
    of_mergekit = recipe is not None and recipe.suffix.lower() in options.YAML
    if not of_mergekit and None in (pre, post):
        ctx.fail(f"Missing argument '{'PRE' if pre is None else 'POST'}'.")
    with plain_errors("nothing was written"), uncollected(), bars(quiet) as progress:
        if sum(x is not None for x in (ratio, ratios, recipe)) != 1:
            raise ValueError("average: expected exactly one of --ratio, --ratios and --recipe")
        check_push(push_to)
        if ratios is None:
            options.refuse_without("--ratios", options.given(blocks=blocks))
        fitted = matching.settings
        if of_mergekit and recipe is not None:
            if pre is not None:
                raise ValueError(
                    f"average: {recipe} names its models itself; leave {' '.join(filter(None, (pre, post)))} out"
                )
            from counterpoise.averaging.from_mergekit import average_mergekit

            made = average_mergekit(recipe, out, donor=donor, **fitted, progress=progress)
        else:
            assert pre is not None
            assert post is not None
            from counterpoise.checkpoints.files import look
            from counterpoise.checkpoints.hashing import hash_early

            look(pre, post, out=out)
            hash_early(pre, post)
            from counterpoise.averaging.average import average as run
            from counterpoise.averaging.recipe import Recipe
            from counterpoise.records import named

            plan: Any = Recipe.read(recipe) if recipe else options.numbers(ratios, "--ratios") if ratios else ratio
            fitted |= {"blocks": blocks or 3, "donor": donor or "post", "progress": named(progress, "averaging")}
            made = run(pre, post, out, plan, **fitted)
        push(out, push_to)
    warn(made.warnings)
    print(f"{out}: {made.told}")


def diff(
    *,
    pre: options.Pre,
    post: options.Post,
    blocks: options.Blocks = "3",
    matching: options.Matching,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """How far POST moved from PRE: relative change per block and per kind of module.

    Example:
      counterpoise diff pre post --blocks layerwise
    """
    with plain_errors("nothing was written"), uncollected(), bars(quiet) as progress:
        from counterpoise.averaging.diff import diff as run
        from counterpoise.checkpoints.files import look

        look(pre, post)
        rows, warnings = run(
            pre,
            post,
            blocks=blocks,
            **matching.settings,
            progress=progress and (lambda done, total: progress("reading both", done, total)),
        )
    warn(warnings)
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", "part", "parameters", "change", "changed", box=None)
    for row in rows:
        table.add_row(row.kind, row.name, f"{row.parameters:,}", f"{row.change:.3e}", f"{row.changed:.1%}")
    Console().print(table)
    print("change: |post - pre| / |pre|; changed: share of the elements")
