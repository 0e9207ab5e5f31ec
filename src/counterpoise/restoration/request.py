"""What `restore` is asked for: one frozen value, checked before anything is read, by the run and by its dry run."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from counterpoise.alignment.settings import Teaching, refuse_settings
from counterpoise.averaging.mix import Donor, refuse_donor
from counterpoise.checkpoints.checkpoint import Checkpoint
from counterpoise.checkpoints.files import refuse_occupied
from counterpoise.checkpoints.matching import refuse_moved_tokens
from counterpoise.evaluation.panel import FEW
from counterpoise.language.engine import TRANSFORMERS, EngineSettings
from counterpoise.language.loading import refuse_unmeasurable
from counterpoise.restoration.race import LEVEL, LOOKS
from counterpoise.search.candidates import CONTROLS, HMA, Ramp, Search, TwoSided, refuse_means

RESULT = "restore.json"
MEANS = (0.2, 0.4, 0.6, 0.8)
ROUGH_MEANS = (0.6, 0.8)
KEEP, CONFIDENCE = 0.95, 0.9
NUMBER = r"\d*\.?\d+|\d+\."
"""A mean or a slope in the name of a ramp."""


@dataclass(frozen=True)
class Heal:
    """A healing with both as teachers beside the averages; its points may be picked, too. See `alignment.heal`.

    Attributes:
        steps: at most.
        start: where it begins: "POST", "PRE", the "pick" among averages, or a ramp by name ("MA 0.8", "LiNeS 0.8", "slope 2
            0.8", "step 0.8").
        keep_by: how questions are shared among the abilities, see `Teaching`.
        openings: of PRE's own, continued as one ability more; see `alignment.heal.Healing`.
    """

    steps: int
    start: str = "POST"
    keep_by: str = "uniform"
    openings: int | None = None

    @property
    def ramp(self) -> tuple[float, float] | None:
        """The slope and the mean ratio of its start, see `search.hma.linear_ramp`; None of the pick, and of what is no start.

        >>> Heal(15, "LiNeS 0.8").ramp, Heal(15, "slope 2 0.7").ramp, Heal(15).ramp
        ((1.0, 0.8), (2.0, 0.7), (0.0, 1.0))
        """
        named = {"POST": "MA 1", "PRE": "MA 0"}.get(self.start, self.start)
        if not (found := re.fullmatch(rf"(?:(MA|LiNeS|step)|slope ({NUMBER})) ({NUMBER})", named)):
            return None
        slope, mean = {"MA": 0.0, "LiNeS": 1.0, "step": math.inf, None: float(found[2] or 0)}[found[1]], float(found[3])
        return (slope, mean) if mean <= 1 else None

    def teaching(self, micro_batch_size: int) -> Teaching:
        """How `alignment.heal` teaches."""
        return Teaching(self.steps, keep_by=self.keep_by, micro_batch_size=micro_batch_size)

    def check(self) -> None:
        """Raise a ValueError for a setting out of range, a start that is none."""
        self.teaching(1).check()
        refuse_settings(openings=self.openings)
        if self.start != "pick" and self.ramp is None:
            raise ValueError(
                "heal_from: expected POST, PRE, pick, or a ramp as 'LiNeS 0.8', 'MA 0.8', 'slope 2 0.8' or 'step 0.8', found "
                f"{self.start!r}"
            )


@dataclass(frozen=True, kw_only=True)
class Details:
    """What `restore` may be told beyond what most runs need.

    Attributes:
        mean: write HMA at this mean instead of picking.
        confidence: how sure the kept reward must be, to within five points of the gain; 0 takes the sample's word.
        race: drop candidates on growing shares of the prompts, see `race.raced`; the controls are then not measured.
        anyway: search also where no ability fell; as a fixed `mean` does.
        donor: whose config, tokenizer and chat template go into OUT.
        drop: patterns of tensors to leave out when one side alone has them.
        allow_unrelated: go on when the two look like unrelated models.
        dtype: of the computation; by default that of POST, or a wider one where the device would imitate it.
        engine: draws and scores; the gradient of a search is always transformers'.
        shard: processes, all that were started, among which the model, PRE and POST are cut up; 1: each holds all.
    """

    mean: float | None = None
    confidence: float = CONFIDENCE
    race: bool = False
    anyway: bool = False
    donor: Donor = "post"
    drop: Sequence[str] = ()
    allow_unrelated: bool = False
    dtype: torch.dtype | None = None
    engine: EngineSettings = TRANSFORMERS
    shard: int = 1


@dataclass(frozen=True)
class Request(Details):
    """A pair, what is searched on it, and where the result goes.

    Attributes:
        pre, post: checkpoints before and after alignment: folders or hub ids; POST may be a LoRA adapter on PRE.
        out: a new folder for the averaged checkpoint; it appears whole or not at all.
        searches: what is compared with plain averaging.
        means: the grid of mean ratios; above 1 (ExPO, extrapolation) plain averaging alone is measured.
        keep_reward: the share of the reward gain that the pick must keep.
        heal: a healing beside the averages.
        work: where finished pieces are kept; by default OUT.work.
        cut: how the report cuts the model where neither HMA nor the random ratios say.
        fast: it is `rough`, as the verdict says.
    """

    pre: str | Path
    post: str | Path
    out: Path
    searches: Sequence[Search] = (HMA(), *CONTROLS)
    means: Sequence[float] = MEANS
    keep_reward: float = KEEP
    heal: Heal | None = None
    device: str = "cpu"
    work: Path | None = None
    cut: int | str = 3
    fast: bool = False

    def rough(self) -> Request:
        """The same, for a rough answer in little time: LiNeS at two means, or the searches that were asked for by name."""
        named = [s for s in self.searches if isinstance(s, TwoSided) or (isinstance(s, HMA) and self.mean is not None)]
        few = [replace(s, proxy_size=min(FEW, s.proxy_size)) for s in named]
        means = ROUGH_MEANS if self.means == MEANS else self.means
        return replace(self, searches=few or [Ramp(blocks=self.blocks)], means=means, fast=True)

    def check(self, files: int, tasks: int = 0) -> None:
        """Raise for what can be seen to be wrong before anything is read.

        Args:
            files, tasks: the number of abilities from files, and of lm-eval's.

        Raises:
            ValueError: a setting out of range, or one that has no effect beside another.
            CheckpointError: `out` is occupied, a model that cannot be measured.
        """
        refuse_means(self.means, self.mean)
        if not 0 <= self.keep_reward <= 1:  # NaN as well
            raise ValueError(f"keep_reward: expected a number from 0 to 1, found {self.keep_reward}")
        if not 0 <= self.confidence < 1:
            raise ValueError(f"confidence: expected a number from 0 to below 1, found {self.confidence}")
        refuse_donor(self.donor)
        self.engine.check(tasks, self.shard)
        if self.shard < 1:
            raise ValueError(f"shard: expected at least 1 process, found {self.shard}")
        if self.heal is not None:
            self.heal.check()
            if self.no_healing is not None:
                raise ValueError(self.no_healing)
        if self.race and self.mean is not None:
            raise ValueError("race: expected a grid to pick from, found a fixed mean; leave one of the two out")
        for search in self.searches:
            search.check(files)
            if sum(s.title == search.title for s in self.searches) > 1:
                raise ValueError(f"searches: expected one {search.title}, found more; give each a restore of its own")
        if self.mean is not None and not any(isinstance(s, HMA) for s in self.searches):
            raise ValueError(
                "mean: fixes HMA's mean ratio, and the two-sided search has none; use lambdas, or search both"
            )
        if not (self.out / RESULT).is_file():
            refuse_occupied(self.out.absolute())
        refuse_unmeasurable(self.pre, self.post)

    @property
    def no_healing(self) -> str | None:
        """Why no healing may stand beside the rest; None where it may."""
        if self.fast:
            return "heal: takes longer than a rough answer (--fast) may; leave one of the two out"
        if self.shard > 1:
            return "shard: expected no healing, which has a command of its own with --shard; leave one out"
        if self.mean is not None:
            return "heal: adds points to pick from, and a fixed mean leaves nothing to pick; leave one out"
        return None

    def check_words(self, pre: Checkpoint, post: Checkpoint) -> None:
        """Raise a CheckpointError where the two cannot teach one student; averages need no common vocabulary."""
        if self.heal is not None:
            refuse_moved_tokens(pre, post)

    @property
    def folder(self) -> Path:
        """Where finished pieces are kept."""
        return self.work if self.work is not None else self.out.with_name(self.out.name + ".work")

    @property
    def grid(self) -> list[float]:
        """The mean ratios that are measured."""
        return list(self.means) if self.mean is None else [self.mean]

    @property
    def plain(self) -> list[float]:
        """The means at which plain averages are measured: none in a rough answer."""
        return [] if self.fast else self.grid

    @property
    def blocks(self) -> int | str:
        """How the report cuts the model."""
        return next((s.blocks for s in self.searches if isinstance(s, (HMA, Ramp))), self.cut)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the numbers, as plain json for restore.json and its key; `more_settings` comes on top."""
        sizes = [s.proxy_size for s in self.searches if isinstance(s, (HMA, TwoSided))]
        return {
            "blocks": self.blocks,
            "means": list(self.means),
            "mean": self.mean,
            "keep_reward": self.keep_reward,
            "confidence": self.confidence,
            "proxy_size": sizes[0] if sizes else 256,
            "controls": any(isinstance(s, Ramp) for s in self.searches),
            "donor": self.donor,
            "device": self.device,
        }

    @property
    def more_settings(self) -> dict[str, Any]:
        """What searches beyond HMA and the controls add to `settings`."""
        found: dict[str, Any] = {"race": {"looks": list(LOOKS), "level": LEVEL}} if self.race else {}
        found |= {"anyway": True} if self.anyway else {}
        found |= {"fast": True} if self.fast else {}
        found |= self.engine.told
        found |= {"shard": self.shard} if self.shard > 1 else {}
        if self.heal is not None:
            found |= {"heal": self.heal.steps, "heal_from": self.heal.start, "keep_by": self.heal.keep_by}
            found |= {} if self.heal.openings is None else {"heal_openings": self.heal.openings}
        hma = any(isinstance(s, HMA) for s in self.searches)
        sizes = {s.proxy_size for s in self.searches if isinstance(s, (HMA, TwoSided))}
        ramps = [s.title for s in self.searches if isinstance(s, Ramp)]
        for two in (s for s in self.searches if isinstance(s, TwoSided)):
            found |= {"search": "both" if hma else two.title, "lambdas": list(two.lambdas), "alignment": "imitation"}
            found |= {"calibrate": two.calibrate, "min_effective_sets": two.min_effective_sets}
            found |= {"two_sided_blocks": two.blocks}
        cuts = {s.blocks for s in self.searches if isinstance(s, (HMA, Ramp))}
        if ramps not in ([], ["LiNeS", "reversed", "random"]):  # those are what `controls` alone says
            found["ramps"] = ramps
        if len(sizes) != 1 or len(cuts) > 1:
            found["searches"] = [repr(s) for s in self.searches]  # nothing that the words above can say
        return found
