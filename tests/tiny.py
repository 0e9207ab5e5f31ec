"""Tiny models of every family, built from config, and a tokenizer built in memory: nothing is downloaded."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from torch import nn

VOCABULARY = 64
SIZES = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": VOCABULARY}
LLAMA_LIKE = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 128}
CAUSAL = ("llama", "qwen2", "mistral", "gemma", "gpt2", "gpt_neox")
FAMILIES = (*CAUSAL, "bert")


def tiny(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool | None = None) -> nn.Module:
    """A randomly initialised model of six layers."""
    import transformers as t

    torch.manual_seed(seed)
    still = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}  # training twice gives the same numbers
    extra = {} if tied is None else {"tie_word_embeddings": tied}
    configs = {
        "llama": lambda: t.LlamaConfig(**LLAMA_LIKE, **extra),
        "qwen2": lambda: t.Qwen2Config(**LLAMA_LIKE, **extra),
        "mistral": lambda: t.MistralConfig(**LLAMA_LIKE, **extra),
        "gemma": lambda: t.GemmaConfig(**LLAMA_LIKE, head_dim=4, **extra),
        "gpt2": lambda: t.GPT2Config(
            n_embd=16, n_layer=6, n_head=4, vocab_size=VOCABULARY, n_positions=128, **still, **extra
        ),
        "gpt_neox": lambda: t.GPTNeoXConfig(**SIZES, intermediate_size=24, max_position_embeddings=128, **extra),
        "bert": lambda: t.BertConfig(**SIZES, intermediate_size=24, max_position_embeddings=128, num_labels=2, **extra),
    }
    kind = t.AutoModelForSequenceClassification if family == "bert" else t.AutoModelForCausalLM
    model: nn.Module = kind.from_config(configs[family]()).to(dtype).eval()
    for name, parameter in model.named_parameters():  # norms start as ones and biases as zeros: make all of them tell
        if "norm" in name or "ln_" in name or name.endswith("bias"):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def nudge(model: nn.Module, *, scale: float = 0.02, seed: int = 1) -> nn.Module:
    """Move every parameter a little, in place: a stand-in for training."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            step = torch.randn(parameter.shape, generator=random, dtype=torch.float64) * scale
            parameter.copy_((parameter.double() + step).to(parameter.dtype))
    return model


def save_pair(
    folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, shard: tuple[str, str] = ("1GB", "1GB"),
    scale: float = 0.02, tied: bool | None = None,
) -> tuple[Path, Path]:  # fmt: skip
    """PRE and POST on disk, with a tokenizer; `shard` is the largest shard of each."""
    model = tiny(family, dtype=dtype, tied=tied)
    for name, size in zip(("pre", "post"), shard, strict=True):
        if name == "post":
            nudge(model, scale=scale)
        model.save_pretrained(folder / name, max_shard_size=size)
        tokenizer().save_pretrained(folder / name)
    return folder / "pre", folder / "post"


def tokenizer():  # type: ignore[no-untyped-def]
    """One token a character: letters, digits and some marks; id 0 pads, 1 begins, 2 ends."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        *string.ascii_lowercase,
        *string.digits,
        " ",
        ".",
        ",",
        "?",
        "!",
        "\n",
        ":",
    ]
    raw = Tokenizer(models.WordLevel({s: i for i, s in enumerate(signs)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def apart(pre: torch.Tensor, post: torch.Tensor, ratio: float) -> torch.Tensor:
    """pre + ratio (post - pre) as numpy computes it, an operation after the other, each rounded."""
    a, b = (t.contiguous().numpy() for t in (pre, post))
    return torch.from_numpy(a - (a - b) * a.dtype.type(ratio))
