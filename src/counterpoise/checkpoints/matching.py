"""Which tensor of PRE is which of POST, and do the two mean the same: vocabulary, names, shapes."""

from __future__ import annotations

import filecmp
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from counterpoise.checkpoints.checkpoint import Checkpoint
from counterpoise.checkpoints.files import CheckpointError, read_json


def same_vocabulary(pre: Checkpoint, post: Checkpoint) -> list[str]:
    """Refuse two vocabularies; warn of a few tokens that differ."""
    sizes = [c.config.get("vocab_size") for c in (pre, post)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"PRE has a vocabulary of {sizes[0]}, POST of {sizes[1]}; resize one to the other's tokens "
            "(resize_token_embeddings) so that each row means the same token"
        )
    first, second = (c.tokenizer_folder / "tokenizer.json" for c in (pre, post))
    alike = first.is_file() and second.is_file() and filecmp.cmp(first, second, shallow=False)
    words = [vocabulary(pre)] * 2 if alike else [vocabulary(c) for c in (pre, post)]
    if not all(words) or words[0] == words[1]:
        return []
    differing = sorted(k for k in words[0].keys() | words[1].keys() if words[0].get(k) != words[1].get(k))
    message = f"the tokenizers give {len(differing)} tokens another id, first {differing[0]!r}"
    if len(differing) > max(64, len(words[0]) // 100):
        raise CheckpointError(f"{message}: expected one vocabulary; rows of the embedding would mix different tokens")
    return [f"{message}; an average keeps the donor's tokenizer"]


def refuse_moved_tokens(pre: Checkpoint, post: Checkpoint) -> None:
    """Raise a CheckpointError where a token that both know has two ids: one would teach the other another language."""
    words = [vocabulary(c) for c in (pre, post)]
    if moved := sorted(w for w in words[0].keys() & words[1].keys() if words[0][w] != words[1][w]):
        ids = [w[moved[0]] for w in words]
        raise CheckpointError(
            f"{pre.source} and {post.source} give {len(moved)} tokens two ids, first {moved[0]!r} ({ids[0]} and {ids[1]}): "
            "expected one tokenizer; teachers and student read the same ids"
        )


def vocabulary(checkpoint: Checkpoint) -> dict[str, Any]:
    """Token -> id, from tokenizer.json; empty without one."""
    path = checkpoint.tokenizer_folder / "tokenizer.json"
    if not path.is_file():
        return {}
    content = read_json(path)
    try:
        vocab = content.get("model", {}).get("vocab", {})
        table = dict(vocab) if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}
        return table | {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"{path}: expected a vocabulary as tokenizers writes it, found another ({error})"
        ) from None


def same_names(pre: Checkpoint, post: Checkpoint, drop: Sequence[str]) -> tuple[list[str], list[str], dict[str, str]]:
    """The tensors that both have, those dropped, and where PRE has a tensor under another name."""

    def spare(names: list[str]) -> list[str]:
        return [n for n in names if not any(fnmatchcase(n, pattern) for pattern in drop)]

    _unwrap(pre, post)
    _unwrap(post, pre)
    computed = {n for checkpoint in (pre, post) for n in checkpoint if is_computed(n, checkpoint.shape(n))}
    same = set(pre) - computed == set(post) - computed
    elsewhere, copies = ({}, set[str]()) if same else _elsewhere(pre, post)
    computed |= copies
    common = [n for n in post if (n in pre or n in elsewhere) and n not in computed]
    used = {elsewhere.get(n, n) for n in common} | computed
    only_post = [n for n in post if n not in pre and n not in elsewhere and n not in computed]
    only_pre = [n for n in pre if n not in used]
    for here, there, names in (("POST", "PRE", spare(only_post)), ("PRE", "POST", spare(only_pre))):
        if names:
            pattern = _pattern(names[0], [*common, *used])
            raise CheckpointError(
                f"{here} has {len(names)} tensors that {there} lacks, first {names[0]}. If it is a head added for training "
                f"(a PPO value head), leave it out with --drop '{pattern}'; "
                "otherwise they are not one model's before and after"
            )
    dropped = [*only_post, *only_pre, *sorted(computed)]
    unused = [p for p in drop if not any(fnmatchcase(n, p) for n in dropped)]
    if unused:
        raise CheckpointError(f"--drop {unused[0]!r} matches no tensor that one side alone has; it would do nothing")
    return common, dropped, elsewhere


def is_computed(name: str, shape: tuple[int, ...]) -> bool:
    """Whether older versions of transformers stored what a model computes when it is built: masks and frequencies.

    Today's neither writes nor reads them. They are the same before and after training, and their -1e9 would drown every
    distance between weights.

    >>> is_computed("h.0.attn.bias", (1, 1, 1024, 1024)), is_computed("h.0.attn.bias", (768,))
    (True, False)
    """
    module, _, last = name.rpartition(".")
    mask = last == "bias" and len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return mask or (last == "masked_bias" and math.prod(shape) == 1) or (last == "inv_freq" and "rotary" in module)


def _unwrap(wrapped: Checkpoint, other: Checkpoint) -> None:
    """Take away what stands before all of the other's names (`policy.`), where the class knows the rest and not the whole."""
    if not other.keys().isdisjoint(wrapped):
        return
    parts = ((name, i + 1) for name in wrapped for i, sign in enumerate(name) if sign == ".")
    prefixes = {name[:i] for name, i in parts if name[i:] in other}  # of a policy and its critic, two
    from counterpoise.checkpoints.naming import Naming

    if len(prefixes) != 1 or (naming := Naming.of(other.folder)) is None or naming.read(wrapped).spots:
        return
    wrapped.entries = {name.removeprefix(*prefixes): entry for name, entry in wrapped.entries.items()}


def _elsewhere(pre: Checkpoint, post: Checkpoint) -> tuple[dict[str, str], set[str]]:
    """POST's name -> PRE's, where transformers reads the two as one tensor; and PRE's copies of what POST has once.

    A copy that PRE stores of a tied tensor, and POST does not, is left out where it is one. Where it is another tensor, PRE
    is not tied: then POST's one tensor stands for both.
    """
    from counterpoise.checkpoints.naming import Naming, Spot

    naming = Naming.of(post.folder, tied=True)
    if naming is None:
        return {}, set()
    (before, after), found = (naming.read(c).spots for c in (pre, post)), dict[str, str]()
    held = {spot: name for name, spot in before.items()}
    kept = {spot.parameter: name for name, spot in after.items()}
    for name, spot in after.items():
        if (other := held.get(spot, name)) != name:
            found[name] = other
    copies: set[str] = set()
    for group in naming.ties:
        mine = [held[Spot(p)] for p in group if Spot(p) in held]
        theirs = [kept[p] for p in group if p in kept]
        if mine and _tied(pre, post):
            found |= {n: mine[0] for n in theirs if after[n] not in held}
        if theirs and _tied(post, pre):
            source = pre.get(found.get(theirs[0], theirs[0]))
            for name in (n for n in mine if before[n].parameter not in kept):
                if source is not None and pre[name].shape == source.shape and pre[name].equal(source):
                    copies.add(name)
                else:
                    post.store_again(name, theirs[0])
    return found, copies


def _tied(checkpoint: Checkpoint, other: Checkpoint) -> bool:
    """Does the class take an output head that is not stored from the embedding?"""
    from counterpoise.checkpoints.naming import config_of

    config = config_of(checkpoint.folder) or config_of(other.folder)
    return bool(getattr(config, "tie_word_embeddings", False))


def _pattern(name: str, common: Sequence[str]) -> str:
    """What to give to --drop: a part of the model of its own (`v_head.*`), or a tensor of every layer (`*.mlp.gate`)."""
    top, _, rest = name.partition(".")
    if rest and not any(n.startswith(top + ".") for n in common):
        return top + ".*"
    return "*." + ".".join(name.split(".")[-2:]) if rest else name


def same_shape(pre: Checkpoint, post: Checkpoint, name: str, name_in_pre: str) -> None:
    """Refuse a tensor of two shapes."""
    shapes = [pre.shape(name_in_pre), post.shape(name)]
    if shapes[0] != shapes[1]:
        advice = "another size of model" + (", or a resized vocabulary" if shapes[0][1:] == shapes[1][1:] else "")
        raise CheckpointError(
            f"{name} has the shape {shapes[0]} in PRE and {shapes[1]} in POST ({advice}); expected one model"
        )
