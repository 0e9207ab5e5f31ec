"""How far the features of PRE and POST have parted, layer by layer (Lin et al. 2024, section 5, reads MA's gain from it).

    python experiments/hma/features.py WORK [WORK ...]

WORK as make_post.py left it. Both models read the same texts: LAMBADA contexts and the held-out prompts. Per layer
  stream   linear CKA (Kornblith et al. 2019, equation 3) of the two residual streams behind it: all change so far,
  own      the same of what the layer itself adds when POST's layer is given the input of PRE's: its change alone,
  moved    |post - pre| / |pre| of the layer's weights, Frobenius norms.
CKA is 1 where one set of features is a rotation and scaling of the other. The first token of a text, whose activations
are enormous, is left out. Writes results/features-RUN-SEED.json; tables.py sets it beside the ratios that HMA found.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from counterpoise.evaluation.parts import part_of
from counterpoise.language.prompts import read_prompts
from counterpoise.records import versions, write_json

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Every pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="+")
    parser.add_argument("--run", help="names the file (default: the method that made POST)")
    parser.add_argument("--texts", type=int, default=64, help="of each of the two kinds")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    for work in options.work:
        path = next(p for m in ("rsf", "dpo", "ppo") if (p := work / f"{m}.json").is_file())
        seed, run = json.loads(path.read_text())["settings"]["seed"], options.run or path.stem
        found = {
            "command": f"python experiments/hma/features.py WORK --run {run} --texts {options.texts}",
            "versions": versions(),
            "run": run,
            "seed": seed,
            "layers": compare(work, texts(work, options.texts)),
        }
        options.results.mkdir(parents=True, exist_ok=True)
        write_json(options.results / f"features-{run}-{seed}.json", found)


def texts(work: Path, count: int) -> list[str]:
    """What both models read."""
    lines = (work / "lambada_openai.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    held = [p.text for p in read_prompts(work / "prompts.jsonl") if part_of(p.group or p.key) == "held-out"]
    return [json.loads(line)["context"] for line in lines] + held[:count]


@torch.no_grad()
def compare(work: Path, read: list[str]) -> list[dict[str, float]]:
    """CKA and weight change of every layer."""
    tokenizer = AutoTokenizer.from_pretrained(work / "pre")
    pre, post = (
        AutoModelForCausalLM.from_pretrained(work / n, dtype=torch.float32).model.eval() for n in ("pre", "post")
    )
    behind: list[list[Tensor]] = [[] for _ in pre.layers]  # PRE's stream
    added: list[list[tuple[Tensor, Tensor]]] = [[] for _ in pre.layers]

    def both(index: int) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...], settings: dict[str, Any], output: Tensor) -> None:
            there = post.layers[index](*inputs, **settings)
            behind[index].append(output[0, 1:])
            added[index].append((output[0, 1:] - inputs[0][0, 1:], there[0, 1:] - inputs[0][0, 1:]))

        return hook

    for index, layer in enumerate(pre.layers):
        layer.register_forward_hook(both(index), with_kwargs=True)
    other: list[list[Tensor]] = [[] for _ in pre.layers]
    for text in read:
        tokens = tokenizer(text, return_tensors="pt").input_ids
        pre(tokens, use_cache=False)
        hidden = post(tokens, use_cache=False, output_hidden_states=True).hidden_states
        for index, states in enumerate(hidden[1:]):  # the last one is behind the final norm
            other[index].append(states[0, 1:])
    rows = []
    for index, (a, b) in enumerate(zip(pre.layers, post.layers, strict=True)):
        ours, theirs = (torch.cat([pair[i] for pair in added[index]]) for i in (0, 1))
        last = index == len(pre.layers) - 1
        stream = pre.norm(torch.cat(behind[index])) if last else torch.cat(behind[index])
        moved = sum(float((q - p).square().sum()) for p, q in zip(a.parameters(), b.parameters(), strict=True))
        size = sum(float(p.square().sum()) for p in a.parameters())
        rows.append(
            {
                "layer": index,
                "stream": cka(stream, torch.cat(other[index])),
                "own": cka(ours, theirs),
                "moved": (moved / size) ** 0.5,
                "tokens": len(ours),
            }
        )
    return rows


def cka(x_ND: Tensor, y_ND: Tensor) -> float:
    """Linear CKA of two sets of features of the same N tokens, between 0 and 1.

    >>> x = torch.randn(100, 4); round(cka(x, 3 * x.flip(1)), 4)
    1.0
    """
    x, y = ((v - v.mean(0)).double() for v in (x_ND, y_ND))
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


if __name__ == "__main__":
    main()
