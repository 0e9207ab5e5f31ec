"""Rewards: what each kind scores, and what is refused."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from counterpoise.evaluation.classifiers import spare_token
from counterpoise.evaluation.rewards import checked, classifier, fingerprint, load_reward
from counterpoise.planning.looking import look_at_reward
from tiny import tiny, tokenizer

GOOD, BAD = ["good", "great", "lovely", "superb"], ["bad", "awful", "boring", "dull"]


def csv(path: Path) -> Path:
    rows = [(f"a {w}, {v} film", int(words is GOOD)) for words in (GOOD, BAD) for w in words for v in words]
    text = "text,label\n" + "".join(f'"{t}",{label}\n' for t, label in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["reviews.csv", "reviews.csv.gz"])
def test_sentiment_ranks_obvious_texts(tmp_path: Path, name: str) -> None:
    reward = load_reward(f"sentiment:{csv(tmp_path / name)}")
    good, mixed, bad = reward(["bad"] * 3, ["a great, lovely film", "a great, boring film", "an awful, dull film"])
    assert good > 0 > bad
    assert bad < mixed < good
    assert reward(["other", "words"], ["a great, lovely film", ""])[0] == good  # the prompt is not looked at
    assert reward([], []) == []
    again = load_reward(f"sentiment:{tmp_path / name}")(["x"], ["a great, lovely film"])
    assert again == [good]  # fitted anew: the same number


@pytest.mark.parametrize(("text", "found"), [
    ("review,label\nfine,1\n", r"expected the columns text and label in the first line, found \['review', 'label'\]"),
    ("text,label\nfine,good\npoor,bad\n", r"expected the labels 0 and 1, found \['bad', 'good'\]"),
    ("text,label\nfine,1\n", r"expected the labels 0 and 1, found \['1'\]"),
    ("", r"expected the columns text and label in the first line, found \[\]"),
])  # fmt: skip
def test_a_file_that_is_not_labelled_text_is_refused(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"r\.csv: {found}"):
        load_reward(f"sentiment:{tmp_path / 'r.csv'}")


@pytest.mark.parametrize(("values", "found"), [
    ([1.0], r"expected 2 numbers, one per response, found an array of shape \(1,\)"),
    ([[1.0], [2.0]], r"found an array of shape \(2, 1\)"),
    ([0.0, float("nan")], "expected finite numbers, found nan for the response 'second'; clip or repair"),
    (["good", "bad"], r"expected a list of numbers, found \['good', 'bad'\] "),
    ([0.0, [1.0, 2.0]], "expected a list of numbers, found"),
    ([float("-inf"), 0.0], "found -inf for the response 'first'"),
])  # fmt: skip
def test_wrong_lengths_and_numbers_are_refused(values: list, found: str) -> None:
    with pytest.raises(ValueError, match=f"reward mine: .*{found}"):
        checked(lambda prompts, responses: values, "mine")(["p", "q"], ["first", "second"])


def test_a_checked_reward_gives_plain_floats() -> None:
    found = checked(lambda prompts, responses: torch.tensor([1, 2]), "mine")(["p", "q"], ["r", "s"])
    assert found == [1.0, 2.0]
    assert {type(value) for value in found} == {float}


def test_a_function_of_a_module_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards_7.py").write_text(
        "def length(prompts, responses):\n    return [len(r) - len(p) for p, r in zip(prompts, responses)]\n"
        "def short(prompts, responses):\n    return [0.0]\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert load_reward("my_rewards_7:length")(["a", "abc"], ["abcd", "abcd"]) == [3.0, 1.0]
    assert sys.path == path
    with pytest.raises(ValueError, match=r"reward my_rewards_7:short: expected 2 numbers"):
        load_reward("my_rewards_7:short")(["a", "b"], ["c", "d"])
    for name in ("number", "absent"):
        with pytest.raises(ValueError, match=f"my_rewards_7 has no callable named '{name}'"):
            load_reward(f"my_rewards_7:{name}")
    with pytest.raises(
        ValueError, match=r"reward no_rewards_7:length: no module 'no_rewards_7' can be imported from here"
    ):
        load_reward("no_rewards_7:length")
    assert sys.path == path


def test_a_function_of_a_file_by_its_path(tmp_path: Path) -> None:
    for folder, many in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "helper_of.py").write_text("one = 1.0\n")
        (tmp_path / folder / "mine.py").write_text(
            f"import helper_of\ndef f(prompts, responses):\n    return [{many} * helper_of.one for r in responses]\n"
            "def g(prompts, responses):\n    return [0.0] * len(responses)\n"
        )
    path = list(sys.path)
    first, second, other = (f"{tmp_path}/{at}" for at in ("a/mine.py:f", "b/mine.py:f", "a/mine.py:g"))
    assert (load_reward(first)(["p"], ["r"]), load_reward(second)(["p"], ["r"])) == ([1.0], [2.0])
    assert look_at_reward(first) is None
    assert sys.path == path
    assert len({fingerprint(spec) for spec in (first, second, other)}) == 3
    for look in (load_reward, look_at_reward):
        with pytest.raises(ValueError, match=r"a/mine\.py has no callable named 'h'"):
            look(f"{tmp_path}/a/mine.py:h")
        with pytest.raises(FileNotFoundError, match=r"none\.py"):
            look(f"{tmp_path}/a/none.py:f")


# Classifiers

PROMPTS, RESPONSES = ["ab", "what is it", "c?"], ["yes", "no", "one two three, four. five"]


def bert(folder: Path, labels: int, template: str | None = None) -> tuple[torch.nn.Module, Path]:
    model = tiny("bert")
    if labels != 2:
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(**{**model.config.to_dict(), "num_labels": labels})).eval()
    model.classifier.weight.data *= 30  # scores that differ
    model.save_pretrained(folder)
    words = tokenizer()
    words.chat_template = template
    words.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    names = ["input_ids", "token_type_ids", "attention_mask"]  # BERT is told which piece is which
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_input_names": names}))
    return model, folder


def logits(model: torch.nn.Module, *pieces: str | list[str]) -> list[float]:
    """One pair alone, without padding."""
    ids = [tokenizer().convert_tokens_to_ids(list(piece)) for piece in pieces]
    kinds = [i for i, piece in enumerate(ids) for _ in piece]
    with torch.no_grad():
        found = model(
            input_ids=torch.tensor([[token for piece in ids for token in piece]]), token_type_ids=torch.tensor([kinds])
        ).logits
    return found[0].tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_two_labels_are_scored_by_their_log_odds(tmp_path: Path, batch_size: int) -> None:
    model, folder = bert(tmp_path, 2)
    found = load_reward(str(folder), batch_size=batch_size)(PROMPTS, RESPONSES)
    pairs = [logits(model, *pair) for pair in zip(PROMPTS, RESPONSES, strict=True)]
    assert found == pytest.approx([b - a for a, b in pairs], abs=1e-4)
    assert max(found) - min(found) > 0.01


def test_a_spare_token_may_be_the_first_of_the_vocabulary() -> None:
    model, words = tiny("bert"), tokenizer()
    everything = range(model.config.vocab_size)
    assert spare_token([[*everything[1:]]], words, model) == 0
    assert spare_token([[*everything]], words, model) is None
    assert spare_token([[5]], words, model) == words.pad_token_id


def test_one_label_is_the_score(tmp_path: Path) -> None:
    model, folder = bert(tmp_path, 1)
    wanted = [logits(model, *pair)[0] for pair in zip(PROMPTS, RESPONSES, strict=True)]
    assert load_reward(str(folder))(PROMPTS, RESPONSES) == pytest.approx(wanted, abs=1e-4)
    assert max(wanted) - min(wanted) > 0.01


def test_three_labels_are_refused(tmp_path: Path) -> None:
    _, folder = bert(tmp_path, 3)
    with pytest.raises(ValueError, match="expected a model of one or two outputs, found 3"):
        load_reward(str(folder))


def test_a_chat_template_is_used_where_there_is_one(tmp_path: Path) -> None:
    model, folder = bert(tmp_path, 2, "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}")
    wanted = [logits(model, f"u:{p}\na:{r}\n") for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert load_reward(str(folder))(PROMPTS, RESPONSES) == pytest.approx([b - a for a, b in wanted], abs=1e-4)


def test_the_template_alone_decides_the_special_tokens(tmp_path: Path) -> None:
    """Llama's tokenizer adds <s> to every text, and so does its template: the model was trained on one."""
    model, folder = bert(tmp_path, 2, "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}")
    words = AutoTokenizer.from_pretrained(folder)
    words._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    words.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == [1, 4, 5]
    a, b = logits(model, ["<s>", *"ab\nyes\n"])
    assert load_reward(str(folder))(["ab"], ["yes"]) == pytest.approx([b - a], abs=1e-4)


def test_a_response_beyond_the_context_is_cut(tmp_path: Path) -> None:
    model, folder = bert(tmp_path, 2)
    with pytest.warns(UserWarning, match="fill its 128 tokens, what goes beyond is cut off"):
        (found,) = classifier(str(folder))(["ab"], ["x" * 500])
    a, b = logits(model, "ab", "x" * 126)
    assert found == pytest.approx(b - a, abs=1e-4)


def test_roberta_has_fewer_positions_than_its_config_says(tmp_path: Path) -> None:
    words = tokenizer()
    words.pad_token = words.eos_token
    config = RobertaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=20, type_vocab_size=1, num_labels=1, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"fill its {19 - words.pad_token_id} tokens"):
        assert np.isfinite(classifier(str(tmp_path))(["ab"], ["x" * 500])).all()


def test_a_language_model_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected a trained sequence-classification model, found no score\.weight"):
        load_reward(str(tmp_path))


def test_remote_code_is_not_run(tmp_path: Path) -> None:
    """Without being told no, transformers would ask at the terminal."""
    tiny("bert").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForSequenceClassification": "own.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_reward(str(tmp_path))
    assert not (tmp_path / "ran").exists()
