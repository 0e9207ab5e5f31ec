"""`counterpoise average` against mergekit's `linear` and against the floor, whole processes, in turn.

    python benchmarks/average.py WORK [--mergekit PATH] [--rounds 5] [--layers 22] [--ties]

Makes two random 1.0 GB bfloat16 Llama checkpoints (0.5 B parameters) in 4 shards below WORK once; then in each round runs
  floor      cat both inputs, dd one of them to a new file (with fsync): reading both and writing one,
  hashed     the floor, then SHA-256 of both inputs: what the recipe must record,
  cp         cp of one of them (and fsync),
  counterpoise average ... --ratio 0.6, input hashing on (it always is),
  diff       counterpoise diff,
  mergekit   linear with the same weights, when --mergekit names its mergekit-yaml,
  ties       with --ties: counterpoise merge --method ties --density 0.2 --scope tensor, and
  mergekit ties    the same, likewise.
Prints medians and ratios taken round by round, and writes benchmarks/results/average.json. With more --layers the models are
larger, only cp and counterpoise run, and the file is average_large.json. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

LAYERS, HIDDEN, MIDDLE, VOCABULARY, SHARDS = 22, 1280, 3456, 32000, 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": HIDDEN,
    "intermediate_size": MIDDLE, "num_attention_heads": 20, "num_key_value_heads": 20,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
}  # fmt: skip
HASHING = 'import hashlib, sys; [hashlib.file_digest(open(p, "rb"), "sha256") for p in sys.argv[1:]]'


def tensors(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name in ("q", "k", "v", "o"):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        for name in ("gate", "up"):
            shapes[f"{layer}.mlp.{name}_proj.weight"] = (MIDDLE, HIDDEN)
        shapes[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, MIDDLE)
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (HIDDEN,)
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def make_models(work: Path, layers: int) -> None:
    """PRE of random normal numbers, POST a small step away, rounded to bfloat16."""
    shapes, total = tensors(layers), 0
    sizes = {n: 2 * int(np.prod(s)) for n, s in shapes.items()}
    shards: list[list[str]] = [[] for _ in range(SHARDS)]
    for name, size in sizes.items():
        shards[min(SHARDS - 1, total * SHARDS // sum(sizes.values()))].append(name)
        total += size
    weight_map = {n: f"model-{i + 1:05}-of-{SHARDS:05}.safetensors" for i, names in enumerate(shards) for n in names}
    for folder in ("pre", "post"):
        (work / folder).mkdir(parents=True)
        (work / folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (work / folder / "model.safetensors.index.json").write_text(json.dumps(index))
    random, drawn = np.random.default_rng(0), dict[int, list[np.ndarray]]()
    for names in shards:
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [offset, offset + sizes[name]]}
            offset += sizes[name]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        files = [(work / folder / weight_map[names[0]]).open("wb") for folder in ("pre", "post")]
        for file in files:
            file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            if sizes[name] not in drawn:  # the tensors of one size hold the same numbers
                drawn[sizes[name]] = [random.standard_normal(sizes[name] // 2, dtype=np.float32) for _ in range(2)]
            values, step = drawn[sizes[name]][0] * np.float32(0.02), drawn[sizes[name]][1] * np.float32(0.001)
            for file, numbers in zip(files, (values, values + step), strict=True):
                file.write((numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes())
        for file in files:
            file.close()


def timed(command: list[str], env: dict[str, str]) -> dict[str, float]:
    """Wall and CPU seconds of a process and its children, and the peak of its anonymous memory in MB."""
    before, begun = os.times(), time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")))
        except (OSError, TypeError):
            pass
        time.sleep(0.02)
    wall = time.perf_counter() - begun
    after = os.times()
    if process.returncode:
        raise SystemExit(f"{command} failed: {process.stderr.read().decode()[-800:]}")  # type: ignore[union-attr]
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall_s": wall, "cpu_s": cpu, "peak_anonymous_mb": peak / 1000}


def main() -> None:
    """Make the models, run the rounds, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--mergekit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--ties", action="store_true", help="merge by ties, too")
    options = parser.parse_args()
    work = options.work.absolute()
    if not (work / "pre").exists():
        make_models(work, options.layers)
    recipe = work / "linear.yml"
    recipe.write_text(
        f"merge_method: linear\ndtype: bfloat16\nmodels:\n  - model: {work}/pre\n    parameters: {{weight: 0.4}}\n"
        f"  - model: {work}/post\n    parameters: {{weight: 0.6}}\n"
    )
    ties = work / "ties.yml"
    ties.write_text(
        f"merge_method: ties\nbase_model: {work}/pre\ndtype: bfloat16\nparameters: {{normalize: true}}\n"
        f"models:\n  - model: {work}/post\n    parameters: {{weight: 1, density: 0.2}}\n"
    )
    out, ours, sides = work / "out", [sys.executable, "-m", "counterpoise"], [f"{work}/pre", f"{work}/post"]
    both = " ".join(str(p) for side in ("pre", "post") for p in sorted((work / side).glob("*.safetensors")))
    one = " ".join(str(p) for p in sorted((work / "pre").glob("*.safetensors")))
    floor = f"cat {both} > /dev/null; mkdir {out}; cat {one} | dd of={out}/x bs=4M conv=fsync iflag=fullblock"
    commands = {
        "floor": ["sh", "-c", floor],
        "hashed": ["sh", "-c", f"{floor}; {sys.executable} -c '{HASHING}' {both}"],
        "cp": ["sh", "-c", f"mkdir {out}; cp {one} {out}; sync {out}/*"],
        "counterpoise": [*ours, "average", *sides, "-o", str(out), "--ratio", "0.6", "--quiet"],
        "diff": [*ours, "diff", *sides, "--quiet"],
    }  # fmt: skip
    if options.layers != LAYERS:
        commands = {name: commands[name] for name in ("cp", "counterpoise")}
    elif options.mergekit:
        merging = ["--method", "ties", "--density", "0.2", "--scope", "tensor", "--quiet"]
        commands["mergekit"] = [options.mergekit, str(recipe), str(out), "--allow-crimes", "--quiet"]
    if options.mergekit and options.ties:
        commands["ties"] = [*ours, "merge", *sides, "-o", str(out), *merging]
        commands["mergekit ties"] = [options.mergekit, str(ties), str(out), "--allow-crimes", "--quiet"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")} | {"HF_HUB_OFFLINE": "1"}  # as users run it
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(-1, options.rounds):
        row = {}
        for name, command in list(commands.items())[
            : 1 if number < 0 else None
        ]:  # the first round warms the page cache
            shutil.rmtree(out, ignore_errors=True)
            row[name] = timed(command, env)
        shutil.rmtree(out, ignore_errors=True)
        if number >= 0:
            rounds.append(row)
            report(rounds, options)  # as far as it came


def report(rounds: list[dict[str, dict[str, float]]], options: argparse.Namespace) -> None:
    """Medians, and ratios taken within each round."""
    measures = ("wall_s", "cpu_s", "peak_anonymous_mb")
    names = list(rounds[0])
    medians = {n: {m: statistics.median(r[n][m] for r in rounds) for m in measures} for n in names}
    ratios = {
        f"counterpoise/{n}": {
            m: statistics.median(r["counterpoise"][m] / max(r[n][m], 1e-9) for r in rounds) for m in measures[:2]
        }
        for n in names
        if n != "counterpoise"
    }
    print(f"{'':14}{'wall s':>9}{'CPU s':>9}{'peak anonymous MB':>20}")
    for name, row in medians.items():
        print(f"{name:14}{row['wall_s']:9.2f}{row['cpu_s']:9.2f}{row['peak_anonymous_mb']:20.0f}")
    if "mergekit" in names:
        for over, under in (("hashed", "mergekit"), *([("ties", "mergekit ties")] if options.ties else [])):
            ratios[f"{over}/{under}"] = {
                m: statistics.median(r[over][m] / r[under][m] for r in rounds) for m in measures[:2]
            }
    size = sum(file.stat().st_size for file in (options.work / "pre").glob("*.safetensors")) / 1e9
    for name, row in ratios.items():
        print(f"{name:26} wall x {row['wall_s']:.2f}   CPU x {row['cpu_s']:.2f}")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "command": f"python benchmarks/average.py WORK{' --mergekit PATH' if options.mergekit else ''} "
        f"--rounds {options.rounds} --layers {options.layers}", "gigabytes_of_each_model": size,
        "commit": commit, "seed": 0, "versions": {n: version(n) for n in ("torch", "numpy", "counterpoise")}
        | ({"mergekit": "0.1.5"} if options.mergekit else {}), "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "rounds": rounds, "medians": medians, "ratios": ratios,
    }  # fmt: skip
    name = "average.json" if options.layers == LAYERS else "average_large.json"
    path = Path(__file__).parent / "results" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
