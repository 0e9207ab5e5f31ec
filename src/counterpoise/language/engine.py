"""An engine: what draws from a model and scores with it in the place of a module of transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, get_args

from torch import nn

from counterpoise.checkpoints.preflight import Pair

Name = Literal["transformers", "vllm"]


class Engine(ABC):
    """A model of which averages are put in place, which draws, and which scores.

    `sampling.sample` and `scoring.continuation_logprobs` take one where they take a model. Gradients, whole distributions and
    lm-eval's tasks need a model of transformers.

    Attributes:
        config, generation_config: as transformers reads them.
    """

    config: Any
    generation_config: Any

    @abstractmethod
    def put(self, pair: Pair, shares: Mapping[str, float]) -> None:
        """Put the average of a pair with these ratios, by tensor, in the place of the weights.

        Raises:
            CheckpointError: what is then in place is not that average; a file of the pair has changed.
        """

    @abstractmethod
    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        new: int,
        temperature: float,
        stops: Sequence[int],
    ) -> list[list[int]]:
        """A response to each prompt, all as token ids, of at most `new` tokens and up to one of `stops`.

        Args:
            seeds: of each response, 0 to 2**63 - 1; it decides the response, whatever else is drawn.
            temperature: 0 is greedy.
        """

    @abstractmethod
    def score(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[float]]:
        """Summed log-probabilities in nats, see `scoring.continuation_logprobs`.

        Raises:
            ValueError: NaN or infinity.
        """

    @abstractmethod
    def rest(self) -> None:
        """Leave the device's memory to others until the next `put`, where that can be done."""


LanguageModel = nn.Module | Engine


@dataclass(frozen=True)
class EngineSettings:
    """Which engine measures.

    Attributes:
        name: "transformers", or "vllm" (Kwon et al. 2023, arXiv 2309.06180).
        tensor_parallel: devices that share each layer, of vLLM.
    """

    name: Name = "transformers"
    tensor_parallel: int = 1

    @property
    def told(self) -> dict[str, Any]:
        """For the keys and records of what it measured; nothing of transformers, as before there were engines."""
        ours = {"engine": self.name, "tensor_parallel": self.tensor_parallel}
        return {} if self.name == "transformers" else ours

    def check(self, tasks: int = 0, shard: int = 1) -> None:
        """Raise for what this engine cannot do.

        Args:
            tasks: the number of lm-eval's tasks among the abilities.
            shard: processes among which the model is cut up.

        Raises:
            ValueError: a setting out of range, or without effect; lm-eval's tasks.
            ModuleNotFoundError: it is not installed.
        """
        if self.name not in get_args(Name):
            raise ValueError(f"engine: expected {' or '.join(get_args(Name))}, found {self.name!r}")
        if self.tensor_parallel < 1:
            raise ValueError(f"tensor_parallel: expected at least 1 device, found {self.tensor_parallel}")
        if self.name == "transformers":
            if self.tensor_parallel > 1:
                raise ValueError("tensor_parallel: is of vLLM; add --engine vllm, or leave it out")
            return
        if tasks:
            raise ValueError(NO_TASKS)
        if shard > 1:
            raise ValueError(
                "shard: a model that is cut up is drawn from and scored by transformers alone, found --engine vllm; leave one out"
            )
        if find_spec("vllm") is None:
            raise ModuleNotFoundError(
                "engine vllm: needs vllm; pip install 'counterpoise[vllm]', or on a machine without a GPU see "
                "benchmarks/vllm_env.sh"
            )


TRANSFORMERS = EngineSettings()
NO_TASKS = (
    "engine vllm: expected abilities from files (choices:, continue:, generate:), found a task of lm-eval; measure those with "
    "--engine transformers"
)
