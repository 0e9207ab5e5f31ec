"""Equal and unequal tasks: what each method gains on the worst task, on the cut ones and in the mean.

    python experiments/banditmtl/unequal.py DATA            # 2 data sets, whole and cut, 13 methods, 10 seeds
    python experiments/banditmtl/unequal.py DATA --model textcnn --seeds 3
    python experiments/banditmtl/unequal.py DATA --model pretrained --encoder SMOLLM2   # as smollm2_to_hf.py writes it
    python experiments/banditmtl/unequal.py DATA --table    # the tables of UNEQUAL.md from results/unequal.jsonl

`cut`: half of the tasks, drawn by seed, keep 5 % of their training rows. A shared network is trained until the mean
validation accuracy has not risen for some epochs; the epoch of the best one is scored. In every step all methods see the
same rows of a seed, equally many a task; "proportional" weighs the tasks' mean losses by their sizes, which is what a
plain trainer on the joined data minimises. "pretrained" trains the same network on vectors of a frozen SmolLM2 (the mean
over tokens of its states after some layers), which are written to a folder beside it once. Reviews that stand in training
and in test are left out of training. A run that is in results/ already is not done again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import run as common
import torch
from cycling import encode, interval, shuffled
from layouts import read_tasks
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise import multitask
from counterpoise.classification.data import Split, TaskData
from counterpoise.classification.vectors import tokenize
from counterpoise.multitask import BanditMTL, Weighting

STORE = common.HERE / "results" / "unequal.jsonl"
PAGE = common.HERE / "UNEQUAL.md"
SETTINGS: dict[str, Any] = {
    "rows": {"sentiment": 16, "topic": 32}, "epochs": 40, "patience": 5, "lr": 3e-3, "width": 64, "words": 20_000,
    "tokens": 200, "dropout": 0.5, "kept": 0.05, "rho": 1.2, "eta": 0.5,
    "mild": {"rho": "10%", "eta": 0.2},
}  # fmt: skip
"""`mild`: what was best in GRPO on four puzzles (experiments/mixtures), taken over before any run here."""
FROZEN = {"layers": 8, "tokens": 48}
"""Of the pretrained encoder: after how many layers its states are taken, and of how many tokens."""
BF16 = torch.cpu._is_avx512_bf16_supported()
"""Whether convolutions and the pretrained encoder are in bfloat16: twice as fast where a processor has it, else imitated."""
PARTS = ("train", "validation", "test")
Build = Callable[[list[str], list[int], "Network"], Weighting]


class Network(nn.Module):
    """One encoder for all tasks, one head a task; texts are word indices, 0 is padding, or vectors of floats."""

    def __init__(self, words: int, classes: Sequence[int], kind: str) -> None:
        super().__init__()
        width = SETTINGS["width"]
        self.words = nn.Linear(words, width) if kind == "pretrained" else nn.Embedding(words, width, padding_idx=0)
        convolutions = [nn.Conv1d(width, width, k, padding=k // 2) for k in (3, 5, 7)] if kind == "textcnn" else []
        self.convolutions = nn.ModuleList(convolutions)
        self.hidden = nn.Linear(width * (len(convolutions) or 1), width)
        self.heads = nn.ModuleList(nn.Linear(width, n) for n in classes)

    def shared(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if not name.startswith("heads")]

    def features(self, texts_BT: Tensor) -> Tensor:
        if texts_BT.is_floating_point():
            pooled = torch.relu(self.words(texts_BT))
        elif self.convolutions:
            with torch.autocast("cpu", torch.bfloat16, enabled=BF16):
                x_BDT = self.words(texts_BT).transpose(1, 2)
                pooled = torch.cat([c(x_BDT).amax(2) for c in self.convolutions], dim=1).float().relu()
        else:
            pooled = F.embedding_bag(texts_BT, self.words.weight, mode="mean", padding_idx=0)
        return torch.relu(self.hidden(F.dropout(pooled, SETTINGS["dropout"], self.training)))


def bandit(prior: Callable[[list[int]], Any], **settings: Any) -> Build:
    settings = {"rho": SETTINGS["rho"], **settings}
    return lambda tasks, sizes, net: BanditMTL(tasks, prior=prior(sizes), eta=SETTINGS["eta"], **settings)


METHODS: dict[str, Build] = {
    "uniform": lambda tasks, sizes, net: multitask.Uniform(tasks),
    "proportional": bandit(lambda sizes: sizes, rho=0.0),
    "sqrt": bandit(lambda sizes: [n**0.5 for n in sizes], rho=0.0),
    "BanditMTL, prior uniform": bandit(lambda sizes: "uniform"),
    "BanditMTL, prior proportional": bandit(lambda sizes: sizes),
    "BanditMTL, m/2 effective": lambda tasks, sizes, net: BanditMTL(
        tasks, min_effective_tasks=len(tasks) / 2, eta=SETTINGS["eta"]
    ),
    "BanditMTL, mild": lambda tasks, sizes, net: BanditMTL(tasks, **SETTINGS["mild"]),
    "single task": lambda tasks, sizes, net: multitask.Uniform(tasks),
    "uncertainty": lambda tasks, sizes, net: multitask.UncertaintyWeighting(tasks),
    "GradNorm": lambda tasks, sizes, net: multitask.GradNorm(tasks, shared=[net.hidden.weight]),
    "FAMO": lambda tasks, sizes, net: multitask.FAMO(tasks),
    "ExcessMTL": lambda tasks, sizes, net: multitask.ExcessMTL(tasks, shared=[net.hidden.weight]),
    "MGDA": lambda tasks, sizes, net: multitask.MGDA(tasks, shared=net.shared()),
}

FIRST, OTHERS = slice(0, 7), slice(7, None)
ROUNDS = ((FIRST, "cut"), (FIRST, "full"), (OTHERS, "cut"), (OTHERS, "full"))
"""Which methods are run on all seeds before the others: the question is between the first ones."""


def cut(tasks: Sequence[TaskData], seed: int) -> list[list[int]]:
    """The training rows that each task keeps: half of the tasks, drawn by seed, keep a share; validation and test stay whole."""
    draw = torch.Generator().manual_seed(1000 + seed)
    chosen = set(torch.randperm(len(tasks), generator=draw)[: len(tasks) // 2].tolist())
    found = []
    for i, t in enumerate(tasks):
        keep = torch.randperm(len(t.train), generator=draw).tolist()
        found.append(sorted(keep[: round(SETTINGS["kept"] * len(keep))]) if i in chosen else sorted(keep))
    return found


def cut_down(t: TaskData, rows: Sequence[int]) -> TaskData:
    """The task with these training rows."""
    train = Split(tuple(t.train.texts[k] for k in rows), tuple(t.train.labels[k] for k in rows))
    return TaskData(t.name, t.labels, train, t.validation, t.test)


def padded(tasks: Sequence[TaskData]) -> tuple[list[dict[str, tuple[Tensor, Tensor]]], int]:
    """Padded word indices and classes of every part, and the size of the vocabulary (of what is read of a text)."""
    texts = [{part: [tokenize(x)[: SETTINGS["tokens"]] for x in t.split(part).texts] for part in PARTS} for t in tasks]
    found, size = encode(tasks, texts, SETTINGS, first=2)
    pad = nn.utils.rnn.pad_sequence
    return [{part: (pad(x, batch_first=True), y) for part, (x, y) in parts.items()} for parts in found], size


@torch.no_grad()
def frozen(tasks: Sequence[TaskData], folder: Path, store: Path) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """The encoder's vectors and the classes of every part of whole tasks; a finished part is not computed again."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    dtype = torch.bfloat16 if BF16 else torch.float32
    model = AutoModel.from_pretrained(folder, num_hidden_layers=FROZEN["layers"], dtype=dtype).eval()
    model.norm = nn.Identity()  # fitted to the last layer
    store.mkdir(parents=True, exist_ok=True)
    found = []
    for t in tasks:
        parts: dict[str, tuple[Tensor, Tensor]] = {}
        for part in PARTS:
            texts, labels = t.split(part).texts, t.split(part).labels
            if not (place := store / f"{t.name}-{part}-{FROZEN['layers']}-{FROZEN['tokens']}-{BF16:d}.pt").is_file():
                ids = tokenizer(list(texts), truncation=True, max_length=FROZEN["tokens"])["input_ids"]
                order = sorted(range(len(ids)), key=[len(x) for x in ids].__getitem__)
                vectors = torch.empty(len(ids), model.config.hidden_size)
                for rows in (order[i : i + 64] for i in range(0, len(ids), 64)):
                    read = tokenizer.pad(
                        {"input_ids": [ids[i] for i in rows]}, return_tensors="pt", padding_side="right"
                    )
                    mask = read["attention_mask"]
                    states = model(**read).last_hidden_state.float() * mask[..., None]
                    vectors[rows] = states.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
                torch.save(vectors, place)
                print(t.name, part, len(ids), flush=True)
            parts[part] = torch.load(place), torch.tensor([t.labels.index(y) for y in labels])
        found.append(parts)
    train = torch.cat([p["train"][0] for p in found])
    centre, scale = train.mean(0), train.std(0)
    return [{part: ((x - centre) / scale, y) for part, (x, y) in parts.items()} for parts in found]


def batch(net: Network, texts: Sequence[Tensor]) -> list[Tensor]:
    """Logits of each task's texts, through one pass of all of them."""
    if not texts[0].is_floating_point():
        longest = max(int((x != 0).sum(1).max()) for x in texts)
        texts = [F.pad(x[:, :longest], (0, max(0, longest - x.shape[1]))) for x in texts]
    joined = torch.cat(list(texts))
    parts = net.features(joined).split([len(x) for x in texts])
    return [head(x) for head, x in zip(net.heads, parts, strict=True)]


def train(
    tasks: Sequence[TaskData], parts: list[Any], words: int, method: str, kind: str, rows: int, seed: int
) -> dict[str, Any]:
    """One training, scored at the epoch of the best mean validation accuracy."""
    torch.manual_seed(seed)
    net = Network(words, [len(t.labels) for t in tasks], kind)
    sizes = [len(t.train) for t in tasks]
    weighting = METHODS[method]([t.name for t in tasks], sizes, net)
    apart = isinstance(weighting, multitask.JacobianWeighting)  # a pass a task, so that its gradient is its own
    optimizer = torch.optim.Adam([*net.parameters(), *weighting.parameters()], lr=SETTINGS["lr"], fused=True)
    steps, best, found, begun = -(-max(sizes) // rows), -1.0, {}, time.process_time()
    for epoch in range(1, SETTINGS["epochs"] + 1):
        draw = [shuffled(n, steps * rows) for n in sizes]
        for step in range(steps):
            chosen = [o[step * rows : (step + 1) * rows] for o in draw]
            texts = [p["train"][0][r] for p, r in zip(parts, chosen, strict=True)]
            logits = [h(net.features(x)) for h, x in zip(net.heads, texts, strict=True)] if apart else batch(net, texts)
            losses = [F.cross_entropy(x, p["train"][1][r]) for x, p, r in zip(logits, parts, chosen, strict=True)]
            optimizer.zero_grad()
            weighting(losses).backward()
            optimizer.step()
            weighting.step()
        now = score(net, parts, "validation")
        if (mean := statistics.fmean(now["validation_accuracy"])) > best:
            best = mean
            found = {"epoch": epoch, **now, **score(net, parts, "test")}
        if epoch - found["epoch"] >= SETTINGS["patience"]:
            break
    return {**found, "epochs": epoch, "cpu_seconds": round(time.process_time() - begun, 1)}


@torch.no_grad()
def score(net: Network, parts: list[Any], part: str) -> dict[str, list[float]]:
    """Accuracy, macro-F1 and loss of each task."""
    net.eval()
    found: dict[str, list[float]] = {f"{part}_{name}": [] for name in ("accuracy", "macro_f1", "loss")}
    for head, p in zip(net.heads, parts, strict=True):
        texts, labels = p[part]
        logits = torch.cat([head(net.features(x)) for x in texts.split(512)])
        found[f"{part}_accuracy"].append(float((logits.argmax(1) == labels).double().mean()))
        found[f"{part}_macro_f1"].append(float(f1_score(labels, logits.argmax(1), average="macro")))
        found[f"{part}_loss"].append(float(F.cross_entropy(logits, labels)))
    net.train()
    return {name: common.rounded(values) for name, values in found.items()}


def one(
    tasks: Sequence[TaskData], parts: list[Any], words: int, method: str, kind: str, rows: int, seed: int
) -> dict[str, Any]:
    """One run; "single task" trains a network of its own for each task, and joins what they score."""
    if method != "single task":
        return train(tasks, parts, words, method, kind, rows, seed)
    alone = [train([t], [p], words, method, kind, rows, seed) for t, p in zip(tasks, parts, strict=True)]
    joined = {k: [x for a in alone for x in a[k]] for k, v in alone[0].items() if isinstance(v, list)}
    numbers = {k: round(sum(a[k] for a in alone), 1) for k in ("epoch", "epochs", "cpu_seconds")}
    return {**joined, **numbers}


FIGURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "mean accuracy": lambda r: 100 * statistics.fmean(r["test_accuracy"]),
    "worst task": lambda r: 100 * min(r["test_accuracy"]),
    "cut tasks": lambda r: 100 * statistics.fmean(r["test_accuracy"][i] for i in r["cut"]),
    "macro-F1": lambda r: 100 * statistics.fmean(r["test_macro_f1"]),
    "mean test loss": lambda r: statistics.fmean(r["test_loss"]),
    "worst test loss": lambda r: max(r["test_loss"]),
}


def table(runs: list[dict[str, Any]], base: str) -> list[str]:
    """One row a method: means over its seeds and, for most figures, the difference to `base` paired by seed."""
    by = {(r["method"], r["seed"]): r for r in runs}
    methods = [m for m in METHODS if any(r["method"] == m for r in runs)]
    shown = [f for f in FIGURES if f != "cut tasks" or runs[0]["cut"]]
    lines = [f"Differences to {base}, paired by seed, 95 % t intervals.", ""]
    lines += ["| method | seeds | " + " | ".join(f"{f} | − {base}" for f in shown) + " | epochs | seconds |"]
    lines += ["|" + " --- |" * (2 * len(shown) + 4)]
    for method in methods:
        seeds = [s for m, s in by if m == method and (base, s) in by]
        if len(seeds) < 3:
            continue
        cells = [method, str(len(seeds))]
        for name in shown:
            values = [FIGURES[name](by[method, s]) for s in seeds]
            cells.append(f"{statistics.fmean(values):.{3 if 'loss' in name else 2}f}")
            against = [v - FIGURES[name](by[base, s]) for v, s in zip(values, seeds, strict=True)]
            cells.append("" if method == base else interval(against))
        cells += [f"{statistics.fmean(by[method, s][k] for s in seeds):.0f}" for k in ("epochs", "cpu_seconds")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def write_tables(runs: list[dict[str, Any]]) -> None:
    """Fill in what stands between <!-- MODEL-DATA-KIND --> and <!-- end -->."""
    page = PAGE.read_text(encoding="utf-8")
    for name in sorted({f"{r['model']}-{r['data']}-{r['kind']}" for r in runs}):
        mine = [r for r in runs if f"{r['model']}-{r['data']}-{r['kind']}" == name]
        if f"<!-- {name} -->" not in page:
            print(f"{name}: {len(mine)} runs, and no place for their table on the page")
            continue
        before, rest = page.split(f"<!-- {name} -->\n")
        made = "\n".join([*table(mine, "uniform"), "", *table(mine, "proportional")])
        page = f"{before}<!-- {name} -->\n{made}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    PAGE.write_text(page, encoding="utf-8")


def main() -> None:
    """Run what is missing, or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", choices=("averaging", "textcnn", "pretrained"), default="averaging")
    parser.add_argument("--encoder", type=Path, help="of --model pretrained: the folder of SmolLM2")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if (options.model == "pretrained") != (options.encoder is not None) and not options.table:
        parser.error("--encoder FOLDER goes with --model pretrained, and only with it")
    torch.set_num_threads(1)
    runs = common.read_lines(STORE)
    if options.table:
        write_tables(runs)
        return
    done = {(r["model"], r["data"], r["kind"], r["method"], r["seed"]) for r in runs}
    folders = {data: options.data / common.SETTINGS[data]["folder"] for data in common.SETTINGS}
    whole = {d: read_tasks(f, common.SETTINGS[d]["layout"], drop_leaked=True) for d, f in folders.items()}
    vectors: dict[str, list[Any]] = {}
    more: dict[str, Any] = {}
    typed = ""
    if options.model != "averaging":
        more, typed = {"bf16": BF16}, f" --model {options.model}"
    if options.encoder:
        more, typed = {**more, "frozen": FROZEN}, f"{typed} --encoder SMOLLM2"
        store = options.encoder.with_name(f"{options.encoder.name}-vectors")
        vectors = {data: frozen(whole[data], options.encoder, store) for data in whole}
    names = list(METHODS)
    for (which, kind), seed, data in itertools.product(ROUNDS, range(options.seeds), whole):
        key = (options.model, data, kind)
        missing = [m for m in names[which] if (*key, m, seed) not in done]
        if not missing:
            continue
        rows = cut(whole[data], seed) if kind == "cut" else [list(range(len(t.train))) for t in whole[data]]
        tasks = [cut_down(t, r) for t, r in zip(whole[data], rows, strict=True)]
        if options.model == "pretrained":
            chosen = zip(vectors[data], rows, strict=True)
            parts = [{**p, "train": tuple(x[r] for x in p["train"])} for p, r in chosen]
            words = parts[0]["train"][0].shape[1]
        else:
            parts, words = padded(tasks)
        small = [i for i, t in enumerate(tasks) if len(t.train) < len(whole[data][i].train)]
        for method in missing:
            found = one(tasks, parts, words, method, options.model, SETTINGS["rows"][data], seed)
            told = common.provenance(f"python experiments/banditmtl/unequal.py DATA{typed}", SETTINGS | more)
            line = {**dict(zip(("model", "data", "kind"), key, strict=True)), "method": method, "seed": seed}
            line |= {"tasks": [t.name for t in tasks], "examples": [len(t.train) for t in tasks], "cut": small}
            with STORE.open("a", encoding="utf-8") as file:
                print(json.dumps({**line, **found, "provenance": told}), file=file)
            means = {name: round(f(line | found), 2) for name, f in FIGURES.items() if name != "cut tasks" or small}
            print(*key, seed, method, means, found["epochs"], found["cpu_seconds"], flush=True)


if __name__ == "__main__":
    main()
