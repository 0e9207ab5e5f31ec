"""`counterpoise merge`: heavy imports inside the command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from counterpoise.cli.terminal import bars, plain_errors


def merge(
    pre: Annotated[
        str, typer.Argument(help="Checkpoint before training: a folder, or a hub id (org/name, org/name@revision).")
    ],
    posts: Annotated[list[str], typer.Argument(help="One or several checkpoints after; may be LoRA adapters on PRE.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write; it appears whole or not at all.")],
    method: Annotated[str | None, typer.Option(help="ties (the default), dare or dare-ties.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of each update that is kept (0.2).")] = None,
    ratio: Annotated[float | None, typer.Option(help="Share of the merged update that goes onto PRE (1).")] = None,
    weights: Annotated[str | None, typer.Option(help="One a POST, with commas: 1,0.5. Default: equal.")] = None,
    scope: Annotated[
        str | None, typer.Option(help="ties ranks elements in the whole model (the default) or in each tensor.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of dare's random draw (0).")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A merge's recipe.json, instead of the options above.")] = None,
    donor: Annotated[
        str | None,
        typer.Option(help="Whose config and tokenizer go into OUT: post (the first) or pre (post, or the recipe's)."),
    ] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Pattern of tensors that one side alone has.")] = None,
    allow_unrelated: Annotated[
        bool, typer.Option("--allow-unrelated", help="Go on when the models look unrelated.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Merge one or several POSTs into PRE by TIES or DARE, streaming from disk to disk."""
    with plain_errors("nothing was written"), bars(quiet) as progress:
        from counterpoise.averaging.merge import Merge, MergeRecipe
        from counterpoise.averaging.merge import merge as run

        given: Any = {"method": method, "density": density, "ratio": ratio, "scope": scope, "seed": seed}
        given = {name: value for name, value in {**given, "weights": _weights(weights)}.items() if value is not None}
        if recipe and given:
            raise ValueError(
                f"--{next(iter(given))}: expected none of a merge's settings beside --recipe; leave it out"
            )
        again = MergeRecipe.read(recipe) if recipe else MergeRecipe(Merge(**given))
        made = run(
            pre,
            posts,
            out,
            again,
            donor=donor,  # type: ignore[arg-type]
            drop=drop,
            allow_unrelated=allow_unrelated,
            progress=progress,
        )
    for warning in made.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    plan = made.plan
    count = f"{len(posts)} {'update' if len(posts) == 1 else 'updates'}"
    print(f"{out}: {plan.method} of {count}, density {plan.density:g}, ratio {plan.ratio:g}")


def _weights(text: str | None) -> tuple[float, ...] | None:
    try:
        return tuple(float(part) for part in text.split(",")) if text else None
    except ValueError:
        raise ValueError(f"--weights: expected numbers with commas between them, found {text!r}") from None
