"""`counterpoise align` as a stranger meets it."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import rewards_for_tests
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner, Result

from counterpoise.alignment.distil import read_samples
from counterpoise.checkpoints.opening import open_checkpoint
from counterpoise.cli.align import app
from counterpoise.language.prompts import read_prompts
from counterpoise.records import NUMERICS
from tiny import save_pair, tokenizer

QUICK = (
    "--iterations 2 --prompts-per-iteration 6 --batch-size 4 --max-new-tokens 5 --learning-rate 1e-2 --quiet".split()
)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(result: Result, message: str) -> None:
    assert result.exit_code in (1, 2), result.output
    assert re.search("^(error|Error): ", result.stderr, re.M)
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pre, prompts.jsonl, pairs.jsonl, corpus.jsonl."""
    folder = tmp_path_factory.mktemp("world")
    save_pair(folder)
    draw = random.Random(0)

    def word(letters: str) -> str:
        return "".join(draw.choice(letters) for _ in range(5))

    def write(name: str, rows: list[dict[str, str]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("prompts.jsonl", [{"prompt": word("abcxyz")} for _ in range(12)])
    write("pairs.jsonl", [{"prompt": word("xyz"), "chosen": word("abc"), "rejected": word("uvw")} for _ in range(16)])
    write("corpus.jsonl", [{"text": word("mnopqrst")} for _ in range(9)])
    return folder


def asked(world: Path, reward: str = "world:early_letters") -> list[object]:
    return ["--prompts", world / "prompts.jsonl", "--reward", reward]


def test_rsf_writes_a_checkpoint_with_its_record(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "post"
    made = call(world / "pre", "-o", out, "--method", "rsf", *asked(world), "--n", 3, *QUICK)
    assert made.exit_code == 0, made.output
    assert f"checkpoint: {out}" in made.stdout
    assert "2 iterations; at the last: reward " in made.stdout
    assert set(open_checkpoint(out)) == set(open_checkpoint(world / "pre"))
    record = json.loads((out / "align.json").read_text())
    assert record["settings"]["n"] == 3
    assert record["settings"]["learning_rate"] == 1e-2
    assert record["settings"]["method"] == "rsf"
    assert record["metrics"] == json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert sorted(p.name for p in (tmp_path / "post.work").glob("iteration-*")) == ["iteration-0001", "iteration-0002"]
    again = call(world / "pre", "-o", out, "--method", "rsf", *asked(world), "--n", 3, *QUICK)
    assert again.exit_code == 0
    assert "nothing was done again" in again.stdout


def test_every_mitigation_is_an_option_and_is_recorded(world: Path, tmp_path: Path) -> None:
    options = "--l1 0.1 --l2 0.05 --kd 0.1 --sma 0.5 --reset-every 3 --freeze 1 --merge 0.1 --merge-keep 0.5".split()
    shutil.copyfile(world / "corpus.jsonl", world / "other.jsonl")
    options += f"--replay {world}/corpus.jsonl --replay {world}/other.jsonl --balance bandit --replay-ratio 0.5".split()
    options += "--stop-at-reward 99 --seed 3".split()
    made = call(world / "pre", "-o", tmp_path / "post", "--method", "ppo", *asked(world), *options, *QUICK)
    assert made.exit_code == 0, made.output
    held = json.loads((tmp_path / "post" / "align.json").read_text())["settings"]["mitigations"]
    names = ["FreezeLowest", "BalancedReplay", "KD", "L2", "OnlineMerging", "L1", "MovingAverage", "RewardBudget"]
    assert [m["name"] for m in held] == names
    assert held[1]["ratio"] == 0.5
    told = json.loads((tmp_path / "post" / "metrics.jsonl").read_text().splitlines()[-1])
    assert told == json.loads((tmp_path / "post" / "align.json").read_text())["metrics"]
    assert told["replay 1 share"] + told["replay 2 share"] == pytest.approx(1.0)
    assert {k for k in told if k.startswith("replay")} == {
        f"replay {i} {what}" for i in (1, 2) for what in ("share", "loss ratio")
    }
    assert held[4] == {"name": "OnlineMerging", "weight": 0.1, "keep": 0.5, "seed": 3}
    assert [m["seed"] for m in held if "seed" in m] == [3, 3]
    lora = ["--lora", 2, "--replay", "self", "--last-checkpoint-only", "--draw-batch-size", 4, "--seed", 3]
    lora += ["--sma", 0.5, "--reset-every", 2]
    made = call(world / "pre", "-o", tmp_path / "low", "--method", "rsf", *asked(world), "--n", 2, *lora, *QUICK)
    assert made.exit_code == 0, made.output
    assert set(open_checkpoint(tmp_path / "low")) == set(open_checkpoint(world / "pre"))
    assert [p.name for p in (tmp_path / "low.work").glob("iteration-*")] == ["iteration-0002"]
    settings = json.loads((tmp_path / "low" / "align.json").read_text())["settings"]
    assert settings["draw_batch_size"] == 4
    assert [m["seed"] for m in settings["mitigations"] if "seed" in m] == [3, 3]
    [drawn] = [json.loads(p.read_text())["key"] for p in (tmp_path / "low.work" / "pieces").glob("replay-*")]
    assert drawn["numerics"] == NUMERICS  # the batch decides nothing


def test_a_reward_budget_stops_early(world: Path, tmp_path: Path) -> None:
    options = [*asked(world), "--n", 2, "--stop-at-reward", "-1"]
    made = call(world / "pre", "-o", tmp_path / "post", "--method", "rsf", *options, *QUICK)
    assert made.exit_code == 0, made.output
    assert "ended early: the reward budget is reached" in made.stdout
    pre, post = open_checkpoint(world / "pre"), open_checkpoint(tmp_path / "post")
    assert all((pre[n] == post[n]).all() for n in pre)


def test_collect_and_distil(world: Path, tmp_path: Path) -> None:
    file = tmp_path / "best.jsonl"
    settings = [*asked(world), "--n", 4, "--max-new-tokens", 5, "--quiet"]
    made = call("collect", world / "post", "-o", file, *settings)
    assert made.exit_code == 0, made.output
    samples = read_samples(file)
    assert [s.prompt for s in samples] == read_prompts(world / "prompts.jsonl")
    assert all(s.reward >= s.mean_reward for s in samples)
    out = tmp_path / "post"
    settings = ["--samples", file, "--l2", "0.1", "--learning-rate", "1e-2", "--quiet"]
    made = call(world / "pre", "-o", out, "--method", "rsf", *settings)
    assert made.exit_code == 0, made.output
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    refused(call("collect", world / "post", "-o", file, *asked(world), "--quiet"), "expected a new file")


def test_reward_model_and_dpo_and_the_reward_model_as_a_reward(world: Path, tmp_path: Path) -> None:
    pairs = ["--preferences", world / "pairs.jsonl", "--quiet"]
    made = call("reward-model", world / "pre", "-o", tmp_path / "rm", *pairs, "--learning-rate", "1e-2", "--epochs", 3)
    assert made.exit_code == 0, made.output
    assert "14 of 16 pairs trained on" in made.stdout
    assert f"reward: --reward {tmp_path / 'rm'}" in made.stdout
    made = call(
        world / "pre", "-o", tmp_path / "rl", "--method", "rsf", *asked(world, tmp_path / "rm"), "--n", 2, *QUICK
    )
    assert made.exit_code == 0, made.output
    settings = [
        "--epochs",
        2,
        "--batch-size",
        8,
        "--learning-rate",
        "1e-3",
        "--l2",
        "0.1",
        "--replay",
        "self",
        "--max-new-tokens",
        5,
    ]
    made = call(world / "pre", "-o", tmp_path / "dpo", "--method", "dpo", *pairs, *settings)
    assert made.exit_code == 0, made.output
    lines = [json.loads(line) for line in (tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method", "sft"], "'sft' is not one of 'rsf', 'ppo', 'dpo'"),
        (["--method", "rsf"], "rsf: expected --prompts and --reward, found no --prompts"),
        (["--method", "dpo"], "dpo: expected --preferences, found no --preferences"),
        (["--method", "dpo", "PROMPTS", "PAIRS"], "expected --preferences alone, found --prompts"),
        (["--method", "rsf", "ASKED", "--beta", "0.1"], "--beta: not a setting of rsf"),
        (["--method", "dpo", "PAIRS", "--n", "4"], "--n: not a setting of dpo"),
        (
            ["--method", "ppo", "ASKED", "--kl-target", "1", "--reset-every", "2"],
            "--reset-every: does nothing here; add --sma",
        ),
        (["--method", "rsf", "ASKED", "--freeze", "9"], "--freeze: expected 0 to 5 of the 6 layers, found 9"),
        (["--method", "rsf", "ASKED", "--dtype", "int8"], "'int8' is not one of 'float32'"),
        (
            ["--method", "rsf", "ASKED", "--max-new-tokens", "126"],
            "expected prompts of at most 2 tokens (a context of 128",
        ),
        (
            ["--method", "rsf", "ASKED", "--lora", "2", "--l1", "1", "--max-new-tokens", "5"],
            "--l1: expected no --lora beside it, found one; with LoRA, whose factors are no part of PRE",
        ),
        (["--method", "dpo", "PAIRS", "--stop-at-reward", "1"], "a reward budget needs samples"),
        (["--method", "dpo", "PAIRS", "--replay", "none.jsonl"], "none.jsonl"),
        (["--method", "dpo", "PAIRS", "--replay", "."], "--replay .: expected a jsonl file, found a folder"),
        (
            ["--method", "dpo", "PAIRS", "CORPUS", "CORPUS", "--balance", "bandit"],
            "expected corpora that differ, found",
        ),
        (["--method", "dpo", "PAIRS", "CORPUS", "--replay-ratio", "inf"], "ratio that is finite, found inf"),
    ],
)
def test_mistakes_get_one_clear_line(args: list[str], message: str, world: Path, tmp_path: Path) -> None:
    groups = {
        "PROMPTS": ["--prompts", world / "prompts.jsonl"],
        "ASKED": asked(world),
        "PAIRS": ["--preferences", world / "pairs.jsonl"],
        "CORPUS": ["--replay", world / "corpus.jsonl"],
    }
    typed = [x for a in args for x in groups.get(a, [a])]
    refused(call(world / "pre", "-o", tmp_path / "out", "--quiet", *typed), message)
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_language_head_is_told(world: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(world / "pre", num_labels=1)
    model.save_pretrained(tmp_path / "judge")
    tokenizer().save_pretrained(tmp_path / "judge")
    made = call(tmp_path / "judge", "-o", tmp_path / "out", "--method", "rsf", *asked(world), *QUICK)
    refused(
        made, "expected a causal language model, which goes on with its prompt, found LlamaForSequenceClassification"
    )


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("rewards_for_tests:not_a_number", "expected finite numbers, found nan for the response"),
        ("rewards_for_tests:one_short", "numbers, one per response, found an array of shape"),
        ("rewards_for_tests:missing", "has no callable named 'missing'"),
        ("none/at-all-here/x", "none/at-all-here/x"),
    ],
)
@pytest.mark.parametrize("method", ["rsf", "ppo"])
def test_bad_rewards_are_told(method: str, reward: str, message: str, world: Path, tmp_path: Path) -> None:
    refused(call(world / "pre", "-o", tmp_path / "out", "--method", method, *asked(world, reward), *QUICK), message)


def test_a_reward_that_breaks_later_keeps_what_was_done(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        world / "pre",
        "-o",
        tmp_path / "out",
        "--method",
        "ppo",
        *asked(world, "rewards_for_tests:breaks"),
        *QUICK,
    ]
    monkeypatch.setenv("BREAKS_AT", "2")
    refused(call(*command), "expected finite numbers, found nan")
    work = tmp_path / "out.work"
    assert [p.name for p in work.glob("iteration-*")] == ["iteration-0001"]
    assert (work / "iteration-0001" / "model.safetensors").is_file()
    monkeypatch.setenv("BREAKS_AT", "0")
    assert call(*command).exit_code == 0
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2


def on_a_full_disk(arguments: list[object], told: Path) -> None:
    """Run the command; from its second drawing on no file may grow beyond 20 kB: writes fail as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    rewards_for_tests.AT_SECOND = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    result = call(*arguments)
    told.write_text(f"{result.exit_code}\n{result.stderr}")


def test_a_full_disk_is_told_and_earlier_iterations_are_kept(world: Path, tmp_path: Path) -> None:
    out, told = tmp_path / "out", tmp_path / "told"
    reward = "rewards_for_tests:fills"
    command = [world / "pre", "-o", out, "--method", "rsf", *asked(world, reward), "--n", 2, *QUICK]
    child = multiprocessing.get_context("fork").Process(target=on_a_full_disk, args=(command, told))
    child.start()
    child.join(120)
    code, errors = told.read_text().split("\n", 1)
    assert code == "1"
    assert f"\nerror: iteration 2: expected to write to {out}.work, found: " in f"\n{errors}"
    assert "make room, earlier iterations are whole" in errors
    left = sorted(p.name for p in Path(f"{out}.work").iterdir())
    assert "iteration-0001" in left
    assert "state-0001.pt" in left
    assert not [name for name in left if "partial" in name or "0002" in name]
    assert not out.exists()
    made = call(*command)
    assert made.exit_code == 0, made.output
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2


def test_help_needs_neither_torch_nor_half_a_second() -> None:
    code = (
        "import sys, time; begun = time.process_time()\n"
        "from typer.testing import CliRunner; from counterpoise.cli.align import app\n"
        "for command in ([], ['model'], ['collect'], ['reward-model']):\n"
        "    assert CliRunner().invoke(app, [*command, '--help']).exit_code == 0\n"
        "assert not {'torch', 'transformers', 'numpy', 'trl'} & set(sys.modules), 'imported'\n"
        "print(time.process_time() - begun)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    spent = float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    assert spent < 1.0  # 0.3 s on a quiet machine
