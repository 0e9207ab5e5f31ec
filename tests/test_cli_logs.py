"""`counterpoise tax --from` as it is typed, and its page."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from counterpoise.cli.app import app
from counterpoise.report import page
from counterpoise.report.logs import logs_page
from evaluation.lm_logs import choice, write
from report import browser

OPTIONS = [
    "--prompts a", "--reward a", "--abilities a", "--work a", "--drop a", "--allow-unrelated", "--limit 5", "--prompt-limit 5",
    "--replies 2", "--seed 1", "--device cpu", "--dtype auto", "--batch-size 4", "--max-new-tokens 4", "--temperature 1",
    "--no-chat-template", "--trust-tasks", "--fast", "--engine vllm", "--tensor-parallel 2",
    "--shard", "--compile",
]  # fmt: skip


def run(*args: object) -> Result:
    return CliRunner().invoke(app, list(map(str, args)))


@pytest.fixture
def logs(tmp_path: Path) -> tuple[Path, Path]:
    draw = random.Random(0)
    made = []
    for name, gain in (("a", 3.0), ("b", 0.0)):
        rows = [choice(i, [draw.gauss(gain, 1), draw.gauss(0, 1)], 0) for i in range(40)]
        made.append(write(tmp_path / name, {"quiz": rows, name: rows}, versions={"quiz": 1}))
    return made[0], made[1]


def test_the_table_the_json_and_the_page_say_the_same(logs: tuple[Path, Path], tmp_path: Path) -> None:
    done = run("tax", "--from", *logs, "--page", tmp_path / "tax.html")
    assert done.exit_code == 0, done.output
    content = json.loads(run("tax", "--from", *logs, "--json").stdout)
    assert (
        content["verdict"]
        == "Of 1 task by the first metric, 1 fell and 0 rose (p < 0.05, adjusted over tasks by Holm)."
    )
    assert [r["metric"] for r in content["tax"]] == ["acc", "logprob"]
    html = (tmp_path / "tax.html").read_text()
    for told in (content["verdict"], *content["notes"]):
        assert told in done.output.replace("note: ", "")
        assert told.replace("<", "&lt;") in html
    assert f"Only in {logs[0]}, left out: a." in content["notes"]
    assert len(html) < 100_000  # no figure, so no plotly


def test_nothing_heavy_is_imported(logs: tuple[Path, Path]) -> None:
    code = (
        "import sys\nfrom counterpoise.cli.app import app\n"
        f"app(['tax', '--from', {str(logs[0])!r}, {str(logs[1])!r}], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'datasets', 'lm_eval', 'inspect_ai', 'plotly'} & set(sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("option", OPTIONS)
def test_what_measures_models_is_refused_by_name_beside_from(option: str) -> None:
    done = run("tax", "--from", "a", "b", *option.split())
    assert done.exit_code == 1
    assert f"error: {option.split()[0]}: does nothing with --from" in done.output


def test_every_option_of_a_measurement_is_among_these() -> None:
    known = {p.opts[-1] for p in typer.main.get_command(app).commands["tax"].params if p.param_type_name == "option"}  # type: ignore[attr-defined]
    assert known - {o.split()[0] for o in OPTIONS} == {"--from", "--json", "--page", "--quiet"}


@pytest.mark.parametrize("lacking", ["--prompts", "--reward", "--abilities"])
def test_without_from_the_panel_is_asked_for(lacking: str) -> None:
    given = [x for o in ("--prompts", "--reward", "--abilities") if o != lacking for x in (o, "a")]
    done = run("tax", "a", "b", *given)
    assert done.exit_code == 2
    assert f"Missing option '{lacking}'" in done.output


def test_the_folder_of_the_page_must_be_there(logs: tuple[Path, Path], tmp_path: Path) -> None:
    done = run("tax", "--from", *logs, "--page", tmp_path / "none" / "file")
    assert f"--page {tmp_path / 'none' / 'file'}: expected a folder" in done.output


def test_a_log_that_is_not_there_is_named() -> None:
    assert (
        "nowhere: expected a file or folder, found nothing of that name" in run("tax", "--from", "nowhere", "b").output
    )


def test_names_from_outside_stay_text_and_the_browser_complains_of_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "plotly_script", lambda: "")
    bad = "<img src=x onerror=alert(1)>"
    log = write(tmp_path / "a", {"t": [choice(i, [1.0, 0.0], i % 2) for i in range(9)]}, versions={"t": 1})
    from counterpoise.evaluation.log_tax import compare
    from counterpoise.evaluation.logs import read_log

    found = compare(read_log(str(log)), read_log(str(log)))
    found["tax"][0]["name"] = found["pre"]["source"] = found["calibration"][0]["name"] = bad
    found["notes"].append(bad)
    text = logs_page({"command": bad, **found})
    assert "<img" not in text
    if (binary := browser.find()) is None:
        pytest.skip("no browser found")
    (tmp_path / "page.html").write_text(text)
    with browser.running(binary) as tab:
        tab.open(tmp_path / "page.html", width=400)
        assert tab.complaints() == []
        assert tab.value("document.documentElement.scrollWidth") == 400
