"""Merging one or several POSTs into one PRE, from disk to disk: TIES and DARE."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from counterpoise.averaging.mergekit import Mergekit, is_yaml
from counterpoise.averaging.mix import LARGEST, Donor, mix, refuse_donor
from counterpoise.averaging.recipe import read_with, refuse_unlike
from counterpoise.averaging.streaming import Mixed, of_tensors, other_inputs, write
from counterpoise.averaging.thinning import (
    Keep,
    elected_mean,
    everything,
    generator_for,
    in_order,
    kept,
    largest,
    update_of,
    updates,
)
from counterpoise.checkpoints.about import described, inherited
from counterpoise.checkpoints.files import CheckpointError, refuse_occupied, staged
from counterpoise.checkpoints.opening import open_checkpoint
from counterpoise.checkpoints.preflight import Pair, preflight
from counterpoise.checkpoints.rounding import narrow
from counterpoise.records import Stages, named, public, versions, write_json

Method = Literal["ties", "dare", "dare-ties"]
Scope = Literal["model", "tensor"]
MERGE_FORMAT = "counterpoise merge 1"


@dataclass(frozen=True)
class Merge:
    """How updates are merged; all that decides the result beside the checkpoints.

    Attributes:
        method: "ties" (the largest elements, elected signs), "dare" (random elements, enlarged), or "dare-ties" (random
            elements, enlarged, elected signs).
        density: the share of each update that is kept, in (0, 1].
        ratio: the share of the merged update that goes onto PRE, as in `average`.
        weights: of the POSTs, positive; only their proportions count. () stands for equal ones.
        scope: TIES ranks the elements of the whole model ("model", the paper) or of each tensor ("tensor", mergekit).
        seed: of DARE.
    """

    method: Method = "ties"
    density: float = 0.2
    ratio: float = 1.0
    weights: tuple[float, ...] = ()
    scope: Scope = "model"
    seed: int = 0

    def __post_init__(self) -> None:
        for label, value, choices in (("method", self.method, Method), ("scope", self.scope, Scope)):
            if value not in get_args(choices):
                raise ValueError(f"{label}: expected {', '.join(get_args(choices))}, found {value!r}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density: expected a share in (0, 1], found {self.density}")
        if not abs(self.ratio * self.scale) <= LARGEST:
            raise ValueError(
                f"ratio: expected a finite number, over the density at most {LARGEST:g}, found {self.ratio}"
            )
        if not (all(w > 0 for w in self.weights) and math.isfinite(sum(self.weights))):
            raise ValueError(f"weights: expected positive numbers with a finite sum, found {list(self.weights)}")

    @property
    def scale(self) -> float:
        """What a kept element is multiplied by."""
        return 1.0 if self.method == "ties" else 1.0 / self.density

    def check(self, pairs: Sequence[Pair]) -> None:
        """Raise a ValueError for a number of weights that is not that of the POSTs."""
        if len(self.weights) not in (0, len(pairs)):
            raise ValueError(f"merge: expected one weight per POST, found {len(self.weights)} for {len(pairs)}")

    def mixer(self, pairs: Sequence[Pair], progress: Stages | None) -> Mixed:
        """What becomes of each stretch; whole updates are ranked first."""
        return of_tensors(partial(_merged, self, _keepers(pairs, self, progress)))

    def __str__(self) -> str:
        drawn = f"of each update a random {self.density:.3g}, enlarged by its inverse"
        ways = {
            "ties": f"of each update the largest {self.density:.3g}, ranked in the whole {self.scope}; signs elected (TIES)",
            "dare": f"{drawn} (DARE, seed {self.seed})",
            "dare-ties": f"{drawn}; signs elected (DARE and TIES, seed {self.seed})",
        }
        return f"`pre + {self.ratio:g} * merged(post - pre)`: {ways[self.method]}"


@dataclass(frozen=True)
class MergeRecipe:
    """What made a merged checkpoint; recipe.json holds it."""

    plan: Merge | Mergekit
    inputs: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def told(self) -> str:
        """Itself in a few words."""
        plan, count = self.plan, len(self.inputs) - 1
        how = f", density {plan.density:g}, ratio {plan.ratio:g}" if isinstance(plan, Merge) else ""
        return f"{plan.method} of {count} {'update' if count == 1 else 'updates'}{how}"

    def to_json(self) -> dict[str, Any]:
        """A plain dict; `read` takes it from a file."""
        return {"format": MERGE_FORMAT, "formula": "pre + ratio * merged(post_t - pre)", **asdict(self)}

    @classmethod
    def read(cls, path: str | Path) -> MergeRecipe:
        """Read the recipe.json of a merge, or a recipe of mergekit (.yml, .yaml)."""
        if is_yaml(path):
            return cls(Mergekit.read(path))
        return read_with(cls._from_json, path, "the recipe of a merge")

    @classmethod
    def _from_json(cls, content: Any) -> MergeRecipe:
        if (found := content.get("format") if isinstance(content, dict) else content) != MERGE_FORMAT:
            raise ValueError(f"expected format: {MERGE_FORMAT}, found {str(found)[:60]!r}")
        refuse_unlike(content)
        told, rest = content["plan"], {k: content[k] for k in ("inputs", "settings", "versions")}
        own = "document" not in told
        plan = Merge(**{**told, "weights": tuple(told["weights"])}) if own else Mergekit(**told)
        return cls(plan, **rest, warnings=tuple(content["warnings"]))


def merge(
    pre: str | Path,
    posts: Sequence[str | Path],
    out: str | Path,
    plan: Merge | Mergekit | MergeRecipe,
    *,
    donor: Donor | None = None,
    drop: Sequence[str] | None = None,
    allow_unrelated: bool = False,
    progress: Stages | None = None,
) -> MergeRecipe:
    """Merge the updates of one or several POSTs into PRE and write the result, streaming: a few MiB a POST of memory.

    theta = pre + ratio * merged({post_t - pre}): TIES (arXiv 2306.01708), DARE (2311.03099). With one POST, TIES is
    trimming and DARE is dropping; an element that is not kept is then PRE's to the bit, and with ratio 1 and no
    enlarging one that is kept is POST's. With several, DARE takes the weighted mean of the updates where the paper adds
    them, so that `ratio` means the same in every method: ratio = number of POSTs is the paper's sum with lambda = 1.
    Arithmetic is float32 (or the inputs' own, if wider), rounded once, as in `average`.

    Args:
        pre, posts: folders or hub ids; a POST may be a LoRA adapter on PRE.
        out: a new folder; it appears whole or not at all. Same shards and tensor names as the first POST.
        plan: the settings, or the recipe of a merge to be done again; files other than its own are warned of.
        donor: whose config, tokenizer and chat template are copied: PRE, or the first POST. None takes the recipe's, else
            POST.
        drop: patterns of tensors to leave out when one side alone has them. None drops what the recipe dropped.
        progress: called with (stage, done, total).

    Raises:
        CheckpointError: the checkpoints do not fit (see `preflight`), NaN or Inf, unrelated models, an occupied `out`, an
            input that changes meanwhile.
        ValueError: a number of POSTs that is not that of the plan; see `Merge.check` and `Mergekit.check`.
    """
    refuse_donor(donor)
    again = plan if isinstance(plan, MergeRecipe) else MergeRecipe(plan)
    plan = again.plan
    giver = donor or again.settings.get("donor", "post" if isinstance(plan, Merge) else plan.donor)
    patterns = drop or [escape(name) for name in again.settings.get("dropped", ())]
    refuse_occupied(Path(out).absolute())
    pairs = pairs_of(pre, posts, patterns, out)
    plan.check(pairs)
    with staged(out) as folder:
        mixed, merging = plan.mixer(pairs, progress), named(progress, "merging")
        counts = dict.fromkeys(pairs[0].names, 1)
        told = write(pairs, folder, mixed, counts, merging, donor=giver, allow_unrelated=allow_unrelated)
        names = ["post"] if len(pairs) == 1 else [f"post {i}" for i in range(1, len(pairs) + 1)]
        checkpoints = {"pre": pairs[0].pre, **{n: p.post for n, p in zip(names, pairs, strict=True)}}
        inputs = {name: public({"source": c.source}) | described(c) for name, c in checkpoints.items()}
        if again.inputs and len(again.inputs) != len(inputs):
            told.append(f"the recipe was made for {len(again.inputs) - 1} POSTs, not for {len(posts)}")
        else:
            told += other_inputs(again.inputs, inputs)
        told += inherited({name.upper(): about.get("card", {}) for name, about in inputs.items()})[1]
        settings = {"donor": giver, "dropped": sorted({n for p in pairs for n in p.dropped})}
        recipe = MergeRecipe(plan, inputs, settings, versions(), tuple(dict.fromkeys(told)))
        write_json(folder / "recipe.json", public(recipe.to_json()))
        (folder / "README.md").write_text(public(_card(recipe)), encoding="utf-8")
        for pair in pairs:
            pair.refuse_changed()
    return recipe


def pairs_of(pre: str | Path, posts: Sequence[str | Path], drop: Sequence[str], out: str | Path) -> list[Pair]:
    """PRE with each POST, checked to fit.

    Raises:
        CheckpointError: see `preflight`; POSTs that are not saved alike.
    """
    if not posts:
        raise ValueError("merge: expected at least one POST, found none")
    pairs = [preflight(pre, post, drop=patterns, out=out) for post, patterns in _drops(pre, posts, drop)]
    for pair in pairs[1:]:
        if lost := set(pairs[0].names) ^ set(pair.names):
            raise CheckpointError(
                f"{pairs[0].post.source} and {pair.post.source}: {len(lost)} tensors stand in only one of the two, first "
                f"{min(lost)}; expected POSTs of one model, saved alike (heads tied in all or in none)"
            )
    return pairs


def _drops(pre: str | Path, posts: Sequence[str | Path], drop: Sequence[str]) -> list[tuple[str | Path, list[str]]]:
    """The patterns that mean something for each POST; one that means nothing for any goes to the first, to be refused."""
    if not drop:
        return [(post, []) for post in posts]
    first = open_checkpoint(pre)
    alone = [set(first) ^ set(open_checkpoint(post, base=first)) for post in posts]
    used = [[d for d in drop if any(fnmatchcase(n, d) for n in names)] for names in alone]
    used[0] += [d for d in drop if not any(d in patterns for patterns in used)]
    return list(zip(posts, used, strict=True))


def _merged(
    plan: Merge, keepers: Mapping[str, list[Keep]], name: str, key: int, start: int, pre: Tensor, posts: list[Tensor]
) -> Tensor:
    """One flat stretch of the merge, in the first POST's dtype."""
    if not posts[0].is_floating_point():
        return posts[0]
    moves = [update_of(pre, post) for post in posts]
    masks = [keep(move) for keep, move in zip(keepers[name], moves, strict=True)]
    if len(posts) == 1:
        moved = mix(pre, posts[0], plan.ratio * plan.scale, key=key, start=start)
        return torch.where(masks[0], moved, pre.to(moved.dtype))
    sparse = [move * mask * plan.scale for move, mask in zip(moves, masks, strict=True)]
    weights = plan.weights or (1.0,) * len(posts)
    if plan.method == "dare":
        update = in_order([u * w for u, w in zip(sparse, weights, strict=True)]) / math.fsum(weights)
    else:
        update = elected_mean(sparse, weights)
    return narrow(pre.to(update.dtype) + plan.ratio * update, posts[0].dtype, key=key, start=start)


def _keepers(pairs: Sequence[Pair], plan: Merge, progress: Stages | None) -> dict[str, list[Keep]]:
    """For every tensor, one `Keep` per POST."""
    first, count = pairs[0], len(pairs)
    if plan.density == 1:
        return {n: [everything] * count for n in first.names}
    if plan.method != "ties":
        return {
            n: [partial(kept, density=plan.density, generator=generator_for(plan.seed, i, n)) for i in range(count)]
            for n in first.names
        }
    # Ranked in the order of the first POST's files, which is the order of writing.
    groups = [(n,) for n in first.names] if plan.scope == "tensor" else [first.names]
    keepers: dict[str, list[Keep]] = {n: [] for n in first.names}
    total, done = count * len(groups), 0
    for pair in pairs:
        for group in groups:
            keeper = largest(partial(updates, pair, group), plan.density)
            for name in group:
                keepers[name].append(keeper)
            done += 1
            if progress is not None:
                progress("ranking the updates", done, total)
    return keepers


def _card(recipe: MergeRecipe) -> str:
    """README.md: what it is and how to make it again."""
    from counterpoise.tables.card import front_matter
    from counterpoise.tables.grid import as_markdown
    from counterpoise.tables.tables import files

    parts = [
        front_matter(recipe.inputs, relation="merge"),
        "# Merged checkpoint",
        f"{recipe.plan}; `recipe.json` holds the settings.",
        *(["## Warnings\n\n" + "\n".join(f"- {w}" for w in recipe.warnings)] if recipe.warnings else []),
        "## Made from",
        as_markdown(files({"inputs": recipe.inputs})),
        "Versions: " + ", ".join(f"{k} {v}" for k, v in recipe.versions.items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"
