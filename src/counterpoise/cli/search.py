"""`counterpoise search`: heavy imports inside the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from counterpoise.cli import options
from counterpoise.cli.help import option
from counterpoise.cli.terminal import bars, plain_errors, print_json, warn


def search(
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
    alignment: options.AlignmentForm = None,
    blocks: options.SearchBlocks = None,
    proxy_size: options.ProxySize = 256,
    max_passes: Annotated[
        int, option("N", "Most points that the search evaluates; two-sided: 0 writes the path.")
    ] = 12,
    fast: options.Fast = False,
    work: options.WorkFolder = None,
    drop: options.Drop = None,
    allow_unrelated: options.Unrelated = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    batch_size: options.BatchSize = 16,
    max_new_tokens: options.NewTokens = 128,
    temperature: options.Temperature = 1.0,
    no_chat_template: options.NoChat = False,
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
        from counterpoise.evaluation.panel import FEW, SHORT, PanelFiles
        from counterpoise.language.sampling import Drawing
        from counterpoise.records import public
        from counterpoise.search.candidates import SEARCHES
        from counterpoise.search.descent import SearchResult
        from counterpoise.search.recipes import Wanted, find_recipe

        if fast:
            proxy_size, max_passes = min(FEW, proxy_size), min(4, max_passes)
            max_new_tokens = min(SHORT, max_new_tokens)
        if method == "hma":
            options.refuse_without("--method two-sided", options.given(**{"lambda": price}, alignment=alignment))
        if (mean is None) == (method == "hma"):
            raise ValueError(
                "search: expected --mean with --method hma, and --lambda with --method two-sided, which has no mean"
            )
        how = SEARCHES[method](**options.given(blocks=blocks, alignment=alignment), proxy_size=proxy_size)
        at = mean if mean is not None else 1.0 if price is None else price
        device = options.usable_device(device)
        fitted: dict[str, Any] = {"drop": drop or (), "allow_unrelated": allow_unrelated, "device": device}
        fitted["dtype"] = options.dtype_of(dtype)
        wanted = Wanted(pre, post, out, how, at, work, max_passes, **fitted)
        wanted.check()
        drawing = Drawing(1, max_new_tokens, temperature, not no_chat_template, batch_size, seed)
        panel = PanelFiles(prompts, reward, [], drawing=drawing).load(device)
        found, recipe = find_recipe(wanted, panel, progress=progress)
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
            f"A rough answer (--fast): {proxy_size} responses of {max_new_tokens} tokens at most, {max_passes} points."
        )
    for block, value in zip(recipe.partition.blocks, recipe.ratios, strict=True):
        print(f"{block.name:24} {value:.3f}")
    print(f"{gained}; written to {out}")
