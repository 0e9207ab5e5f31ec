"""A GGUF file as a checkpoint: refused with the command that converts it, and the command works."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from counterpoise.checkpoints.files import CheckpointError
from counterpoise.checkpoints.opening import open_checkpoint
from counterpoise.planning.looking import look

gguf = pytest.importorskip("gguf")


def write(path: Path, wide: int = 16, words: int = 300) -> np.ndarray:
    """A Llama of one layer with byte tokens, as llama.cpp writes it; gives the head."""
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(64)
    file.add_embedding_length(wide)
    file.add_block_count(1)
    file.add_feed_forward_length(2 * wide)
    file.add_head_count(2)
    file.add_head_count_kv(2)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_dimension_count(wide // 2)
    file.add_vocab_size(words)
    file.add_tokenizer_model("llama")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *(f"x{i}" for i in range(words - 259))]
    file.add_token_list(tokens)
    file.add_token_scores([0.0] * words)
    file.add_token_types([2, 3, 3, *[6] * 256, *[1] * (words - 259)])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(0)
    draw = np.random.default_rng(0)
    square = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (wide, wide))
    inner = {**square, "ffn_gate": (2 * wide, wide), "ffn_up": (2 * wide, wide), "ffn_down": (wide, 2 * wide)}
    shapes = {f"blk.0.{name}": shape for name, shape in inner.items()}
    shapes |= {"blk.0.attn_norm": (wide,), "blk.0.ffn_norm": (wide,), "output_norm": (wide,)}
    shapes |= {"token_embd": (words, wide), "output": (words, wide)}
    tensors = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        file.add_tensor(f"{name}.weight", tensor)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return tensors["output"]


def test_the_command_in_the_error_makes_a_checkpoint_of_a_gguf_file(tmp_path: Path) -> None:
    home = tmp_path / 'a "folder" of mine'
    home.mkdir()
    head = write(home / "it's.gguf")
    (home / "config.json").write_text("{}")  # some repositories hold one beside it
    for look_at in (open_checkpoint, lambda source: look(str(source))):
        for source in (home / "it's.gguf", home):
            with pytest.raises(
                CheckpointError, match=r"expected safetensors, found the GGUF file it's\.gguf; "
            ) as error:
                look_at(source)
    python, option, code = shlex.split(str(error.value).partition("accelerate): ")[2])
    assert (python, option) == ("python", "-c")
    exec(code, {})
    made = open_checkpoint(home / "it's-safetensors")
    assert torch.equal(made["lm_head.weight"], torch.from_numpy(head))
    assert AutoTokenizer.from_pretrained(made.folder)("a")["input_ids"]
