"""The command line as a stranger meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from counterpoise.averaging.recipe import Recipe
from counterpoise.cli.app import app
from tiny import save_pair
from world import make

RESTORE = (
    "--means 0.3,0.7 --keep-reward 0.5 --confidence 0.5 --proxy-size 12 --prompt-limit 30 --max-new-tokens 6".split()
)


def run(*args: object) -> Result:
    return CliRunner().invoke(app, list(map(str, args)))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("world"))


def arguments(world: Path, *more: str) -> list[str]:
    files = ["--prompts", world / "prompts.jsonl", "--reward", "world:early_letters"]
    abilities = ["--abilities", f"continue:{world / 'text.jsonl'}", "--abilities", f"choices:{world / 'guess.jsonl'}"]
    return list(map(str, [world / "pre", world / "post", *files, *abilities, *more]))


def heed() -> None:
    """A shell's background job ignores Ctrl-C; the child must not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def process(*args: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, filter(None, [Path(__file__).parent, *sys.path]))),
    }
    command = [sys.executable, "-m", "counterpoise", *args]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed
    )


def test_help_imports_nothing_heavy_and_costs_less_than_importing_torch() -> None:
    helped = (
        "from typer.testing import CliRunner; from counterpoise.cli.app import app\n"
        "for command in ([], ['restore'], ['average'], ['demo']):\n"
        "    assert CliRunner().invoke(app, [*command, '--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'datasets', 'trl', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )

    def seconds(code: str) -> float:
        timed = f"import sys, time; begun = time.process_time()\n{code}\nprint(time.process_time() - begun)"
        command = [sys.executable, "-c", timed]
        return min(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(3))

    assert seconds(helped) < seconds("import torch")  # on the same machine, not in seconds


def test_average_and_diff(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    made = run("average", pre, post, "-o", tmp_path / "out", "--ratios", "0,0.5,1", "--quiet")
    assert made.exit_code == 0
    assert "3 ratios, mean 0.5" in made.output
    again = run("average", pre, post, "-o", tmp_path / "again", "--recipe", tmp_path / "out" / "recipe.json", "--quiet")
    assert again.exit_code == 0
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("out", "again"))
    assert first == second
    table = run("diff", pre, post, "--quiet")
    assert table.exit_code == 0
    assert "layers 0-1" in table.output
    assert "mlp" in table.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["average", "PRE", "POST", "-o", "OUT"], "expected exactly one of --ratio, --ratios and --recipe"),
        (["average", "PRE", "POST", "-o", "OUT", "--ratios", "a,b"], "expected numbers with commas between them"),
        (["average", "PRE", "POST", "-o", "OUT", "--ratios", "0,1"], "ratios: expected 3, one per block"),
        (["average", "PRE", "POST", "-o", "OUT", "--ratio", "nan"], "ratios: expected numbers of at least 0"),
        (["average", "PRE", "none/at/all", "-o", "OUT", "--ratio", "1"], "none/at/all"),
        (["average", "PRE", "POST", "-o", "PRE", "--ratio", "1"], "expected a new or empty folder"),
        (["tax", "PRE", "POST", "--prompts", "none.jsonl", "--reward", "m:f", "--abilities", "x"], "none.jsonl"),
    ],
)
def test_mistakes_get_one_clear_line(tmp_path: Path, args: list[str], message: str) -> None:
    pre, post = save_pair(tmp_path)
    places = {"PRE": str(pre), "POST": str(post), "OUT": str(tmp_path / "out")}
    found = run(*(places.get(a, a) for a in args), "--quiet")
    assert found.exit_code == 1
    assert message in found.output
    assert "Traceback" not in found.output
    assert "\nerror: " in f"\n{found.output}"
    assert not (tmp_path / "out").exists()


def test_restore_tax_and_search_from_the_command_line(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = arguments(world, "--prompt-limit", "30", "--max-new-tokens", "6", "--quiet")
    made = run("restore", *arguments(world, *RESTORE, "--quiet"), "-o", out)
    assert made.exit_code == 0, made.output
    assert f"checkpoint: {out}" in made.output
    assert f"--heal 20, another -o, and --work {out}.work" in made.output
    assert (out / "report.html").is_file()
    again = run("restore", *arguments(world, *RESTORE, "--quiet"), "-o", out)
    assert again.exit_code == 0
    assert "nothing was done again" in again.output
    tax = run("tax", *common, "--json")
    assert tax.exit_code == 0, tax.output
    rows = json.loads(tax.stdout)["tax"]
    kept = json.loads((out / "restore.json").read_text())["tax"]
    assert [r["tax"] for r in rows] == [r["tax"] for r in kept]  # the same held-out items, the same numbers
    options = ["--prompts", world / "prompts.jsonl", "--reward", "world:early_letters", "--mean", 0.5]
    options += ["--proxy-size", 12, "--max-new-tokens", 6]
    found = run("search", world / "pre", world / "post", "-o", tmp_path / "recipe.json", *options, "--quiet")
    assert found.exit_code == 0, found.output
    assert "passes, proxy loss" in found.output
    assert Recipe.read(tmp_path / "recipe.json").mean == pytest.approx(0.5)


def test_a_rough_answer_says_so_and_measures_little(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = run("restore", *arguments(world, "--keep-reward", "0.3", "--fast", "--quiet", "--json"), "-o", out)
    assert made.exit_code == 0, made.output
    result = json.loads(made.stdout)
    assert result["verdict"].startswith(
        "A rough answer (--fast): at most 32 prompts and items a part, and 32 tokens a "
    )
    assert result["settings"]["fast"]
    assert {p["name"] for p in result["points"]} <= {"PRE", "POST", "LiNeS 0.6", "LiNeS 0.8", "MA 0.6", "MA 0.8"}
    assert result["settings"]["limit"] == result["settings"]["prompt_limit"] == 32
    told = run("tax", *arguments(world, "--fast", "--quiet"))
    assert told.exit_code == 0, told.output
    assert "A rough answer (--fast)" in " ".join(told.output.split())


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_goes_on_where_it_was(world: Path, tmp_path: Path, stop: signal.Signals) -> None:
    out, work = tmp_path / "out", tmp_path / "out.work"
    started = process("restore", *arguments(world, *RESTORE), "-o", str(out))
    while len(list(work.glob("*.json"))) < 5:
        assert started.poll() is None, started.communicate()
        time.sleep(0.02)
    started.send_signal(stop)
    _, errors = started.communicate(timeout=60)
    assert not out.exists()
    if stop is signal.SIGINT:
        assert started.returncode == 130
        assert f"finished pieces are in {work}; the same command goes on from there" in errors
    kept = {f.name: f.stat().st_mtime_ns for f in work.glob("*.json")}
    made = run("restore", *arguments(world, *RESTORE, "--quiet"), "-o", out)
    assert made.exit_code == 0, made.output
    assert (out / "model.safetensors").is_file()
    assert kept.items() <= {f.name: f.stat().st_mtime_ns for f in work.glob("*.json")}.items()  # nothing done twice


def test_warnings_reach_the_terminal(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path, scale=0.08)  # so far apart that it should be told
    for command in (["average", pre, post, "-o", tmp_path / "out", "--ratio", 0.5], ["diff", pre, post]):
        made = run(*command, "--quiet")
        assert made.exit_code == 0
        assert "warning: PRE and POST are far apart" in made.output


def test_a_device_that_is_not_there_is_named(world: Path) -> None:
    made = run("tax", *arguments(world, "--device", "cuda:99", "--quiet"))
    assert made.exit_code == 1
    assert "error: --device: 'cuda:99' cannot be used here" in made.output


def test_a_lost_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    lost = str(tmp_path / "prompts.jsonl")
    found = run("tax", "a", "b", "--prompts", lost, "--reward", "sentiment:r.csv", "--abilities", "choices:a.jsonl")
    assert found.exit_code == 1
    assert f"{lost}: expected a file or folder, found nothing of that name; check the path" in found.output
