"""`counterpoise heal`: parse, call, print. Heavy imports inside the command."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from counterpoise.cli import options
from counterpoise.cli.help import drawn, group, machine, option
from counterpoise.cli.terminal import bars, command_line, plain_errors, print_json, warn

taught = group("How it is taught")


def heal(
    start: Annotated[str, typer.Argument(metavar="START", help="The student: POST, PRE or an average of them.")],
    align_teacher: Annotated[str, option("POST", "The teacher of what alignment brought.")],
    keep_teacher: Annotated[str, option("PRE", "The teacher of what there was before.")],
    out: options.Out,
    prompts: options.Prompts,
    abilities: options.MaybeAbilities = None,
    openings: Annotated[
        int | None,
        taught("N", "Also continue openings that PRE draws itself (default: 256 without --abilities, else none)."),
    ] = None,
    steps: Annotated[int, taught("N", "At most; validation prompts may end it earlier.")] = 15,
    every: Annotated[int, taught("N", "Steps from one point to the next.")] = 5,
    prompts_per_step: Annotated[int, taught("N", "Prompts of each side in a step.", min=1)] = 32,
    learning_rate: Annotated[float | None, taught("X", "Default: by size, 3e-5 at 135 million parameters.")] = None,
    divergence: Annotated[
        Literal["reverse", "forward", "jensen-shannon"], taught(None, "From the teacher, at every token.")
    ] = "reverse",
    keep_by: Annotated[
        Literal["uniform", "bandit"], taught(None, "Who is asked how much: equal shares, or as BanditMTL draws.")
    ] = "uniform",
    dry_run: options.DryRun = False,
    speed: options.SpeedOption = None,
    work: options.WorkFolder = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.WeightsDtype = "float32",
    bf16: options.BFloat16 = False,
    shard: Annotated[bool, machine(None, "Cut weights up among torchrun's processes (FSDP).", "--shard")] = False,
    batch_size: Annotated[Any, options.batch(64)] = None,
    micro_batch_size: options.MicroBatch = 8,
    recompute: options.Recompute = False,
    max_new_tokens: Annotated[int, drawn("N", "Longest answer of the student.", min=1)] = 64,
    temperature: options.Temperature = 1.0,
    no_chat_template: options.NoChat = False,
    trust_tasks: options.TrustTasks = False,
    report_to: options.ReportTo = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Give back what alignment cost by teaching: START learns from both teachers, on its own answers.

    Example:
      counterpoise heal post --align-teacher post --keep-teacher pre -o healed \\
          --prompts prompts.jsonl --abilities choices:arc_easy.jsonl
    """
    kept = f"finished points are in {work or f'{out}.work'}; the same command goes on from there"
    with plain_errors(kept), bars(quiet or dry_run) as progress:
        from counterpoise.alignment.heal import Healing, lies
        from counterpoise.alignment.settings import Teaching
        from counterpoise.alignment.training import processes
        from counterpoise.alignment.training.models import Machine
        from counterpoise.alignment.training.tracking import refuse_absent, reporting
        from counterpoise.language.sampling import Drawing

        if not dry_run:
            options.refuse_without("--dry-run", options.given(speed=speed))
        refuse_absent(report_to or ())
        teaching = Teaching(steps, every, prompts_per_step, learning_rate, divergence, keep_by, micro_batch_size)
        device = options.device_of(device)
        rows = options.rows_on(device, batch_size, 64)
        drawing = Drawing(1, max_new_tokens, temperature, not no_chat_template, rows, seed)
        wanted = Healing(
            start, align_teacher, keep_teacher, out, prompts, abilities or (), openings, teaching, drawing,
            Machine(options.dtype_of(dtype), bf16, shard or processes.asked_for("FSDP"), device, recompute), work, trust_tasks,
        )  # fmt: skip
        if dry_run:
            from counterpoise.cli.plan import tell
            from counterpoise.planning.heal import plan_heal
            from counterpoise.planning.shorter import heal_fits, heal_ways

            there: dict[str, Any] = {"present": speed is None, "memory": options.memory_of(speed)}
            tell(wanted, lambda a: plan_heal(a, **there), heal_ways(wanted), speed, device, as_json, heal_fits(wanted))
            return
        with processes.one_message():
            wanted.check()
            options.usable_device(device)
            with reporting(report_to or (), work or out.with_name(f"{out.name}.work"), device=device):
                record = wanted.run(command=command_line(), progress=progress)
    if not processes.is_first():
        return
    if as_json:
        print_json(record)
        return
    warn(record["warnings"])
    if record.get("already_finished"):
        print(f"{out} holds the result of this very run already; nothing was done again.")
    told = record["healed"]
    early = "" if told["ended"] == "steps" else f" (ended by {told['ended']})"
    before, after = told["before"], told["after"]
    for name, side in (("to POST, where alignment is asked", "align"), ("to PRE, where abilities are", "keep")):
        print(f"{name}: {before[side]:.4f} -> {after[side]:.4f} nats per token")
    print(
        f"best after {after['step']} steps{early}; {told['drawn']:,} tokens drawn, "
        f"{told['trained']:,} of them trained on, {told['seconds']:.0f} s"
    )
    print(lies(told["line"]))
    print(f"checkpoint: {out}")
