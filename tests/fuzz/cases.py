"""What is fuzzed: a small world of good files, and for each kind of file the commands that read it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from counterpoise.averaging.average import average
from counterpoise.averaging.merge import Merge, merge
from counterpoise.evaluation.measurement import Measurement, Scores
from counterpoise.evaluation.results import Measured, results, write_results
from multitask.text.worlds import write_folder
from report import made
from tiny import nudge, tiny, tokenizer

SHORT = "--max-new-tokens 2 --quiet"
PANEL = "--prompts prompts.jsonl --reward fuzz_reward:score --abilities choices:guess.jsonl"
RESTORE = f"restore pre post -o out {PANEL} --abilities continue:text.jsonl --abilities generate:ask.jsonl {SHORT}"
DRY = "--dry-run --speed 1e12,1e11"
TRAIN = "multitask train --data tasks -o out --epochs 1 --width 4 --dimension 8 --batch-size 64 --quiet"
AVERAGE = "average pre post -o out --ratio 0.5 --quiet"


@dataclass(frozen=True)
class Target:
    """A command, and the file of the world that is broken under it.

    Attributes:
        share: how often it is tried beside the others.
    """

    name: str
    file: str
    command: str
    share: int = 2


TARGETS = (
    Target("header", "post/model.safetensors", AVERAGE, 8),
    Target("header of pre", "pre/model.safetensors", "diff pre post --quiet"),
    Target("index", "sharded/model.safetensors.index.json", "average pre sharded -o out --ratio 0.5 --quiet", 6),
    Target("config", "post/config.json", AVERAGE, 4),
    Target("config measured", "post/config.json", f"restore pre post -o out {PANEL} {SHORT} {DRY}", 4),
    Target("adapter", "adapter/adapter_config.json", "average pre adapter -o out --ratio 0.5 --quiet", 6),
    Target("adapter's weights", "adapter/adapter_model.safetensors", "average pre adapter -o out --ratio 0.5 --quiet"),
    Target("tokenizer", "post/tokenizer_config.json", f"judge respond post -o out.json --prompts few.jsonl {SHORT}"),
    Target("recipe", "recipe.json", "average pre post -o out --recipe recipe.json --quiet", 6),
    Target("merge recipe", "merge.json", "merge pre post -o out --recipe merge.json --quiet", 4),
    Target("prompts", "prompts.jsonl", f"{RESTORE} {DRY}", 6),
    Target("choices", "guess.jsonl", f"{RESTORE} {DRY}", 4),
    Target("continue", "text.jsonl", f"{RESTORE} {DRY}", 4),
    Target("generate", "ask.jsonl", f"{RESTORE} {DRY}", 4),
    Target("preferences", "pairs.jsonl", f"align pre -o out --method dpo --preferences pairs.jsonl {DRY} --quiet", 6),
    Target("samples", "best.jsonl", f"align pre -o out --method rsf --samples best.jsonl {DRY} --quiet", 4),
    Target("corpus", "corpus.jsonl", "align pre -o out --method rsf --prompts prompts.jsonl --reward fuzz_reward:score "
           f"--replay corpus.jsonl --max-new-tokens 4 {DRY} --quiet", 4),
    Target("results", "results.json", "front results.json other.json -o out.html", 8),
    Target("restore.json", "restore.json", "front restore.json -o out.html", 6),
    Target("template", "post/chat_template.jinja", f"judge respond post -o out.json --prompts few.jsonl {SHORT}", 4),
    Target("reward csv", "reward.csv", "judge compare ours.json theirs.json -o out.json --reward sentiment:reward.csv", 4),
    Target("responses", "ours.json", "judge compare ours.json theirs.json -o out.json --reward fuzz_reward:score", 4),
    Target("task csv", "tasks/colour.csv", TRAIN, 3),
    Target("task jsonl", "tasks/animal.jsonl", TRAIN, 3),
    Target("vectors", "glove.txt", TRAIN.replace("--dimension 8", "--vectors glove.txt"), 3),
)  # fmt: skip


def make(folder: Path) -> Path:
    """A tiny pair with everything that its commands read, in `folder`."""
    from peft import LoraConfig, get_peft_model

    os.environ["PYTHONPATH"] = str(folder)
    model = tiny("llama")
    words = tokenizer()
    words.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    for side in ("pre", "post", "sharded"):
        if side == "post":
            nudge(model)
        model.save_pretrained(folder / side, max_shard_size="8KB" if side == "sharded" else "1GB")
        words.save_pretrained(folder / side)
    adapted = get_peft_model(
        tiny("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(folder / "adapter")
    average(folder / "pre", folder / "post", folder / "averaged", [0.1, 0.5, 0.9])
    (folder / "averaged" / "recipe.json").rename(folder / "recipe.json")
    merge(folder / "pre", [folder / "post"], folder / "merged", Merge())
    (folder / "merged" / "recipe.json").rename(folder / "merge.json")

    def lines(name: str, rows: Sequence[object]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    said = [f"say {word} {n}" for n in range(20) for word in ("red", "blue", "dog")]
    lines("prompts.jsonl", [{"prompt": p} if n % 3 else {"messages": [{"role": "user", "content": p}]}
                            for n, p in enumerate(said)])  # fmt: skip
    lines("few.jsonl", [{"prompt": said[0]}, {"messages": [{"role": "system", "content": "be kind"},
                                                           {"role": "user", "content": said[1]}]}])  # fmt: skip
    lines("guess.jsonl", [{"query": p, "choices": ["yes", "no"], "gold": n % 2} for n, p in enumerate(said)])
    lines("text.jsonl", [{"context": p, "continuation": " and so on"} for p in said])
    lines("ask.jsonl", [{"prompt": p, "answer": "yes"} for p in said])
    lines("pairs.jsonl", [{"prompt": p, "chosen": "yes", "rejected": "no no"} for p in said])
    lines("best.jsonl", [{"prompt": p, "response": "yes"} for p in said[:9]])
    lines("corpus.jsonl", [{"text": f"once there was {p}"} for p in said[:9]])
    for who in ("ours", "theirs"):
        found = [{"instruction": p, "output": f"{who} {n}", "generator": who} for n, p in enumerate(said[:6])]
        (folder / f"{who}.json").write_text(json.dumps(found))
    rows = [f"{'good fine' if n % 2 else 'bad poor'} {p},{n % 2}" for n, p in enumerate(said)]
    (folder / "reward.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    (folder / "glove.txt").write_text(
        "".join(f"{w} {' '.join(['0.1', '-0.2', '0.3'])}\n" for w in "the a red sea".split())
    )
    write_folder(folder / "tasks", colours=60, animals=60)
    (folder / "fuzz_reward.py").write_text(
        "def score(prompts, responses):\n    return [float(len(r)) for r in responses]\n"
    )
    (folder / "restore.json").write_text(json.dumps(made.results()))
    for seed, name in enumerate(("results.json", "other.json")):
        write_results(folder / name, _results(seed))
    return folder


def _results(seed: int) -> dict[str, object]:
    def scored(reward: float, ability: float) -> Scores:
        def measured(metric: str, unit: str, at: float) -> Measurement:
            statistics = at + 0.1 * np.random.default_rng([seed, int(at * 10)]).normal(size=(12, 1))
            return Measurement(metric, unit, statistics, "mean", None, tuple(f"{metric}{n:020}" for n in range(12)))

        return Scores(measured("reward", "", reward), {"piqa": [measured("accuracy", "%", ability)]})

    at = {"PRE": (0.0, 1.0), "POST": (1.0, 0.5), "MA 0.5": (0.6, 0.8), "HMA 0.5": (0.7, 0.8)}
    points = [
        Measured(n, n.split()[0], scored(*v), (0.5,) * ("MA" in n), 0.5 if "MA" in n else None) for n, v in at.items()
    ]
    return results(points, run="rsf", seed=seed, reward="helpful")
