"""`counterpoise merge` beside mergekit on the same tensors, element by element.

    python benchmarks/merge_mergekit.py WORK --mergekit PATH/mergekit-yaml

Makes a small random Llama (PRE) and three POSTs in float32 and in bfloat16 below WORK, merges them with both programs
and, a third time, densely in float64 (tests/merging/dense.py), and writes benchmarks/results/merge_mergekit.json:
  ties         every element; those that differ are counted by cause: on the border of the trimming, where equal
               magnitudes leave the choice open (mergekit sorts unstably, we keep the first); where the kept updates
               cancel exactly (mergekit elects plus, we elect no sign); the rest, with the largest distance there;
  bfloat16     twice: as mergekit does it by default (updates in bfloat16), and with its dtype: float32, written in float32
               and then rounded as counterpoise rounds (stochastically, see counterpoise.checkpoints.rounding);
  dare         two random draws cannot be equal: the share kept, the factor of kept elements, the bias over seeds, and
               whether a seed repeats; with density 1 nothing is random, and every element is compared.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from counterpoise.averaging.merge import Merge, merge
from counterpoise.checkpoints.checkpoint import Checkpoint
from counterpoise.checkpoints.rounding import key_of, narrow
from counterpoise.records import versions

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
from merging import dense  # noqa: E402

DENSITY, RATIO, WEIGHTS, DRAWS = 0.2, 0.7, (1.0, 2.0, 0.5), 5


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--mergekit", required=True, help="path of mergekit-yaml 0.1.5")
    options = parser.parse_args()
    work = options.work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    ties, dare = [], []
    for name in ("float32", "bfloat16"):
        pre, posts = models(work / name, getattr(torch, name))
        for inner in ("float32",) if name == "float32" else ("bfloat16", "float32"):
            for count in (1, 3):
                theirs = mergekit(options.mergekit, work, "ties", pre, posts[:count], DENSITY, inner, name)
                ties.append(
                    {
                        "weights": name,
                        "mergekit_dtype": inner,
                        "posts": count,
                        **compare_ties(work, pre, posts[:count], theirs),
                    }
                )
        dare.append({"weights": name, **compare_dare(options.mergekit, work, pre, posts, name)})
    found = {
        "command": "python benchmarks/merge_mergekit.py WORK --mergekit MERGEKIT",
        "versions": {**versions(), "mergekit": "0.1.5"},
        "density": DENSITY,
        "ratio": RATIO,
        "post_weights": WEIGHTS,
        "ties": ties,
        "dare": dare,
    }
    (HERE / "results" / "merge_mergekit.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def models(folder: Path, dtype: torch.dtype) -> tuple[Path, list[Path]]:
    """PRE and three POSTs a random step away."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder / "pre")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    posts = []
    for seed in (1, 2, 3):
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(before[n].float() + 0.002 * torch.randn(p.shape, generator=random))
        model.save_pretrained(folder / f"post{seed}")
        posts.append(folder / f"post{seed}")
    return folder / "pre", posts


def mergekit(
    program: str, work: Path, method: str, pre: Path, posts: list[Path], density: float, dtype: str, out_dtype: str,
    *, seed: int = 0, normalize: bool = True,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """What mergekit makes of them in `dtype`, rounded to `out_dtype` as counterpoise rounds."""
    sources = [
        {"model": str(post), "parameters": {"density": density, "weight": weight}}
        for post, weight in zip(posts, WEIGHTS, strict=False)
    ]
    config = {
        "merge_method": method, "base_model": str(pre), "models": sources, "dtype": dtype, "out_dtype": dtype,
        "parameters": {"normalize": normalize, "lambda": RATIO},
    }  # fmt: skip
    (work / "merge.yaml").write_text(yaml.safe_dump(config))
    shutil.rmtree(work / "theirs", ignore_errors=True)
    command = [program, "merge.yaml", "theirs", "--random-seed", str(seed), "--no-copy-tokenizer"]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"mergekit failed: {done.stderr[-2000:]}")
    sources = [Checkpoint(p) for p in (pre, *posts)]
    made = Checkpoint(work / "theirs").items()
    return {n: narrow(t.clone(), getattr(torch, out_dtype), key=key_of(*(s[n] for s in sources))) for n, t in made}


def ours(work: Path, pre: Path, posts: list[Path], plan: Merge) -> dict[str, torch.Tensor]:
    """What counterpoise makes of them."""
    shutil.rmtree(work / "ours", ignore_errors=True)
    merge(pre, posts, work / "ours", plan)
    return {n: t.clone() for n, t in Checkpoint(work / "ours").items()}


def compare_ties(work: Path, pre: Path, posts: list[Path], theirs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Elements that differ, why, and how far each program is from the dense version."""
    weights = WEIGHTS[: len(posts)]
    mine = ours(work, pre, posts, Merge(density=DENSITY, ratio=RATIO, weights=weights, scope="tensor"))
    before, after = arrays(pre), [arrays(p) for p in posts]
    exact = dense.ties(before, after, DENSITY, RATIO, weights, "tensor")
    border, cancelled = {}, {}
    for name in mine:
        updates = [post[name] - before[name] for post in after]
        sizes = [np.abs(u).astype(np.float32) for u in updates]
        border[name] = np.any([s == np.sort(s.ravel())[-max(1, int(DENSITY * s.size))] for s in sizes], axis=0)
        trimmed = [u * dense.largest(u, DENSITY) for u in updates]
        cancelled[name] = np.any(trimmed, axis=0) & (sum(w * t for w, t in zip(weights, trimmed, strict=True)) == 0)
    return {"tensors": len(mine), **told(mine, theirs, before, after, exact, border, cancelled)}


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """float64 tensors."""
    return {n: t.double().numpy() for n, t in Checkpoint(folder).items()}


def told(
    mine: dict[str, torch.Tensor],
    theirs: dict[str, torch.Tensor],
    before: dict[str, np.ndarray],
    after: list[dict[str, np.ndarray]],
    exact: dict[str, np.ndarray],
    border: dict[str, np.ndarray],
    cancelled: dict[str, np.ndarray],
) -> dict[str, Any]:
    """Counts of differing elements by cause; distances elsewhere in eps times the larger of |pre| and |post|."""
    counts = dict.fromkeys(("elements", "differ", "on_the_border", "updates_cancel", "rounding_or_other"), 0)
    apart = dict.fromkeys(("ours_from_mergekit", "ours_from_float64", "mergekit_from_float64"), 0.0)
    for name, tensor in mine.items():
        a, b = tensor.double().numpy(), theirs[name].double().numpy()
        different, on, none = a != b, border[name], cancelled[name] & ~border[name]
        for key, mask in (
            ("elements", np.ones_like(different)),
            ("differ", different),
            ("on_the_border", different & on),
            ("updates_cancel", different & none),
            ("rounding_or_other", different & ~on & ~none),
        ):
            counts[key] += int(mask.sum())
        step = torch.finfo(tensor.dtype).eps * np.max([np.abs(before[name]), *(np.abs(p[name]) for p in after)], axis=0)
        elsewhere = ~on & ~none & (step > 0)
        for key, x, y in (
            ("ours_from_mergekit", a, b),
            ("ours_from_float64", a, exact[name]),
            ("mergekit_from_float64", b, exact[name]),
        ):
            apart[key] = max(apart[key], float((np.abs(x - y)[elsewhere] / step[elsewhere]).max(initial=0.0)))
    return {**counts, "largest_distance_elsewhere": {k: round(v, 3) for k, v in apart.items()}}


def compare_dare(program: str, work: Path, pre: Path, posts: list[Path], dtype: str) -> dict[str, Any]:
    """What two random draws have in common; float32 arithmetic in both."""
    settings = (pre, posts[:1], DENSITY, "float32", dtype)
    found: dict[str, Any] = {}
    before, after = Checkpoint(pre), Checkpoint(posts[0])
    makers = {
        "ours": lambda seed: ours(work, pre, posts[:1], Merge(method="dare", density=DENSITY, ratio=RATIO, seed=seed)),
        "mergekit": lambda seed: mergekit(program, work, "dare_linear", *settings, seed=seed),
    }
    for label, make in makers.items():
        draws = [make(seed) for seed in range(DRAWS)]
        again = make(0)
        update = torch.cat([(after[n].double() - before[n].double()).flatten() for n in before])
        moved = [torch.cat([(d[n].double() - before[n].double()).flatten() for n in before]) for d in draws]
        kept = [m != 0 for m in moved]
        big = update.abs() > 1e-3  # where rounding does not hide the factor
        factors = [float((m[k & big] / update[k & big] / RATIO).median()) for m, k in zip(moved, kept, strict=True)]
        mean = torch.stack(moved).mean(0) / RATIO
        found[label] = {
            "share_kept": [round(float(k.double().mean()), 5) for k in kept],
            "factor_of_kept": [round(f, 4) for f in factors],
            "slope_of_the_mean_on_the_update": round(float(mean @ update / (update @ update)), 4),
            "same_seed_same_bytes": all(torch.equal(again[n], draws[0][n]) for n in before),
        }
    whole = mergekit(program, work, "dare_ties", pre, posts, 1.0, "float32", dtype)
    mine = ours(work, pre, posts, Merge(method="dare-ties", density=1.0, ratio=RATIO, weights=WEIGHTS))
    start, ends = arrays(pre), [arrays(p) for p in posts]
    exact = dense.ties(start, ends, 1.0, RATIO, WEIGHTS, "tensor")
    nothing = {n: np.zeros(t.shape, dtype=bool) for n, t in start.items()}
    sums = {n: sum(w * (e[n] - start[n]) for w, e in zip(WEIGHTS, ends, strict=True)) == 0 for n in start}
    found["density_1_dare_ties"] = told(mine, whole, start, ends, exact, nothing, sums)
    return found


if __name__ == "__main__":
    main()
