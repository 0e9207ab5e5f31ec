"""What a pair of billions of parameters costs on one GPU, and whether its bits are those of the CPU.

    python benchmarks/gpu.py WORK --shape tiny --device cpu   # the rehearsal: seconds
    python benchmarks/gpu.py WORK --shape 3b                  # 3b or 8b; under nine minutes on an 80 GB card

Nothing large travels: PRE is a Llama of random weights, made on the device and written to WORK in bfloat16; POST is PRE and
noise of a thousandth. Timed are: loading, a change of ratios, a forward and backward and a search step, drawing and scoring, a
whole search for three ratios, and a sweep of eleven points. Writes benchmarks/results/gpu-SHAPE.json
after each of them; the pair is kept in WORK.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from counterpoise.averaging.mix import mix
from counterpoise.averaging.partition import thirds, whole
from counterpoise.averaging.resident import ResidentAverage
from counterpoise.checkpoints.preflight import Pair, preflight
from counterpoise.language.sampling import Drawing, sample
from counterpoise.language.scoring import Example, continuation_logprobs
from counterpoise.planning.timing import Endless
from counterpoise.records import versions, write_json
from counterpoise.search.hma import hma
from counterpoise.search.proxies import ProxySet

RESULTS = Path(__file__).parent / "results"
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    "3b": {"hidden_size": 3200, "intermediate_size": 8640, "num_hidden_layers": 26, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
"""OpenLLaMA-3B's and Llama-3.1-8B's, and one for the rehearsal."""
PROXIES, PROMPTS, NEW, ITEMS = 256, 128, 64, 256


def main() -> None:
    """Make the pair, time, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    found: dict[str, Any] = {
        "command": f"python benchmarks/gpu.py WORK --shape {options.shape} --device {options.device}",
        "commit": git("describe", "--always", "--dirty"),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "work": {"proxies": PROXIES, "prompts": PROMPTS, "new tokens": NEW, "items": ITEMS, "batch": options.batch},
    }

    def told(name: str, value: Any) -> None:
        found[name] = value
        write_json(RESULTS / f"gpu-{options.shape}.json", found)
        print(f"{name:40} {value}", flush=True)

    seconds, pre = clock(options.device), options.work / f"pre-{options.shape}"
    if not (options.work / "made").is_file():
        make(options.work, options.shape, options.device)
    pair = preflight(pre, options.work / f"post-{options.shape}")
    holder: list[ResidentAverage] = []
    told("loading, s", seconds(lambda: holder.append(ResidentAverage(pair, device=options.device))))
    (resident,) = holder
    told("parameters", sum(p.numel() for p in resident.model.parameters()))
    told("the pair lies on the device", bool(resident._held))
    cut, everything = thirds(pair.names), whole(pair.names)
    draw = torch.Generator().manual_seed(0)

    def rows(count: int, width: int) -> list[list[int]]:
        return torch.randint(3, SHAPES[options.shape]["vocab_size"], (count, width), generator=draw).tolist()

    proxies = ProxySet(tuple(Example(tuple(r[:64]), tuple(r[64:])) for r in rows(PROXIES, 128)), options.batch)
    one = ProxySet(proxies.examples[: options.batch], options.batch)
    ratios = [[0.4, 0.5, 0.6], [0.5, 0.6, 0.7]]
    told("bits equal to the CPU's", same_bits(resident, pair, ratios[0]))
    each = range(options.rounds)
    told("set, s", [seconds(lambda i=i: resident.set(cut, ratios[i % 2])) for i in range(1, options.rounds + 1)])

    def plain() -> None:
        resident.model.requires_grad_(True)
        one.backward(resident.model)
        resident.model.zero_grad(set_to_none=True)

    step = [0.45, 0.55, 0.65]
    resident.set(cut, step)
    timed = [(seconds(plain), seconds(lambda: resident.loss_and_gradient(cut, step, one.backward))) for _ in (*each, 0)]
    told("forward and backward, s", [a for a, _ in timed[1:]])
    told("search step over it", statistics.median(b / a for a, b in timed[1:]))
    prompts = [tuple(r) for r in rows(PROMPTS, 64)]
    drawing = Drawing(max_new_tokens=NEW, chat=False, batch_size=PROMPTS)
    took = [seconds(lambda: sample(resident.model, Endless(), prompts, drawing)) for _ in each]
    told("drawn tokens a second", PROMPTS * NEW / statistics.median(took))
    contexts = rows(ITEMS, 64)
    choices = [[r[:8], r[8:]] for r in rows(ITEMS, 16)]
    took = [seconds(lambda: continuation_logprobs(resident.model, contexts, choices, batch_size=64)) for _ in each]
    told("scored items a second", ITEMS / statistics.median(took))
    told("search of three ratios, s", seconds(lambda: hma(resident, cut, proxies.backward, 0.5)))

    def sweep() -> None:
        for tenth in range(11):
            resident.set(everything, [tenth / 10])
            sample(resident.model, Endless(), prompts, drawing)
            continuation_logprobs(resident.model, contexts, choices, batch_size=64)

    told("sweep of eleven points, s", seconds(sweep))
    if options.device == "cuda":
        told("peak memory, GB", torch.cuda.max_memory_allocated() / 1e9)


def make(work: Path, shape: str, device: str) -> None:
    """PRE and POST, in bfloat16; `made` says that both are whole."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], max_position_embeddings=2048)).to(torch.bfloat16)
    model.save_pretrained(work / f"pre-{shape}")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-3 * torch.randn_like(parameter)
    model.save_pretrained(work / f"post-{shape}")
    (work / "made").touch()


def same_bits(resident: ResidentAverage, pair: Pair, ratios: list[float]) -> bool:
    """Whether what lies on the device is what the CPU mixes, of a few of the tensors."""
    cut = thirds(pair.names)
    resident.set(cut, ratios)
    held, of = resident.model.state_dict(), cut.ratios(pair.names, ratios)
    names = [n for n in pair.names if n in held][:: max(1, len(pair.names) // 20)]
    return all(torch.equal(held[n].cpu(), mix(*pair.tensors(n), of[n]).to(held[n].dtype)) for n in names)


def clock(device: str) -> Callable[[Callable[[], Any]], float]:
    """Times a call to its end on the device."""

    def seconds(work: Callable[[], Any]) -> float:
        begun = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return round(time.perf_counter() - begun, 4)

    return seconds


def git(*asked: str) -> str:
    """What git says."""
    return subprocess.run(["git", *asked], capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
