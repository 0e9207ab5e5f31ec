"""Do two configs mean the same model? Compared as transformers understands them: defaults filled in, old spellings as new."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from counterpoise.checkpoints.checkpoint import Checkpoint
from counterpoise.checkpoints.files import CheckpointError
from counterpoise.checkpoints.known import plain

# What does not change the function of the tensors, or is asked elsewhere. All other settings, known or not, are compared.
LEFT_OUT = re.compile(
    r"_?name_or_path|_commit_hash|_?transformers_version|transformers\.js_config|unsloth\w*|architectures|architecture|auto_map"
    r"|(torch_)?dtype|id2label|label2id|label_names|problem_type|task_specific_params|finetuning_task|vocab_size|tie_word_embeddings"
    r"|output_(attentions|hidden_states|router_logits|past|scores)|(use_)?return_dict\w*|use_cache|use_bfloat16|torchscript"
    r"|(bos|eos|pad|sep|cls|mask|decoder_start|forced_bos|forced_eos)_token_id|(begin_)?suppress_tokens|gradient_checkpointing"
    r"|\w*(dropout|pdrop|layerdrop)\w*|drop_path_rate|\w*initializer_\w+|(embedding_)?initializer|init_\w+|rescale_prenorm_residual"
    r"|\w*_loss(_\w+)?|router_jitter_noise|pretraining_tp|chunk_size_feed_forward|quantization_config|_?(attn|experts)_implementation\w*"
)
# Same shapes or not, these make another model; what else changes a shape is found in the shapes.
KINDS = re.compile(
    r"model_type|is_decoder|is_encoder_decoder|add_cross_attention|hidden_size|n_embd|d_model|d_kv|n_head|n_layers?|(\w+_)?head_dim"
    r"|num_((hidden|encoder|decoder)_)?layers|(encoder|decoder)_layers|(\w+_)?num_(\w+_)?heads|(encoder|decoder)_attention_heads"
    r"|n_(routed|shared)_experts|num_(local_)?experts"
)
MOST_LABELS = 100_000
"""transformers makes a list of as many names or layers as a config says; more would fill the memory."""


def same_architecture(pre: Checkpoint, post: Checkpoint) -> list[str]:
    """Refuse another model; warn of settings that differ without changing a shape."""
    kinds = [c.config.get("model_type") for c in (pre, post)]
    if kinds[0] != kinds[1]:
        raise CheckpointError(
            f"PRE is a {kinds[0]} model, POST a {kinds[1]} one; expected one model before and after training"
        )
    first, second = pre.config, post.config
    alone = [key for key in first.keys() ^ second.keys() if not LEFT_OUT.fullmatch(key)]
    if plain(first) and plain(second) and not alone and not any(_differing(first, second)):
        return []  # alike as they stand, they are alike as they are understood
    first, second = (understood(c.config, c.folder / "config.json") for c in (pre, post))
    try:
        differing = list(_differing(first, second))
    except RecursionError:
        raise CheckpointError(
            f"{post.folder / 'config.json'}: expected a config, found brackets nested too deeply"
        ) from None
    warnings = []
    for path, before, after in differing:
        values = f"{path:.200} is {before!s:.200} in PRE and {after!s:.200} in POST"
        if not KINDS.fullmatch(path.rpartition(".")[2]):
            warnings.append(f"{values}; an average keeps the donor's")
        elif None not in (before, after):
            raise CheckpointError(f"{values}; expected one model before and after training")
    return warnings


def understood(config: dict[str, Any], place: Path) -> dict[str, Any]:
    """The config that stands at `place` as transformers reads it, or as it is where transformers does not know the model.

    Raises:
        CheckpointError: values of a wrong type, or others that transformers refuses.
    """
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.utils import logging

    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
        raise CheckpointError(f"{place}: expected architectures to be a list of names, found {names!r:.80}")
    for key, wanted in (("model_type", str), ("quantization_config", dict), ("auto_map", dict)):
        if not isinstance(config.get(key), (wanted, type(None))):
            raise CheckpointError(f"{place}: expected {key} to be a json {_JSON[wanted]}, found {config[key]!r:.80}")
    if long := [(k, n) for k, n in _numbers(config) if n > MOST_LABELS and re.search("labels|layers?$", k)]:
        raise CheckpointError(f"{place}: expected {long[0][0]} of at most {MOST_LABELS:,}, found {long[0][1]:,}")
    kind = config.get("model_type")
    if kind is None or kind not in CONFIG_MAPPING:
        return config
    verbosity = logging.get_verbosity()
    logging.set_verbosity(40)  # token ids outside the vocabulary and the like: not asked here
    try:
        read = AutoConfig.from_pretrained(place.parent, trust_remote_code=False).to_dict()
        return _plain(json.loads(json.dumps(read, default=str)))  # tuples as lists, numbers as keys as text
    except Exception as error:  # of any kind: what others wrote meets code that takes it for granted
        said = " ".join(str(error).split())
        raise CheckpointError(
            f"{place}: expected the config of a {kind} model as transformers reads it, found: {said:.300}; mend the file or "
            "fetch it again"
        ) from None
    finally:
        logging.set_verbosity(verbosity)


_JSON = {str: "text", dict: "object"}


def _numbers(content: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int):
            yield key, value


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings say their type twice where they were written by older versions."""
    for value in [v for v in config.values() if isinstance(v, dict)]:
        _plain(value)
    if "rope_type" in config:
        config.pop("type", None)
    return config


def _differing(pre: dict[str, Any], post: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, PRE's value, POST's) of all that differs, of lists the first place; what one config alone has says nothing."""
    whole = "model_type" in pre or not path
    for key in [*pre, *(k for k in post if k not in pre)]:
        if LEFT_OUT.fullmatch(key) or (whole and not (key in pre and key in post)):
            continue
        first, second = pre.get(key), post.get(key)
        where = f"{path}.{key}" if path else str(key)
        if isinstance(first, dict) and isinstance(second, dict):
            yield from _differing(first, second, where)
        elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
            apart = ((f"{where}[{i}]", a, b) for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)
            yield from islice(apart, 1)
        elif first != second:
            yield where, first, second
