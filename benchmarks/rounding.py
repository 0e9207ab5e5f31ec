"""What rounding does to averages of two bfloat16 checkpoints: to the nearest, and stochastic as counterpoise does it.

    python benchmarks/rounding.py PRE POST TEXTS.jsonl --name dpo [--texts 24]

PRE and POST are rounded to bfloat16 as they would lie on a hub. For every ratio: the share of the update that the written
weights have, <written - pre, post - pre> / |post - pre|^2, and the KL divergence per token of the written model from the
average that was never rounded, all computed in float32 on the prompts of TEXTS. And `share_loaded`: the share that is kept
of a float32 POST's update when the average, in float32 on disk, is rounded to the nearest as it is loaded in bfloat16, as
the experiments measured it. One entry of benchmarks/results/rounding.json a pair; the file keeps those of other names.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from counterpoise.averaging.mix import mix
from counterpoise.language.prompts import encode_prompt, read_prompts
from counterpoise.records import versions

RATIOS = (0.2, 0.4, 0.6, 0.8)
RESULTS = Path(__file__).parent / "results" / "rounding.json"
Weights = Mapping[str, Tensor]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pre", type=Path)
    parser.add_argument("post", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--name", required=True, help="of the pair, in the results file")
    parser.add_argument("--texts", dest="count", type=int, default=24)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.pre)
    rows = [encode_prompt(tokenizer, p) for p in read_prompts(options.texts)[: options.count]]
    model = AutoModelForCausalLM.from_pretrained(options.pre, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    ends = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
        for folder in (options.pre, options.post)
    ]
    pre, post = ({n: t.clone() for n, t in end.items()} for end in ends)
    full = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (options.pre, options.post)
    ]
    before = logprobs(model, pre, rows)
    found = []
    for ratio in RATIOS:
        wide = {n: torch.lerp(pre[n].float(), post[n].float(), ratio) for n in pre}
        written = {
            "nearest": {n: t.bfloat16() for n, t in wide.items()},
            "stochastic": {n: mix(pre[n], post[n], ratio) for n in pre},
        }
        true = logprobs(model, wide, rows)
        row = {"ratio": ratio, "kl_from_pre": divergence(true, before)}
        loaded = {n: torch.lerp(full[0][n], full[1][n], ratio).bfloat16() for n in pre}
        row["share_loaded"] = share(full[0], full[1], loaded)
        for how, weights in written.items():
            row[f"share_{how}"] = share(pre, post, weights)
            row[f"kl_{how}"] = divergence(true, logprobs(model, weights, rows))
        found.append(row)
        print({k: float(f"{v:.3g}") for k, v in row.items()}, flush=True)
    save(options.name, {"update": distance(pre, post), "tokens": len(before), "ratios": found})


@torch.no_grad()
def logprobs(model: torch.nn.Module, weights: Weights, rows: list[tuple[int, ...]]) -> Tensor:
    """Of every next token, (tokens, vocabulary)."""
    model.load_state_dict({n: t.float() for n, t in weights.items()})
    return torch.cat([model(torch.tensor([row])).logits[0].log_softmax(-1) for row in rows])


def divergence(true: Tensor, other: Tensor) -> float:
    """KL(true | other), nats a token."""
    return float((true.exp() * (true - other)).sum(-1).mean())


def share(pre: Weights, post: Weights, written: Weights) -> float:
    """Of the update, along itself."""
    gaps = {n: post[n].double() - pre[n].double() for n in pre}
    along = sum(float(((written[n].double() - pre[n].double()) * g).sum()) for n, g in gaps.items())
    return float(along / sum(g.square().sum() for g in gaps.values()))


def distance(pre: Weights, post: Weights) -> float:
    """|post - pre| / |pre|."""
    update = sum(float((post[n].double() - pre[n].double()).square().sum()) for n in pre)
    return (update / sum(float(t.double().square().sum()) for t in pre.values())) ** 0.5


def save(name: str, row: dict[str, object]) -> None:
    """Add the row to the file."""
    told = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(told, capture_output=True, text=True, cwd=RESULTS.parent, check=True).stdout.strip()
    command = " ".join(["python", "benchmarks/rounding.py", "PRE", "POST", "TEXTS.jsonl", *sys.argv[4:]])
    content = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    content[name] = {"command": command, "commit": commit, "versions": versions(), **row}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
