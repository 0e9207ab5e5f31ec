"""The same bytes whatever vector instructions the processor has, and on any number of threads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HASHES = """
import json, sys
from pathlib import Path
from counterpoise.averaging.average import average
from counterpoise.averaging.merge import Merge, merge
from counterpoise.checkpoints.hashing import sha256
here, out = Path(sys.argv[1]), Path(sys.argv[2])
for kind in ("float32", "bfloat16", "float16"):
    average(here / kind / "pre", here / kind / "post", out / kind, 0.3)
    average(here / kind / "pre", here / "adapter", out / f"{kind}-lora", 0.7)
for kind in ("float32", "bfloat16"):
    for method in ("ties", "dare"):
        posts = [here / kind / "post", here / kind / "more"]
        merge(here / kind / "pre", posts, out / f"{kind}-{method}", Merge(method=method, density=0.3, ratio=0.6))
print(json.dumps({f.parent.name: sha256(f) for f in sorted(out.glob("*/model.safetensors"))}))
"""


def write(folder: Path, seed: int) -> None:
    """PRE, or PRE and a tenth of noise, from Philox: torch.randn itself depends on the instructions."""
    base, noise = (np.random.Generator(np.random.Philox(s)) for s in (0, seed))
    wide = {f"model.layers.{i}.mlp.up_proj.weight": base.standard_normal((67, 1501), "float32") for i in range(2)}
    wide = {n: t + (seed > 0) * np.float32(0.1) * noise.standard_normal(t.shape, "float32") for n, t in wide.items()}
    name = {0: "pre", 1: "post", 2: "more"}[seed]
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        made = folder / str(kind).removeprefix("torch.") / name
        made.mkdir(parents=True)
        save_file(
            {n: torch.from_numpy(t).to(kind) for n, t in wide.items()}, made / "model.safetensors", {"format": "pt"}
        )
        (made / "config.json").write_text('{"model_type": "llama"}')


def write_adapter(folder: Path) -> None:
    random = np.random.Generator(np.random.Philox(9))
    folder.mkdir()
    low, high = (torch.from_numpy(random.standard_normal(s, "float32")) / 10 for s in ((19, 1501), (67, 19)))
    start = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    save_file(
        {f"{start}A.weight": low, f"{start}B.weight": high}, folder / "adapter_model.safetensors", {"format": "pt"}
    )
    settings = {"peft_type": "LORA", "r": 19, "lora_alpha": 7, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def test_what_is_written_has_the_same_bytes_with_other_vector_instructions_and_threads(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path, seed)
    write_adapter(tmp_path / "adapter")
    found = []
    for capability, threads in (("default", "1"), ("avx2", "2")):
        environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", HASHES, str(tmp_path), str(tmp_path / capability)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        found.append(json.loads(run.stdout))
    assert len(set(found[0].values())) == 10
    assert found[0] == found[1]
