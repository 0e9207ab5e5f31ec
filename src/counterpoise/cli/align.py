"""`counterpoise align`: parse, call, print. Heavy imports inside the commands."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from counterpoise.cli.options import DryRun, SpeedOption, speed_of
from counterpoise.cli.terminal import bars, plain_errors


class _AlignByDefault(TyperGroup):
    """`align MODEL ...` is the command `model`; the other commands go by their names."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default command in front of anything that names no other."""
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["model", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="align",
    cls=_AlignByDefault,
    help="Align a model with RSF, DPO or PPO, with any mitigation of the alignment tax.\n\n"
    "`align MODEL -o OUT ...` is short for `align model MODEL -o OUT ...`: see `align model --help`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str, typer.Argument(help="Checkpoint to start from: a folder, or a hub id (org/name, org/name@revision).")
]
Out = Annotated[Path, typer.Option("-o", "--out", help="Folder to write; it appears whole or not at all.")]
Prompts = Annotated[Path | None, typer.Option(help='rsf, ppo: jsonl of {"prompt": str} or {"messages": [...]}.')]
RewardOption = Annotated[
    str | None, typer.Option(help="rsf, ppo: sentiment:FILE.csv, module:function, a model folder or a hub id.")
]
Preferences = Annotated[
    Path | None, typer.Option(help="dpo: jsonl or json (.gz) of prompt, chosen, rejected, or of HH transcripts.")
]
Seed = Annotated[int, typer.Option(help="Decides every random draw.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="Of the trained weights and of OUT: float32, bfloat16, float16 or float64.")]
Work = Annotated[Path | None, typer.Option(help="Checkpoints on the way, state to go on from (default OUT.work).")]
MicroBatch = Annotated[
    int, typer.Option(help="Sequences through the model at once in training: memory and speed, up to rounding.")
]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Longest response.")]
Temperature = Annotated[float, typer.Option(help="Of sampled responses.")]
NoChat = Annotated[bool, typer.Option("--no-chat-template", help="Give prompts as plain text.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
METHOD, HELD = "Settings of the method (default: the paper's)", "Mitigations of the alignment tax"


def _setting(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=METHOD)


def _held(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=HELD)


@app.command()
def model(
    source: Annotated[
        str, typer.Argument(metavar="MODEL", help="PRE: a folder, or a hub id (org/name, org/name@revision).")
    ],
    out: Out,
    method: Annotated[str, typer.Option(help="rsf, ppo or dpo.")],
    prompts: Prompts = None,
    reward: RewardOption = None,
    preferences: Preferences = None,
    samples: Annotated[
        Path | None, typer.Option(help="rsf, distillation style: what `align collect` wrote, instead of prompts.")
    ] = None,
    iterations: Annotated[int | None, _setting("rsf (10), ppo (10): rounds of drawing and training.")] = None,
    prompts_per_iteration: Annotated[int | None, _setting("rsf (2048), ppo (512): prompts of a round.")] = None,
    n: Annotated[int | None, _setting("rsf (32): responses per prompt.")] = None,
    epochs: Annotated[int | None, _setting("rsf (2), ppo (2): passes over a round; dpo (3).")] = None,
    learning_rate: Annotated[float | None, _setting("rsf (1e-5), ppo (1e-6), dpo (1e-6).")] = None,
    batch_size: Annotated[int | None, _setting("Responses or pairs per optimiser step (32).")] = None,
    draw_batch_size: Annotated[
        int | None, _setting("Responses drawn at once (64), at least n; decides the random draws.")
    ] = None,
    beta: Annotated[float | None, _setting("dpo (0.1): inverse temperature.")] = None,
    kl: Annotated[float | None, _setting("ppo (0.1): weight of the KL penalty to PRE in the reward.")] = None,
    kl_target: Annotated[float | None, _setting("ppo: adapt the weight towards this KL per response, nats.")] = None,
    l1: Annotated[float | None, _held("Strength of L1 towards PRE (paper: 0.04 to 1).")] = None,
    l2: Annotated[float | None, _held("Strength of L2 towards PRE (paper: 0.01 to 0.1).")] = None,
    kd: Annotated[float | None, _held("Strength of distillation from PRE (paper: 1e-5 to 1e-1).")] = None,
    lora: Annotated[int | None, _held("Rank of a LoRA update (paper: 16 to 512).")] = None,
    replay: Annotated[str | None, _held("jsonl of texts to learn again, or 'self': PRE's own responses.")] = None,
    replay_ratio: Annotated[float, _held("Replayed tokens per response token (paper: 0.25 to 4).")] = 1.0,
    sma: Annotated[float | None, _held("Decay of a moving average of the weights, which is the result.")] = None,
    reset_every: Annotated[int | None, _held("With --sma: Elastic Reset each so many steps.")] = None,
    stop_at_reward: Annotated[float | None, _held("End when the mean reward of the samples reaches this.")] = None,
    freeze: Annotated[int | None, _held("Keep the lowest so many layers and the embeddings.")] = None,
    merge: Annotated[float | None, _held("Online merging: weight of PRE in each step's update.")] = None,
    merge_keep: Annotated[float, _held("Online merging: share of elements kept (OnDARE).")] = 1.0,
    merge_base: Annotated[str | None, _held("Online merging: the checkpoint before instruction tuning.")] = None,
    dry_run: DryRun = False,
    speed: SpeedOption = None,
    work: Work = None,
    last_checkpoint_only: Annotated[
        bool, typer.Option("--last-checkpoint-only", help="Keep one checkpoint on the way, not every iteration's.")
    ] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Mixed precision: float32 weights, computed with in bfloat16.")
    ] = False,
    shard: Annotated[
        bool,
        typer.Option(
            "--shard", help="rsf, ppo: cut weights, gradients and moments up among torchrun's processes (FSDP)."
        ),
    ] = False,
    micro_batch_size: MicroBatch = 8,
    max_new_tokens: NewTokens = 128,
    temperature: Temperature = 1.0,
    no_chat_template: NoChat = False,
    quiet: Quiet = False,
) -> None:
    """Align MODEL and write the result to OUT."""
    kept = f"finished iterations are in {work or f'{out}.work'}; the same command goes on from there"
    chosen = {
        "iterations": iterations,
        "prompts_per_iteration": prompts_per_iteration,
        "n": n,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "beta": beta,
        "kl": kl,
        "kl_target": kl_target,
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}
    common = {"micro_batch_size": micro_batch_size, "chat": not no_chat_template, "seed": seed}
    drawing: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    if draw_batch_size is not None:
        drawing["draw_batch_size"] = draw_batch_size
    files = {"prompts": prompts, "preferences": preferences, "samples": samples}
    strengths = {"l1": l1, "l2": l2, "kd": kd, "lora": lora, "sma": sma, "freeze": freeze, "merge": merge}
    others: dict[str, Any] = {
        "replay": replay,
        "replay_ratio": replay_ratio,
        "reset_every": reset_every,
        "stop_at_reward": stop_at_reward,
        "merge_keep": merge_keep,
        "merge_base": merge_base,
    }
    with plain_errors(kept), bars(quiet or dry_run) as progress:
        from counterpoise.alignment.training import processes

        shard = shard or processes.asked_for("FSDP")
        if dry_run:
            from counterpoise.cli.plan import tell
            from counterpoise.planning.align import plan_align

            plan = plan_align(
                source,
                out,
                method,
                chosen,
                common,
                drawing,
                {**strengths, **others},
                **files,
                reward=reward,
                dtype=_dtype(dtype),
                bf16=bf16,
                shared_by=processes.expected(shard),
                device=device,
                keep_checkpoints=not last_checkpoint_only,
            )
            tell(plan, speed_of(speed), device)
            return
        from counterpoise.alignment import from_options as assembling
        from counterpoise.alignment.align import align
        from counterpoise.language.dtypes import warning

        processes.join(device)
        told = warning(_dtype(dtype), _dtype("bfloat16" if bf16 else dtype), device)
        if told and processes.is_first():
            print(f"warning: {told}", file=sys.stderr)
        how: assembling.How = {"dtype": _dtype(dtype), "bf16": bf16, "shard": shard, "device": device}
        train = assembling.method(
            method,
            source,
            {**chosen, **common},
            drawing,
            **files,
            reward=reward,
            how=how,
        )
        held = assembling.mitigations(
            source,
            strengths,
            **others,
            files=files,
            drawing={**drawing, "chat": not no_chat_template, "seed": seed},
            work=work or out.with_name(f"{out.name}.work"),
            how=how,
        )
        record = align(
            source,
            out,
            train.run,
            mitigations=held,
            told=train.told,
            work=work,
            **how,
            keep_checkpoints=not last_checkpoint_only,
            command=_command(),
            progress=progress,
        )
    if not processes.is_first():
        return
    if record.get("already_finished"):
        print(f"{out} holds the result of this very run already; nothing was done again.")
    _show(record)
    print(f"checkpoint: {out}")


@app.command()
def collect(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A finished model: a folder or a hub id.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The jsonl file to write.")],
    prompts: Annotated[Path, typer.Option(help='jsonl of {"prompt": str} or {"messages": [...]}.')],
    reward: Annotated[str, typer.Option(help="sentiment:FILE.csv, module:function, a model folder or a hub id.")],
    n: Annotated[int, typer.Option(help="Responses per prompt.")] = 32,
    work: Annotated[Path | None, typer.Option(help="Where finished pieces are kept (default OUT.work).")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the computation.")] = "float32",
    micro_batch_size: Annotated[int, typer.Option(help="Sequences at once; decides the random draws.")] = 64,
    max_new_tokens: NewTokens = 128,
    temperature: Temperature = 1.0,
    no_chat_template: NoChat = False,
    quiet: Quiet = False,
) -> None:
    """Collect the best of n responses once, for RSF in distillation style: `align PRE --method rsf --samples OUT`."""
    work = work or out.with_name(f"{out.name}.work")
    with plain_errors(f"finished pieces are in {work}; the same command goes on from there"), bars(quiet) as progress:
        from counterpoise.alignment.from_options import collect_to

        found = collect_to(
            source,
            out,
            prompts,
            reward,
            work=work,
            dtype=_dtype(dtype),
            device=device,
            n=n,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            chat=not no_chat_template,
            batch_size=micro_batch_size,
            seed=seed,
            progress=progress and (lambda done, total: progress(f"best of {n}", done, total)),
        )
    count = len(found)
    print(f"{count} responses, mean reward of all {sum(s.mean_reward for s in found) / count:.4f}, "
          f"of the best {sum(s.reward for s in found) / count:.4f}")  # fmt: skip
    print(f"written to {out}")


@app.command("reward-model")
def reward_model(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A language model: a folder or a hub id.")],
    out: Out,
    preferences: Annotated[Path, typer.Option(help="jsonl or json (.gz) of prompt, chosen, rejected, or HH.")],
    epochs: Annotated[int, typer.Option(help="Passes over the pairs.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Falls linearly to 0.")] = 1e-5,
    batch_size: Annotated[int, typer.Option(help="Pairs per optimiser step.")] = 32,
    micro_batch_size: MicroBatch = 8,
    max_length: Annotated[int, typer.Option(help="Pairs with more tokens on a side are left out.")] = 1024,
    held_out: Annotated[float, typer.Option(help="Share of the pairs that measures the accuracy.")] = 0.1,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    quiet: Quiet = False,
) -> None:
    """Train a reward model on preferences: OUT serves as --reward OUT here and in restore."""
    with plain_errors("nothing was written"), bars(quiet) as progress:
        from counterpoise.alignment.preferences import read_preferences
        from counterpoise.alignment.reward_model import train_reward_model

        record = train_reward_model(
            source,
            out,
            read_preferences(preferences),
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            max_length=max_length,
            held_out=held_out,
            seed=seed,
            device=device,
            dtype=_dtype(dtype),
            command=_command(),
            progress=progress,
        )
    pairs, accuracy = record["pairs"], record["accuracy"]
    print(
        f"{pairs['trained']} of {pairs['given']} pairs trained on, loss {record['loss'][0]:.4f} -> {record['loss'][-1]:.4f}"
    )
    if accuracy["after"] is not None:
        print(f"accuracy on {pairs['held_out']} held-out pairs: {accuracy['before']:.1%} -> {accuracy['after']:.1%}")
    print(f"reward: --reward {out}")


def _show(record: dict[str, Any]) -> None:
    metrics = record["metrics"]
    numbers = {k: v for k, v in metrics.items() if isinstance(v, float)}
    print(f"{record['iterations']} iterations; at the last: " + ", ".join(f"{k} {v:.4g}" for k, v in numbers.items()))
    if metrics.get("stopped"):
        print("ended early: the reward budget is reached")


def _dtype(name: str) -> Any:
    import torch

    names = ("float32", "bfloat16", "float16", "float64")
    if name not in names:
        raise ValueError(f"--dtype: expected {', '.join(names)}, found {name!r}")
    return getattr(torch, name)


def _command() -> str:
    return shlex.join(["counterpoise", *sys.argv[1:]])
