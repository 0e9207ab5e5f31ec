"""`counterpoise judge`: win rates of one model's responses against another's. Heavy imports inside the commands."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from counterpoise.cli import options
from counterpoise.cli.help import Commands, general, group, machine, option
from counterpoise.cli.terminal import bars, command_line, plain_errors, print_json, say

if TYPE_CHECKING:
    from counterpoise.judging.alpaca import OutputPair
    from counterpoise.judging.judges import EndpointJudge, Judge

app = Commands(
    "judge", "Which of two models answers better: win rate in both orders, by a preference model or a chat endpoint."
)

asked = group("Endpoint")


@app.command()
def compare(
    ours: Annotated[
        Path, typer.Argument(metavar="OURS", help='AlpacaEval json: [{"instruction", "output", "generator"}, ...].')
    ],
    theirs: Annotated[Path, typer.Argument(metavar="THEIRS", help="The reference's outputs to the same instructions.")],
    out: Annotated[Path, option("FILE", "Result file (json) to write.", "-o", "--out")],
    reward: Annotated[
        str | None,
        option(
            "REWARD", "Judge by a reward: a model folder or hub id, FILE.py:function, sentiment:FILE.csv, http://..."
        ),
    ] = None,
    preference: Annotated[
        str | None,
        option(
            "TEXT",
            "Judge by a pairwise model: PairRM (llm-blender/PairRM-hf, or its folder), or "
            "module:function(instructions, firsts, seconds) -> P(first is better).",
        ),
    ] = None,
    base_url: Annotated[
        str | None, asked("TEXT", "Judge by an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1.")
    ] = None,
    model: Annotated[str | None, asked("TEXT", "The endpoint's model.")] = None,
    key_variable: Annotated[
        str | None, asked("TEXT", "Environment variable with the key (OPENAI_API_KEY); '' sends none.")
    ] = None,
    annotations: Annotated[Path | None, option("FILE", "Also write AlpacaEval's annotations (json).")] = None,
    work: Annotated[Path | None, general("FOLDER", "Where answers are kept (default OUT.work).")] = None,
    max_calls: Annotated[int | None, asked("N", "Refuse to start when more calls would be needed.")] = None,
    yes: Annotated[bool, asked(None, "Do not ask before calling the endpoint.", "--yes")] = False,
    price_in: Annotated[float | None, asked("X", "Price of a million prompt tokens, for the estimate.")] = None,
    price_out: Annotated[float | None, asked("X", "Price of a million completion tokens.")] = None,
    concurrency: Annotated[int | None, asked("N", "Calls under way at once (4).", min=1)] = None,
    timeout: Annotated[float | None, asked("X", "Seconds for one call (60).")] = None,
    attempts: Annotated[int | None, asked("N", "Calls before giving up on one question (6).")] = None,
    longest_wait: Annotated[
        float | None, asked("X", "Longest pause in seconds that a server may ask for (120).")
    ] = None,
    max_tokens: Annotated[int | None, asked("N", "Longest answer (512); 0 leaves the field out.")] = None,
    temperature: Annotated[float | None, asked("X", "Of the judge (0); below 0 leaves the field out.")] = None,
    limit: Annotated[int | None, option("N", "At most so many prompts.", min=1)] = None,
    dry_run: options.DryRun = False,
    speed: options.SpeedOption = None,
    device: Annotated[str | None, machine("DEVICE", "Of a reward or preference model (auto).")] = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Win rate of OURS against THEIRS with a 95 % interval, each pair judged in both orders.

    Example:
      counterpoise judge compare ours.json theirs.json -o win.json \\
          --preference llm-blender/PairRM-hf
    """
    work = work or out.with_name(out.name + ".work")
    with plain_errors(f"answers are in {work}; the same command goes on from there"):
        from counterpoise.judging.alpaca import annotated, pair_outputs, read_outputs
        from counterpoise.judging.judges import EndpointJudge, judge_pairs
        from counterpoise.language.endpoint import Endpoint
        from counterpoise.records import Store, named, versions, write_json

        if sum(x is not None for x in (reward, preference, base_url)) != 1:
            raise ValueError("judge: expected exactly one of --reward, --preference and --base-url")
        patience = options.given(
            key_variable=key_variable, timeout=timeout, attempts=attempts, longest_wait=longest_wait
        )
        sent = options.given(temperature=temperature, max_tokens=max_tokens)
        costs = options.given(max_calls=max_calls, yes=yes or None, price_in=price_in, price_out=price_out)
        if base_url is None:
            options.refuse_without(
                "--base-url", options.given(model=model, **patience, **sent, **costs, concurrency=concurrency)
            )
        else:
            options.refuse_without("--reward or --preference", options.given(device=device))
        if not dry_run:
            options.refuse_without("--dry-run", options.given(speed=speed))
        device = "cpu" if base_url else options.device_of(device or "auto")
        pairs = pair_outputs(read_outputs(ours), read_outputs(theirs))[:limit]
        judge: Judge
        if base_url is None and dry_run:
            from counterpoise.cli.plan import tell
            from counterpoise.evaluation.specs import is_function
            from counterpoise.planning.judge import plan_compare
            from counterpoise.planning.shorter import first_ways

            if preference is not None and is_function(preference):
                _local(reward, preference, device)
                preference = None
            by: Any = {"reward": reward, "preference": preference}
            tell(pairs, lambda some: plan_compare(some, **by), first_ways(pairs), speed, device, as_json)
            return
        if base_url is None:
            judge, about = _local(reward, preference, device)
        else:
            if not model:
                raise ValueError("judge: --base-url needs --model")
            if sent.get("temperature", 0) < 0:
                sent["temperature"] = None
            if "max_tokens" in sent:
                sent["max_tokens"] = sent["max_tokens"] or None
            endpoint = Endpoint(base_url, model, **patience, **sent)
            judge, about = EndpointJudge(endpoint, Store(work), concurrency or 4), endpoint.identity
            if not _agreed(judge, pairs, max_calls, (price_in, price_out), yes=yes, dry_run=dry_run):
                return
        with bars(quiet) as progress:
            if isinstance(judge, EndpointJudge):
                judge = replace(judge, progress=named(progress, "judging"))
            found = judge_pairs(judge, pairs)
        made = {"format": "counterpoise judge 1", "command": command_line(), "versions": versions()}
        result = {**made, "judge": about, **found}
        write_json(out, result)
        if annotations is not None:
            name = about.get("model") or about.get("reward") or about.get("preference")
            write_json(annotations, annotated(pairs, found["scores"], str(name)))
    if as_json:
        print_json(result)
    else:
        _show(result, out)


@app.command()
def respond(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint: a folder or a hub id.")],
    prompts: options.Prompts,
    out: Annotated[Path, option("FILE", "AlpacaEval json to write.", "-o", "--out")],
    generator: Annotated[str | None, option("TEXT", "Its name in the file (default: MODEL's last part).")] = None,
    limit: Annotated[int | None, option("N", "At most so many prompts.", min=1)] = None,
    max_new_tokens: options.NewTokens = 256,
    temperature: options.Temperature = 0.7,
    batch_size: Annotated[Any, options.batch(options.USUAL)] = None,
    no_chat_template: options.NoChat = False,
    seed: options.Seed = 0,
    dry_run: options.DryRun = False,
    speed: options.SpeedOption = None,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Answer prompts with a checkpoint and write AlpacaEval's outputs.

    Example:
      counterpoise judge respond restored --prompts prompts.jsonl -o ours.json
    """
    with plain_errors("nothing was written"), bars(quiet or dry_run) as progress:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        from counterpoise.checkpoints.files import resolve
        from counterpoise.language.dtypes import placed
        from counterpoise.language.loading import refuse_damaged, refuse_unmeasurable, without_bars
        from counterpoise.language.prompts import encode_prompts, read_prompts
        from counterpoise.language.sampling import Drawing, decode, sample
        from counterpoise.language.ways import context_of
        from counterpoise.records import named, write_json

        size = options.rows_on(device, batch_size)
        drawing = Drawing(1, max_new_tokens, temperature, not no_chat_template, size, seed)
        drawing.check()
        refuse_unmeasurable(model)
        if not dry_run:
            options.refuse_without("--dry-run", options.given(speed=speed))
        wanted = read_prompts(prompts)[:limit]
        device = options.device_of(device)
        if dry_run:
            from counterpoise.cli.plan import tell
            from counterpoise.planning.judge import plan_respond
            from counterpoise.planning.shorter import respond_ways

            on: dict[str, Any] = {"device": device if speed is None else None, "memory": options.memory_of(speed)}
            tell(
                (wanted, drawing),
                lambda a: plan_respond(model, *a, **on),
                respond_ways(wanted),
                speed,
                device,
                as_json,
            )
            return
        folder = resolve(model)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        context = context_of(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        encoded = encode_prompts(tokenizer, wanted, chat=drawing.chat, new=max_new_tokens, limit=context)
        with without_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        refuse_damaged(loaded, model)
        answering = named(progress, "answering")
        drawn = sample(placed(loaded, device), tokenizer, encoded, drawing, progress=answering)
        texts = decode(tokenizer, [group[0] for group in drawn])
        name = generator or Path(model.rstrip("/")).name
        rows = [{"instruction": p.text, "output": t, "generator": name} for p, t in zip(wanted, texts, strict=True)]
        write_json(out, rows)
    if as_json:
        print_json(rows)
    else:
        print(f"{out}: {len(rows)} outputs of {name}")


def _local(reward: str | None, preference: str | None, device: str) -> tuple[Judge, dict[str, Any]]:
    from counterpoise.evaluation.rewards import load_reward
    from counterpoise.evaluation.specs import imported, is_function
    from counterpoise.judging.judges import by_preference, by_reward

    if reward is not None:
        return by_reward(load_reward(reward, device=device)), {"reward": reward}
    assert preference is not None
    if not is_function(preference):
        from counterpoise.judging.pairrm import pairrm

        return by_preference(pairrm(preference, device=device), preference), {"preference": preference}
    module, _, function = preference.partition(":")
    if not module or not function:
        raise ValueError(f"--preference: expected a PairRM checkpoint or module:function, found {preference!r}")
    if (found := imported(module, function)) is None:
        raise ValueError(f"--preference: {module} has no callable named {function!r}")
    return by_preference(found, preference), {"preference": preference}


def _agreed(
    judge: EndpointJudge,
    pairs: list[OutputPair],
    most: int | None,
    prices: tuple[Any, Any],
    *,
    yes: bool,
    dry_run: bool,
) -> bool:
    """Show what asking would take, and ask whether to."""
    plan, endpoint = judge.plan(pairs), judge.endpoint
    out = f"at most {plan.tokens_out:,} out" if endpoint.max_tokens else "as many out as it writes"
    cost = "" if None in prices else f", at most about {plan.cost(*prices):,.2f} by your prices"
    told = (
        f"{plan.calls:,} calls to {endpoint.model} at {endpoint.base_url} ({plan.stored:,} answers are there already): about "
        f"{plan.tokens_in:,} tokens in, {out}{cost}"
    )
    (print if dry_run else say)(told)  # what a dry run is asked for is no chatter
    if most is not None and plan.calls > most:
        raise ValueError(f"{plan.calls:,} calls are needed, more than --max-calls {most:,}; nothing was asked")
    if dry_run:
        print("dry run: nothing was asked or written")
        return False
    if plan.calls and not yes:
        if not sys.stdin.isatty():
            raise ValueError(f"nothing was asked, and would be {told}; give --yes to call without being asked")
        if not typer.confirm(f"Go on with {plan.calls:,} calls?", err=True):
            raise ValueError("nothing was asked")
    return True


def _show(result: dict[str, Any], out: Path) -> None:
    from counterpoise.tables.numbers import number, spoken

    def percent(found: dict[str, float] | None) -> str:
        return spoken({k: 100 * v for k, v in found.items()}) if found else "–"

    win, position, lengths = result["win_rate"], result["position"], result["lengths"]
    print(f"{result['ours']} against {result['theirs']}: win rate {percent(win)} %")
    print(
        f"{result['won']} won, {result['tied']} tied, {result['lost']} lost, {result['left_out']} of {result['prompts']} "
        "prompts left out (no verdict in one of the orders)"
    )
    for label, counts in result["verdicts"].items():
        print(f"  {label.replace('_', ' ')}: " + ", ".join(f"{n} {v}" for v, n in counts.items() if n))
    print(f"shown first and preferred: {percent(position['first_preferred'])} % of decided verdicts (50 is no bias)")
    if position["same_in_both_orders"] is not None:
        print(f"same verdict in both orders: {100 * position['same_in_both_orders']:.0f} %")
    print(
        f"mean length {number(lengths['ours'], 0)} and {number(lengths['theirs'], 0)} characters; win rate where ours is "
        f"longer {percent(lengths['win_rate_where_longer'])} %, shorter {percent(lengths['win_rate_where_shorter'])} %"
    )
    print(f"wrote {out}")
