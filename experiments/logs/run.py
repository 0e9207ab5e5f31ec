"""`counterpoise tax --from` on logs that lm-eval writes here, and what many rows take.

    python experiments/logs/run.py [--rows]

Trains nothing: two tiny models of random weights are measured by lm-eval's command line on local tasks (choices in a
group, texts with two filters and BLEU, a last word, rolling likelihoods), and again with a limit, few-shot examples,
another version of a task and shuffled documents. results/transcript.txt is what counterpoise says of them. Then logs in
lm-eval's format are made of 100,000 rows in one task, and of 57 tasks in a group: results/rows.json has the seconds (of the
clock, and of the processor, which other work on the machine does not change) and the peak memory. --rows does that alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DATE = "2026-11-28T12-00-00.000000"
DATA = (
    "test_split: test\nfewshot_split: test\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {0}.jsonl}}}}\n"
)
CHOICES = "output_type: multiple_choice\ndoc_to_text: '{{q}}:'\ndoc_to_choice: '{{options}}'\ndoc_to_target: gold\n"
TASKS = {
    "first": CHOICES + "metric_list:\n  - {metric: acc}\n  - {metric: acc_norm}\n",
    "second": CHOICES + "metric_list:\n  - {metric: acc}\n",
    "texts": "output_type: generate_until\ndoc_to_text: '{{q}}:'\ndoc_to_target: '{{a}}'\n"
    "generation_kwargs: {until: [' '], max_gen_toks: 8}\nfilter_list:\n"
    "  - {name: strict, filter: [{function: take_first}]}\n"
    "  - {name: letters, filter: [{function: regex, regex_pattern: '([a-h]+)'}, {function: take_first}]}\n"
    "metric_list:\n  - {metric: exact_match}\n  - {metric: bleu}\n",
    "last": "output_type: loglikelihood\ndoc_to_text: '{{q}}:'\ndoc_to_target: ' {{a}}'\n"
    "metric_list:\n  - {metric: perplexity}\n  - {metric: acc}\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{q}} {{a}}'\n"
    "metric_list:\n  - {metric: word_perplexity}\n  - {metric: byte_perplexity}\n  - {metric: bits_per_byte}\n",
}


def main() -> None:
    """Both parts, in a temporary folder."""
    (HERE / "results").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        if "--rows" not in sys.argv:
            transcribe()
        rows = {"versions": versions(), "one task of 100,000 items": made("long", 1, 100_000)}
        rows["57 tasks of 246 items in a group"] = made("many", 57, 246)
        (HERE / "results" / "rows.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def transcribe() -> None:
    """Run lm-eval and keep what counterpoise says of its logs."""
    models()
    for folder, version, shuffled in (("tasks", 1, False), ("shuffled", 1, True), ("newer", 2, False)):
        write_tasks(Path(folder), version, shuffled)
    names = "both,texts,last,rolling"
    lm_eval("A", "tasks", names, "out_A")
    lm_eval("B", "tasks", names, "out_B")
    lm_eval("B", "tasks", names.replace(",rolling", ""), "few_B", "--limit", "20")
    lm_eval("B", "shuffled", names, "shuffled_B")
    lm_eval("B", "newer", names, "newer_B")
    lm_eval("B", "tasks", "last", "shots_B", "--num_fewshot", "1")
    sides = ("out_B", "few_B", "shuffled_B", "newer_B", "shots_B")
    told = [counterpoise("out_A", other)[0] for other in sides]
    (HERE / "results" / "transcript.txt").write_text("\n".join(told), encoding="utf-8")


def models() -> None:
    """A and B: random weights, and the same moved a little; a tokenizer of letters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = {c: i for i, c in enumerate(["<pad>", "<s>", "</s>", *" :0123456789abcdefgh"])}
    plain = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    words = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**size, vocab_size=len(letters), max_position_embeddings=512))
    for side in "AB":
        model.save_pretrained(side)
        words.save_pretrained(side)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.03 * torch.randn_like(p)


def write_tasks(folder: Path, version: int, shuffled: bool) -> None:
    """The tasks and their data; `version` is that of the task "last"."""
    draw = random.Random(0)
    folder.mkdir()

    def words(n: int) -> str:
        return " ".join("".join(draw.choice("abcdefgh") for _ in range(3)) for _ in range(n))

    choices = [{"q": f"{words(3)}{i}", "options": [words(1), words(2), words(1)], "gold": i % 3} for i in range(60)]
    texts = [{"q": f"{words(3)}{i}", "a": words(1)} for i in range(40)]
    for name, settings in TASKS.items():
        rows: list[Any] = {"first": choices, "second": choices[:25]}.get(name, texts)
        rows = draw.sample(rows, len(rows)) if shuffled else rows
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        head = f"task: {name}\nmetadata: {{version: {version if name == 'last' else 1}}}\n"
        (folder / f"{name}.yaml").write_text(head + DATA.format(folder.absolute() / name) + settings)
    group = "group: both\ntask: [first, second]\naggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\n"
    (folder / "both.yaml").write_text(group)


def lm_eval(model: str, tasks: str, names: str, out: str, *more: str) -> None:
    """lm-eval's own command line."""
    command = [
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={model}",
        "--tasks",
        names,
        "--include_path",
        tasks,
    ]
    command += ["--log_samples", "--output_path", out, "--device", "cpu", "--batch_size", "8", *more]
    subprocess.run(
        [str(Path(sys.executable).with_name(command[0])), *command[1:]],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True, capture_output=True, timeout=240,
    )  # fmt: skip


def counterpoise(a: str, b: str) -> tuple[str, float]:
    """What `counterpoise tax --from A B` prints, and its seconds."""
    command = ["tax", "--from", a, b, "--page", "tax.html"]
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "counterpoise", *command], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begun
    said = f"$ counterpoise {' '.join(command[:4])}\n{done.stdout}{done.stderr}"
    return "\n".join(line.rstrip() for line in said.splitlines()) + "\n", seconds


def made(name: str, tasks: int, items: int) -> dict[str, Any]:
    """Seconds, peak memory and file size for two logs of `tasks` tasks of four choices."""
    draw = random.Random(0)
    names = [f"task_{t:02}" for t in range(tasks)]
    for side, gain in (("pre", 0.4), ("post", 0.3)):
        folder = Path(f"{name}_{side}")
        folder.mkdir()
        results: dict[str, Any] = {}
        for task in names:
            right = 0
            with open(folder / f"samples_{task}_{DATE}.jsonl", "w") as file:
                for i in range(items):
                    row = line(task, i, [draw.gauss(-20 + gain * (k == i % 4), 1) for k in range(4)])
                    right += row["acc"]
                    file.write(json.dumps(row) + "\n")
            results[task] = {"acc,none": right / items}
        results["all"] = {"acc,none": sum(r["acc,none"] for r in results.values()) / tasks}
        about = {"group_subtasks": {"all": names}, "n-samples": {t: {"effective": items} for t in names}}
        about |= {"higher_is_better": {t: {"acc": True} for t in names}, "versions": dict.fromkeys(names, 1)}
        (folder / f"results_{DATE}.json").write_text(json.dumps({"results": results, **about}))
    size = sum(f.stat().st_size for f in Path(f"{name}_pre").iterdir())
    seconds = counterpoise(f"{name}_pre", f"{name}_post")[1]
    alone = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], capture_output=True, check=True); "
    alone += "r = resource.getrusage(resource.RUSAGE_CHILDREN); print(r.ru_maxrss, r.ru_utime + r.ru_stime)"
    command = [sys.executable, "-m", "counterpoise", "tax", "--from", f"{name}_pre", f"{name}_post"]
    used = subprocess.run([sys.executable, "-c", alone, *command], capture_output=True, text=True, check=True).stdout
    peak, processor = map(float, used.split())
    found = {"seconds": round(seconds, 1), "processor_seconds": round(processor, 1), "peak_MiB": round(peak / 1024)}
    return {**found, "MB_a_side": round(size / 1e6)}


def line(task: str, i: int, logs: list[float]) -> dict[str, Any]:
    """A row as lm-eval writes it, about 2 kB."""
    doc = {
        "question": f"{task} {i} " + "who and where and when " * 20,
        "choices": ["a b", "c d", "e f", "g h"],
        "answer": i % 4,
    }
    asked = [{"arg_0": f"Question: {doc['question']}\nAnswer:", "arg_1": f" {c}"} for c in doc["choices"]]  # type: ignore[attr-defined]
    answers = [[[str(v), "False"]] for v in logs]
    hashes = {
        k: hashlib.sha256(f"{k} {task} {i}".encode()).hexdigest() for k in ("doc_hash", "prompt_hash", "target_hash")
    }
    return {
        "doc_id": i, "doc": doc, "target": str(i % 4), "arguments": {f"gen_args_{k}": a for k, a in enumerate(asked)},
        "resps": answers, "filtered_resps": [a[0] for a in answers], "filter": "none", "metrics": ["acc"], **hashes,
        "acc": float(max(range(4), key=logs.__getitem__) == i % 4),
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Of what wrote and read the logs."""
    from importlib.metadata import version

    return {name: version(name) for name in ("lm-eval", "numpy")}


if __name__ == "__main__":
    main()
