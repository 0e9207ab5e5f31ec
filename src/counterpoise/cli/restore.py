"""`counterpoise restore` and `counterpoise tax`. Heavy imports inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from counterpoise.cli import options
from counterpoise.cli.help import general, machine, option, searched
from counterpoise.cli.logs import tax_of_logs
from counterpoise.cli.push import Push, check_push, push
from counterpoise.cli.terminal import (
    bars,
    command_line,
    is_first,
    plain_errors,
    print_json,
    refuse_several,
    show_result,
    show_tax,
    warn,
)


def restore(
    *,
    pre: options.Pre,
    post: options.Post,
    out: options.Out,
    prompts: options.Prompts,
    reward: options.RewardOption,
    abilities: options.Abilities,
    search: Annotated[Literal["hma", "two-sided", "both"], searched(None, "What looks for ratios per block.")] = "hma",
    blocks: options.SearchBlocks = None,
    mean: Annotated[float | None, searched("X", "Write HMA at this mean ratio instead of picking.")] = None,
    keep_reward: Annotated[
        float | None, searched("X", "Share of the reward gain that the pick must keep (default 0.95).")
    ] = None,
    confidence: Annotated[
        float | None, searched("X", "How sure that must be, to within 5 points; 0: as on these prompts (default 0.9).")
    ] = None,
    means: Annotated[
        str | None,
        searched(
            "X,X", "Mean ratios of the grid; above 1 extrapolates (ExPO), with MA alone (default 0.2,0.4,0.6,0.8)."
        ),
    ] = None,
    slopes: Annotated[
        str | None,
        searched("X,X", "Ramps over depth at each mean: 1 is LiNeS, 2 steeper, step the limit (default 1,2,step)."),
    ] = None,
    race: Annotated[
        bool, searched(None, "Drop on few prompts what surely loses too much reward; no controls.", "--race")
    ] = False,
    outside: Annotated[
        Literal["mean", "first"] | None,
        searched(None, "Ratio of embeddings and head under ramps: the mean (default), or the first layer's."),
    ] = None,
    lambdas: Annotated[
        str | None,
        searched("X,X", "Two-sided: prices of what PRE could do, in units of alignment (default 0.25,0.5,1,2,4)."),
    ] = None,
    calibrate: Annotated[
        int | None, searched("N", "Two-sided: also retain the answers of so many validation items an ability.")
    ] = None,
    min_effective_sets: Annotated[
        float | None, searched("X", "Two-sided: guard the worst retention set, at least so many always counting.")
    ] = None,
    proxy_size: options.ProxySize = 256,
    heal: Annotated[
        int | None, searched("STEPS", "Also heal for so many steps with both as teachers; its points may be picked.")
    ] = None,
    heal_from: Annotated[
        str | None,
        searched("START", "Where healing begins: POST (default), PRE, pick, or a ramp as 'LiNeS 0.8', 'step 0.7'."),
    ] = None,
    keep_by: Annotated[
        Literal["uniform", "bandit"] | None, searched(None, "With --heal: who is asked how much (default uniform).")
    ] = None,
    heal_openings: Annotated[
        int | None, searched("N", "With --heal: openings of PRE's own that are asked about, too (default none).")
    ] = None,
    controls: Annotated[bool, searched(None, "Also measure ramps, a reversed one and random ratios.")] = True,
    anyway: Annotated[bool, searched(None, "Search also where nothing measurable fell.", "--anyway")] = False,
    fast: options.Fast = False,
    dry_run: options.DryRun = False,
    speed: options.SpeedOption = None,
    work: options.WorkFolder = None,
    donor: options.DonorOption = "post",
    matching: options.Matching,
    amounts: options.Amounts,
    how: options.Drawn,
    ray: Annotated[
        str | None,
        machine("HOST:PORT", "Measure on a Ray cluster; auto: the one that runs here, else processes of this machine."),
    ] = None,
    replicas: Annotated[int | None, machine("N", "With --ray: models at once, each in a process (default 1).")] = None,
    engines: options.Engines,
    shard: options.Shard = False,
    push_to: Push = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure the alignment tax, find the average that gives it back, write it with a report.

    Example:
      counterpoise restore pre post -o restored --prompts prompts.jsonl \\
          --reward sentiment:reviews.csv --abilities choices:arc_easy.jsonl
    """
    with (
        plain_errors(f"finished pieces are in {work or f'{out}.work'}; the same command goes on from there"),
        bars(quiet or dry_run) as progress,
    ):
        from counterpoise.restoration.request import Heal, Request
        from counterpoise.search.candidates import HMA, SLOPES, Ramp, TwoSided

        check_push(push_to)
        two = options.given(
            lambdas=lambdas and options.numbers(lambdas, "--lambdas"),
            calibrate=calibrate,
            min_effective_sets=min_effective_sets,
            blocks=blocks,
        )
        if search == "hma":
            options.refuse_without("--search two-sided or both", {name: two[name] for name in two if name != "blocks"})
        if mean is not None:
            nothing = options.given(keep_reward=keep_reward, confidence=confidence, means=means)
            options.refuse_without("a grid to pick from in the place of --mean", nothing)
        if heal is None:
            options.refuse_without(
                "--heal STEPS", options.given(heal_from=heal_from, keep_by=keep_by, heal_openings=heal_openings)
            )
        if not dry_run:
            options.refuse_without("--dry-run", options.given(speed=speed))
        if ray is None:
            options.refuse_without("--ray auto", options.given(replicas=replicas))
        if not controls:
            options.refuse_without("--controls", options.given(slopes=slopes, outside=outside))
        cut = 3 if blocks is None else blocks
        searches: list[HMA | Ramp | TwoSided] = [] if search == "two-sided" else [HMA(cut, proxy_size)]
        if controls:
            steep = options.ramps(slopes) if slopes else SLOPES
            searches += [Ramp(slope, cut, outside or "mean") for slope in (*steep, "reversed", "random")]
        if search != "hma":
            searches.append(TwoSided(**two, proxy_size=proxy_size))
        device = options.device_of(how.device)
        picked = options.given(
            means=means and options.numbers(means, "--means"), keep_reward=keep_reward, mean=mean, work=work
        )
        picked |= options.given(confidence=confidence)
        fitted = {"donor": donor, **matching.settings, "dtype": options.dtype_of(how.dtype)}
        healing = (
            None
            if heal is None
            else Heal(heal, **options.given(start=heal_from, keep_by=keep_by, openings=heal_openings))
        )
        more: dict[str, Any] = {"device": device, "race": race, "heal": healing, "anyway": anyway}
        more |= {"engine": engines.settings, "shard": options.shares(shard, dry_run=dry_run)}
        request = Request(pre, post, out, searches, cut=cut, **picked, **fitted, **more)
        files = how.panel(prompts, reward, abilities, amounts)
        if fast:
            request, files = request.rough(), files.rough()
        cluster = None
        if ray is not None:
            from counterpoise.restoration.cluster import Cluster

            refuse_several("restore --ray", "; start it without torchrun, engines are Ray's")
            cluster = Cluster(files.load, ray, **options.given(replicas=replicas))
            cluster.check(device)
        if dry_run:
            from counterpoise.cli.plan import tell
            from counterpoise.planning.restore import plan_restore
            from counterpoise.planning.shorter import restore_fits, restore_ways

            asked, devices = (request, files), options.devices_like(device, speed)
            there: dict[str, Any] = {"present": speed is None, "memory": options.memory_of(speed)}
            tell(
                asked,
                lambda a: plan_restore(*a, **there),
                restore_ways(asked),
                speed,
                device,
                as_json,
                restore_fits(asked, devices),
            )
            return
        from counterpoise.alignment.training.processes import one_message
        from counterpoise.evaluation.abilities import is_file
        from counterpoise.restoration.restore import run

        request.check(among := sum(map(is_file, abilities)), len(abilities) - among)
        options.usable_device(device)
        with one_message():
            result = run(request, files.load(device), cluster=cluster, command=command_line(), progress=progress)
        if not is_first():
            return
        if result["out"]:
            push(out, push_to)
    show_result(result, out, work, as_json=as_json)
    if heal is None and "choice" in result and request.no_healing is None and not as_json:
        elsewhere = f", another -o, and --work {request.folder}" if result["out"] else ""
        print(f"healing may give back more: the same with --heal 20{elsewhere}")


def tax(
    *,
    ctx: typer.Context,
    pre: options.Pre,
    post: options.Post,
    prompts: options.MaybePrompts = None,
    reward: options.MaybeReward = None,
    abilities: options.MaybeAbilities = None,
    from_logs: Annotated[
        bool,
        option(
            None,
            "PRE and POST are two finished runs, and no model is needed: lm-eval's --log_samples (folder or "
            "files), Inspect logs, results files of counterpoise (FILE#POINT).",
            "--from",
        ),
    ] = False,
    page: Annotated[Path | None, option("FILE", "Also write the page (html).")] = None,
    work: Annotated[Path | None, general("FOLDER", "Keep finished pieces here and go on from them.")] = None,
    matching: options.Matching,
    amounts: options.Amounts,
    how: options.Drawn,
    engines: options.Engines,
    shard: options.Shard = False,
    fast: options.Fast = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Reward and abilities of PRE and POST on held-out data, with intervals and paired tests.

    Needs --prompts, --reward and --abilities; or --from, which compares two finished runs.

    Example:
      counterpoise tax --from pre_logs post_logs --page tax.html
    """
    if not from_logs and not (prompts and reward and abilities):
        lacking = next(name for name in ("prompts", "reward", "abilities") if not ctx.params[name])
        ctx.fail(f"Missing option '--{lacking}'.")
    with plain_errors("nothing was written"), bars(quiet or from_logs) as progress:
        if page and not page.absolute().parent.is_dir():
            raise ValueError(f"--page {page}: expected a folder {page.absolute().parent}, found none; make it first")
        if from_logs:
            tax_of_logs(ctx, pre, post, page, as_json=as_json)
            return
        assert prompts
        assert reward
        assert abilities
        from counterpoise.evaluation.abilities import is_file
        from counterpoise.evaluation.panel import ROUGH
        from counterpoise.language.loading import refuse_unmeasurable
        from counterpoise.restoration.restore import measure_tax

        if work is None and not shard:
            refuse_several("tax", "; with --work FOLDER they share the work")
        engine, shares = engines.settings, options.shares(shard)
        engine.check(sum(not is_file(a) for a in abilities), shares)
        refuse_unmeasurable(pre, post)  # before the reward is loaded

        device = options.usable_device(how.device)
        files = how.panel(prompts, reward, abilities, amounts)
        panel = (files.rough() if fast else files).load(device)
        on: dict[str, Any] = {"device": device, "dtype": options.dtype_of(how.dtype), **matching.settings}
        on |= {"engine": engine, "shard": shares}
        found = measure_tax(pre, post, panel, work=work, progress=progress, **on)
        if not is_first():
            return
        result = {"command": command_line(), **found}
        if fast:
            result |= {"settings": result["settings"] | {"fast": True}, "verdict": f"{ROUGH}. {result['verdict']}"}
        if page:
            from counterpoise.records import public, write_whole
            from counterpoise.report.html import report_page

            write_whole(page, report_page(public(result)))
    warn(result["warnings"])
    if as_json:
        print_json(result)
    else:
        show_tax(result)
        print(result["verdict"])
