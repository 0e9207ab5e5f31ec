"""Every built-in ability against a computation by hand on a tiny Llama."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from counterpoise.evaluation.abilities import load_abilities
from counterpoise.evaluation.items import FileAbility, encode_pair
from counterpoise.evaluation.likelihood import credit
from counterpoise.evaluation.parts import PARTS, part_of
from counterpoise.language.sampling import Drawing
from counterpoise.records import digest
from tiny import tiny, tokenizer

WORDS = ["yes", "no", "maybe so", "seven", "a b c", "nothing at all"]
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def in_part(records: list[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    """Records of a part in the order of their hash."""
    return sorted((r for r in records if part_of(digest(r)) == part), key=digest)


def ids(text: str) -> list[int]:
    return tokenizer().convert_tokens_to_ids(list(text))  # type: ignore[no-any-return]


def logprob(model: torch.nn.Module, context: list[int], continuation: list[int]) -> float:
    """Summed, of one continuation alone, in float64."""
    with torch.no_grad():
        logp = model(torch.tensor([context + continuation]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(float(logp[len(context) - 1 + i, token]) for i, token in enumerate(continuation))


def greedy(model: torch.nn.Module, context: list[int], tokens: int) -> str:
    """The text of a greedy response, by running the whole sequence again for each token."""
    sequence = list(context)
    with torch.no_grad():
        for _ in range(tokens):
            sequence.append(int(model(torch.tensor([sequence]), use_cache=False).logits[0, -1].argmax()))
            if sequence[-1] == 2:
                break
    return str(tokenizer().decode(sequence[len(context) :], skip_special_tokens=True))


# The three kinds


def test_choices(tmp_path: Path) -> None:
    records = [{"query": f"is {n} even?", "choices": WORDS[: 2 + n % 3], "gold": n % 2} for n in range(40)]
    model = tiny("llama")
    ability = load_abilities([f"choices:{write(tmp_path / 'even.jsonl', records)}"])[0]
    assert ability.name == "even"
    per_token, accuracy = ability.measure(model, tokenizer(), "proxy", Drawing(batch_size=3))
    chosen = in_part(records, "proxy")
    assert len(chosen) > 8
    scores = [[logprob(model, ids(r["query"]), ids(f" {c}")) for c in r["choices"]] for r in chosen]
    gold = [r["gold"] for r in chosen]
    tokens = [len(r["choices"][r["gold"]]) + 1 for r in chosen]  # one a character, and the space
    wanted = [s[g] / n for s, g, n in zip(scores, gold, tokens, strict=True)]
    np.testing.assert_allclose(per_token.statistics[:, 0], wanted, atol=1e-5)
    per_letter = [
        [x / len(c) for x, c in zip(s, r["choices"], strict=True)] for s, r in zip(scores, chosen, strict=True)
    ]
    right = [100.0 * (s.index(max(s)) == g) for s, g in zip(per_letter, gold, strict=True)]
    assert accuracy.statistics[:, 0].tolist() == right
    assert 0 < accuracy.value < 100
    assert accuracy.chance == pytest.approx(np.mean([100 / len(r["choices"]) for r in chosen]))
    assert per_token.chance is None
    assert per_token.keys == accuracy.keys == tuple(digest(r) for r in chosen)


def test_continue(tmp_path: Path) -> None:
    records = [{"context": f"count {n}", "continuation": WORDS[n % 6]} for n in range(30)]
    records += [{"context": "", "continuation": f"start {n}"} for n in range(6)]
    records += [{"context": f"end {n}\n", "continuation": "here"} for n in range(6)]
    model = tiny("llama")
    ability = load_abilities([f"continue:{write(tmp_path / 'count.jsonl', records)}"])[0]
    chosen = in_part(records, "proxy")
    assert {"", "\n", "c"} <= {r["context"][-1:] if "end" in r["context"] else r["context"][:1] for r in chosen}
    (found,) = ability.measure(model, tokenizer(), "proxy", Drawing(batch_size=4))
    pairs = [
        (ids(r["context"]) or [1], ids((" " if r["context"].startswith("count") else "") + r["continuation"]))
        for r in chosen
    ]
    wanted = [[logprob(model, *pair), len(pair[1])] for pair in pairs]
    np.testing.assert_allclose(found.statistics, wanted, atol=2e-4)
    total = np.sum(wanted, axis=0)
    assert (found.metric, found.aggregate, found.chance) == ("-nll", "ratio", None)
    assert found.value == pytest.approx(total[0] / total[1], abs=1e-5)


def speaking(n: int) -> torch.nn.Module:
    """A tiny Llama whose greedy text varies and does not end at once."""
    model = tiny("llama", seed=n)
    model.model.embed_tokens.weight.data *= 20
    model.lm_head.weight.data[[0, 2]] *= 0.1
    return model


@pytest.mark.parametrize("metric", ["exact", "bleu"])
def test_generate(tmp_path: Path, metric: str) -> None:
    model, records = speaking(0), []
    for n in range(40):
        query = f"say {n * n}"
        said = greedy(model, ids(query), 12).split("\n")[0].strip() or "none"
        reference = said if n % 2 else f"{said} {WORDS[n % 6]}"  # every other one is right
        loud = metric == "exact" and n % 4 == 1  # still right
        records.append({"prompt": query, "reference": reference.upper() if loud else reference})
    ability = load_abilities([f"generate:{write(tmp_path / 'say.jsonl', records)}?metric={metric}&name=saying"])[0]
    assert ability.name == "saying"
    chosen = in_part(records, "validation")
    likelihood, found = ability.measure(model, tokenizer(), "validation", Drawing(batch_size=5, max_new_tokens=12))
    words = tokenizer()
    pairs = [(ids(r["prompt"]), words(" " + r["reference"])["input_ids"]) for r in chosen]
    wanted = [[logprob(model, *pair), len(pair[1])] for pair in pairs]
    np.testing.assert_allclose(likelihood.statistics, wanted, atol=2e-4, rtol=1e-5)
    answers = [greedy(model, ids(r["prompt"]), 12).split("\n")[0].strip() for r in chosen]
    if metric == "exact":
        right = [100.0 * (int(r["prompt"].split()[1]) ** 0.5 % 2 == 1) for r in chosen]
        assert found.statistics[:, 0].tolist() == right
        assert 0 < found.value < 100
    else:
        sacrebleu = pytest.importorskip("sacrebleu")
        score = sacrebleu.corpus_bleu(answers, [[r["reference"] for r in chosen]]).score
        assert found.value == pytest.approx(score, abs=1e-9)
        assert 5 < score < 95
    assert found.chance == 0
    assert found.keys == likelihood.keys == tuple(digest(r) for r in chosen)


def test_generate_from_messages_goes_through_the_template(tmp_path: Path) -> None:
    model, words = speaking(1), tokenizer()
    words.chat_template = TEMPLATE
    records = [
        {
            "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": f"{n}?"}],
            "reference": f"it is {n}",
        }
        for n in range(30)
    ]
    ability = load_abilities([f"generate:{write(tmp_path / 'chat.jsonl', records)}"])[0]
    chosen = in_part(records, "held-out")
    for chat in (True, False):
        likelihood, _ = ability.measure(model, words, "held-out", Drawing(max_new_tokens=3, chat=chat))
        assert likelihood.keys == tuple(digest(r) for r in chosen)
        texts = [r["messages"][1]["content"] for r in chosen]
        contexts = [ids(f"s:be brief\nu:{t}\na:" if chat else f"be brief\n{t}") for t in texts]
        wanted = [
            [logprob(model, c, ids(r["reference"])), len(r["reference"])] for c, r in zip(contexts, chosen, strict=True)
        ]
        np.testing.assert_allclose(likelihood.statistics, wanted, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize(("answer", "reference", "right"), [
    ("The cat.", "cat", True), ("a  cat!", "Cat", True), ("cats", "cat", False), ("", "cat", False),
    ("theatre", "atre", False), ("2, 3", "2 3", False), ("", "A", False), ("A", "a", True), ("a", "the", False),
    ("5", "-5", False), ("35", "3.5", False), ("3.5.", "3.5", True), ("“An apple!”", "apple", True),
    ("'Oui !'.", "oui", True), ("5'", '5"', False), ("５", "5", False), ("Straße", "STRASSE", True), ("?", "?", True),
    ("?", "!", False), ('""', "", False), ("...", "a", False), ("cat the", "cat", False),
])  # fmt: skip
def test_exact_does_not_see_case_a_leading_article_and_final_marks(answer: str, reference: str, right: bool) -> None:
    from counterpoise.evaluation.generation import exact_match as _exact

    assert _exact([answer], [reference], ("k",)).value == 100 * right


def test_bleu_statistics_are_those_of_the_corpus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    from counterpoise.evaluation.generation import bleu

    answers = ["The cat sat on the mat.", "Don't go there, please!", "", "five"]
    references = ["The cat is on the mat.", "Do not go there, please.", "nothing", "five"]
    wanted = sacrebleu.corpus_bleu(answers, [references])
    total = bleu(answers, references).sum(0)
    assert total.tolist() == [wanted.sys_len, wanted.ref_len, *wanted.counts, *wanted.totals]


# Where a context ends


def merging(merges: list[tuple[str, str]]) -> Any:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    signs = ["<pad>", "<s>", "</s>", *"abcd ", *("".join(m) for m in merges)]
    raw = Tokenizer(models.BPE({s: i for i, s in enumerate(signs)}, merges))
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def test_a_pair_is_split_where_the_whole_text_is() -> None:
    a, b, c, d, space, bc, space_c = 3, 4, 5, 6, 7, 8, 9
    words = merging([("b", "c"), (" ", "c")])
    assert encode_pair(words, "ab", "d") == ((a, b), (d,))
    assert encode_pair(words, "ab", "c") == ((a,), (bc,))  # the model never saw b and c apart
    assert encode_pair(words, "", "cd") == ((1,), (c, d))
    assert encode_pair(words, "a", " c") == ((a,), (space_c,))
    assert encode_pair(words, "a ", "d") == ((a, space), (d,))


def test_a_space_that_ends_a_context_may_begin_the_continuation() -> None:
    text = "Answer: Paris in the north. Answer: London in the south. "
    byte_pairs = Tokenizer(models.BPE())
    byte_pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_pairs.train_from_iterator([text] * 50, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    words = PreTrainedTokenizerFast(tokenizer_object=byte_pairs, eos_token="!")
    for answer in ("Paris in the north", "London in the south"):
        pair = encode_pair(words, "Answer: ", answer)
        assert pair == encode_pair(words, "Answer:", " " + answer)
        context, continuation = ("".join(words.convert_ids_to_tokens(list(part))) for part in pair)
        assert (context, continuation) == ("Answer:", "Ġ" + answer.replace(" ", "Ġ"))


def test_choices_that_change_the_last_token_share_what_comes_before_it(tmp_path: Path) -> None:
    words, model = merging([("b", "c"), (" ", "c")]), tiny("llama")
    records = [
        {"query": f"{x} ", "choices": ["c", "d"], "gold": 0}
        for x in ("a", "ab", "ad", "da", "dd", "aa", "ba", "add", "dad")
    ]
    ability = load_abilities([f"choices:{write(tmp_path / 'x.jsonl', records)}"])[0]
    chosen = in_part(records, "proxy")
    context = [words(r["query"].strip())["input_ids"] for r in chosen]
    wanted = [logprob(model, x, [9]) for x in context]  # " c" as one token, although the query ends with the space
    np.testing.assert_allclose(ability.measure(model, words, "proxy")[0].statistics[:, 0], wanted, atol=1e-5)


def test_a_tokenizer_that_opens_and_closes_every_text() -> None:
    from tokenizers.processors import TemplateProcessing

    words = tokenizer()
    words._tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    assert encode_pair(words, "ab", " c") == ((1, 4, 5), (words.convert_tokens_to_ids(" "), 6))


# Files


def test_an_answer_is_a_reference_and_a_query_a_prompt(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", [{"query": "a", "answer": "b"}])
    two = write(tmp_path / "two.jsonl", [{"prompt": "a", "reference": "b"}])
    found = load_abilities([f"generate:{one}", f"generate:{two}"])
    assert len({a.fingerprint for a in found}) == 1
    (item,) = found[0].items  # type: ignore[attr-defined]
    assert found[0].fingerprint == digest(["generate", "exact 2", None, [item.key]])  # SQuAD's rules were the first


def test_repeats_count_once_and_archives_and_blank_lines_are_read(tmp_path: Path) -> None:
    records = [{"context": f"c{n}", "continuation": "x"} for n in range(20)]
    lines = [json.dumps(r) for r in records]
    repeated = [*lines, "", json.dumps({"id": 7, "continuation": "x", "context": "c3"}), lines[0]]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(repeated).encode()))
    write(tmp_path / "b.jsonl", records[::-1])
    found, plain = load_abilities([f"continue:{tmp_path / 'a.jsonl.gz'}", f"continue:{tmp_path / 'b.jsonl'}"])
    assert (found.name, plain.name) == ("a", "b")
    assert isinstance(found, FileAbility)
    assert len(found.items) == 20
    limited = load_abilities([f"continue:{tmp_path / 'b.jsonl'}?limit=1"])[0]
    assert [len(a.measure(tiny("llama"), tokenizer(), "proxy", limit=2)[0].keys) for a in (plain, limited)] == [2, 1]
    assert found.fingerprint == plain.fingerprint  # order, extra fields and names decide nothing


@pytest.mark.parametrize(("kind", "line", "found"), [
    ("choices", "{", "Expecting property name"),
    ("choices", "[1, 2]", r"expected a json object, found '\[1, 2\]'"),
    ("choices", '{"choices": ["a", "b"], "gold": 0}', "expected the field 'query'; found"),
    ("choices", '{"query": "q", "choices": ["a", "b"]}', "expected the field 'gold'"),
    ("choices", '{"query": "q", "choices": ["a"], "gold": 0}', "choices: expected a list of at least two texts"),
    ("choices", '{"query": "q", "choices": ["a", " "], "gold": 0}', "choices: expected a list of at least two texts"),
    ("choices", '{"query": "q", "choices": "ab", "gold": 0}', "choices: expected a list of at least two texts"),
    ("choices", '{"query": "q", "choices": ["a", "b"], "gold": 2}', "gold: expected a number from 0 to 1, found 2"),
    ("choices", '{"query": "q", "choices": ["a", "b"], "gold": -1}', "gold: expected a number from 0 to 1, found -1"),
    ("choices", '{"query": "q", "choices": ["a", "b"], "gold": "b"}', "gold: expected a number from 0 to 1, found 'b'"),
    ("choices", '{"query": "", "choices": ["a", "b"], "gold": 1}', "query: expected a text, found ''"),
    ("continue", '{"context": "a"}', "expected the field 'continuation'"),
    ("continue", '{"context": "a", "continuation": " "}', "continuation: expected a text, found ' '"),
    ("continue", '{"context": null, "continuation": "a"}', "context: expected a text, found None"),
    ("generate", '{"prompt": "a"}', "expected the field 'answer'"),
    ("generate", '{"prompt": "a", "reference": 5}', "reference: expected a text, found 5"),
    ("generate", '{"answer": "a"}', "expected the field 'query'"),
    ("generate", '{"messages": "hi", "answer": "a"}', "messages: expected"),
    ("generate", '{"messages": [], "answer": "a"}', "messages: expected"),
    ("generate", '{"messages": [{"role": "user"}], "answer": "a"}', "messages: expected"),
    ("generate", '{"messages": [{"role": "user", "content": null}], "answer": "a"}', "messages: expected"),
])  # fmt: skip
def test_a_malformed_line_is_named(tmp_path: Path, kind: str, line: str, found: str) -> None:
    fine = {
        "choices": '{"query": "q", "choices": ["a", "b"], "gold": 1}',
        "continue": '{"context": "a", "continuation": "b"}',
        "generate": '{"prompt": "a", "answer": "b"}',
    }
    (tmp_path / "bad.jsonl").write_text(f"{fine[kind]}\n\n{line}\n{fine[kind]}\n")
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 3: .*{found}"):
        load_abilities([f"{kind}:{tmp_path / 'bad.jsonl'}"])


def test_bad_specs_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"prompt": "a", "answer": "b"}])
    for query, found in (
        ("?metric=rouge", "metric: expected exact or bleu, found 'rouge'"),
        ("?limit=0", "limit: expected a number above 0, found '0'"),
        ("?limit=-3", "limit: expected a number above 0, found '-3'"),
        ("?size=3", "unknown option 'size'; expected name, metric, limit or primary"),
    ):
        with pytest.raises(ValueError, match=found):
            load_abilities([f"generate:{path}{query}"])
    with pytest.raises(ValueError, match=r"expected different names, found 'x' twice; name one with \?name="):
        load_abilities([f"generate:{path}", f"generate:{path}?metric=bleu"])
    assert [a.name for a in load_abilities([f"generate:{path}", f"generate:{path}?metric=bleu&name=y"])] == ["x", "y"]
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: expected one json object a line, found an empty file"):
        load_abilities([f"generate:{tmp_path / 'empty.jsonl'}"])
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        load_abilities([f"generate:{tmp_path / 'absent.jsonl'}"])


def test_limits_take_the_first_by_hash_and_decide_the_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"context": f"c{n}", "continuation": "x"} for n in range(60)])
    whole, cut = load_abilities([f"continue:{path}", f"continue:{path}?limit=4&name=cut"])
    model, words = tiny("llama"), tokenizer()
    for part in PARTS:
        keys = whole.measure(model, words, part)[0].keys
        assert keys == tuple(sorted(keys))
        assert cut.measure(model, words, part)[0].keys == keys[:4]
        assert cut.measure(model, words, part, limit=2)[0].keys == keys[:2]
        assert cut.measure(model, words, part, limit=9)[0].keys == keys[:4]
    assert whole.fingerprint != cut.fingerprint
    other = write(tmp_path / "y.jsonl", [{"context": f"c{n}", "continuation": "x"} for n in range(61)])
    assert load_abilities([f"continue:{other}"])[0].fingerprint != whole.fingerprint


def test_a_part_without_items_is_refused(tmp_path: Path) -> None:
    record = {"context": "a", "continuation": "b"}
    ability = load_abilities([f"continue:{write(tmp_path / 'x.jsonl', [record])}"])[0]
    empty = next(part for part in PARTS if part != part_of(digest(record)))
    with pytest.raises(ValueError, match=rf"x\.jsonl: expected items in the {empty} part, found none among 1"):
        ability.measure(tiny("llama"), tokenizer(), empty)


def test_batches_do_not_change_the_scores(tmp_path: Path) -> None:
    records = [{"query": f"is {'x' * (n % 7)} it?", "choices": WORDS[: 2 + n % 4], "gold": 0} for n in range(30)]
    ability = load_abilities([f"choices:{write(tmp_path / 'x.jsonl', records)}"])[0]
    model, words = tiny("llama"), tokenizer()
    one, many = (ability.measure(model, words, "proxy", Drawing(batch_size=b))[0] for b in (1, 16))
    np.testing.assert_allclose(one.statistics, many.statistics, atol=1e-5)


# What does not fit


LONG = "ab " * 60


@pytest.mark.parametrize(("kind", "record", "found"), [
    ("choices", {"query": LONG, "choices": ["de", "efg"], "gold": 0}, 183),
    ("continue", {"context": LONG, "continuation": "de"}, 182),
    ("continue", {"context": "", "continuation": LONG}, 181),
    ("generate", {"prompt": LONG[:100], "answer": "de"}, 140),
    ("generate", {"messages": [{"role": "user", "content": LONG}], "answer": "de"}, 225),
])  # fmt: skip
def test_items_beyond_the_context_are_refused_with_their_place(
    tmp_path: Path, kind: str, record: dict[str, Any], found: int
) -> None:
    fits: dict[str, Any] = {"choices": {"query": "q", "choices": ["de", "efg"], "gold": 0}}
    fits |= {"continue": {"context": "a", "continuation": "b"}, "generate": {"prompt": "a", "answer": "b"}}
    rows = [{**fits[kind], **{n: f"{v}{i}" for n, v in fits[kind].items() if isinstance(v, str)}} for i in range(9)]
    path = write(tmp_path / "long.jsonl", [*rows, record])
    words = tokenizer()
    words.chat_template = TEMPLATE
    (ability,) = load_abilities([f"{kind}:{path}"])
    assert isinstance(ability, FileAbility)
    said = (
        rf"long: {path}, line 10: expected items of at most 128 tokens .*, found {found} \(1 of 10 items are too long\)"
    )
    with pytest.raises(ValueError, match=said):
        ability.refuse_long(words, Drawing(max_new_tokens=40), 128)
    ability.refuse_long(words, Drawing(max_new_tokens=40), None)
    ability.refuse_long(words, Drawing(max_new_tokens=40), found)


def test_a_place_does_not_change_a_key_or_a_fingerprint(tmp_path: Path) -> None:
    record = {"context": "a", "continuation": "b"}
    (tmp_path / "b.jsonl").write_text("\n\n" + json.dumps(record))
    files = (write(tmp_path / "a.jsonl", [record]), tmp_path / "b.jsonl")
    first, second = (load_abilities([f"continue:{file}?name=x"])[0] for file in files)
    assert first.fingerprint == second.fingerprint
    assert [a.items[0].place[-6:] for a in (first, second)] == ["line 1", "line 3"]  # type: ignore[attr-defined]


# Equal choices


@pytest.mark.parametrize("gold", [0, 1, 2])
def test_choices_of_one_text_share(tmp_path: Path, gold: int) -> None:
    records = [{"query": f"abc{n}", "choices": ["de", "de ", "de"], "gold": gold} for n in range(30)]
    (ability,) = load_abilities([f"choices:{write(tmp_path / 'c.jsonl', records)}"])
    accuracy = ability.measure(tiny("llama"), tokenizer(), "held-out")[1]
    np.testing.assert_allclose(accuracy.statistics, 100 / 3)
    assert accuracy.value == pytest.approx(accuracy.chance)


def test_credit_is_shared_among_the_best_alone() -> None:
    assert credit(["a", "b", "a"], 1, np.array([-1.0, -2.0, -1.0])) == 0.0
    assert credit(["a", "b", "a"], 0, np.array([-3.0, -2.0, -3.0])) == 0.0
    assert credit(["a", "b", "a"], 2, np.array([-1.0, -2.0, -1.0 - 1e-9])) == 50.0  # equal texts, apart by rounding
    assert credit(["a", "b", "c"], 1, np.array([-1.0, -1.0, -2.0])) == 50.0
    assert credit(["a", "b", "c"], 1, np.array([-2.0, -1.0, -2.0])) == 100.0


@pytest.mark.parametrize(("spec", "metric", "primary"), [
    ("choices?primary=accuracy", "exact", "accuracy"),
    ("choices?primary=logprob", "exact", None),
    ("continue?primary=nll", "exact", None),
    ("generate?primary=bleu", "bleu", "bleu"),
    ("generate?primary=exact", "exact", "exact"),
    ("generate?primary=-nll&metric=bleu", "bleu", None),
])  # fmt: skip
def test_the_metric_that_counts_is_named_in_the_spec(tmp_path: Path, spec: str, metric: str, primary: str) -> None:
    kind, _, query = spec.partition("?")
    line = {
        "query": "q",
        "choices": ["a", "b"],
        "gold": 1,
        "context": "a",
        "continuation": "b",
        "prompt": "a",
        "answer": "b",
    }
    path = write(tmp_path / "x.jsonl", [line])
    (found,) = load_abilities([f"{kind}:{path}?{query}"])
    assert isinstance(found, FileAbility)
    assert (found.metric, found.primary) == (metric, primary)
    (plain,) = load_abilities([f"{kind}:{path}" + ("?metric=bleu" if metric == "bleu" else "")])
    assert found.fingerprint == plain.fingerprint  # what is stored of one serves the other


@pytest.mark.parametrize(("spec", "message"), [
    ("choices?primary=exact", "primary: expected logprob or accuracy, found 'exact'"),
    ("continue?primary=accuracy", "primary: expected nll, found 'accuracy'"),
    ("generate?primary=rouge", "primary: expected nll or exact or bleu, found 'rouge'"),
    ("generate?metric=bleu&primary=exact", "primary: expected nll or bleu, found 'exact'"),
    ("choices?primary=", "primary: expected logprob or accuracy, found ''"),
])  # fmt: skip
def test_a_primary_metric_that_is_not_measured_is_refused_with_those_that_are(
    tmp_path: Path, spec: str, message: str
) -> None:
    kind, _, query = spec.partition("?")
    with pytest.raises(ValueError, match=message):
        load_abilities([f"{kind}:{tmp_path / 'not-read.jsonl'}?{query}"])
