"""`counterpoise search`: heavy imports inside the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from counterpoise.cli import options
from counterpoise.cli.help import option
from counterpoise.cli.terminal import bars, is_first, plain_errors, print_json, warn


def search(
    *,
    pre: options.Pre,
    post: options.Post,
    out: Annotated[Path, option("FILE", "The recipe to write.", "-o", "--out")],
    prompts: options.Prompts,
    reward: options.RewardOption,
    mean: Annotated[float | None, option("X", "HMA's mean ratio, in [0, 1].")] = None,
    method: Annotated[Literal["hma", "two-sided"], option(None, "Which search.")] = "hma",
    price: Annotated[
        float | None,
        option("X", "Two-sided: the price of what PRE could do, in units of alignment (default 1).", "--lambda"),
    ] = None,
    blocks: options.SearchBlocks = None,
    proxy_size: options.ProxySize = 256,
    max_passes: Annotated[
        int, option("N", "Most points that the search evaluates; two-sided: 0 writes the path.")
    ] = 12,
    fast: options.Fast = False,
    work: options.WorkFolder = None,
    matching: options.Matching,
    how: options.Drawn,
    engines: options.Engines,
    shard: options.Shard = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Find HMA's ratios at a mean, or the two-sided search's at a lambda, and write them as a recipe.

    Example:
      counterpoise search pre post -o recipe.json --mean 0.6 \\
          --prompts prompts.jsonl --reward sentiment:reviews.csv
      counterpoise average pre post -o averaged --recipe recipe.json
    """
    work = work or out.with_name(out.name + ".work")
    with plain_errors(f"finished pieces are in {work}; the same command goes on from there"), bars(quiet) as progress:
        from counterpoise.alignment.training.processes import one_message
        from counterpoise.evaluation.panel import FEW, SHORT
        from counterpoise.records import public
        from counterpoise.search.candidates import SEARCHES
        from counterpoise.search.descent import SearchResult
        from counterpoise.search.recipes import Wanted, find_recipe

        if fast:
            proxy_size, max_passes = min(FEW, proxy_size), min(4, max_passes)
            how = replace(how, max_new_tokens=min(SHORT, how.max_new_tokens))
        if method == "hma":
            options.refuse_without("--method two-sided", options.given(**{"lambda": price}))
        if (mean is None) == (method == "hma"):
            raise ValueError(
                "search: expected --mean with --method hma, and --lambda with --method two-sided, which has no mean"
            )
        searched = SEARCHES[method](**options.given(blocks=blocks), proxy_size=proxy_size)
        at = mean if mean is not None else 1.0 if price is None else price
        device = options.usable_device(how.device)
        on: dict[str, Any] = {**matching.settings, "device": device, "dtype": options.dtype_of(how.dtype)}
        on |= {"engine": engines.settings, "shard": options.shares(shard)}
        wanted = Wanted(pre, post, out, searched, at, work, max_passes, **on)
        wanted.check()
        with one_message():
            found, recipe = find_recipe(wanted, how.panel(prompts, reward).load(device), progress=progress)
        if not is_first():
            return
        if isinstance(found, SearchResult):
            gained = f"{found.passes} passes, proxy loss {found.trace[0]:.4f} -> {found.value:.4f} nats/token"
        else:
            kept = ", ".join(f"{name} {value:.3f}" for name, value in found.retention.items())
            gained = f"alignment lost {found.alignment:.3f} (1 at PRE), of what PRE says {kept} (1 at POST)"
    warn(recipe.warnings)
    if as_json:
        print_json(public(recipe.to_json()))
        return
    if fast:
        print(
            f"A rough answer (--fast): {proxy_size} responses of {how.max_new_tokens} tokens at most, {max_passes} points."
        )
    for block, value in zip(recipe.partition.blocks, recipe.ratios, strict=True):
        print(f"{block.name:24} {value:.3f}")
    print(f"{gained}; written to {out}")
