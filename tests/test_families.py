"""Families of models: each is measured, drawn from and searched as a plain forward would have it, or refused by name.

COUNTERPOISE_FAMILIES=all tries every family that transformers builds from a small config, in some five minutes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, DynamicCache, T5Config

import families
from counterpoise.checkpoints.files import CheckpointError
from counterpoise.language import generating, scoring
from counterpoise.language.loading import refuse_unmeasurable
from counterpoise.language.sampling import Drawing, sample
from counterpoise.language.scoring import continuation_logprobs
from families import CHOICES, CONTEXTS, FAMILIES, build
from tiny import CAUSAL, nudge, tiny, tokenizer

ALWAYS = ("llama", "bert", "gemma2", "lfm2", "mamba2", "jamba", "falcon_h1", "recurrent_gemma", "rwkv", "minimax", "openai-gpt",
          "qwen3_next")  # fmt: skip
"""One of each kind: attention, an encoder told to decode, windows, convolutions, states, both, experts beside them."""
TRIED = FAMILIES if os.environ.get("COUNTERPOISE_FAMILIES") == "all" else ALWAYS
DOCS = Path(__file__).parents[1] / "docs" / "explanation" / "families.md"
BEST = scoring.Way(True, True), generating.WAYS[0]


def documented() -> dict[str, str]:
    """The rows of the table in docs/explanation/families.md by family."""
    lines = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return {line.split("`")[1]: line for line in lines}


def ways(model: torch.nn.Module) -> tuple[scoring.Way, generating.Way]:
    return scoring.way_of(model), generating.way_of(model)


@pytest.mark.parametrize("family", TRIED)
@pytest.mark.filterwarnings("ignore")
def test_a_family_gives_what_a_plain_forward_gives_as_the_docs_say(family: str) -> None:
    assert families.row(family) == documented()[family]


def test_every_causal_family_of_transformers_is_in_the_docs() -> None:
    assert set(documented()) >= set(FAMILIES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", CAUSAL)
def test_plain_attention_keeps_its_quick_way_in_every_dtype(family: str, dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ways(tiny(family, dtype=dtype)) == BEST


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_that_sees_padding_is_found_in_every_dtype(dtype: torch.dtype) -> None:
    with pytest.warns(UserWarning, match="recurrent_gemma: "):
        assert not scoring.way_of(build("recurrent_gemma").to(dtype)).pads_in_front


@pytest.mark.parametrize("temperature", [1.0, 0])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "gemma2", "lfm2", "jamba", "rwkv", "qwen3_next"])
@pytest.mark.filterwarnings("ignore")
def test_rows_that_have_ended_leave_the_batch_and_change_no_token(
    family: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family) if family in CAUSAL else build(family)
    both = CONTEXTS, [c[:9] for c in CONTEXTS]  # padded in front, and not
    how = Drawing(n=4, max_new_tokens=16, temperature=temperature, batch_size=16)
    said = sample(model, tokenizer(), [*both[0], *both[1]], how)
    model.generation_config.eos_token_id = list(range(2, 12)) if temperature else [said[0][0][3], said[3][0][6]]
    sizes = list[int]()
    model.register_forward_pre_hook(
        lambda module, given, named: sizes.append(len(named["input_ids"])), with_kwargs=True
    )
    for prompts in both:
        found, kinds = [], []
        for share in (2.0, 0.5, 0.01):  # never, at half, whenever one has ended
            monkeypatch.setattr(generating, "ENDED", share)
            sizes.clear()
            found.append(sample(model, tokenizer(), prompts, how))
            kinds.append(len(set(sizes)))
        assert found[0] == found[1] == found[2]
        ended = {len(r) for group in found[0] for r in group} - {how.max_new_tokens}
        assert ended
        assert kinds[2] > kinds[0] or not temperature or not generating.way_of(model).leaves


def test_a_cache_that_can_be_repeated_and_is_then_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jamba's was: rows in another order than the continuations, so that each continues another text."""
    model = tiny("llama")
    wanted = continuation_logprobs(tiny("llama"), CONTEXTS, CHOICES)
    right = DynamicCache.batch_repeat_interleave

    def wrong(cache: DynamicCache, times: int) -> None:
        right(cache, times)
        cache.batch_select_indices(torch.arange(len(cache.layers[0].keys)).roll(1))

    monkeypatch.setattr(DynamicCache, "batch_repeat_interleave", wrong)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert ways(model) == ways(model) == (scoring.Way(True, False), generating.WAYS[1])
    assert [str(w.message)[:27] for w in told] == ["llama: each continuation is", "llama: each response keeps "]
    for found, group in zip(continuation_logprobs(model, CONTEXTS, CHOICES), wanted, strict=True):
        assert found == pytest.approx(group, abs=1e-4)
    greedy = Drawing(n=2, max_new_tokens=5, temperature=0)
    assert sample(model, tokenizer(), CONTEXTS, greedy) == [
        sample(model, tokenizer(), [c], greedy)[0] for c in CONTEXTS
    ]


def test_what_is_found_belongs_to_the_model_and_two_threads_find_the_same() -> None:
    models = [tiny("llama"), build("lfm2"), tiny("llama"), build("lfm2")]
    with warnings.catch_warnings(), ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("ignore")
        found = list(pool.map(scoring.way_of, models))
    assert found == [scoring.Way(True, True), scoring.Way(True, False)] * 2
    assert not any(isinstance(value, torch.Tensor) for m in models for value in vars(m).values())
    assert models[0].state_dict().keys() == tiny("llama").state_dict().keys()


def test_asking_leaves_the_model_and_the_random_numbers_as_they_were() -> None:
    model = tiny("gpt2").train()
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    ways(model)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("asked", [scoring.way_of, generating.way_of])
def test_a_model_that_sees_what_follows_is_refused_when_it_is_asked(asked: Callable[[torch.nn.Module], object]) -> None:
    with pytest.raises(ValueError, match="BertLMHeadModel: expected a "):
        asked(nudge(build("bert", is_decoder=False), scale=0.3))


def test_decoders_adapters_and_what_is_no_checkpoint_pass(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(BertConfig(is_decoder=True).to_json_string(), encoding="utf-8")
    (tmp_path / "adapter").mkdir()
    refuse_unmeasurable(tmp_path, tmp_path / "adapter", tmp_path / "nowhere")
    (tmp_path / "adapter" / "config.json").write_text(T5Config().to_json_string(), encoding="utf-8")
    with pytest.raises(CheckpointError, match="an encoder-decoder; such models can be averaged"):
        refuse_unmeasurable(tmp_path, tmp_path / "adapter")
