"""Readers: what the files say is what the tasks hold, and bad files are named with their line."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from counterpoise.classification import Split, read_tasks
from counterpoise.classification.data import content_split, whole
from counterpoise.classification.parts import SPLITS

from .worlds import rows, write_folder

EACH = ("train", "validation", "test")


def write(folder: Path, **files: str) -> Path:
    """Files by name, with __ for a dot."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content, encoding="utf-8")
    return folder


def test_three_formats_with_their_own_splits(tmp_path):
    write(
        tmp_path,
        a__train__csv='label,id,text\n1,7,"good, really\ngood"\n0,8,bad\n',
        a__val__tsv='text\tlabel\nso "so\t0\n',
        a__test__jsonl='{"text": "fine", "label": 1}\n\n{"text": "poor", "label": "0"}\n',
        README__md="not a task",
    )
    [task] = read_tasks(tmp_path)
    assert task.name == "a"
    assert task.labels == ("0", "1")
    assert task.train == Split(("good, really\ngood", "bad"), ("1", "0"))
    assert task.validation == Split(('so "so',), ("0",))
    assert task.test == Split(("fine", "poor"), ("1", "0"))


def test_tasks_of_any_size_and_number_of_classes_in_the_order_asked_for(tmp_path):
    write_folder(tmp_path, colours=300, animals=90)
    animal, colour = read_tasks(tmp_path)
    assert (animal.name, animal.labels) == ("animal", ("cat", "cow", "dog"))
    assert (colour.name, colour.labels) == ("colour", ("blue", "red"))
    assert [t.name for t in read_tasks(tmp_path, tasks=["colour", "animal"])] == ["colour", "animal"]
    assert [t.name for t in read_tasks(tmp_path, tasks=["animal"])] == ["animal"]
    assert sum(len(colour.split(p)) for p in SPLITS) == 300
    assert read_tasks(tmp_path) == [animal, colour]


def test_classes_that_are_numbers_are_ordered_by_value(tmp_path):
    lines = "".join(f"text {i},{(10, 9, 100)[i % 3]}\n" for i in range(90))
    [task] = read_tasks(write(tmp_path, a__csv="text,label\n" + lines))
    assert task.labels == ("9", "10", "100")


def test_the_split_is_a_property_of_the_text(tmp_path):
    few = [(f"text number {i}", str(i % 2)) for i in range(300)]
    many = few + [(f"another {i}", str(i % 2)) for i in range(700)]
    parts = {}
    for name, made in (("few", few), ("many", many[::-1])):
        table = "text,label\n" + "".join(f"{t},{x}\n" for t, x in made)
        [task] = read_tasks(write(tmp_path / name, a__csv=table))
        parts[name] = {text: part for part in SPLITS for text in task.split(part).texts}
    assert parts["few"].items() <= parts["many"].items()
    shares = [sum(p == part for p in parts["many"].values()) / 1000 for part in EACH]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.03)


def test_golden_parts_of_three_texts():
    assert [content_split(x) for x in ("a fine book", "dull", "never again, it broke")] == [
        "test",
        "validation",
        "train",
    ]
    assert [content_split(x, ["validation"]) for x in ("a fine book", "dull")] == ["train", "validation"]
    assert [content_split(x, []) for x in ("a fine book", "dull")] == ["train", "train"]


def test_a_test_file_leaves_the_rest_for_training_and_validation(tmp_path):
    table = "text,label\n" + "".join(f"{t},{x}\n" for t, x in rows("colour", 200))
    [task] = read_tasks(write(tmp_path, a__csv=table, a__test__csv="text,label\nrose,red\n"))
    assert task.test == Split(("rose",), ("red",))
    assert len(task.train) + len(task.validation) == 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,stars\ngood,1\n", r"a\.csv, line 1: expected the columns text, label, found text, stars \(no label\)"),
        (b"", r"a\.csv: expected rows with text and label, found none; fill the file or leave it out"),
        (b"text,label\n", r"a\.csv: expected rows .* found none; fill the file"),
        (b"text,label\ngood,1\nbad\n", r"a\.csv, line 3: expected 2 columns .* found 1"),
        (b"text,label\ngood, nice,1\n", r"a\.csv, line 2: .* found 3; quote texts with commas"),
        (b"text,label\ngood,1\nbad, \n", r"a\.csv, line 3: expected 2 columns|a\.csv, line 3: expected a label"),
        (b'text,label\n"good" x,1\n', r"a\.csv, line 2: expected csv, found"),
        (b"text,label\ngood,1\ncaf\xe9,0\n", r"a\.csv, line 3: expected utf-8, found .*byte 0xe9.*; save it as utf-8"),
    ],
)
def test_bad_csv_files(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_tasks(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("good\t1", r"line 2: expected json, found"),
        ('{"text": "good"}', r"line 2: expected the columns text, label, found text \(no label\)"),
        ('{"text": 3, "label": 1}', r"line 2: expected text in text, found 3"),
        ('["good", 1]', r"line 2: expected a json object, found"),
        ('{"text": "good", "label": {}}', r"line 2: expected a label, a word or a number, found \{\}"),
        ('{"text": "good", "label": null}', r"line 2: expected a label"),
        ('{"text": "go\\ud800od", "label": 1}', r"line 2: expected json, .*half of a surrogate pair"),
    ],
)
def test_bad_jsonl_lines(tmp_path, line, message):
    write(tmp_path, a__jsonl='{"text": "x", "label": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_tasks(tmp_path)


def test_bad_sources_and_tasks(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder or a tar archive of task files, found nothing"):
        read_tasks(tmp_path / "absent")
    write(tmp_path, notes__txt="hello")
    with pytest.raises(ValueError, match="expected a folder or a tar archive, found another file"):
        read_tasks(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match=r"expected files NAME.csv, .*, found none; is the layout right\?"):
        read_tasks(tmp_path)
    with pytest.raises(ValueError, match="layout: expected folder, glue, found 'csv'"):
        read_tasks(tmp_path, "csv")
    write_folder(tmp_path)
    with pytest.raises(ValueError, match=r"expected tasks among \['animal', 'colour'\], found \['colours'\]"):
        read_tasks(tmp_path, tasks=["animal", "colours"])
    with pytest.raises(ValueError, match="found more than once: \\['animal'\\]"):
        read_tasks(tmp_path, tasks=["animal", "animal"])
    write(tmp_path, colour__train__tsv="text\tlabel\nx\ty\n")
    with pytest.raises(ValueError, match="expected one train file for the task 'colour', found another"):
        read_tasks(tmp_path)


def test_bad_labels_and_empty_parts(tmp_path):
    write(tmp_path, a__csv="text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(60)))
    write(tmp_path, a__test__csv="text,label\nx,2\n")
    with pytest.raises(ValueError, match=r"task 'a': expected in test the labels of training, .* found \['2'\]"):
        read_tasks(tmp_path)
    write(tmp_path, a__test__csv="text,label\nx,1\n", a__csv="text,label\ny,1\nq,0\n")
    with pytest.raises(ValueError, match=r"task 'a': expected examples for validation, found none .*a\.validation"):
        read_tasks(tmp_path)
    assert len(read_tasks(tmp_path, need=["train", "test"])[0].validation) == 0
    write(tmp_path, a__csv="text,label\n" + "".join(f"text {i},1\n" for i in range(60)))
    with pytest.raises(ValueError, match="expected at least two classes in training, found only \\['1'\\]"):
        read_tasks(tmp_path)


def test_a_test_file_alone_is_enough_for_an_evaluation(tmp_path):
    write(tmp_path, a__test__jsonl=json.dumps({"text": "x", "label": True}))
    [task] = read_tasks(tmp_path, need=["test"])
    assert task.test == Split(("x",), ("True",))
    with pytest.raises(ValueError, match="expected examples for train"):
        read_tasks(tmp_path)


def test_long_texts_and_byte_order_marks(tmp_path):
    table = io.StringIO()
    table.write("\ufefftext,label\n" + "word " * 40_000 + ",1\n")
    table.write("".join(f"text {i},{i % 2}\n" for i in range(60)))
    [task] = read_tasks(write(tmp_path, a__csv=table.getvalue()))
    assert max(len(t) for p in SPLITS for t in task.split(p).texts) == 200_000


ROWS = "text,label\n" + "".join(f"text {i},{'good' if i % 3 else 'bad'}\n" for i in range(60))


@pytest.mark.parametrize("names", [("train", "dev", "test"), ("Train", "VALID", "Test")])
def test_parts_that_lie_in_the_folder_itself_are_one_task_by_its_name(tmp_path, names):
    folder = write(tmp_path / "films", **{f"{name}__csv": ROWS for name in names})
    [films] = read_tasks(folder)
    assert (films.name, len(films.train), len(films.validation), len(films.test)) == ("films", 60, 60, 60)
    with tarfile.open(tmp_path / "reviews.tar.gz", "w:gz") as archive:
        for name in names:
            archive.add(folder / f"{name}.csv", f"./{name}.csv")
    assert [t.name for t in read_tasks(tmp_path / "reviews.tar.gz")] == ["reviews"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("books_train", "books_test"),
        ("books-train", "books-dev"),
        ("train_books", "test_books"),
        ("train-00000-of-00001", "test-00000-of-00001"),
        ("train", "validation_matched"),
        ("train1", "test"),
        ("training_a", "testing_b"),
        ("books", "books_test"),
    ],
)
def test_files_that_are_named_as_parts_in_another_way_are_no_tasks(tmp_path, one, other):
    folder = write(tmp_path / "data", **{f"{one}__csv": ROWS, f"{other}__csv": ROWS})
    with pytest.raises(
        ValueError, match=r"expected the parts of a task as NAME.train, .* a task of its own; rename the file"
    ):
        read_tasks(folder)
    assert len(read_tasks(folder, tasks=[one, other], need=[])) == 2


def test_a_task_may_be_called_like_a_part(tmp_path):
    names = [t.name for t in read_tasks(write(tmp_path, speed_test__csv=ROWS, crash_test__csv=ROWS))]
    assert names == ["crash_test", "speed_test"]
    beside = write(tmp_path / "beside", books__train__csv=ROWS, books__test__csv=ROWS, speed_test__csv=ROWS)
    assert [t.name for t in read_tasks(beside)] == ["books", "speed_test"]


def test_words_for_parts_and_folders_of_parts(tmp_path):
    [books] = read_tasks(write(tmp_path / "one", books__training__csv=ROWS, books__eval__csv=ROWS))
    assert (len(books.validation), len(books.train) + len(books.test)) == (60, 60)
    for part in ("train", "dev", "heldout"):
        (tmp_path / "two").mkdir(exist_ok=True)
        write(tmp_path / "two" / part, books__csv=ROWS, films__csv=ROWS)
    for task in read_tasks(tmp_path / "two"):
        assert (task.name in ("books", "films"), *(len(task.split(p)) for p in SPLITS)) == (True, 60, 60, 60)


def test_files_that_are_linked_to_are_read_and_a_link_to_nothing_is_said(tmp_path):
    write(tmp_path / "elsewhere", train__csv=ROWS)
    data = write(tmp_path / "data", a__csv=ROWS)
    (data / "b").symlink_to(tmp_path / "elsewhere")
    (data / "round").symlink_to(data)
    assert [t.name for t in read_tasks(data)] == ["a", "b"]
    with tarfile.open(tmp_path / "links.tar", "w") as archive:
        archive.add(data / "a.csv", "a.csv")
        for kind, name in ((tarfile.LNKTYPE, "b.csv"), (tarfile.SYMTYPE, "c.csv")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "a.csv"
            archive.addfile(link)
    assert [t.name for t in read_tasks(tmp_path / "links.tar")] == ["a", "b", "c"]
    (data / "c.csv").symlink_to(tmp_path / "lost.csv")
    with pytest.raises(FileNotFoundError, match=r"c\.csv"):
        read_tasks(data)


def test_files_of_tasks_that_nobody_asked_for_are_not_read(tmp_path):
    data = write(tmp_path, a__csv=ROWS, b__csv="no,columns\nof,mine\n")
    assert [t.name for t in read_tasks(data, tasks=["a"])] == ["a"]
    with pytest.raises(ValueError, match=r"expected tasks among \['a', 'b'\], found \['c'\]"):
        read_tasks(data, tasks=["c"])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("text,label\n" + "a,-\nb,x\nc,y\n" * 20, "20 rows have the label '-', which often says that there is none"),
        ("text,label\n" + "a,0\nb,1\nc,2\n" * 20 + "d,-1\n", "1 rows have the label '-1'"),
        ("text,label\n" + "a,Pos\nb,pos\n" * 20, r"the labels \['Pos', 'pos'\] look alike"),
        ("text,label\n" + "a,False\nb,0\nc,1\n" * 20, r"the labels \['0', 'False'\] look alike"),
        ("text,label\n" + "a,01\nb,1\n" * 20, r"the labels \['01', '1'\] look alike"),
        ("text,label\n" + "a,caf\u00e9\nb,cafe\u0301\n" * 20, "look alike"),
        ("text,label\n" + 'a,"x,y"\nb,"y,z"\nc,"x,z"\n' * 20, "the label 'x,y' looks like several"),
        ("text,label\n" + 'a,"[0, 2]"\nb,"[1, 2]"\n' * 20, r"labels such as '\[0, 2\]' look like lists"),
        ("text,label\n" + "a,[0 2]\nb,[1 2]\n" * 20, r"labels such as '\[0 2\]' look like lists"),
        ("text,title,label\n" + "a,b,x\nc,d,y\n" * 20, "text is the text, title is not read"),
        ("task,text,label\n" + "a,b,x\nc,d,y\n" * 20, "a file is one task, write one for each"),
        ('text,label\n"so,x\na,x\nb,y\nc,x\n",y\nd,x\ne,y\n', "is there a quote too many"),
    ],
)
def test_what_looks_as_if_something_else_was_meant_is_said(tmp_path, content, told):
    with pytest.warns(UserWarning, match=told):
        read_tasks(write(tmp_path, a__csv=content), need=[])


@pytest.mark.parametrize(
    "content",
    [
        "text,label\n" + "a,-1\nb,0\nc,1\n" * 20,
        "text,label\n" + 'a,"Paris, France"\nb,"Lyon, France"\n' * 20,
        "text,label\n" + "a,true\nb,false\n" * 20,
        'text,label\n"one\ntwo, three\nfour",x\nb,y\n',
    ],
)
def test_what_is_well_meant_is_not_doubted(tmp_path, content, recwarn):
    read_tasks(write(tmp_path, a__csv=content), need=[])
    assert not recwarn.list


def test_a_tsv_that_was_written_with_quotes_is_said(tmp_path):
    with pytest.warns(UserWarning, match=r"a.tsv: 1 rows have cells in quotes, with the quotes in them doubled"):
        read_tasks(write(tmp_path, a__tsv='text\tlabel\n"say ""so"""\tx\n"as is" said\ty\n'), need=[])


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_an_empty_list_of_labels_is_a_list(tmp_path, kind):
    lists = [["joy"], [], ["joy", "anger"], ["anger"]] * 10
    if kind == "jsonl":
        made = "".join(json.dumps({"text": f"t{i}", "tags": x}) + "\n" for i, x in enumerate(lists))
    else:
        made = "text,tags\n" + "".join(f't{i},"{x}"\n' for i, x in enumerate(lists))
    [task] = read_tasks(write(tmp_path, **{f"a__{kind}": made}), label=["tags"], need=[])
    assert (task.kind, task.labels) == ("labels", ("anger", "joy"))
    assert sum(y == () for p in SPLITS for y in task.split(p).labels) == 10


def test_labels_parted_by_commas_where_they_are_asked_for(tmp_path):
    data = write(tmp_path, a__csv="text,label\n" + 'a,"x,y"\nb,y\nc,\n' * 20, b__csv="text,label\n" + "a,x\nb,y\n" * 20)
    with pytest.raises(ValueError, match=r"a\.csv, line 4: expected a label, a word or a number, found ''"):
        read_tasks(data, need=[])
    a, b = read_tasks(data, kinds={"a": "labels"}, need=[])
    assert (a.kind, a.labels, b.kind) == ("labels", ("x", "y"), "classes")
    with pytest.raises(ValueError, match="expected labels separated by commas, found 'x;y'"):
        read_tasks(write(tmp_path / "c", a__csv='text,labels\na,x;y\nb,"x,y"\n'), need=[])
    with pytest.raises(ValueError, match="expected a list of labels, as other rows have, found 'x'"):
        read_tasks(write(tmp_path / "d", a__csv="text,label\na,x\nb,['x']\n"), need=[])


def test_hidden_files_are_no_tasks_and_other_data_is_named(tmp_path):
    folder = write(tmp_path, films__CSV=ROWS, books__csv__gz="", notes__md="", more__parquet="", __hidden__csv=ROWS)
    write(folder / ".ipynb_checkpoints", films__csv=ROWS)
    with pytest.warns(
        UserWarning, match=r"only csv, tsv and jsonl files are read; left out: books.csv.gz, more.parquet$"
    ):
        assert [t.name for t in read_tasks(folder)] == ["films"]


def test_a_label_that_no_row_or_every_row_of_training_has(tmp_path):
    rows = "text,rude,loud,late\n" + "".join(f"text {i},{i % 2},{i % 3 and 1},0\n" for i in range(60))
    with pytest.warns(UserWarning, match="task 'a': no row of training has the label late; it is left out"):
        [task] = read_tasks(write(tmp_path / "one", a__csv=rows), label=["rude", "loud", "late"])
    assert task.labels == ("loud", "rude")
    rows = "".join(json.dumps({"text": f"text {i}", "labels": ["a", "b"]}) + "\n" for i in range(60))
    with pytest.raises(
        ValueError, match=r"that all of \['a', 'b'\] hold in every one; a list names the labels that hold"
    ):
        read_tasks(write(tmp_path / "two", a__jsonl=rows))


def test_an_evaluation_takes_the_labels_of_all_rows_and_whole_all_of_them(tmp_path):
    folder = write(tmp_path, films__train__csv="text,label\na,bad\nb,bad\n", films__test__csv="text,label\nc,good\n")
    [films] = read_tasks(folder, need=["test"])
    assert films.labels == ("bad", "good")
    assert sorted(whole(films).test.labels) == ["bad", "bad", "good"]


def test_whole_numbers_are_spelled_alike_in_all_files_of_a_task_and_versions_are_not(tmp_path):
    made = {f"{name}__csv": f"text,label\na,{x}\nb,{y}\n" for name, x, y in [
        ("v__train", "1.0", "2.0"), ("v__dev", "1", "2"), ("v__test", "2.0", "1"),
        ("w__train", "1.0", "1.5"), ("w__dev", "1.0", "1.5"), ("w__test", "1.0", "1.0"),
    ]}  # fmt: skip
    v, w = read_tasks(write(tmp_path, **made), kinds={"w": "classes"})
    assert (v.labels, v.test.labels) == (("1", "2"), ("2", "1"))
    assert (w.labels, w.test.labels) == (("1.0", "1.5"), ("1.0", "1.0"))


def test_names_that_are_asked_for_are_tasks_whatever_they_look_like(tmp_path):
    both = write(tmp_path / "both", stress__csv=ROWS, stress_test__csv=ROWS)
    assert [t.name for t in read_tasks(both, tasks=["stress", "stress_test"])] == ["stress", "stress_test"]
    folders = tmp_path / "folders"
    for name in ("stress", "stress_test"):
        write(folders / name, train__csv=ROWS) if folders.exists() else (
            folders.mkdir(),
            write(folders / name, train__csv=ROWS),
        )
    assert [t.name for t in read_tasks(folders)] == ["stress", "stress_test"]
    alone = write(tmp_path / "sst-v1.0", train__csv=ROWS, test__csv=ROWS)
    assert [(t.name, len(t.test)) for t in read_tasks(alone)] == [("sst-v1.0", 60)]
    assert [(t.name, len(t.test)) for t in read_tasks(alone, tasks=["films"])] == [
        ("films", 60)
    ]  # the only one asked for
    assert [t.name for t in read_tasks(alone, tasks=["train"], need=["test"])] == ["train"]
