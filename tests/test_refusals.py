"""Wrong and pointless settings are refused by run and dry run with one message, before a model is loaded or a file written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from counterpoise.cli.app import app
from multitask.text.worlds import write_folder
from tiny import nudge, tiny
from world import make

RESTORE = "restore pre post -o out --prompts prompts.jsonl --reward world:early_letters --abilities choices:guess.jsonl"
RESTORE += " --max-new-tokens 6"
SEARCH = "search pre post -o out.json --prompts prompts.jsonl --reward world:early_letters"
TAX = "tax pre post --prompts prompts.jsonl --reward world:early_letters --abilities choices:guess.jsonl"
ONLINE = "--prompts prompts.jsonl --reward world:early_letters"
RSF, PPO = (f"align pre -o out --method {name} {ONLINE}" for name in ("rsf", "ppo"))
DPO = "align pre -o out --method dpo --preferences pairs.jsonl"
RESPOND = "judge respond post -o out.json --prompts prompts.jsonl --max-new-tokens 6"
COMPARE = "judge compare ours.json theirs.json -o out.json --reward world:early_letters"
TRAIN = "multitask train --data tasks -o out"
TWO = "--search two-sided"

WRONG = [
    (RESTORE, "--search random", "'random' is not one of 'hma', 'two-sided', 'both'"),
    (RESTORE, "--slopes 2,2", "searches: expected one slope 2, found more"),
    (RESTORE, "--slopes=-1", "slope: expected a number of at least 0, linear, step, reversed, random, found -1.0"),
    (RESTORE, "--no-controls --slopes 2", "--slopes: does nothing here; add --controls, or leave it out"),
    (RESTORE, "--race --mean 0.5", "race: expected a grid to pick from, found a fixed mean; leave one of the two out"),
    (RESTORE, "--outside last", "'last' is not one of 'mean', 'first'"),
    (RESTORE, "--lambdas 1,2", "--lambdas: does nothing here; add --search two-sided or both"),
    (RESTORE, "--lambdas 9,9 --calibrate 5", "--lambdas: does nothing here"),
    (RESTORE, "--calibrate 5", "--calibrate: does nothing here; add --search two-sided"),
    (RESTORE, "--min-effective-sets 2", "--min-effective-sets: does nothing here; add --search two-sided"),
    (RESTORE, f"{TWO} --lambdas=-1", "lambdas: expected numbers of at least 0, found [-1.0]"),
    (RESTORE, f"{TWO} --lambdas nan", "lambdas: expected numbers of at least 0"),
    (RESTORE, f"{TWO} --lambdas a", "--lambdas: expected numbers with commas between them, found 'a'"),
    (RESTORE, f"{TWO} --min-effective-sets 99", "min_effective_sets: expected a number from 1 to 2, the number of"),
    (RESTORE, f"{TWO} --calibrate 4 --min-effective-sets 99", "min_effective_sets: expected a number from 1 to 3"),
    (RESTORE, f"{TWO} --min-effective-sets 0.5", "min_effective_sets: expected a number from 1 to 2"),
    (RESTORE, f"{TWO} --calibrate -1", "calibrate: expected at least 0 items, found -1"),
    (RESTORE, f"{TWO} --mean 0.5", "mean: fixes HMA's mean ratio, and the two-sided search has none"),
    (RESTORE, f"{TWO} --proxy-size 4", "proxy_size: expected at least 8 sequences, found 4"),
    (RESTORE, "--replicas 2", "--replicas: does nothing here; add --ray auto, or leave it out"),
    (RESTORE, "--ray auto --replicas 0", "replicas: expected at least 1 engine, found 0"),
    (RESTORE, "--proxy-size 0", "proxy_size: expected at least 1 response, found 0"),
    (RESTORE, "--mean 1.2", "mean: expected a number from 0 to 1, found 1.2"),
    (RESTORE, "--mean nan", "mean: expected a number from 0 to 1, found nan"),
    (RESTORE, "--mean 0.5 --means 0.2", "--means: does nothing here"),
    (RESTORE, "--mean 0.5 --keep-reward 0.9", "--keep-reward: does nothing here"),
    (RESTORE, "--mean 0.5 --confidence 0.9", "--confidence: does nothing here"),
    (RESTORE, "--confidence 1", "confidence: expected a number from 0 to below 1, found 1.0"),
    (RESTORE, "--keep-reward 95", "keep_reward: expected a number from 0 to 1, found 95.0"),
    (RESTORE, "--means=-0.1", "means: expected numbers of at least 0, found [-0.1]"),
    (RESTORE, "--means nan,0.3", "means: expected numbers of at least 0"),
    (RESTORE, "--blocks 0", "blocks: expected a number of at least 1, 'layerwise' or 'module', found '0'"),
    (RESTORE, "--blocks wide", "blocks: expected a number of at least 1, 'layerwise' or 'module', found 'wide'"),
    (RESTORE, "--blocks 40", "blocks: expected between 1 and 6"),
    (RESTORE, "--donor me", "'me' is not one of 'post', 'pre'"),
    (RESTORE, "--dtype int8", "'int8' is not one of 'auto', 'float32', 'bfloat16', 'float16', 'float64'"),
    (RESTORE, "--heal 0", "steps: expected at least 1, found 0"),
    (RESTORE, "--heal 5 --mean 0.5", "heal: adds points to pick from, and a fixed mean leaves nothing to pick"),
    (RESTORE, "--heal 5 --fast", "heal: takes longer than a rough answer (--fast) may; leave one of the two out"),
    (RESTORE, "--heal 5 --heal-from HMA", "heal_from: expected POST, PRE, pick, or a ramp as 'LiNeS 0.8'"),
    (RESTORE, "--heal 5 --keep-by turns", "'turns' is not one of 'uniform', 'bandit'"),
    (RESTORE, "--heal-from PRE", "--heal-from: does nothing here; add --heal STEPS"),
    (RESTORE, "--temperature nan", "Invalid value for '--temperature'"),
    (RESTORE, "--temperature -1", "Invalid value for '--temperature'"),
    (RESTORE, "--max-new-tokens 0", "Invalid value for '--max-new-tokens'"),
    (RESTORE, "--batch-size 0", "Invalid value for '--batch-size'"),
    (RESTORE, "--compile --device cpu", "--compile: does nothing here; add --device cuda, or leave it out"),
    (RESTORE, "--abilities choises:a.jsonl", "'choises:a.jsonl': expected choices:, continue: or generate:FILE.jsonl, or"),
    (RESTORE, "--abilities choices:guess.jsonl", "abilities: expected different names, found 'guess' twice"),
    (RESTORE, "--abilities choices:guess.jsonl?metric=bleu", "unknown option 'metric'; expected name, limit or primary"),
    (RESTORE, "--abilities choices:guess.jsonl?primary=bleu", "primary: expected logprob or accuracy, found 'bleu'"),
    (RESTORE, "--abilities continue:guess.jsonl?primary=accuracy", "primary: expected nll, found 'accuracy'"),
    (RESTORE, "--prompts long.jsonl", "long.jsonl, line 2: expected prompts of at most 122 tokens (a context of 128 less 6"),
    (RESTORE, "--abilities choices:wide.jsonl", "wide.jsonl, line 31: expected items of at most 128 tokens (the model's"),
    (RESTORE, "--abilities code", "task.yaml, line 2: this task runs code of its own (!function); read it, and give --trust"),
    (RESTORE, "-o occupied", "occupied: expected a new or empty folder"),
    (SEARCH, "--mean 0.5 --method random", "'random' is not one of 'hma', 'two-sided'"),
    (SEARCH, "--mean 0.5 --lambda 7", "--lambda: does nothing here; add --method two-sided"),
    (SEARCH, "--mean 0.5 --lambda 7", "--lambda: does nothing here; add --method two-sided"),
    (SEARCH, "--method hma", "search: expected --mean with --method hma"),
    (SEARCH, "--method two-sided --mean 0.5", "search: expected --mean with --method hma"),
    (SEARCH, "--mean 1.5", "mean: expected a number from 0 to 1, found 1.5"),
    (SEARCH, "--mean 0.5 --max-passes 0", "max_passes: expected at least 1, found 0"),
    (SEARCH, "--method two-sided --max-passes -1", "max_passes: expected at least 0, found -1"),
    (SEARCH, "--method two-sided --lambda -1", "lambdas: expected numbers of at least 0, found [-1.0]"),
    (SEARCH, "--method two-sided --proxy-size 7", "proxy_size: expected at least 8 sequences, found 7"),
    (SEARCH, "--mean 0.5 --blocks wide", "blocks: expected a number of at least 1, 'layerwise' or 'module'"),
    (RSF, "--method sft", "'sft' is not one of 'rsf', 'ppo', 'dpo'"),
    (RSF, "--preferences pairs.jsonl", "rsf: expected --prompts and --reward alone, found --preferences"),
    (RSF, "--samples best.jsonl", "rsf with --samples: expected --samples alone, found --prompts"),
    (RSF, "--n 0", "n: expected at least 1, found 0"),
    (RSF, "--iterations 0", "iterations: expected at least 1, found 0"),
    (RSF, "--prompts-per-iteration 0", "prompts_per_iteration: expected at least 1, found 0"),
    (RSF, "--epochs 0", "epochs: expected at least 1, found 0"),
    (RSF, "--batch-size 0", "batch_size: expected at least 1, found 0"),
    (RSF, "--micro-batch-size 0", "micro_batch_size: expected at least 1, found 0"),
    (RSF, "--draw-batch-size 0", "expected a number of at least 1, or auto, found '0'"),
    (RSF, "--max-new-tokens 0", "max_new_tokens: expected at least 1, found 0"),
    (RSF, "--learning-rate -1", "learning_rate: expected a positive number, found -1.0"),
    (RSF, "--learning-rate nan", "learning_rate: expected a positive number, found nan"),
    (RSF, "--temperature 0", "temperature: expected a positive number, found 0.0, at which all 32 responses are the same"),
    (RSF, "--beta 0.1", "--beta: not a setting of rsf; leave it out"),
    (RSF, "--kl 0.1", "--kl: not a setting of rsf; leave it out"),
    (PPO, "--n 2", "--n: not a setting of ppo; leave it out"),
    (PPO, "--temperature 0", "temperature: expected a positive number, found 0.0; PPO learns from the probabilities"),
    (PPO, "--kl -1", "kl: expected a number of at least 0, found -1.0"),
    (PPO, "--kl-target 0", "kl_target: expected a positive number, found 0.0"),
    (DPO, "--prompts prompts.jsonl", "dpo: expected --preferences alone, found --prompts; leave it out"),
    (DPO, "--beta 0", "beta: expected a positive number, found 0.0"),
    (DPO, "--n 4", "--n: not a setting of dpo; leave it out"),
    (DPO, "--max-new-tokens 9", "--max-new-tokens: not a setting of dpo; leave it out"),
    (DPO, "--kl 0.1", "--kl: not a setting of dpo; leave it out"),
    (DPO, "--shard", "dpo: expected whole weights, for TRL's loop, found --shard"),
    (DPO, "--stop-at-reward 1", "dpo: a reward budget needs samples, which dpo does not draw"),
    (DPO, "--batch-size 12", "dpo: expected a batch size that 1 processes share in micro-batches of 8, found 12"),
    (RSF, "--l1 -1", "l1: expected a strength of at least 0, found -1.0"),
    (RSF, "--l2 -1", "l2: expected a strength of at least 0, found -1.0"),
    (RSF, "--kd -1", "kd: expected a strength of at least 0, found -1.0"),
    (RSF, "--lora 0", "lora: expected a rank of at least 1, found 0"),
    (RSF, "--lora 2 --l2 0.1", "--l2: expected no --lora beside it, found one; with LoRA"),
    (RSF, "--sma 1.5", "sma: expected a decay in [0, 1), found 1.5"),
    (RSF, "--sma 0.5 --reset-every 0", "sma: expected a reset every 1 or more steps, found 0"),
    (RSF, "--reset-every 3", "--reset-every: does nothing here; add --sma"),
    (RSF, "--merge 2", "merging: expected a weight in [0, 1], found 2.0"),
    (RSF, "--merge 0.1 --merge-keep 0", "merging: expected keep in (0, 1], found 0.0"),
    (RSF, "--merge-keep 0.5 --merge-base nowhere", "--merge-keep: does nothing here; add --merge"),
    (RSF, "--merge-base nowhere", "--merge-base: does nothing here; add --merge"),
    (RSF, "--replay-ratio 4", "--replay-ratio: does nothing here; add --replay"),
    (RSF, "--replay self --replay-ratio 0", "replay: expected a positive token ratio that is finite, found 0.0"),
    (RSF, "--balance bandit", "--balance: does nothing here; add --replay"),
    (RSF, "--replay self --balance bandit", "--balance: expected several --replay to balance, found one"),
    (RSF, "--replay self --replay a.jsonl", "--replay self: expected it alone"),
    (RSF, "--replay nowhere.jsonl", "--replay nowhere.jsonl: expected a jsonl file, found nothing of that name"),
    (RSF, "--freeze 99", "--freeze: expected 0 to 5 of the 6 layers, found 99"),
    (RSF, "--bf16 --dtype bfloat16", "bf16: expected float32 weights, found bfloat16"),
    (RSF, "--dtype auto", "'auto' is not one of 'float32', 'bfloat16', 'float16', 'float64'"),
    (RSF, "-o occupied", "occupied: expected a new or empty folder"),
    (RESPOND, "--temperature nan", "Invalid value for '--temperature'"),
    (RESPOND, "--max-new-tokens 0", "Invalid value for '--max-new-tokens'"),
    (RESPOND, "--prompts long.jsonl", "long.jsonl, line 2: expected prompts of at most 122 tokens (a context of 128 less 6"),
    (RESPOND, "--max-new-tokens 128", "max_new_tokens: expected less than the model's context of 128 tokens, found 128"),
    (RESTORE, "--slopes 1,steep", "--slopes: expected numbers or step, with commas between them, found '1,steep'"),
    (RESPOND, "--batch-size 0", "Invalid value for '--batch-size'"),
    (RESPOND, "--prompts nowhere.jsonl", "nowhere.jsonl: expected a file or folder, found nothing of that name"),
    (COMPARE, "--preference world:early_letters", "judge: expected exactly one of --reward, --preference and --base-url"),
    (COMPARE, "--model gpt", "--model: does nothing here; add --base-url"),
    (COMPARE, "--max-calls 3", "--max-calls: does nothing here; add --base-url"),
    (COMPARE, "--price-in 3", "--price-in: does nothing here; add --base-url"),
    (COMPARE, "--temperature 0.5", "--temperature: does nothing here; add --base-url"),
    (COMPARE, "--reward nowhere:nothing", "reward nowhere:nothing: no module 'nowhere' can be imported from here"),
    (TRAIN, "--epochs 0", "epochs, patience: expected at least 1, found 0, 3"),
    (TRAIN, "--batch-size 0", "batch size: expected at least 1, found 0"),
    (TRAIN, "--patience 0", "epochs, patience: expected at least 1, found 20, 0"),
    (TRAIN, "--lr -1", "lr: expected a positive number, found -1.0"),
    (TRAIN, "--dropout 1.5", "dropout: expected a share in [0, 1), found 1.5"),
    (TRAIN, "--width 0", "expected width and max_tokens of at least 1, found 0 and 256"),
    (TRAIN, "--weighting best", "'best' is not one of 'uniform'"),
    (TRAIN, "--weighting uniform --rho 0.5", "weighting uniform: expected no settings, found rho; leave them out"),
    (TRAIN, "--rho 0.5 --min-effective-tasks 1", "weighting bandit: expected rho or min_effective_tasks, found both"),
    (TRAIN, "--vectors glove.txt --dimension 50", "--dimension: does nothing here"),
    (TRAIN, "--freeze-vectors", "--freeze-vectors: does nothing here; add --vectors"),
    (TRAIN, "-o occupied", "occupied: expected a new or empty folder"),
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make(tmp_path_factory.mktemp("refused"))
    pairs = [{"prompt": f"ab {n}", "chosen": "yes", "rejected": "no no"} for n in range(20)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    (folder / "best.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    for name in ("ours", "theirs"):
        (folder / f"{name}.json").write_text(json.dumps([{"instruction": "a", "output": name, "generator": name}]))
    prompts = (folder / "prompts.jsonl").read_text().splitlines()
    (folder / "long.jsonl").write_text("\n".join([prompts[0], json.dumps({"prompt": "a" * 130}), *prompts[1:]]))
    items = (folder / "guess.jsonl").read_text().splitlines()
    wide = json.dumps({"query": "a" * 130, "choices": ["a", "b"], "gold": 0})
    (folder / "wide.jsonl").write_text("\n".join([*items[:30], wide, *items[30:]]))
    (folder / "code").mkdir()
    (folder / "code" / "task.yaml").write_text("task: own\nprocess_docs: !function own.run\n")
    write_folder(folder / "tasks")
    (folder / "occupied").mkdir()
    (folder / "occupied" / "thesis.txt").write_text("years of work")
    return folder


@pytest.fixture
def nothing_is_loaded(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, reading a model's weights into memory fails the test, and so does a file that was not there before."""
    import transformers

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    for kind in ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModel"):
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", loaded)
    monkeypatch.chdir(place)
    before = {p: p.stat().st_mtime_ns for p in place.rglob("*") if "__pycache__" not in p.parts}
    yield
    assert {p: p.stat().st_mtime_ns for p in place.rglob("*") if "__pycache__" not in p.parts} == before


def said(result: Result) -> str:
    """The one line of an error, or what a usage error says."""
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit)
    return " ".join(result.output.split()).removeprefix("device: cpu ")


@pytest.mark.parametrize(("command", "wrong", "message"), WRONG, ids=[f"{c.split()[0]} {w}" for c, w, _ in WRONG])
@pytest.mark.usefixtures("nothing_is_loaded")
def test_run_and_dry_run_refuse_it_alike(command: str, wrong: str, message: str) -> None:
    words = [*command.split(), *wrong.split()]
    run = said(CliRunner().invoke(app, words))
    assert message in run
    if command not in (SEARCH, TRAIN):
        assert said(CliRunner().invoke(app, [*words, "--dry-run", "--speed", "1e12,1e11"])) == run


FOREIGN = {
    "t5": "found t5, an encoder-decoder; such models can be averaged, merged and diffed",
    "bert": "found bert, a masked language model: its config does not say is_decoder",
    "vit": "expected a causal language model, which goes on with its prompt, found vit",
    "xlnet": "found xlnet, which reads in both directions",
    "nobodys": "expected the config of a causal language model, found: ",
}
MEASURE = (RESTORE, f"{SEARCH} --mean 0.5", TAX, RSF, PPO, DPO, RESPOND)


@pytest.mark.parametrize(
    ("command", "kind"), [*((c, "t5") for c in MEASURE), *((RESTORE, kind) for kind in FOREIGN if kind != "t5")]
)
@pytest.mark.usefixtures("nothing_is_loaded")
def test_run_and_dry_run_refuse_a_model_that_cannot_be_measured(command: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    words = [
        str(tmp_path) if word == "post" or (word == "pre" and "post" not in command) else word
        for word in command.split()
    ]
    run = said(CliRunner().invoke(app, words))
    assert FOREIGN[kind] in run
    assert run.startswith(f"error: {tmp_path}: ")
    if words[0] not in ("search", "tax"):
        assert said(CliRunner().invoke(app, [*words, "--dry-run", "--speed", "1e12,1e11"])) == run


@pytest.fixture(scope="module")
def wordless(place: Path) -> Path:
    """An encoder-decoder and a classifier, pre and post of each."""
    import transformers as t

    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 3, "num_heads": 4, "vocab_size": 64}
    models = {
        "t5": t.T5ForConditionalGeneration(t.T5Config(**sizes, decoder_start_token_id=0)),
        "bert": tiny("bert"),
    }
    for name, model in models.items():
        for side in ("pre", "post"):
            model.save_pretrained(place / f"{name}-{side}")
            nudge(model)
    return place


@pytest.mark.parametrize("command", [RESTORE, SEARCH, TAX, RSF, RESPOND])
@pytest.mark.parametrize(
    ("name", "found"),
    [("t5", "found T5ForConditionalGeneration, an encoder-decoder"), ("bert", "found BertForSequence")],
)
@pytest.mark.usefixtures("wordless", "nothing_is_loaded")
def test_what_writes_no_text_is_refused_by_its_name_before_anything_is_read(
    command: str, name: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from counterpoise.checkpoints import preflight

    def read(*_: object, **__: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(preflight, "scan", read)
    typed = f"{command} --mean 0.5" if command == SEARCH else command
    words = [f"{name}-{w}" if w in ("pre", "post") else w for w in typed.split()]
    run = said(CliRunner().invoke(app, words))
    assert found in run
    if command not in (SEARCH, TAX):
        assert said(CliRunner().invoke(app, [*words, "--dry-run", "--speed", "1e12,1e11"])) == run


@pytest.mark.parametrize("command", [RESTORE, RSF, RESPOND, COMPARE])
@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_speed_is_of_a_dry_run(command: str) -> None:
    run = said(CliRunner().invoke(app, [*command.split(), "--speed", "1e12,1e11"]))
    assert "--speed: does nothing here; add --dry-run, or leave it out" in run
