"""Every family with a causal language model in transformers, tiny: built from config, and what must hold of each.

Run it to try them all and to write the table of the page:
python tests/families.py docs/explanation/families.md [FAMILY ...]
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from counterpoise.averaging.average import average
from counterpoise.averaging.partition import whole
from counterpoise.averaging.resident import ResidentAverage
from counterpoise.checkpoints.files import CheckpointError
from counterpoise.checkpoints.naming import writer_of
from counterpoise.checkpoints.preflight import preflight
from counterpoise.language import generating, scoring
from counterpoise.language.loading import unfit
from counterpoise.language.sampling import Drawing, sample
from counterpoise.language.scoring import Example, continuation_logprobs, row_nlls, score_responses
from tiny import nudge, tokenizer

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LARGEST = 3_000_000
"""Parameters; what stays larger than that with these sizes is not built."""
SIZES: dict[int, str] = {
    64: "vocab_size vocab_size_per_layer_input",
    16: "hidden_size d_model n_embd emb_dim word_embed_proj_dim embedding_size dim_model attention_hidden_size lru_width "
        "backbone_hidden_size",
    128: "max_position_embeddings n_positions max_seq_len n_ctx context_length index_topk",
    4: "num_hidden_layers n_layer n_layers num_layers num_attention_heads n_head n_heads num_heads decoder_attention_heads "
       "encoder_attention_heads head_dim num_local_experts num_experts n_routed_experts moe_num_experts qk_nope_head_dim "
       "qk_rope_head_dim v_head_dim mamba_n_heads mamba_num_heads state_size mamba_d_state ssm_state_size linear_key_head_dim "
       "linear_value_head_dim hidden_size_per_layer_input laurel_rank global_head_dim linear_head_dim linear_num_heads "
       "num_centroids",
    24: "intermediate_size ffn_hidden_size d_ff d_inner dff decoder_ffn_dim encoder_ffn_dim block_ff_dim",
    2: "eos_token_id num_key_value_heads encoder_layers decoder_layers num_experts_per_tok moe_k moe_topk moe_top_k "
       "n_mamba_heads mamba_expand linear_num_key_heads linear_num_value_heads index_n_heads o_groups "
       "centroid_intermediate_top_k",
    8: "moe_intermediate_size moe_ffn_hidden_size expert_ffn_hidden_size shared_expert_intermediate_size "
       "shared_intermediate_size q_lora_rank kv_lora_rank index_head_dim sliding_window attention_window_size mamba_d_head "
       "mamba_head_dim mamba_headdim mamba_chunk_size chunk_size block_size o_lora_rank",
    3: "conv_kernel conv_L_cache mamba_d_conv linear_conv_kernel_dim",
    1: "bos_token_id n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group first_k_dense_replace "
       "zero_expert_num mamba_n_groups n_groups mamba_ngroups",
    0: "pad_token_id num_kv_shared_layers",
}  # fmt: skip
"""What a setting becomes wherever a family has one of that name: all small."""
TOWERS = {16: "hidden_size intermediate_size image_size vision_output_dim projection_dim embed_dim width out_channels",
          1: "num_hidden_layers num_global_layers depth num_blocks", 3: "num_channels", 8: "patch_size",
          2: "num_attention_heads attention_heads"}  # fmt: skip
"""The same for towers of images and sound, of which nothing is asked."""
ALTERNATING = {"layer_types": ["linear_attention", "full_attention"] * 2}
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {**ALTERNATING, "num_key_value_heads": 4},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "deepseek_v4": {"head_dim": 8, "num_key_value_heads": 1},
    "falcon_h1": {"mamba_d_ssm": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_dt_rank": 4},
    "kimi_linear": ALTERNATING,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 4, "num_layers": 2},
    "mamba2": {"num_heads": 4, "head_dim": 8},
    "minimax": ALTERNATING,
    "qwen3_5_moe_text": ALTERNATING,
    "qwen3_5_text": ALTERNATING,
    "qwen3_next": ALTERNATING,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"attn_layers": ["local", "local"], "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [8, 8],
                 "attention_head_size": 4, "feed_forward_size": 24},
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    "xlstm": {"hidden_size": 128, "num_blocks": 4, "autocast_kernel_dtype": "float32"},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "mamba", "hybrid"] * 2, "attention_hidden_size": 32,
              "attention_head_dim": 8},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
               "attention_hidden_size": 32},
    "youtu": {"pad_token_id": None},  # transformers sets the row of the padding to 0 where it loads one
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What a family needs besides."""


STILL = (
    "dropout attention_dropout hidden_dropout activation_dropout attn_pdrop embd_pdrop resid_pdrop hidden_dropout_prob "
)
STILL += "attention_probs_dropout_prob attn_dropout_p summary_last_dropout"


def flat(table: dict[int, str]) -> dict[str, int]:
    return {name: value for value, names in table.items() for name in names.split()}


def config_of(family: str, **settings: Any) -> Any:
    """A family's config, every size small; encoders of texts read from left to right."""
    kind = CONFIG_MAPPING[family]
    usual: dict[str, Any] = {}
    with suppress(ValueError, TypeError, AttributeError, KeyError, ImportError):  # some have no valid default
        usual = kind().to_dict()
    known = {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}
    known |= usual.keys() | getattr(kind, "attribute_map", {}).keys()
    small: dict[str, Any] = {n: v for n, v in flat(SIZES).items() if n in known}
    small |= {n: 0.0 for n in STILL.split() if n in known}
    if "qk_rope_head_dim" in small:  # attention of several latents: no width of its own
        small = {n: v for n, v in small.items() if n != "head_dim"} | {"num_key_value_heads": 4}
    for name, part in {n: c for n, c in usual.items() if isinstance(c, dict) and n.endswith("_config")}.items():
        if name == "text_config" and part.get("model_type") in CONFIG_MAPPING:
            small[name] = config_of(part["model_type"]).to_dict()
        elif name in ("ffn_config", "attn_config"):
            small[name] = {n: v for n, v in flat(SIZES).items() if n in part}
        else:
            sized = {n: v for n, v in flat(TOWERS).items() if n in part}
            small[name] = {**{n: part[n] for n in ("model_type",) if n in part}, **sized}
    small |= {n: True for n in ("is_decoder", "causal") if n in usual}
    return kind(**small | SPECIAL.get(family, {}) | settings)


def build(family: str, **settings: Any) -> nn.Module:
    """A tiny model of a family, its weights large enough that all of the context tells."""
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config_of(family, **settings)).parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters at these sizes")
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config_of(family, **settings)).float().eval()
    return nudge(model, scale=0.1)


random = torch.Generator().manual_seed(3)


def text(length: int) -> tuple[int, ...]:
    return tuple(torch.randint(4, 64, (length,), generator=random).tolist())


CONTEXTS = [text(n) for n in (21, 9, 14)]
CHOICES = [[text(n) for n in lengths] for lengths in ((4, 2), (1, 3), (2, 5))]
EXAMPLES = [Example(c, r) for c, group in zip(CONTEXTS, CHOICES, strict=True) for r in group]
CLOSE = 1e-3  # nats


def plain(model: nn.Module, row: Sequence[int]) -> Tensor:
    """Log-probabilities of every token at every position: one row, no padding, no cache, no mask."""
    return model(input_ids=torch.tensor([row]), use_cache=False).logits[0].log_softmax(-1)


def plain_sum(model: nn.Module, example: Example) -> Tensor:
    before = plain(model, example.prompt + example.response)[len(example.prompt) - 1 : -1]
    return before.gather(1, torch.tensor(example.response)[:, None]).sum()


def scores_as_a_plain_forward_does(model: nn.Module) -> None:
    with torch.no_grad():
        wanted = torch.stack([plain_sum(model, e) for e in EXAMPLES])
        found = torch.tensor([s for group in continuation_logprobs(model, CONTEXTS, CHOICES) for s in group])
        torch.testing.assert_close(found, wanted, atol=CLOSE, rtol=0)
        torch.testing.assert_close(-row_nlls(model, EXAMPLES), wanted, atol=CLOSE, rtol=0)


def has_the_hidden_states_of_a_plain_forward(model: nn.Module) -> None:
    with torch.no_grad():
        together, alone = (score_responses(model, e, hidden=True).hidden_BCH for e in (EXAMPLES, EXAMPLES[:1]))
    assert together is not None
    assert alone is not None
    torch.testing.assert_close(together[0, -4:], alone[0], atol=CLOSE, rtol=CLOSE)


def has_the_gradient_of_a_plain_forward(model: nn.Module) -> None:
    gradients = []
    for losses in (row_nlls(model, EXAMPLES), torch.stack([-plain_sum(model, e) for e in EXAMPLES])):
        model.zero_grad()
        losses.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-3 * gradients[1].norm() > 0


def draws_what_each_prompt_alone_would(model: nn.Module) -> None:
    """Greedy: every token drawn is the likeliest of a plain forward."""
    for group, prompt in zip(
        sample(model, tokenizer(), CONTEXTS, Drawing(n=2, max_new_tokens=6, temperature=0)), CONTEXTS, strict=True
    ):
        assert group[0] == group[1]
        with torch.no_grad():
            logp_TV = plain(model, prompt + group[0])[len(prompt) - 1 : -1]
        drawn_T = logp_TV.gather(1, torch.tensor(group[0])[:, None])[:, 0]
        torch.testing.assert_close(drawn_T, logp_TV.max(-1).values, atol=CLOSE, rtol=0)


def is_searched_as_it_is_written(model: nn.Module) -> None:
    """The resident average is the checkpoint on disk, and its gradient is the slope of its loss."""
    with TemporaryDirectory() as name:
        pre, post, out = (Path(name, side) for side in ("pre", "post", "out"))
        model.save_pretrained(pre)
        nudge(model, scale=0.01).save_pretrained(post)
        pair = preflight(pre, post)
        resident, cut = ResidentAverage(pair), whole(pair.names)
        average(pre, post, out, 0.5)
        written = type(resident.model).from_pretrained(out).eval()

        def loss(asked: nn.Module) -> float:
            value = row_nlls(asked, EXAMPLES).sum()
            if value.requires_grad:
                value.backward()
            return value.item()

        def is_slope(ratio: float) -> bool:
            _, (slope,) = resident.loss_and_gradient(cut, [ratio], loss)
            ends = []
            with torch.no_grad():
                for r in (ratio - 2**-8, ratio + 2**-8):
                    resident.set(cut, [r])
                    ends.append(loss(resident.model))
            return bool(abs((ends[1] - ends[0]) * 2**7 - slope) <= 0.05 * abs(slope) + 0.02)

        with torch.no_grad():
            resident.set(cut, [0.5])
            assert loss(written) == loss(resident.model)
        assert any(is_slope(ratio) for ratio in (0.5, 0.3, 0.7))  # a token that changes experts has no slope there


PROMISES: tuple[Callable[[nn.Module], None], ...] = (
    scores_as_a_plain_forward_does, has_the_gradient_of_a_plain_forward, draws_what_each_prompt_alone_would,
)  # fmt: skip
"""What holds of every family that is not refused."""
SCORED = {
    scoring.Way(True, True): "cache shared",
    scoring.Way(True, False): "each text on its own",
    scoring.Way(False, False): "each text on its own, padded behind",
}
DRAWN = {
    (True, True, True): "cache shared",
    (True, False, True): "a cache each",
    (False, False, True): "a cache each, one length at a time",
    (False, False, False): "no cache, one length at a time",
}


def row(family: str) -> str:
    """The family's line in docs/explanation/families.md.

    Raises:
        Exception: a promise is broken.
    """
    try:
        config = config_of(family)
        writer_of(config, family)
        why = unfit(config)
        model = build(family)
    except CheckpointError as error:
        return f"| `{family}` | refused: {str(error).partition(', found ')[2].partition(';')[0]} | | | |"
    except Exception:  # each config refuses small sizes in its own way
        return f"| `{family}` | not tried: no small model of it is built here | | | |"
    if why is not None:
        return f"| `{family}` | refused: {why.partition(': ')[0]} | | | |"
    for promise in PROMISES:
        promise(model)
    cells = [SCORED[scoring.way_of(model)], DRAWN[generating.way_of(model)[:3]]]
    for check, refusal in (
        (has_the_hidden_states_of_a_plain_forward, ValueError),
        (is_searched_as_it_is_written, CheckpointError),
    ):
        try:
            check(model)
            cells.append("yes")
        except refusal:
            cells.append("refused")
    return f"| `{family}` | " + " | ".join(cells) + " |"


HEAD = "| model type | scored | drawn | PPO | restored and searched |\n|---|---|---|---|---|"


def write(page: Path, *families: str) -> None:
    """Put the table into the page, or some of its rows; a broken promise is printed, and no row written for it."""
    text = page.read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")} if families else {}
    for family in families or FAMILIES:
        try:
            rows[family] = row(family)
            print(rows[family], flush=True)
        except Exception as error:
            print(f"{family}: {type(error).__name__} {error}", file=sys.stderr)
    table = "\n".join([HEAD, *(rows[family] for family in sorted(rows))])
    page.write_text(f"{text.partition(HEAD)[0]}{table}\n", encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    write(Path(sys.argv[1]), *sys.argv[2:])
