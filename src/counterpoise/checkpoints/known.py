"""Classes of transformers whose configs and parameters are known here: to ask it takes five seconds of processor time.

Only ever a yes: of whatever is not listed here, to the last key and value, transformers is asked. tests/test_known.py asks it
of what is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

LAYER = {
    "input_layernorm.weight": "H", "post_attention_layernorm.weight": "H", "self_attn.q_proj.weight": "QH",
    "self_attn.k_proj.weight": "KH", "self_attn.v_proj.weight": "KH", "self_attn.o_proj.weight": "HQ",
    "mlp.gate_proj.weight": "IH", "mlp.up_proj.weight": "IH", "mlp.down_proj.weight": "HI",
}  # fmt: skip
BIASES = {"self_attn.q_proj.bias": "Q", "self_attn.k_proj.bias": "K", "self_attn.v_proj.bias": "K"}
NORMS = {"self_attn.q_norm.weight": "D", "self_attn.k_norm.weight": "D"}
CLASSES = {
    "llama": ("LlamaForCausalLM", LAYER), "mistral": ("MistralForCausalLM", LAYER),
    "qwen2": ("Qwen2ForCausalLM", LAYER | BIASES), "qwen3": ("Qwen3ForCausalLM", LAYER | NORMS),
}  # fmt: skip
"""Kind of model -> its class, and the parameters of a layer: H hidden, I intermediate, Q, K of all heads, D of one."""
SIZES = "hidden_size intermediate_size num_attention_heads num_key_value_heads num_hidden_layers vocab_size".split()
SIZE, SHARE, BASE = r"[1-9]\d{0,8}", r"0\.\d+|\d(\.\d+)?e-\d+", r"[1-9]\d*\.\d+"
VALUES = {
    SIZE: f"{' '.join(SIZES)} head_dim max_position_embeddings max_window_layers pretraining_tp",
    f"null|{SIZE}": "sliding_window", "null": "rope_scaling", SHARE: "rms_norm_eps initializer_range attention_dropout",
    "false|true": "tie_word_embeddings use_cache", "false": "attention_bias mlp_bias use_sliding_window",
    BASE: "rope_theta", rf'{{"rope_theta": {BASE}, "rope_type": "default"}}': "rope_parameters", '"silu"': "hidden_act",
    '"(float32|bfloat16|float16)"': "torch_dtype dtype", r"null|\d{1,9}": "bos_token_id pad_token_id",
    r"null|\d{1,9}|\[(\d{1,9}(, )?)*\]": "eos_token_id", '".*"': "model_type transformers_version _name_or_path",
    r'\["\w*"\]': "architectures", r'\["full_attention"(, "full_attention")*\]': "layer_types",
}  # fmt: skip
"""What may stand behind a key, as json."""
KEYS = {key: pattern for pattern, keys in VALUES.items() for key in keys.split()}


def plain(config: Mapping[str, Any]) -> bool:
    """Whether transformers reads this config as it stands, and builds a known class with it."""
    kind, needed = config.get("model_type"), {*SIZES, "tie_word_embeddings"}
    if not isinstance(kind, str) or kind not in CLASSES or config.get("architectures") != [CLASSES[kind][0]]:
        return False
    needed |= {"head_dim"} if kind == "qwen3" else set()  # where it is not a share of the hidden size
    told = {key: json.dumps(value, sort_keys=True) for key, value in config.items()}
    if not needed <= told.keys() <= KEYS.keys() or not all(re.fullmatch(KEYS[k], v) for k, v in told.items()):
        return False
    layers = config.get("layer_types")
    if layers is not None and (not kind.startswith("qwen") or len(layers) != config["num_hidden_layers"]):
        return False
    fits = config["hidden_size"] % config["num_attention_heads"] == 0 == _head(config) % 2
    return bool(fits and (config.get("pad_token_id") or 0) < config["vocab_size"])


def complete(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the class that a config names finds each of its parameters among tensors (name -> shape), and nothing else.

    A head that is stored though the config ties it is for transformers to judge.
    """
    if not plain(config):
        return False
    hidden, middle, heads, groups, layers, words = (config[size] for size in SIZES)
    one = _head(config)
    size = {"H": hidden, "I": middle, "Q": heads * one, "K": groups * one, "D": one}
    layer = {n: tuple(size[d] for d in dims) for n, dims in CLASSES[config["model_type"]][1].items()}
    wanted = {f"model.layers.{i}.{n}": shape for i in range(layers) for n, shape in layer.items()}
    wanted |= {"model.embed_tokens.weight": (words, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        wanted["lm_head.weight"] = (words, hidden)
    return wanted == dict(shapes)


def _head(config: Mapping[str, Any]) -> int:
    """The size of one head of attention."""
    found: int = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return found
