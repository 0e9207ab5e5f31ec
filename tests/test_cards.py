"""The cards and records that go with a written checkpoint: what the hub reads, on what terms, and nobody's folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from typer.testing import CliRunner

from counterpoise.averaging.average import average
from counterpoise.averaging.merge import Merge, merge
from counterpoise.checkpoints.about import about, inherited
from counterpoise.cli.app import app
from counterpoise.records import public
from counterpoise.tables.card import front_matter
from tiny import save_pair
from world import make


def card(folder: Path, **told: object) -> None:
    (folder / "README.md").write_text(
        "---\n" + "".join(f"{k}: {json.dumps(v)}\n" for k, v in told.items()) + "---\n# Mine\n"
    )


def test_the_licence_is_inherited_and_two_that_differ_are_named(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    card(pre, license="apache-2.0", language=["en", "fr"], pipeline_tag="text-generation")
    average(pre, post, tmp_path / "one", 0.5)
    told = metadata_load(tmp_path / "one" / "README.md")
    assert told["license"] == "apache-2.0"
    assert told["language"] == ["en", "fr"]
    assert told["pipeline_tag"] == "text-generation"
    assert told["library_name"] == "transformers"
    assert told["tags"] == ["merge", "counterpoise"]
    card(post, license="other", license_name="llama3", license_link="LICENSE")
    made = average(pre, post, tmp_path / "two", 0.5)
    assert "license" not in metadata_load(tmp_path / "two" / "README.md")
    assert any("licences differ (PRE apache-2.0, POST other llama3)" in w for w in made.warnings)
    merged = merge(pre, [post], tmp_path / "three", Merge())
    assert any("licences differ" in w for w in merged.warnings)
    card(pre, license="other", license_name="llama3", license_link="LICENSE")
    average(pre, post, tmp_path / "four", 0.5)
    assert metadata_load(tmp_path / "four" / "README.md")["license_name"] == "llama3"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "---\na: [\n---\n",
        "---\n- 1\n---\n",
        "---\nlicense: {a: 1}\n---\n",
        "\xff",
        "---\nlicense: 2020-01-01\n---\n",
    ],
)
def test_a_card_that_says_nothing_usable_is_no_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    assert about(tmp_path) == {}
    assert inherited({"PRE": {}, "POST": {}}) == ({}, [])


def test_nothing_that_is_written_names_a_folder_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("secret place", "elsewhere"):
        (tmp_path / name).mkdir()
    folder = make(tmp_path / "secret place")
    monkeypatch.chdir(tmp_path / "elsewhere")
    words = [folder / "pre", folder / "post", "-o", folder / "out", "--prompts", folder / "prompts.jsonl"]
    words += ["--reward", "world:early_letters", "--abilities", f"choices:{folder / 'guess.jsonl'}?limit=60"]
    words += ["--abilities", f"continue:{folder / 'text.jsonl'}", "--means", "0.5", "--no-controls", "--proxy-size", 12]
    words += ["--max-new-tokens", 6, "--prompt-limit", 30, "--keep-reward", 0.1, "-q", "--device", "cpu"]
    done = CliRunner().invoke(app, ["restore", *map(str, words)])
    assert done.exit_code == 0, done.output
    out = folder / "out"
    for file in ("README.md", "recipe.json", "restore.json", "report.html"):
        assert str(tmp_path) not in (out / file).read_text(encoding="utf-8"), file
    kept = ModelCard.load(out / "README.md")
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in kept.data.eval_results}
    rows = json.loads((out / "restore.json").read_text())["tax"]
    assert found == {(r["name"], r["metric"]): r["pick"]["value"] for r in rows}
    again = CliRunner().invoke(app, ["restore", *map(str, words)])
    assert "nothing was done again" in again.output


def test_names_take_the_place_of_paths_and_nothing_else_changes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "cache" / "models--org--name" / "snapshots" / "abc").mkdir(parents=True)
    given = {
        "x": [f"choices:{tmp_path}/a?limit=3", "http://host/a/b", "and/or", "1 / 2", f"--out={tmp_path}/a", 3, None]
    }
    assert public(given) == {"x": ["choices:a?limit=3", "http://host/a/b", "and/or", "1 / 2", "--out=a", 3, None]}
    assert public(f"{tmp_path}/cache/models--org--name/snapshots/abc") == "org/name"
    assert public("/no/such/thing") == "/no/such/thing"


TOLD = [
    {},
    {"license": "mit", "language": ["en", "dé"], "pipeline_tag": "text-generation"},
    {"license": "other", "license_name": "x", "license_link": "LICENSE", "language": "en"},
]


@pytest.mark.parametrize("source", ["org/name", "folder"])
@pytest.mark.parametrize("card", TOLD)
def test_the_front_matter_is_what_the_hubs_own_code_writes(source: str, card: dict[str, Any]) -> None:
    hub = {"base_model": [source], "base_model_relation": "merge"} if "/" in source else {}
    wanted = ModelCardData(library_name="transformers", tags=["merge", "counterpoise"], **hub, **card).to_yaml()
    assert front_matter({"pre": {"source": source, "card": card}}, relation="merge") == f"---\n{wanted}\n---"
