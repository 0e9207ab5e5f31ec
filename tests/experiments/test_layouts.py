"""The published layouts of BanditMTL's two data sets."""

import tarfile

import pytest
from layouts import NEWSGROUPS, read_tasks, strip_message

from counterpoise.classification import Split


def test_texts_of_any_tasks_test_part_leave_training_and_validation_when_asked(tmp_path):
    lines = [f"{i % 2}\ttext {i}" for i in range(60)]
    for name, tested in (("a", lines[:3]), ("b", lines[3:6])):
        (tmp_path / f"{name}.task.train").write_text("\n".join(lines))
        (tmp_path / f"{name}.task.test").write_text("\n".join(tested))
    kept, dropped = (read_tasks(tmp_path, "fdu-mtl", drop_leaked=drop) for drop in (False, True))
    leaked = {f"text {i}" for i in range(6)}
    for before, after in zip(kept, dropped, strict=True):
        assert after.test == before.test
        for part in ("train", "validation"):
            held, left = before.split(part), after.split(part)
            pairs = [p for p in zip(held.texts, held.labels, strict=True) if p[0] not in leaked]
            assert list(zip(left.texts, left.labels, strict=True)) == pairs
        assert leaked <= set(before.train.texts + before.validation.texts)


def test_fdu_mtl_as_files_and_as_an_archive(tmp_path):
    lines = [b"1\twonderful , truly \xff great", b"0\tdull book \x97"] * 20
    lines = [line + b" %d" % i for i, line in enumerate(lines)]
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "books.task.train").write_bytes(b"\r\n".join(lines) + b"\r\n")
    (folder / "books.task.test").write_bytes(b"0\tbad\n1\tgood\n")
    with tarfile.open(tmp_path / "packed.tar.gz", "w:gz") as archive:
        archive.add(folder, arcname=".")
    [books] = read_tasks(folder, "fdu-mtl")
    assert books.labels == ("0", "1")
    assert books.test == Split(("bad", "good"), ("0", "1"))
    assert "wonderful , truly \ufffd great 0" in books.train.texts + books.validation.texts
    assert len(books.train) + len(books.validation) == 40
    assert read_tasks(tmp_path / "packed.tar.gz", "fdu-mtl") == [books]
    only = tmp_path / "only"
    only.mkdir()
    (tmp_path / "packed.tar.gz").rename(only / "packed.tar.gz")
    assert read_tasks(only, "fdu-mtl") == [books]


MESSAGE = """From: a@b (Ann)
Subject: Re: engines
Lines: 9

In article <1@x>, Bob writes:
> It runs.
| Indeed.
It does not run.

Try the caf\u00e9.

--
Ann, Dept. of Engines
"""


def test_a_message_without_header_quotes_and_footer():
    assert strip_message(MESSAGE) == "It does not run.\n\nTry the caf\u00e9."


@pytest.mark.parametrize("message", ["From: a\n\n", "no blank line", "From: a\n\n> all quoted\n"])
def test_a_message_of_which_nothing_remains(message):
    assert strip_message(message) == ""


def test_messages_are_stripped_as_scikit_learn_does():
    from sklearn.datasets import _twenty_newsgroups as news

    for message in (MESSAGE, MESSAGE.replace("--", "-----"), "a: b\n\nBody\n\n\nFoot\n\nEnd", "a: b\n\n--\nBody"):
        body = news.strip_newsgroup_quoting(news.strip_newsgroup_header(message))
        assert strip_message(message) == news.strip_newsgroup_footer(body).strip()


def test_newsgroups_by_date(tmp_path):
    for part in ("train", "test"):
        for group in (*(g for groups in NEWSGROUPS.values() for g in groups), "alt.atheism"):
            folder = tmp_path / f"20news-bydate-{part}" / group
            folder.mkdir(parents=True)
            for i in range(20 if part == "train" else 1):
                (folder / str(i)).write_bytes(f"From: x\n\nAbout {group}, {i} \u00e9\n".encode("latin-1"))
    found = read_tasks(tmp_path, "newsgroups")
    assert [t.name for t in found] == ["comp", "rec", "sci", "talk"]
    assert all(len(t.labels) == 4 and len(t.test) == 4 for t in found)
    assert all(len(t.train) + len(t.validation) == 80 for t in found)
    assert found[1].test.texts[0] == "About rec.autos, 0 \u00e9"
    assert found[1].test.labels[0] == "rec.autos"


def test_bad_fdu_lines(tmp_path):
    (tmp_path / "books.task.train").write_text("1\tgood\n0 bad\n")
    with pytest.raises(ValueError, match=r"books\.task\.train, line 2: expected LABEL<TAB>TEXT, found '0 bad'"):
        read_tasks(tmp_path, "fdu-mtl")
    (tmp_path / "books.task.train").write_text("\n")
    with pytest.raises(ValueError, match="found none; fill the file"):
        read_tasks(tmp_path, "fdu-mtl")


def test_the_real_reviews(data):
    found = read_tasks(data / "sentiment-reviews", "fdu-mtl")
    assert len(found) == 14
    assert sum(len(t.train) + len(t.validation) for t in found) == 22_180
    assert all(len(t.test) == 400 and t.labels == ("0", "1") for t in found)
    assert sum(x in set(t.train.texts) for t in found for x in t.test.texts) == 483
    clean = read_tasks(data / "sentiment-reviews", "fdu-mtl", drop_leaked=True)
    tested = {x for t in found for x in t.test.texts}
    assert [t.test for t in clean] == [t.test for t in found]
    assert not any(tested & {*t.train.texts, *t.validation.texts} for t in clean)


def test_the_real_newsgroups(data):
    found = read_tasks(data / "newsgroups", "newsgroups")
    assert [(t.name, len(t.labels)) for t in found] == [("comp", 4), ("rec", 4), ("sci", 4), ("talk", 4)]
    sizes = {t.name: (len(t.train) + len(t.validation), len(t.test)) for t in found}
    assert sizes == {"comp": (2346, 1563), "rec": (2389, 1590), "sci": (2373, 1579), "talk": (1952, 1301)}
    assert not any("Subject:" in text[:200] and "Lines:" in text[:200] for t in found for text in t.train.texts[:50])
