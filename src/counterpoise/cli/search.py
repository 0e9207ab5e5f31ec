"""`counterpoise search`: heavy imports inside the command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from counterpoise.cli.options import (
    Alignment,
    BatchSize,
    Device,
    Drop,
    Dtype,
    NewTokens,
    NoChat,
    Post,
    Pre,
    Prompts,
    ProxySize,
    Quiet,
    RewardOption,
    SearchBlocks,
    Seed,
    Temperature,
    Unrelated,
    dtype_of,
    usable_device,
)
from counterpoise.cli.terminal import bars, plain_errors


def search(
    pre: Pre,
    post: Post,
    out: Annotated[Path, typer.Option("-o", "--out", help="The recipe to write.")],
    prompts: Prompts,
    reward: RewardOption,
    mean: Annotated[float | None, typer.Option(help="HMA's mean ratio, in [0, 1].")] = None,
    method: Annotated[str, typer.Option(help="hma or two-sided.")] = "hma",
    weight: Annotated[
        float, typer.Option("--lambda", min=0, help="Two-sided: the price of what PRE could do, in units of alignment.")
    ] = 1.0,
    alignment: Alignment = "imitation",
    blocks: SearchBlocks = None,
    proxy_size: ProxySize = 256,
    max_passes: Annotated[
        int, typer.Option(min=0, help="Most points that the search evaluates; two-sided: 0 writes the path.")
    ] = 12,
    work: Annotated[Path | None, typer.Option(help="Where finished pieces are kept (default OUT.work).")] = None,
    drop: Drop = None,
    allow_unrelated: Unrelated = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 16,
    max_new_tokens: NewTokens = 128,
    temperature: Temperature = 1.0,
    no_chat_template: NoChat = False,
    quiet: Quiet = False,
) -> None:
    """Find HMA's ratios at a mean, or the two-sided search's at a lambda, and write them as a recipe."""
    work = work or out.with_name(out.name + ".work")
    with plain_errors(f"finished pieces are in {work}; the same command goes on from there"), bars(quiet) as progress:
        if method not in ("hma", "two-sided"):
            raise ValueError(f"--method: expected hma or two-sided, found {method!r}")
        if (mean is None) == (method == "hma"):
            raise ValueError(
                "search: expected --mean with --method hma, and --lambda with --method two-sided, which has no mean"
            )
        from counterpoise.evaluation.panel import Panel

        panel = Panel.load(
            prompts,
            reward,
            [],
            device=usable_device(device),
            seed=seed,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            chat=not no_chat_template,
        )
        options: dict[str, Any] = {
            "proxy_size": proxy_size,
            "max_passes": max_passes,
            "work": work,
            "drop": drop or (),
            "allow_unrelated": allow_unrelated,
            "device": usable_device(device),
            "dtype": dtype_of(dtype),
            "progress": progress,
        }
        if mean is not None:
            from counterpoise.search.recipes import hma_recipe

            found, recipe = hma_recipe(pre, post, out, panel, mean=mean, blocks=blocks or 3, **options)
            gained = f"{found.passes} passes, proxy loss {found.trace[0]:.4f} -> {found.value:.4f} nats/token"
        else:
            from counterpoise.search.recipes import two_sided_recipe

            options |= {"weight": weight, "alignment": alignment, "blocks": blocks or "layerwise"}
            end, recipe = two_sided_recipe(pre, post, out, panel, **options)
            kept = ", ".join(f"{name} {value:.3f}" for name, value in end.retention.items())
            gained = f"alignment lost {end.alignment:.3f} (1 at PRE), of what PRE says {kept} (1 at POST)"
    for warning in recipe.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for block, value in zip(recipe.partition.blocks, recipe.ratios, strict=True):
        print(f"{block.name:24} {value:.3f}")
    print(f"{gained}; written to {out}")
