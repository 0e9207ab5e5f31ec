"""Classifiers as rewards: a batch scores as each row alone, and a LoRA adapter as the model it stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

from counterpoise.evaluation.rewards import fingerprint, load_reward
from counterpoise.planning.looking import look_at_reward
from tiny import LLAMA_LIKE, SIZES, VOCABULARY, nudge, tiny, tokenizer

P, R = ["ab", "what is it", "c?", "abc"], ["yes", "no", "one two three, four. five", "efgh"]
CLOSED = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
OPEN = "{% for m in messages %}{{ m.content }}{% endfor %}"
SMALL = {**SIZES, "intermediate_size": 24, "max_position_embeddings": 128}
CONFIGS: dict[str, Any] = {
    "llama": lambda: t.LlamaConfig(**LLAMA_LIKE),
    "gpt2": lambda: t.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=128),
    "bert": lambda: t.BertConfig(**SMALL),
    "roberta": lambda: t.RobertaConfig(**SMALL, pad_token_id=0),
    "opt": lambda: t.OPTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, word_embed_proj_dim=16,
                               vocab_size=VOCABULARY, max_position_embeddings=128),
    "xlnet": lambda: t.XLNetConfig(d_model=16, n_layer=2, n_head=2, d_inner=24, vocab_size=VOCABULARY),
}  # fmt: skip


def save(
    folder: Path, family: str, *, template: str | None = CLOSED, pad: str | None = "</s>", side: str = "right"
) -> Any:
    """A trained classifier of one output and its tokenizer; bfloat16 bodies have float32 heads."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    config.num_labels = 1
    model = nudge(t.AutoModelForSequenceClassification.from_config(config).eval(), scale=0.3)
    model.save_pretrained(folder)
    words = tokenizer()
    words.chat_template, words.pad_token, words.padding_side = template, pad, side
    words.save_pretrained(folder)
    return model


def alone(model: Any, ids: list[int]) -> float:
    """The score of one row that is not padded: pooled at its last token where the architecture pools at all."""
    model.config.pad_token_id = None
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids])).logits[0, 0])


@pytest.mark.filterwarnings("ignore:reward .*padding changes its scores")
@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize(("template", "pad", "side"), [
    (CLOSED, "</s>", "right"), (CLOSED, None, "left"), (OPEN, "<pad>", "left"), (OPEN, "</s>", "right"),
])  # fmt: skip
def test_a_batch_scores_as_each_row_alone(
    tmp_path: Path, family: str, template: str, pad: str | None, side: str
) -> None:
    model = save(tmp_path, family, template=template, pad=pad, side=side)
    ends = [2] if template == CLOSED else []
    words = tokenizer()
    rows = [[*words(p)["input_ids"], *ends, *words(r)["input_ids"], *ends] for p, r in zip(P, R, strict=True)]
    wanted = [alone(model, row) for row in rows]
    assert max(wanted) - min(wanted) > 0.01
    assert load_reward(str(tmp_path))(P, R) == pytest.approx(wanted, abs=2e-4)


def test_an_architecture_that_padding_changes_is_scored_row_by_row_and_says_so(tmp_path: Path) -> None:
    save(tmp_path, "xlnet")
    with pytest.warns(UserWarning, match="padding changes its scores, so responses are scored one at a time"):
        load_reward(str(tmp_path))(P, R)


def test_a_float32_head_on_a_bfloat16_body_scores_the_last_token(tmp_path: Path) -> None:
    model = save(tmp_path, "llama").to(torch.bfloat16)
    model.score.float()
    model.save_pretrained(tmp_path)
    reward = load_reward(str(tmp_path))
    singly = [reward([p], [r])[0] for p, r in zip(P, R, strict=True)]
    assert reward(P, R) == pytest.approx(singly, abs=0.1)


# LoRA adapters


def adapter(tmp_path: Path, *, labels: int = 1, kind: str = "SEQ_CLS") -> tuple[Path, Any]:
    """A base language model and a reward adapter on it, with its head; and the merged model."""
    from peft import LoraConfig, get_peft_model

    tiny("llama").save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    base = t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=labels, pad_token_id=0)
    tuned = get_peft_model(base, LoraConfig(task_type=kind, r=2, target_modules=["q_proj"], modules_to_save=["score"]))
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, tuned.parameters()):
            parameter += torch.randn_like(parameter)
    tuned.save_pretrained(tmp_path / "reward")
    return tmp_path / "reward", tuned.merge_and_unload()


@pytest.mark.parametrize("labels", [1, 2])
def test_an_adapter_scores_as_its_merged_model(tmp_path: Path, labels: int) -> None:
    folder, merged = adapter(tmp_path, labels=labels)
    merged.save_pretrained(tmp_path / "merged")
    tokenizer().save_pretrained(tmp_path / "merged")
    wanted = load_reward(str(tmp_path / "merged"))(P, R)
    assert max(wanted) - min(wanted) > 0.1
    assert load_reward(str(folder))(P, R) == pytest.approx(wanted, abs=1e-4)
    source = look_at_reward(str(folder))
    assert source is not None
    assert source.shape.layers == 6
    before = fingerprint(str(folder))
    nudge(tiny("llama")).save_pretrained(tmp_path / "base")
    assert fingerprint(str(folder)) != before


@pytest.mark.parametrize(("change", "found"), [
    ({"base_model_name_or_path": "/nowhere/base"}, r"expected its base model at '/nowhere/base'"),
    ({"base_model_name_or_path": None}, r"expected its base model at None"),
    ({"task_type": "CAUSAL_LM"}, r"expected a LoRA adapter of a sequence classifier .*task_type 'CAUSAL_LM'"),
    ({"peft_type": "IA3"}, r"found peft_type 'IA3'"),
])  # fmt: skip
def test_an_adapter_that_is_no_reward_is_refused_by_run_and_dry_run(tmp_path: Path, change: dict, found: str) -> None:
    folder, _ = adapter(tmp_path)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **change}))
    for read in (load_reward, look_at_reward):
        with pytest.raises(ValueError, match=found):
            read(str(folder))


def test_an_adapter_without_its_head_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, _ = adapter(tmp_path)
    weights = load_file(folder / "adapter_model.safetensors")
    kept = {name: value for name, value in weights.items() if "score" not in name}
    save_file(kept, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"found no score\.weight in it"):
        load_reward(str(folder))
