"""Tokens, the vocabulary and files in GloVe's format."""

import gzip

import layouts
import pytest
import torch

from counterpoise.classification import Vocabulary, read_vectors, tokenize, word_vectors

TEXTS = ["Good good book", "good tea", "rare book"]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Don't!", ["do", "n't", "!"]),
        ("larkin 's `` the book '' is n't", ["larkin", "'s", "``", "the", "book", "''", "is", "n't"]),
        ("well-kept, 3.5 stars -- we'll see...", ["well-kept", ",", "3.5", "stars", "--", "we", "'ll", "see", "..."]),
        ("Caf\u00e9 \u4f60\u597d!", ["caf\u00e9", "\u4f60", "\u597d", "!"]),
        ("Cafe\u0301s abc\u4f60x-y", ["caf\u00e9s", "abc", "\u4f60", "x-y"]),
        (
            "\u092b\u093f\u0932\u094d\u092e \u0905\u091a\u094d\u091b\u0940\u0964",
            ["\u092b\u093f\u0932\u094d\u092e", "\u0905\u091a\u094d\u091b\u0940", "\u0964"],
        ),
        ("\u0e14\u0e35", ["\u0e14", "\u0e35"]),
        (" \n", []),
    ],
)
def test_tokens(text, tokens):
    assert tokenize(text) == tokens
    assert tokenize(" ".join(tokens)) == tokens


def test_the_vocabulary_keeps_frequent_and_known_words_in_the_order_of_their_count(tmp_path):
    file = tmp_path / "vectors.txt"
    file.write_text("good 1 2\nrare 3 4\nunused 9 9\n")
    words, table_VD, found = word_vectors(TEXTS, file)
    assert words.words == ("good", "book", "rare")  # tea occurs once and has no vector
    assert found == 2
    assert table_VD.shape == (5, 2)
    assert table_VD[[0, 1, 2, 4]].tolist() == [[0, 0], [2, 3], [1, 2], [3, 4]]
    assert words.encode("rare tea, good", max_tokens=3) == [4, 1, 1]
    assert words.encode("", max_tokens=3) == [1]


def test_without_a_file_vectors_are_drawn_by_the_seed():
    words, table_VD, found = word_vectors(TEXTS, dimension=50, seed=3)
    assert words.words == ("good", "book")
    assert found == 0
    assert torch.equal(table_VD, word_vectors(TEXTS, dimension=50, seed=3).table_VD)
    assert not torch.equal(table_VD, word_vectors(TEXTS, dimension=50, seed=4).table_VD)
    assert float(table_VD[1:].std()) == pytest.approx(0.1, rel=0.3)
    assert word_vectors(TEXTS, max_words=1).vocabulary.words == ("good",)


def test_gz_word2vec_header_and_words_with_spaces(tmp_path):
    lines = "3 2\n. . 1 2\ngood 3 -4e-1\ngood 9 9\n"
    with gzip.open(tmp_path / "v.txt.gz", "wt") as file:
        file.write(lines.replace(". . 1 2", "x 1 2"))
    assert {w: v.tolist() for w, v in read_vectors(tmp_path / "v.txt.gz", ["good"]).items()} == {
        "good": pytest.approx([3.0, -0.4])
    }
    (tmp_path / "v.txt").write_text("x 1 2\n. . 5 6\n")
    assert read_vectors(tmp_path / "v.txt", [". ."])[". ."].tolist() == [5, 6]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("v.txt", b"", "expected lines of a word and its numbers, found an empty file"),
        ("v.txt", b"good 1 2\nbad 1\n", "line 2: expected a word and 2 numbers, found 'bad 1"),
        ("v.txt", b"good 1 2\nbad 1 x\n", r"line 2: expected 2 numbers after the word, found \['1', 'x'\]"),
        ("v.txt", b"good 1 nan\nbad 1 2\n", "line 1: expected finite numbers, found nan"),
        ("v.txt", b"good\n", "line 1: expected a word and its numbers"),
        ("v.txt.gz", gzip.compress(b"good 1 2\n" * 99, mtime=0)[:-12], "expected a whole gzip file"),
        ("v.txt", gzip.compress(b"good 1 2\n" * 99, mtime=0)[:-2], "expected a whole gzip file"),
        (
            "v.txt.gz",
            gzip.compress(b"good 1 2\n" * 99, mtime=0)[:10] + b"\xff" * 40,
            "found it damaged .*; fetch it again",
        ),
    ],
)
def test_bad_vector_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_vectors(tmp_path / name, ["good", "bad"])


def test_whether_vectors_are_gzipped_is_seen_and_not_told_by_the_name(tmp_path):
    for name, content in (("plain.gz", b"good 1 2\n"), ("zipped.txt", gzip.compress(b"good 1 2\n"))):
        (tmp_path / name).write_bytes(content)
        assert read_vectors(tmp_path / name, ["good"])["good"].tolist() == [1, 2]


def test_no_vector_file_and_none_that_fits(tmp_path):
    with pytest.raises(ValueError, match="expected a file of word vectors, found nothing"):
        read_vectors(tmp_path / "absent", ["good"])
    with pytest.raises(ValueError, match="found a folder"):
        read_vectors(tmp_path, ["good"])
    (tmp_path / "v.txt").write_text("gut 1 2\n")
    with pytest.raises(ValueError, match="found none of their 4 words"):
        word_vectors(TEXTS, tmp_path / "v.txt")
    with pytest.raises(ValueError, match="must differ, found more than once: \\['good'\\]"):
        Vocabulary(["good", "good"])


def test_the_real_vectors_know_most_words_of_the_real_reviews(data):
    [books] = layouts.read_tasks(data / "sentiment-reviews", "fdu-mtl", tasks=["books"])
    words, table_VD, found = word_vectors(books.train.texts, data / "glove-50d" / "glove.6B.50d.subset.txt.gz")
    assert table_VD.shape == (len(words), 50)
    assert found > 0.9 * len(words)
    tokens = [t for text in books.test.texts for t in tokenize(text)]
    known = set(words.words)
    assert sum(t in known for t in tokens) > 0.9 * len(tokens)


def test_a_vocabulary_that_reads_little_is_said_and_one_of_nothing_refused():
    with pytest.raises(ValueError, match="expected words that occur 2 times in training, found none among 3"):
        word_vectors(["one two three"])
    with pytest.warns(UserWarning, match="the vocabulary holds 40 % of the words of training"):
        word_vectors(["one one two three four"])
