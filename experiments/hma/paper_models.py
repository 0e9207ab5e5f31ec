"""Commands, not runs: the paper's own models through `counterpoise align`, `restore` and `judge`.

    python experiments/hma/paper_models.py            print the commands
    python experiments/hma/paper_models.py --check    dry-run each and write paper_models.md

Lin et al. 2024 (arXiv 2309.06256) align OpenLLaMA-3B after SFT by RSF, PPO and DPO, and take Zephyr-7B-beta and
Zephyr-7B-Gemma as they are. None of these models is at hand here: the check builds their architectures from
paper_models/*.json (numbers with their sources) and stand-ins for the data, in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).parent
ABILITIES = ("arc_easy?limit=800", "arc_challenge?limit=400", "race?limit=400", "piqa?limit=600",
             "squad_completion?limit=900", "drop?limit=1000", "wmt14-fr-en?limit=1000")  # fmt: skip
"""Of the paper's tasks; where the set is no larger, all of a part (30 % of it). squadv2: see `squad_metrics`."""
ASKED = ("arc_easy", "arc_challenge", "race", "piqa", "squadv2", "drop", "wmt14-fr-en")
BF16, FP32 = "4e14,2e12", "2.7e13,2e12"
"""One H100 at 40 % of the data sheet's 989 (bfloat16) or 67 (float32) TFLOP/s and 60 % of its 3.35 TB/s."""
MEMORY = 80e9
JUDGE = "OpenAssistant/reward-model-deberta-v3-large-v2"


@dataclass(frozen=True)
class Command:
    """One line, and the pair it belongs to.

    Attributes:
        speed: of one H100 for the dry run.
    """

    pair: str
    words: tuple[str, ...]
    speed: str = BF16
    why: str = ""

    @property
    def line(self) -> str:
        """As it is typed."""
        return shlex.join(["counterpoise", *self.words])


def commands() -> list[Command]:
    """All of them, in the order in which they are run."""
    return [*open_llama(), *zephyr("beta"), *zephyr("gemma")]


def open_llama() -> list[Command]:
    """RSF, PPO and DPO from the SFT model, with the paper's settings, and HMA for each."""
    reward = "weqweasdas/hh_rlhf_rm_open_llama_3b"
    hh = ("--prompts", "hh_prompts.jsonl", "--reward", reward)
    rsf = "--iterations 10 --prompts-per-iteration 2048 --n 32 --epochs 2 --learning-rate 1e-5 --batch-size 32"
    ppo = "--prompts-per-iteration 512 --epochs 2 --learning-rate 1e-6 --kl 0.1"
    dpo = "--epochs 3 --learning-rate 1e-6 --batch-size 32 --beta 0.1"
    small = ("--micro-batch-size", "2", "--device", "cuda")
    drawing = ("--temperature", "1.0", "--draw-batch-size", "16")
    found = []
    for name, method, settings, data, why in (
        ("rsf", "rsf", rsf, hh, "best of 32, 10 iterations"),
        ("ppo", "ppo", ppo, hh, "all weights, KL weight 0.1 of the paper's 0.05 to 0.3"),
        ("ppo-lora", "ppo", f"{ppo} --lora 16", hh, "the paper's LoRA variant"),
        ("dpo", "dpo", dpo, ("--preferences", "hh_pairs.jsonl"), "up to 3 epochs"),
    ):
        drawn = small if method == "dpo" else (*drawing, *small)
        words = (
            "align",
            "openllama-sft",
            "-o",
            f"openllama-{name}",
            "--method",
            method,
            *settings.split(),
            *data,
            *drawn,
        )
        found.append(Command("OpenLLaMA-3B", words, FP32, why))
    for name in ("rsf", "ppo", "dpo"):
        out = ("-o", f"openllama-{name}-hma")
        words = ("restore", "openllama-sft", f"openllama-{name}", *out, *hh, *_measured(128, "1.0", "8"))
        found.append(Command("OpenLLaMA-3B", words, BF16, f"HMA after {name.upper()}"))
    return found


def zephyr(which: str) -> list[Command]:
    """HMA of a published pair, and its win rates on AlpacaEval before and after."""
    pre, post = {
        "beta": ("HuggingFaceH4/mistral-7b-sft-beta", "HuggingFaceH4/zephyr-7b-beta"),
        "gemma": ("HuggingFaceH4/zephyr-7b-gemma-sft-v0.1", "HuggingFaceH4/zephyr-7b-gemma-v0.1"),
    }[which]
    pair, out = f"Zephyr-7B-{which}", f"zephyr-{which}-hma"
    data = ("--prompts", "dpo_prompts.jsonl", "--reward", JUDGE)
    found = [Command(pair, ("restore", pre, post, "-o", out, *data, *_measured(512, "0.7", "4")), BF16, "HMA")]
    answers = {post: f"zephyr-{which}.json", out: f"{out}.json"}
    for model, file in answers.items():
        words = ("judge", "respond", model, "--prompts", "alpaca_eval.jsonl", "-o", file, "--temperature", "0.7")
        found.append(Command(pair, (*words, "--max-new-tokens", "2048", "--device", "cuda"), BF16, "805 answers"))
    ours, theirs = answers[out], answers[post]
    by = {
        "reward": ("--reward", JUDGE, "--device", "cuda"),
        "pairrm": ("--preference", "llm-blender/PairRM-hf", "--device", "cuda"),
    }
    for name, options in by.items():
        words = ("judge", "compare", ours, theirs, "-o", f"win-{which}-{name}.json", *options)
        found.append(Command(pair, words, FP32, {"reward": "a reward model", "pairrm": "PairRM"}[name]))
    for file in answers.values():
        gpt = ("--base-url", "https://api.openai.com/v1", "--model", "gpt-4-1106-preview", "--max-calls", "1610")
        words = ("judge", "compare", file, "gpt4_turbo.json", "-o", f"gpt4-{file}", *gpt)
        found.append(Command(pair, words, BF16, "win rate against GPT-4, both orders"))
    return found


def _measured(new: int, temperature: str, batch: str) -> tuple[str, ...]:
    abilities = [word for task in ABILITIES for word in ("--abilities", task)]
    grid = ("--blocks", "3", "--means", "0.2,0.4,0.6,0.8", "--proxy-size", "2000", "--prompt-limit", "800")
    drawing = ("--max-new-tokens", str(new), "--temperature", temperature, "--batch-size", batch)
    return (*abilities, *grid, *drawing, "--device", "cuda", "--dtype", "bfloat16")


# The check


STAND_INS = {"hh_prompts.jsonl": (10_000, 400), "dpo_prompts.jsonl": (10_000, 800), "alpaca_eval.jsonl": (805, 160)}
"""File -> prompts and characters of each; 4 characters a token. hh_pairs.jsonl: 40,000 pairs of the first."""
ANSWERS = ("zephyr-beta", "zephyr-beta-hma", "zephyr-gemma", "zephyr-gemma-hma", "gpt4_turbo")
ANSWERED = 2000
"""Characters of an answer to AlpacaEval's instructions."""


def stand_ins(folder: Path) -> dict[str, str]:
    """Config-only folders and data files in `folder`: name in a command -> what the dry run is given."""
    places = {}
    for path in sorted((HERE / "paper_models").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        made = folder / path.stem
        made.mkdir()
        (made / "config.json").write_text(json.dumps(found["config"]))
        places |= dict.fromkeys(found["models"], str(made))
    aligned = folder / "aligned"  # what `align` writes: the same model in float32
    aligned.mkdir()
    config = json.loads((Path(places["openllama-sft"]) / "config.json").read_text(encoding="utf-8"))
    (aligned / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    places |= {f"openllama-{name}": str(aligned) for name in ("rsf", "ppo", "dpo")}
    for which in ("beta", "gemma"):
        places[f"zephyr-{which}-hma"] = next(
            p for n, p in places.items() if n.startswith(f"HuggingFaceH4/zephyr-7b-{which}")
        )
    count, characters = STAND_INS["alpaca_eval.jsonl"]
    for name in ANSWERS:
        asked = [f"{number:06} ".ljust(characters, "a") for number in range(count)]
        rows = [{"instruction": text, "output": name.ljust(ANSWERED, "b"), "generator": name} for text in asked]
        (folder / f"{name}.json").write_text(json.dumps(rows))
        places[f"{name}.json"] = str(folder / f"{name}.json")
    for file, (count, characters) in STAND_INS.items():
        lines = (json.dumps({"prompt": f"{number:06} ".ljust(characters, "a")}) + "\n" for number in range(count))
        (folder / file).write_text("".join(lines))
    pair = {"prompt": "a" * 400, "chosen": "b" * 400, "rejected": "c" * 400}
    lines = (json.dumps({**pair, "prompt": f"{number:06} ".ljust(400, "a")}) + "\n" for number in range(40_000))
    (folder / "hh_pairs.jsonl").write_text("".join(lines))
    return places | {file: str(folder / file) for file in (*STAND_INS, "hh_pairs.jsonl")}


@contextmanager
def kept_plans() -> Iterator[list[Any]]:
    """Inside, what a dry run would print is kept."""
    from counterpoise.cli import plan as shown

    printed, plans = shown.tell, []

    def kept(asked: Any, planned: Callable[[Any], Any], ways: Any, speed: str, *rest: Any) -> None:
        plans.append((planned(asked), (shown.speed_of(speed) or [])[:2]))

    shown.tell = kept
    try:
        yield plans
    finally:
        shown.tell = printed


def dry_run_of(command: Command, places: Mapping[str, str], folder: Path) -> Any:
    """The plan of one command, by the command line itself; None where an endpoint would be asked."""
    from typer.main import get_command

    from counterpoise.cli.app import app

    words = list(command.words)
    at = words.index("-o") + 1
    given = [places.get(w, w) if i != at else str(folder / w) for i, w in enumerate(words)]
    os.environ.setdefault("OPENAI_API_KEY", "not asked")
    with kept_plans() as plans:
        speed = f"{command.speed},{MEMORY:g}"
        get_command(app).main([*given, "--dry-run", "--speed", speed, "--quiet"], standalone_mode=False)
    return plans[0] if plans else None


def architectures(places: Mapping[str, str]) -> list[str]:
    """What the dry runs took the models for, with their parameters counted on the meta device."""
    from counterpoise.planning.looking import look

    lines = []
    for path in sorted((HERE / "paper_models").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        config = found["config"]
        causal = config["architectures"][0].endswith("ForCausalLM")
        shape = look(places[found["models"][0]], classifier=not causal).shape
        heads = f"{config['num_attention_heads']}, {config.get('num_key_value_heads', config['num_attention_heads'])}"
        lines.append(
            f"| {', '.join(f'`{m}`' for m in found['models'])} | {config['architectures'][0]} | {shape.layers} | {shape.hidden} "
            f"| {shape.intermediate} | {heads} | {shape.vocabulary:,} | {shape.parameters / 1e9:.2f} |"
        )
    return lines


def names_of() -> list[str]:
    """What lm-eval's registry says of the paper's tasks."""
    from counterpoise.evaluation.harness_tasks import find_task

    lines = []
    for name in (*ASKED, "squad_completion"):
        found = find_task(name)
        cfg = found.manager.task_index[name].cfg or {}
        parts = [cfg.get("dataset_path"), cfg.get("dataset_name")]
        data = " ".join(str(p) for p in parts if p) or "chosen by its Python class"
        metrics = ", ".join(m["metric"] for m in cfg.get("metric_list", ())) or "of its Python class"
        lines.append(f"| `{name}` | `{found.task}` | {data} | {found.output_type or 'Python class'} | {metrics} |")
    return lines


def squad_metrics() -> dict[str, list[str]]:
    """Which metrics of the two SQuAD tasks are numbers per item, from their own code on a made-up document."""
    from lm_eval.tasks.squad_completion.task import SQUADCompletion
    from lm_eval.tasks.squadv2.task import SQuAD2

    from counterpoise.evaluation.harness import _statistics

    two = {"id": "1", "answers": {"text": ["a"], "answer_start": [0]}}
    told = {
        "squadv2": SQuAD2.process_results(object.__new__(SQuAD2), two, ("a", (-1.0, False))),
        "squad_completion": SQUADCompletion.process_results(object.__new__(SQUADCompletion), {"value": "a"}, ["a"]),
    }
    return {task: [n for n, v in found.items() if _statistics(n, [v]) is not None] for task, found in told.items()}


def check() -> str:
    """Dry-run every command; the page."""
    from counterpoise.cli.plan import duration, size
    from counterpoise.language.work import Speed

    rows, peaks, assumed = [], [], {}
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        places = stand_ins(folder)
        for command in commands():
            found = dry_run_of(command, places, folder)
            if found is None:
                continue
            plan, speed = found
            kind = " ".join(command.words[: 2 if command.words[0] == "judge" else 1])
            name = f"{command.pair}: {kind} {command.words[command.words.index('-o') + 1]}"
            resident = sum(plan.resident.values())
            for stage in plan.stages:
                if stage.work.flops:
                    need, time = size(resident + stage.memory), duration(stage.work.seconds(Speed(*speed)))
                    rows.append(f"| {name} | {stage.name} | {stage.what} | {need} | {time} |")
            parts = ", ".join(f"{n} {size(b)}" for n, b in plan.resident.items())
            whole = duration(plan.seconds(Speed(*speed)))
            fits = "yes" if plan.peak < 0.9 * MEMORY else "barely" if plan.peak < MEMORY else "**no**"
            peaks.append(f"| {name} | {parts} | {size(plan.peak)} | {fits} | {size(plan.disk)} | {whole} |")
            assumed |= dict.fromkeys(plan.assumed)
        built = architectures(places)
        names, metrics = names_of(), squad_metrics()
    if metrics["squadv2"] or not metrics["squad_completion"]:
        raise RuntimeError(
            f"expected numbers per item of squad_completion alone, found {metrics}; rewrite the commands"
        )
    return page(rows, peaks, built, list(assumed), names, metrics)


def page(
    rows: Sequence[str],
    peaks: Sequence[str],
    built: Sequence[str],
    assumed: Sequence[str],
    names: Sequence[str],
    metrics: Mapping[str, Sequence[str]],
) -> str:
    """The Markdown."""
    blocks = []
    for pair in dict.fromkeys(c.pair for c in commands()):
        lines = "\n".join(f"# {c.why}\n{c.line}" for c in commands() if c.pair == pair)
        blocks.append(f"### {pair}\n\n```sh\n{lines}\n```")
    counted = ", ".join(metrics["squad_completion"])
    data = ", ".join(f"`{file}` {count:,} prompts of {size} characters" for file, (count, size) in STAND_INS.items())
    data += f", answers to AlpacaEval of {ANSWERED:,} characters"
    return f"""# The paper's own models: commands, not runs

Written by `python experiments/hma/paper_models.py --check`. **Nothing below was run on these models**: each command went
through its own `--dry-run` with the architecture alone (`paper_models/*.json`) and stand-in data, so that every option is
resolved and every number is an estimate. What GPT-4 would be asked is counted, not priced.

What must be there first: `openllama-sft`, OpenLLaMA-3B fine-tuned on ShareGPT (1e-5, 1 epoch, batch 128, 2048 tokens;
the paper's is not published, TRL's SFT trains one); `hh_prompts.jsonl` and `hh_pairs.jsonl` from HH-RLHF;
`dpo_prompts.jsonl`, the prompts that Zephyr's DPO was trained on; `alpaca_eval.jsonl` and `gpt4_turbo.json` from
AlpacaEval.

{(chr(10) * 2).join(blocks)}

## Estimated, not measured

One H100 (80 GB), 40 % of the data sheet's 989 TFLOP/s in bfloat16 (`restore`) or 67 in float32 (`align`), 60 % of its
3.35 TB/s.

| run | resident | peak memory | fits 80 GB | written | time, estimated |
| --- | --- | ---: | --- | ---: | ---: |
{chr(10).join(peaks)}

PPO on all weights needs more than 80 GB (an H200 has 141 GB), or two GPUs and `--shard` under torchrun.
"Barely" is within a tenth of 80 GB, less than these estimates can tell.

| model | stage | passes, responses, items | peak memory | time, estimated |
| --- | --- | --- | ---: | ---: |
{chr(10).join(rows)}

| architecture of | class | layers | hidden | intermediate | heads, key heads | vocabulary | billion parameters |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |
{chr(10).join(built)}

Where the numbers were found stands in `paper_models/*.json`.

Assumed:

{chr(10).join(f"- {line}" for line in assumed)}
- stand-ins for the data: {data}, `hh_pairs.jsonl` 40,000 pairs

## The tasks

| asked for | lm-eval | data set | output | metrics |
| --- | --- | --- | --- | --- |
{chr(10).join(names)}

All names of the issue exist. Two things differ from the paper all the same:

- `squadv2` cannot be measured here: its metrics are computed over the whole set (none is a number per item, as intervals
  and paired tests need) by a metric that is fetched from the hub. `squad_completion` stands in for it ({counted}: a number
  per item); it is SQuAD 1 as completion, not the paper's F1 on SQuAD 2.
- `race` is the high-school half alone, `drop` reports exact match first and F1 second; all are 0-shot.

A limit of `?limit=N` counts items per part: proxy, validation and held-out parts are 40, 30 and 30 % of a test set.

## PairRM

`llm-blender/PairRM-hf` is a `DebertaV2PairRM`: it compares two responses instead of scoring one, and its class is in a
package, llm-blender, that does not import under transformers 5 ([LLM-Blender issue
33](https://github.com/yuchenlin/LLM-Blender/issues/33)). `--preference llm-blender/PairRM-hf` needs neither:
`counterpoise.judging.pairrm` reads the checkpoint by the names of its tensors and settings. Tested on a small checkpoint
of that form (tests/evaluation/test_pairrm.py); the published weights are out of reach here: not measured. As the reward of
`restore`, which needs one number a response, `{JUDGE}` takes its place.
"""


def main() -> None:
    """Print, or check and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="dry-run each command and write paper_models.md")
    if not parser.parse_args().check:
        for command in commands():
            print(f"# {command.pair}: {command.why}\n{command.line}\n")
        return
    (HERE / "paper_models.md").write_text(check(), encoding="utf-8")
    print(f"wrote {HERE / 'paper_models.md'}")


if __name__ == "__main__":
    main()
