"""`counterpoise merge`: heavy imports inside the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from counterpoise.cli import options
from counterpoise.cli.help import matched, option
from counterpoise.cli.push import Push, check_push, push
from counterpoise.cli.terminal import bars, plain_errors, uncollected, warn


def merge(
    *,
    pre: options.Pre,
    posts: Annotated[
        list[str],
        typer.Argument(metavar="POST...", help="One or several checkpoints after; may be LoRA adapters on PRE."),
    ],
    out: options.Out,
    method: Annotated[Literal["ties", "dare", "dare-ties"] | None, option(None, "Of merging (default ties).")] = None,
    density: Annotated[float | None, option("X", "Share of each update that is kept (0.2).")] = None,
    ratio: Annotated[float | None, option("X", "Share of the merged update that goes onto PRE (1).")] = None,
    weights: Annotated[str | None, option("X,X", "One a POST, with commas: 1,0.5. Default: equal.")] = None,
    scope: Annotated[
        Literal["model", "tensor"] | None,
        option(None, "ties ranks elements in the whole model (the default) or in each tensor."),
    ] = None,
    seed: Annotated[int | None, option("N", "Of dare's random draw (0).")] = None,
    recipe: Annotated[
        Path | None, option("FILE", "A merge's recipe.json or a YAML of mergekit, instead of the options above.")
    ] = None,
    donor: Annotated[
        Literal["post", "pre"] | None,
        matched(
            None, "Whose config and tokenizer go into OUT: post (the first) or pre (default post, or the recipe's)."
        ),
    ] = None,
    matching: options.Matching,
    push_to: Push = None,
    quiet: options.Quiet = False,
) -> None:
    """Merge one or several POSTs into PRE by TIES or DARE, streaming from disk to disk.

    Example:
      counterpoise merge pre maths code -o merged --method ties --density 0.2
    """
    with plain_errors("nothing was written"), uncollected(), bars(quiet) as progress:
        from counterpoise.checkpoints.files import look

        look(pre, *posts, out=out)
        from counterpoise.averaging.merge import Merge, MergeRecipe, merge as run

        check_push(push_to)
        shares = tuple(options.numbers(weights, "--weights")) if weights else None
        typed = options.given(method=method, density=density, ratio=ratio, scope=scope, seed=seed, weights=shares)
        if recipe and typed:
            raise ValueError(
                f"--{next(iter(typed))}: expected none of a merge's settings beside --recipe; leave it out"
            )
        again = MergeRecipe.read(recipe) if recipe else MergeRecipe(Merge(**typed))
        fitted: Any = {"donor": donor, "drop": matching.drop, "allow_unrelated": matching.allow_unrelated}
        made = run(pre, posts, out, again, **fitted, progress=progress)
        push(out, push_to)
    warn(made.warnings)
    print(f"{out}: {made.told}")
