"""`counterpoise align`: parse, call, print. Heavy imports inside the commands."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from counterpoise.cli import options
from counterpoise.cli.help import Commands, Group, general, group, machine, measured, option
from counterpoise.cli.push import Push, check_push, push
from counterpoise.cli.terminal import bars, command_line, plain_errors, print_json, warn


class _AlignByDefault(Group):
    """`align MODEL ...` is the command `model`; the other commands go by their names."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default command in front of anything that names no other."""
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["model", *args]
        return super().parse_args(ctx, args)


app = Commands(
    "align",
    "Align a model with RSF, DPO or PPO, with any mitigation of the alignment tax.\n\n"
    "`align MODEL -o OUT ...` is short for `align model MODEL -o OUT ...`: see `align model --help`.",
    cls=_AlignByDefault,
)

Model = Annotated[
    str, typer.Argument(help="Checkpoint to start from: a folder, or a hub id (org/name, org/name@revision).")
]
StateFolder = Annotated[
    Path | None, general("FOLDER", "Checkpoints on the way, state to go on from (default OUT.work).")
]
_setting = group("Settings of the method (default: the paper's)")
_held = group("Mitigations of the alignment tax")


@app.command()
def model(
    source: Annotated[
        str, typer.Argument(metavar="MODEL", help="PRE: a folder, or a hub id (org/name, org/name@revision).")
    ],
    out: options.Out,
    method: Annotated[Literal["rsf", "ppo", "dpo"], option(None, "How it is aligned.")],
    prompts: Annotated[
        Path | None, measured("DATA", "rsf, ppo: jsonl, json, csv or parquet of prompts; or hf:NAME:SPLIT:COLUMN.")
    ] = None,
    reward: Annotated[
        str | None,
        measured("REWARD", "rsf, ppo: sentiment:FILE.csv, FILE.py:function, a model folder or hub id, an endpoint."),
    ] = None,
    preferences: Annotated[
        Path | None,
        measured("DATA", "dpo: prompts with chosen and rejected, also HH's and UltraFeedback's."),
    ] = None,
    samples: Annotated[
        Path | None, measured("FILE", "rsf, distillation style: what `align collect` wrote, instead of prompts.")
    ] = None,
    iterations: Annotated[int | None, _setting("N", "rsf (10), ppo (10): rounds of drawing and training.")] = None,
    prompts_per_iteration: Annotated[int | None, _setting("N", "rsf (2048), ppo (512): prompts of a round.")] = None,
    n: Annotated[int | None, _setting("N", "rsf (32): responses per prompt.")] = None,
    epochs: Annotated[int | None, _setting("N", "rsf (2), ppo (2): passes over a round; dpo (3).")] = None,
    learning_rate: Annotated[float | None, _setting("X", "rsf (1e-5), ppo (1e-6), dpo (1e-6).")] = None,
    batch_size: Annotated[int | None, _setting("N", "Responses or pairs per optimiser step (32).")] = None,
    draw_batch_size: Annotated[
        Any, _setting("N|auto", "Responses drawn at once (64), at least n; auto: as many as fit.", parser=options.rows)
    ] = None,
    max_new_tokens: Annotated[int | None, _setting("N", "rsf, ppo (128): longest response.")] = None,
    temperature: Annotated[float | None, _setting("X", "rsf, ppo (1): of sampled responses.")] = None,
    beta: Annotated[float | None, _setting("X", "dpo (0.1): inverse temperature.")] = None,
    kl: Annotated[float | None, _setting("X", "ppo (0.1): weight of the KL penalty to PRE in the reward.")] = None,
    kl_target: Annotated[
        float | None, _setting("X", "ppo: adapt the weight towards this KL per response, nats.")
    ] = None,
    l1: Annotated[float | None, _held("X", "Strength of L1 towards PRE (paper: 0.04 to 1).")] = None,
    l2: Annotated[float | None, _held("X", "Strength of L2 towards PRE (paper: 0.01 to 0.1).")] = None,
    kd: Annotated[float | None, _held("X", "Strength of distillation from PRE (paper: 1e-5 to 1e-1).")] = None,
    lora: Annotated[int | None, _held("N", "Rank of a LoRA update (paper: 16 to 512).")] = None,
    replay: Annotated[
        list[str] | None, _held("TEXT", "jsonl of texts to learn again (repeatable), or 'self': PRE's own responses.")
    ] = None,
    replay_ratio: Annotated[
        float | None, _held("X", "With --replay (1): replayed tokens per response token (paper: 0.25 to 4).")
    ] = None,
    balance: Annotated[
        Literal["bandit"] | None, _held(None, "With several --replay: drawn by a bandit on what each forgets.")
    ] = None,
    sma: Annotated[float | None, _held("X", "Decay of a moving average of the weights, which is the result.")] = None,
    reset_every: Annotated[int | None, _held("N", "With --sma: Elastic Reset each so many steps.")] = None,
    stop_at_reward: Annotated[float | None, _held("X", "End when the mean reward of the samples reaches this.")] = None,
    freeze: Annotated[int | None, _held("N", "Keep the lowest so many layers and the embeddings.")] = None,
    merge: Annotated[float | None, _held("X", "Online merging: weight of PRE in each step's update.")] = None,
    merge_keep: Annotated[float | None, _held("X", "With --merge (1): share of elements kept (OnDARE).")] = None,
    merge_base: Annotated[str | None, _held("TEXT", "With --merge: the checkpoint before instruction tuning.")] = None,
    dry_run: options.DryRun = False,
    speed: options.SpeedOption = None,
    work: StateFolder = None,
    last_checkpoint_only: Annotated[
        bool, general(None, "Keep one checkpoint on the way, not every iteration's.", "--last-checkpoint-only")
    ] = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.WeightsDtype = "float32",
    bf16: options.BFloat16 = False,
    shard: Annotated[
        bool,
        machine(None, "rsf, ppo: cut weights, gradients and moments up among torchrun's processes (FSDP).", "--shard"),
    ] = False,
    micro_batch_size: options.MicroBatch = 8,
    recompute: options.Recompute = False,
    no_chat_template: options.NoChat = False,
    report_to: options.ReportTo = None,
    push_to: Push = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Align MODEL and write the result to OUT.

    Example:
      counterpoise align pre -o post --method rsf --prompts prompts.jsonl \\
          --reward sentiment:reviews.csv
    """
    typed = dict(locals())
    kept = f"finished iterations are in {work or f'{out}.work'}; the same command goes on from there"
    with plain_errors(kept), bars(quiet or dry_run) as progress:
        from counterpoise.alignment.align import align
        from counterpoise.alignment.from_options import OPTIONS, Alignment, Files
        from counterpoise.alignment.mitigations.table import TABLE
        from counterpoise.alignment.training import processes
        from counterpoise.alignment.training.models import Machine
        from counterpoise.alignment.training.tracking import refuse_absent, reporting

        check_push(push_to)
        refuse_absent(report_to or ())
        if not dry_run:
            options.refuse_without("--dry-run", options.given(speed=speed))
        device = options.device_of(device)
        told_it = {name: value for name, value in typed.items() if name in OPTIONS}
        settings = options.given(**told_it, chat=not no_chat_template)
        held = options.given(**{name: typed[name] for row in TABLE for name in (row.option, *row.partners)})
        if len(held.get("replay", ())) == 1:
            (held["replay"],) = held["replay"]
        files = Files(prompts, reward, preferences, samples)
        machine = Machine(options.dtype_of(dtype), bf16, shard or processes.asked_for("FSDP"), device, recompute)
        wanted = Alignment(source, out, method, files, settings, held, work, machine, not last_checkpoint_only)
        if dry_run:
            from counterpoise.cli.plan import tell
            from counterpoise.language.costs import Plan
            from counterpoise.planning.align import plan_align
            from counterpoise.planning.shorter import align_fits, align_ways

            shared = processes.expected(machine.shard)

            def planned(asked: Alignment) -> Plan:
                return plan_align(asked, shared_by=shared, present=speed is None, memory=options.memory_of(speed))

            tell(wanted, planned, align_ways(wanted), speed, device, as_json, align_fits(wanted))
            return
        from counterpoise.language.dtypes import warning

        with processes.one_message():
            wanted.check()
        processes.join(device)
        told = warning(machine.dtype, options.dtype_of("bfloat16") if bf16 else machine.dtype, device)
        if told and processes.is_first():
            warn([told])
        run, recorded = wanted.bind()
        with reporting(report_to or (), wanted.folder, device=device):
            record = align(
                source,
                out,
                run,
                mitigations=wanted.mitigations(),
                told=recorded,
                work=work,
                machine=machine,
                keep_checkpoints=wanted.keep_checkpoints,
                command=command_line(),
                progress=progress,
            )
        if processes.is_first():
            push(out, push_to)
    if not processes.is_first():
        return
    if as_json:
        print_json(record)
        return
    if record.get("already_finished"):
        print(f"{out} holds the result of this very run already; nothing was done again.")
    _show(record)
    print(f"checkpoint: {out}")


@app.command()
def collect(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A finished model: a folder or a hub id.")],
    out: Annotated[Path, option("FILE", "The jsonl file to write.", "-o", "--out")],
    prompts: options.Prompts,
    reward: options.RewardOption,
    n: Annotated[int, option("N", "Responses per prompt.")] = 32,
    work: options.WorkFolder = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: Annotated[options.WholeDtype, machine(None, "Of the computation.")] = "float32",
    micro_batch_size: Annotated[int, machine("N", "Sequences at once.")] = 64,
    max_new_tokens: options.NewTokens = 128,
    temperature: options.Temperature = 1.0,
    no_chat_template: options.NoChat = False,
    quiet: options.Quiet = False,
) -> None:
    """Collect the best of n responses once, for RSF in distillation style.

    Example:
      counterpoise align collect pre -o best.jsonl --prompts prompts.jsonl \\
          --reward sentiment:reviews.csv
      counterpoise align pre -o post --method rsf --samples best.jsonl
    """
    work = work or out.with_name(f"{out.name}.work")
    with plain_errors(f"finished pieces are in {work}; the same command goes on from there"), bars(quiet) as progress:
        from counterpoise.alignment.from_options import Collection
        from counterpoise.language.sampling import Drawing
        from counterpoise.records import named

        device = options.device_of(device)
        drawing = Drawing(n, max_new_tokens, temperature, not no_chat_template, micro_batch_size, seed)
        wanted = Collection(source, out, prompts, reward, drawing, work, options.dtype_of(dtype), device)
        found = wanted.run(named(progress, f"best of {n}"))
    count = len(found)
    print(f"{count} responses, mean reward of all {sum(s.mean_reward for s in found) / count:.4f}, "
          f"of the best {sum(s.reward for s in found) / count:.4f}")  # fmt: skip
    print(f"written to {out}")


@app.command("reward-model")
def reward_model(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A language model: a folder or a hub id.")],
    out: options.Out,
    preferences: Annotated[
        Path, option("DATA", "Prompts with chosen and rejected, as --prompts; also HH's and UltraFeedback's.")
    ],
    epochs: Annotated[int, option("N", "Passes over the pairs.")] = 1,
    learning_rate: Annotated[float, option("X", "Falls linearly to 0.")] = 1e-5,
    batch_size: Annotated[int, option("N", "Pairs per optimiser step.")] = 32,
    micro_batch_size: options.MicroBatch = 8,
    max_length: Annotated[
        int, option("N", "Longest prompt with its response in tokens; responses are cut to fit.")
    ] = 1024,
    held_out: Annotated[float, option("X", "Share of the pairs that measures the accuracy.")] = 0.1,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.WeightsDtype = "float32",
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a reward model on preferences: OUT serves as --reward OUT here and in restore.

    Example:
      counterpoise align reward-model pre -o judge --preferences hh.jsonl.gz
    """
    with plain_errors("nothing was written"), bars(quiet) as progress:
        from counterpoise.alignment.preferences import read_preferences
        from counterpoise.alignment.reward_model import train_reward_model
        from counterpoise.alignment.settings import RewardTraining

        settings = RewardTraining(
            epochs=epochs, learning_rate=learning_rate, batch_size=batch_size, micro_batch_size=micro_batch_size,
            max_length=max_length, held_out=held_out, seed=seed,
        )  # fmt: skip
        record = train_reward_model(
            source,
            out,
            read_preferences(preferences),
            settings,
            device=options.device_of(device),
            dtype=options.dtype_of(dtype),
            command=command_line(),
            progress=progress,
        )
    if as_json:
        print_json(record)
        return
    pairs, cut, accuracy = record["pairs"], record["cut"], record["accuracy"]
    if cut["pairs"] or cut["left_out"]:
        warn([
            f"{max_length} tokens were too few for {cut['pairs'] + cut['left_out']} of {pairs['given']} pairs: of "
            f"{cut['pairs']} the responses were cut, {cut['tokens']:.0%} of their tokens in all, and {cut['left_out']} whose "
            "prompt leaves no room were left out"
        ])  # fmt: skip
    print(
        f"{pairs['trained']} of {pairs['given']} pairs trained on, loss {record['loss'][0]:.4f} -> {record['loss'][-1]:.4f}"
    )
    if accuracy["after"] is not None:
        print(f"accuracy on {pairs['held_out']} held-out pairs: {accuracy['before']:.1%} -> {accuracy['after']:.1%}")
    print(f"reward: --reward {out}")


def _show(record: Mapping[str, Any]) -> None:
    metrics = record["metrics"]
    numbers = {k: v for k, v in metrics.items() if isinstance(v, float)}
    print(f"{record['iterations']} iterations; at the last: " + ", ".join(f"{k} {v:.4g}" for k, v in numbers.items()))
    if metrics.get("stopped"):
        print("ended early: the reward budget is reached")
