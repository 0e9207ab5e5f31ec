"""vLLM as an engine (Kwon et al. 2023, arXiv 2309.06180): averages are put in place while it runs, it draws and scores."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from counterpoise.averaging.vllm_inside import Put, Sides, put
from counterpoise.checkpoints.checkpoint import Checkpoint, short
from counterpoise.checkpoints.files import CheckpointError
from counterpoise.checkpoints.preflight import Pair
from counterpoise.language.engine import Engine

OURS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""Of vLLM's settings what is set unless the user has: in this process, quiet, no telemetry, 1 GiB of cache on a CPU, any core."""
SHARE = 0.8
"""Of a GPU's memory that is free when vLLM starts, beside a reward model there, for weights and cache."""
COLDEST = 0.01
"""vLLM draws at this temperature where a lower one is asked for, and says so in its log alone."""
BLOCK = 32
"""Tokens of a block of the cache on a CPU: prefixes are shared by whole blocks, and vLLM's own 128 would share few."""


class VLLM(Engine):
    """An engine of vLLM in this process, or in one a device where several share each layer.

    Every change of weights is checked: see `vllm_inside`.

    Args:
        folder: config of the model; the weights there are not read.
        dtype: of the computation.
        device: "cpu" or "cuda", which vLLM must be built for.
        tensor_parallel: devices that share each layer.

    Raises:
        ValueError: another device; an architecture that vLLM does not have.
    """

    def __init__(
        self, folder: str | Path, dtype: torch.dtype, device: str = "cpu", *, tensor_parallel: int = 1
    ) -> None:
        for name, value in OURS.items():
            os.environ.setdefault(name, value)
        from transformers import AutoConfig, GenerationConfig
        from vllm.platforms import current_platform

        if device != current_platform.device_type:
            raise ValueError(
                f"engine vllm: this vLLM computes on {current_platform.device_type}, found --device {device}; of several GPUs "
                "CUDA_VISIBLE_DEVICES chooses"
            )
        self.config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        has = (Path(folder) / "generation_config.json").is_file()
        own = GenerationConfig.from_pretrained(folder) if has else GenerationConfig.from_model_config(self.config)
        self.generation_config = own
        self._sleeps, self._asleep = device == "cuda", False
        how: dict[str, Any] = {"enable_sleep_mode": True}
        if device == "cuda":
            memory = map(torch.cuda.mem_get_info, range(min(tensor_parallel, torch.cuda.device_count())))
            how["gpu_memory_utilization"] = SHARE * min(free / total for free, total in memory)
        if device == "cpu":  # where compiling takes minutes
            how = {"enforce_eager": True, "block_size": BLOCK}
            current_platform.simple_compile_backend = "eager"  # read when its modules are imported; g++ may not be here
        if tensor_parallel > 1:  # in an actor of Ray's vLLM would ask that for workers, one GPU a bundle
            how["distributed_executor_backend"] = "mp"
        from vllm import LLM

        self.llm: Any = LLM(
            str(folder), skip_tokenizer_init=True, dtype=short(dtype), tensor_parallel_size=tensor_parallel,
            load_format="dummy", max_model_len=-1, generation_config="vllm", enable_prefix_caching=True, **how,
        )  # fmt: skip
        how = vars(self.llm.llm_engine.vllm_config)
        self._limit: int = how["model_config"].max_model_len
        self._block: int = how["cache_config"].block_size
        self._seen: dict[tuple[int, str, int], int] = {}
        self._in_place: tuple[Pair, dict[str, float]] | None = None

    def put(self, pair: Pair, shares: Mapping[str, float]) -> None:
        self._wake()
        if self._in_place is None or self._in_place[0] is not pair or self._in_place[1] != shares:
            self._in_place = None  # until it is known to be
            sides = Sides(_place(pair.pre), _place(pair.post), tuple(pair.dropped))
            found: list[Put] = self.llm.collective_rpc(put, args=(sides, dict(shares)))
            self.llm.reset_prefix_cache()
            for rank, one in enumerate(found):
                self._check(rank, Put(*one))
            self._in_place = pair, dict(shares)
        pair.refuse_changed()

    def _check(self, rank: int, found: Put) -> None:
        """Raise where what a worker holds is not what it was sent: it kept weights that were there before, or others."""
        stale = [
            f"layer {layer}" if layer else "outside the layers"
            for layer in found.sent
            if not self._new(rank, layer, found)
        ]
        if found.wrong or stale:
            raise CheckpointError(
                f"engine vllm: expected the weights that were put in place, found others in {[*found.wrong, *stale][0]} "
                f"({len(found.wrong)} tensors, {len(stale)} layers): this vLLM cannot change this model's weights while it runs, "
                "or a head that differs from its embedding is tied there; use --engine transformers"
            )

    def _new(self, rank: int, layer: str, found: Put) -> bool:
        """Whether what is held is as new, or as old, as what was sent."""
        sent, held = (rank, f"sent {layer}", found.sent[layer]), (rank, f"held {layer}", found.held.get(layer, 0))
        return self._seen.setdefault(sent, held[2]) == held[2] and self._seen.setdefault(held, sent[2]) == sent[2]

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        new: int,
        temperature: float,
        stops: Sequence[int],
    ) -> list[list[int]]:
        from vllm import SamplingParams

        if 0 < temperature < COLDEST:
            raise ValueError(
                f"engine vllm: expected temperature 0, or at least {COLDEST}, as vLLM takes that below it, found {temperature}"
            )
        ends = [stop for stop in stops if stop < self.config.get_text_config().vocab_size]  # vLLM refuses others
        how = {"max_tokens": new, "temperature": temperature, "stop_token_ids": ends, "ignore_eos": True}
        asked = [SamplingParams(**how, seed=seed if temperature else None, detokenize=False) for seed in seeds]
        return [list(found.outputs[0].token_ids) for found in self._run(prompts, asked)]

    def score(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[float]]:
        rows = [(c, r) for c, group in zip(contexts, continuations, strict=True) for r in group]
        sums = self._sums(rows, [len(context) % self._block > 0 for context, _ in rows])
        lacking = [i for i, value in enumerate(sums) if value is None]
        for i, value in zip(lacking, self._sums([rows[i] for i in lacking], [False] * len(lacking)), strict=True):
            sums[i] = value
        each = iter([math.nan if value is None else value for value in sums])
        found = [[next(each) for _ in group] for group in continuations]
        if not all(math.isfinite(x) for group in found for x in group):
            raise ValueError(
                "engine vllm: expected finite log-probabilities, found NaN or Inf; the weights are damaged (diff names the "
                "tensor), or --dtype is too narrow for them"
            )
        return found

    def _sums(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], cached: Sequence[bool]) -> list[float | None]:
        """Summed log-probabilities; None where more than the context before its last token was read from the cache."""
        from vllm import SamplingParams

        fixed: Any = {
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 0,
            "flat_logprobs": True,
            "detokenize": False,
        }
        how = [SamplingParams(**fixed, ignore_eos=True, skip_reading_prefix_cache=not read) for read in cached]
        sums: list[float | None] = []
        for (context, following), found in zip(rows, self._run([[*c, *r] for c, r in rows], how), strict=True):
            if (found.num_cached_tokens or 0) >= len(context):
                sums.append(None)
            else:
                logprobs = found.prompt_logprobs
                first = [logprobs.start_indices[i] for i in range(len(context), len(context) + len(following))]
                sums.append(math.fsum(logprobs.logprobs[i] for i in first))
        return sums

    def _run(self, prompts: Sequence[Sequence[int]], how: Sequence[Any]) -> list[Any]:
        if not prompts:
            return []
        if (longest := max(len(p) + h.max_tokens for p, h in zip(prompts, how, strict=True))) > self._limit:
            raise ValueError(
                f"engine vllm: expected at most {self._limit} tokens, those to draw among them (one where texts are scored), "
                f"found {longest}: that is the model's context, or what vLLM's cache holds (VLLM_CPU_KVCACHE_SPACE, in GiB)"
            )
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        answered: list[Any] = self.llm.generate(asked, list(how), use_tqdm=False)
        return answered

    def rest(self) -> None:
        if self._sleeps and not self._asleep:
            self.llm.sleep(level=1)
            self._asleep = True

    def _wake(self) -> None:
        if self._sleeps:
            torch.cuda.empty_cache()  # of a resident model that has gone
        if self._asleep:
            self.llm.wake_up()
            self._asleep = False


def _place(checkpoint: Checkpoint) -> str:
    """The local folder that opens as this checkpoint, of an adapter its own."""
    return str(getattr(checkpoint, "adapter_folder", checkpoint.folder))
