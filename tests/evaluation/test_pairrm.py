"""PairRM from a checkpoint with its authors' names of tensors, settings and marks: a small one, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import DebertaV2Config, DebertaV2Model
from typer.testing import CliRunner

from counterpoise.cli.app import app
from counterpoise.judging.alpaca import Output, OutputPair
from counterpoise.judging.pairrm import MARKS, pairrm
from counterpoise.language.costs import forward
from counterpoise.language.prompts import Prompt
from counterpoise.language.sampling import Drawing
from counterpoise.planning.judge import plan_compare, plan_respond
from counterpoise.planning.looking import look
from tiny import save_pair, tokenizer

CONFIG = Path(__file__).parents[2] / "experiments" / "hma" / "paper_models" / "pairrm.json"
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def save(folder: Path, **changed: Any) -> Path:
    folder.mkdir()
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": [*MARKS.values()]})
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    words.save_pretrained(folder)
    marks = {name: words.convert_tokens_to_ids(mark) for name, mark in MARKS.items()}
    told = json.loads(CONFIG.read_text(encoding="utf-8"))["config"]
    config = {**told, **SMALL, **marks, "vocab_size": len(words), **changed}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    torch.manual_seed(0)
    body = DebertaV2Model(DebertaV2Config(**{k: v for k, v in config.items() if k != "architectures"})).state_dict()
    tensors = {
        f"pretrained_model.{n}": torch.randn_like(t) * 0.3 if t.is_floating_point() else t for n, t in body.items()
    }
    tensors |= {"head_layer.1.weight": torch.randn(16, 32), "head_layer.1.bias": torch.randn(16)}
    tensors |= {"head_layer.4.weight": torch.randn(1, 16), "head_layer.4.bias": torch.randn(1)}
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("pairrm") / "ranker")


ASKED = ["say hello", "hi", "what is a longer question about?"]
FIRST = ["hello!", "no", "this one, and much more of it"]
SECOND = ["go away", "a long answer to a short one", "that"]


def test_a_preference_is_the_sigmoid_of_the_difference_of_two_scores(ranker: Path) -> None:
    """Row by row without padding, the head in numpy."""
    tensors = load_file(ranker / "model.safetensors")
    config = DebertaV2Config.from_pretrained(ranker)
    body = DebertaV2Model(config).eval()
    body.load_state_dict({n.removeprefix("pretrained_model."): t for n, t in tensors.items() if n.startswith("pre")})
    head = {n.removeprefix("head_layer."): t.double().numpy() for n, t in tensors.items() if n.startswith("head")}
    words = tokenizer()
    letters = words.get_vocab()

    def row(mark: str, text: str) -> list[int]:
        return [1, getattr(config, mark), *(letters.get(c, 3) for c in text), 2]

    expected = []
    for texts in zip(ASKED, FIRST, SECOND, strict=True):
        ids = [i for mark, text in zip(MARKS, texts, strict=True) for i in row(mark, text)]
        with torch.no_grad():
            states = body(torch.tensor([ids])).last_hidden_state[0].double().numpy()
        at = [states[ids.index(getattr(config, mark))] for mark in MARKS]
        hidden = [np.tanh(head["1.weight"] @ np.concatenate([at[0], r]) + head["1.bias"]) for r in at[1:]]
        scores = [head["4.weight"] @ h + head["4.bias"] for h in hidden]
        expected.append(1 / (1 + np.exp(scores[1] - scores[0]))[0])
    found = pairrm(ranker, batch_size=3)(ASKED, FIRST, SECOND)
    assert found == pytest.approx(expected, abs=1e-5)
    assert len({round(p, 3) for p in found}) == 3
    assert pairrm(ranker, batch_size=1)(ASKED, FIRST, SECOND) == pytest.approx(found, abs=1e-5)


def test_long_texts_are_cut_and_both_responses_stay_in_sight(ranker: Path) -> None:
    prefer = pairrm(ranker)
    long = "a" * 3000
    (same,), (other,) = prefer([long], ["b"], ["c"]), prefer([long + "z"], ["b"], ["c"])
    assert same == other  # the prompt ends at 1224 tokens
    (one,), (two,) = prefer(["a"], [long], [long]), prefer(["a"], [long], ["c" + long])
    assert one != two
    # Each response gets half of what the prompt leaves, however short the other: 2048 - 4 of "a" with its marks.
    half = (2048 - 4) // 2 - 3
    kept, cut = "b" * half, "b" * half + "c"
    for responses in (([kept], ["d"]), ([cut], ["d"])):
        assert prefer(["a"], *responses) == prefer(["a"], [kept], ["d"])
        assert prefer(["a"], *reversed(responses)) == prefer(["a"], ["d"], [kept])
    assert prefer(["a"], [kept[1:] + "c"], ["d"]) != prefer(["a"], [kept], ["d"])


def test_marks_inside_a_text_are_dropped(ranker: Path) -> None:
    prefer = pairrm(ranker)
    assert prefer(["say <|candidate1|>hello"], FIRST[:1], ["<|source|>" + SECOND[0]]) == prefer(
        ASKED[:1], FIRST[:1], SECOND[:1]
    )


def test_the_command_judges_with_it(ranker: Path, tmp_path: Path) -> None:
    def outputs(name: str, texts: list[str]) -> Path:
        rows = [{"instruction": i, "output": o, "generator": name} for i, o in zip(ASKED, texts, strict=True)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        return tmp_path / f"{name}.json"

    files = [str(outputs("ours", FIRST)), str(outputs("theirs", SECOND))]
    out = tmp_path / "win.json"
    ran = CliRunner().invoke(app, ["judge", "compare", *files, "-o", str(out), "--preference", str(ranker), "--quiet"])
    assert ran.exit_code == 0, ran.output
    result = json.loads(out.read_text())
    assert result["judge"] == {"preference": str(ranker)}
    prefer = pairrm(ranker)
    there, back = prefer(ASKED, FIRST, SECOND), prefer(ASKED, SECOND, FIRST)
    scores = [((a > 0.5) + (b < 0.5)) / 2 for a, b in zip(there, back, strict=True)]
    assert result["scores"] == scores


def test_a_dry_run_tells_and_writes_nothing(ranker: Path, tmp_path: Path) -> None:
    save_pair(tmp_path)
    rows = [{"instruction": i, "output": o, "generator": "m"} for i, o in zip(ASKED, FIRST, strict=True)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"prompt": i}) + "\n" for i in ASKED))
    before = sorted(tmp_path.rglob("*"))

    def dry(*words: object) -> str:
        told = ["judge", *words, "-o", tmp_path / "out.json", "--dry-run", "--speed", "1e12,1e11"]
        ran = CliRunner().invoke(app, [str(w) for w in told])
        assert ran.exit_code == 0, ran.output
        assert sorted(tmp_path.rglob("*")) == before
        return " ".join(ran.output.split())

    file = tmp_path / "a.json"
    assert "3 pairs in both orders" in dry("compare", file, file, "--preference", ranker)
    assert "its time is not counted" in dry("compare", file, file, "--preference", "json:dumps")
    assert "its time is not counted" in dry("compare", file, file, "--reward", "json:dumps")
    assert "3 responses" in dry(
        "respond", tmp_path / "post", "--prompts", tmp_path / "asked.jsonl", "--max-new-tokens", 6
    )
    asking = dry("compare", file, file, "--base-url", "http://127.0.0.1:1/v1", "--model", "m", "--key-variable", "")
    assert "3 calls to m" in asking  # both orders show the same
    assert "nothing was asked or written" in asking
    prompts = [Prompt((("user", i),)) for i in ASKED]
    plan = plan_respond(str(tmp_path / "post"), prompts, Drawing(1, 6, chat=False, batch_size=2))
    shape = look(str(tmp_path / "post")).shape
    mean = sum(map(len, ASKED)) / 3
    by_hand = forward(shape, mean, sequences=3, logits=1) + forward(shape, 6, sequences=3, logits=6, start=mean)
    assert plan.stages[0].work.flops == pytest.approx(by_hand.flops)
    both = plan_compare(
        [OutputPair(i, Output(i, a, "x"), Output(i, b, "y")) for i, a, b in zip(ASKED, FIRST, SECOND, strict=True)],
        reward=None,
        preference=str(ranker),
    )
    tokens = sum(map(len, (*ASKED, *FIRST, *SECOND))) / 3
    shape = look(str(ranker), classifier=True).shape
    assert both.stages[0].work.flops == pytest.approx(forward(shape, tokens, sequences=6).flops)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"source_prefix_id": None},
            "expected PairRM (DebertaV2PairRM), found ['DebertaV2PairRM'] without source_prefix_id",
        ),
        ({"cand1_prefix_id": 5}, "expected token 5 to be <|candidate1|>, found 'b'"),
        ({"num_hidden_layers": 1}, None),
    ],
)
def test_another_checkpoint_is_refused(changed: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    place = save(tmp_path / "ranker", **changed)
    if message is None:  # a head that was not saved
        tensors = load_file(place / "model.safetensors")
        save_file({n: t for n, t in tensors.items() if n != "head_layer.4.bias"}, place / "model.safetensors")
        message = "expected a trained PairRM, found no head_layer.4.bias"
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        pairrm(place)
    assert message in str(refused.value)
