"""A LoRA adapter read as a checkpoint equals PEFT's own merge."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from counterpoise.averaging.average import average
from counterpoise.averaging.resident import ResidentAverage
from counterpoise.checkpoints.checkpoint import companions_sha256
from counterpoise.checkpoints.files import CheckpointError
from counterpoise.checkpoints.hashing import sha256
from counterpoise.checkpoints.opening import open_checkpoint
from counterpoise.checkpoints.preflight import preflight
from tiny import tiny, tokenizer

peft = pytest.importorskip("peft")

LLAMA = ["q_proj", "v_proj", "up_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": LLAMA}),
    "rslora": ("llama", {"target_modules": LLAMA, "use_rslora": True}),
    "patterns": (
        "llama",
        {"target_modules": LLAMA, "rank_pattern": {"up_proj": 3}, "alpha_pattern": {"layers.1.mlp.up_proj": 5}},
    ),
    "whole head": ("llama", {"target_modules": LLAMA, "modules_to_save": ["lm_head"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "biases": ("gpt_neox", {"target_modules": ["query_key_value"], "bias": "all"}),
}


def adapter(
    tmp_path: Path, family: str, settings: dict[str, Any], tied: bool | None = None
) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    model = tiny(family, tied=tied)
    model.save_pretrained(tmp_path / "pre")
    tokenizer().save_pretrained(tmp_path / "pre")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    return tmp_path / "pre", tmp_path / "adapter", dict(open_checkpoint(tmp_path / "merged"))


@pytest.mark.parametrize("case", CASES)
def test_reading_an_adapter_equals_pefts_merge(tmp_path: Path, case: str) -> None:
    pre, folder, merged = adapter(tmp_path, *CASES[case])
    base = open_checkpoint(pre)
    read = open_checkpoint(folder, base=base)
    assert list(read) == list(base)
    changed = 0
    for name, tensor in read.items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)
        changed += not torch.equal(tensor, base[name])
    assert changed >= 6


def test_conv1d_and_linear_layers_in_one_adapter_equal_pefts_merge(tmp_path: Path) -> None:
    """PEFT saves one flag for both kinds, that of the layer it met last; c_proj of the attention is square."""
    settings = {"target_modules": ["c_attn", "c_proj", "lm_head"]}
    pre, folder, merged = adapter(tmp_path, "gpt2", settings, tied=False)
    assert json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    for name, tensor in open_checkpoint(folder, base=open_checkpoint(pre)).items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)


def test_a_flag_that_a_linear_layer_cannot_mean_is_no_word_on_it(tmp_path: Path) -> None:
    """PEFT sets fan_in_fan_out to False where it meets a Linear, and warns."""
    pre, folder, merged = adapter(tmp_path, *CASES["plain"])
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fan_in_fan_out": True}))
    read = open_checkpoint(folder, base=open_checkpoint(pre))
    assert any(len(set(t.shape)) == 1 < t.ndim for t in read.values())
    for name, tensor in read.items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)


def test_a_square_embedding_equals_pefts_merge(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "pre")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "pre")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["wpe"]))
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
    adapted.save_pretrained(tmp_path / "adapter")
    read = open_checkpoint(tmp_path / "adapter", base=open_checkpoint(tmp_path / "pre"))
    wanted = adapted.merge_and_unload().transformer.wpe.weight
    torch.testing.assert_close(read["transformer.wpe.weight"], wanted.data, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ensure", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
)
def test_with_a_tied_head_what_peft_computes_is_read_or_refused(
    tmp_path: Path, settings: dict[str, Any], ensure: bool
) -> None:
    """PEFT trains one of the two and leaves the other as it was, unless told to keep them tied."""
    model = tiny("llama", tied=True)
    model.save_pretrained(tmp_path / "pre")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, ensure_weight_tying=ensure, **settings)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
    adapted.save_pretrained(tmp_path / "adapter")
    base = open_checkpoint(tmp_path / "pre")
    if not ensure:
        with pytest.raises(CheckpointError, match="tied"):
            open_checkpoint(tmp_path / "adapter", base=base)
        return
    tokens = torch.arange(4, 30)[None]
    ours = tiny("llama", tied=True)
    ours.load_state_dict(dict(open_checkpoint(tmp_path / "adapter", base=base)), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, adapted(tokens).logits, rtol=1e-4, atol=1e-5)


def test_the_tokenizer_is_the_adapters_where_it_has_one(tmp_path: Path) -> None:
    pre, folder, _ = adapter(tmp_path, *CASES["plain"])
    (pre / "chat_template.jinja").write_text("of the base")
    post = open_checkpoint(folder, base=open_checkpoint(pre))
    assert post.tokenizer_folder == pre
    own = tokenizer()
    own.chat_template = "{{ messages }}"
    own.save_pretrained(folder)
    assert post.tokenizer_folder == folder
    average(pre, folder, tmp_path / "out", 0.5, donor="post")
    written = [p.name for p in (tmp_path / "out").iterdir()]
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= set(written)
    assert "adapter_config.json" not in written
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages }}"
    sums = companions_sha256(post)
    assert {name: sums[name] for name in sums if name != "config.json"} == {
        name: sha256(tmp_path / "out" / name) for name in sums if name != "config.json"
    }


def test_averaging_with_an_adapter_needs_no_merged_copy(tmp_path: Path) -> None:
    pre, folder, merged = adapter(tmp_path, *CASES["plain"])
    recipe = average(pre, folder, tmp_path / "out", 0.5)
    made, base = open_checkpoint(tmp_path / "out"), open_checkpoint(pre)
    for name in base:
        torch.testing.assert_close(made[name], torch.lerp(base[name], merged[name], 0.5), rtol=1e-5, atol=1e-6)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert set(recipe.inputs["post"]["sha256"]) == {"adapter_model.safetensors", "adapter_config.json"}


def test_what_is_not_plain_lora_is_refused_by_name(tmp_path: Path) -> None:
    pre, folder, _ = adapter(tmp_path, *CASES["plain"])
    base = open_checkpoint(pre)
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    for change, match in (
        ({"use_dora": True}, "use_dora is not supported.*merge the adapter with PEFT"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4"),
        ({"peft_type": "IA3"}, "expected a LoRA adapter, found peft_type 'IA3'"),
    ):
        path.write_text(json.dumps({**settings, **change}))
        with pytest.raises(CheckpointError, match=match):
            open_checkpoint(folder, base=base)
    with pytest.raises(CheckpointError, match="only POST may be an adapter"):
        open_checkpoint(folder)


def test_another_base_and_a_resized_vocabulary_are_refused(tmp_path: Path) -> None:
    _, folder, _ = adapter(tmp_path, "llama", {"target_modules": LLAMA, "modules_to_save": ["embed_tokens", "lm_head"]})
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=6, num_attention_heads=4,
                        num_key_value_heads=2)  # fmt: skip
    LlamaForCausalLM(small).save_pretrained(tmp_path / "small")
    with pytest.raises(CheckpointError, match="resized vocabulary"):
        open_checkpoint(folder, base=open_checkpoint(tmp_path / "small"))
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match="PRE has no tensor"):
        open_checkpoint(folder, base=open_checkpoint(tmp_path / "gpt2"))


def test_a_resident_average_of_a_base_and_its_adapter(tmp_path: Path) -> None:
    """Searched and measured without a merged copy: the bits are those that averaging would write."""
    pre, folder, _ = adapter(tmp_path, *CASES["rslora"])
    recipe = average(pre, folder, tmp_path / "out", [0.2, 0.7, 1.0])
    pair = preflight(pre, folder)
    resident = ResidentAverage(pair)
    resident.set(recipe.partition, recipe.ratios)
    written, state = open_checkpoint(tmp_path / "out"), resident.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in written.items())


def edit(folder: Path, **changes: object) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.fixture
def plain(tmp_path: Path) -> tuple[Path, Path]:
    return adapter(tmp_path, *CASES["plain"])[:2]


@pytest.mark.parametrize(("pattern", "found"), [
    (r"(?:(\w|\w\w|\.)+)+[!?]", "still at it after 1 s"), (r"(.|..|...)+(.|..|...)+[!?]", "still at it after 1 s"),
    ("(((a{99}){99}){99}){99}", "too many repeats"), ("a{999999999}", "too many repeats"), ("x" * 100_000, "too long"),
    ("(" * 500 + ")" * 500, "recursion"), ("(layers", "unterminated subpattern"), ("*", "nothing to repeat"),
])  # fmt: skip
def test_a_pattern_that_never_ends_or_means_nothing_is_soon_refused(
    plain: tuple[Path, Path], pattern: str, found: str
) -> None:
    pre, folder = plain
    edit(folder, alpha_pattern={pattern: 3})
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: expected .*{found}") as raised:
        preflight(pre, folder)
    assert "\n" not in str(raised.value)
    assert time.monotonic() - begun < 8


def test_patterns_mean_what_they_mean_to_peft(tmp_path: Path) -> None:
    patterns = {r"layers\.[0-2]\..*": 3, "up_proj": 5, r"(layers.)+4\.self_attn\.(q|v)_proj": 7, "proj": 100}
    settings = {"target_modules": LLAMA, "alpha_pattern": patterns}
    pre, folder, merged = adapter(tmp_path, "llama", settings)
    for name, tensor in open_checkpoint(folder, base=open_checkpoint(pre)).items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [{"lora_alpha": "16"}, {"lora_alpha": None}, {"lora_alpha": float("nan")}, {"r": None}, {"r": [4]}, {"r": True},
     {"alpha_pattern": ["q_proj"]}, {"alpha_pattern": {"q_proj": "4"}}, {"alpha_pattern": "q_proj"}, {"rank_pattern": 3},
     {"rank_pattern": {"q_proj": None}}, {"peft_type": 3}, {"peft_type": None}],
)  # fmt: skip
def test_a_value_of_a_wrong_type_in_an_adapter_is_one_clear_error(plain: tuple[Path, Path], change: Any) -> None:
    pre, folder = plain
    edit(folder, **change)
    with pytest.raises(
        CheckpointError, match=r"expected (a LoRA adapter|lora_alpha|r|alpha_pattern|rank_pattern)"
    ) as raised:
        preflight(pre, folder)
    assert "\n" not in str(raised.value)


def test_a_rank_of_nothing_is_no_adapter(plain: tuple[Path, Path]) -> None:
    pre, folder = plain
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    cut = {n: t[:0] if ".lora_A." in n else t[:, :0] if ".lora_B." in n else t for n, t in tensors.items()}
    save_file({n: t.contiguous() for n, t in cut.items()}, path)
    with pytest.raises(CheckpointError, match="does not fit PRE's"):
        preflight(pre, folder)


def test_a_folder_of_named_adapters_names_them(tmp_path: Path) -> None:
    pre, folder, _ = adapter(tmp_path, *CASES["plain"])
    for name in ("helpful", "harmless"):
        shutil.copytree(folder, tmp_path / "named" / name)
    with pytest.raises(
        CheckpointError, match=r"named adapters \(harmless, helpful\); give one of them: .*named/harmless"
    ):
        preflight(pre, tmp_path / "named")
    assert len(preflight(pre, tmp_path / "named" / "helpful").names) == 57


def test_placeholders_of_zero_3_in_an_adapter_are_named(plain: tuple[Path, Path]) -> None:
    pre, folder = plain
    path = folder / "adapter_model.safetensors"
    save_file(dict.fromkeys(load_file(path), torch.empty(0)), path)
    with pytest.raises(
        CheckpointError, match=r"36 empty tensors of the shape \[0\].*zero_to_fp32.*stage3_gather_16bit"
    ):
        preflight(pre, folder)
