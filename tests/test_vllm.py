"""vLLM in the place of transformers: the same greedy texts and log-probabilities, the bits of an averaged checkpoint.

Most of it needs vLLM, which wants an environment of its own: `bash benchmarks/vllm_env.sh FOLDER`, then
`PYTHONPATH=src FOLDER/bin/python -m pytest tests/test_vllm.py`. Heads are of 32: its attention on a CPU has no kernel for
those of 4 in `tiny`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from counterpoise import Details, EngineSettings, Panel, average, measure_tax, restore
from counterpoise.averaging.partition import thirds
from counterpoise.averaging.recipe import Recipe
from counterpoise.averaging.resident import ResidentAverage
from counterpoise.averaging.vllm_inside import Sides, bits_of, held, put
from counterpoise.checkpoints.checkpoint import Checkpoint
from counterpoise.checkpoints.files import CheckpointError
from counterpoise.checkpoints.preflight import preflight
from counterpoise.cli.app import app
from counterpoise.language.sampling import Drawing, sample
from counterpoise.language.scoring import continuation_logprobs
from counterpoise.search.candidates import HMA
from counterpoise.search.recipes import Wanted, find_recipe
from tiny import LLAMA_LIKE, VOCABULARY, nudge, tokenizer

needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None, reason="needs vLLM, in an environment of its own: bash benchmarks/vllm_env.sh FOLDER"
)
FAMILIES = ("llama", "qwen2", "gpt2", "tied")
"""GPT-2's head is its embedding, and so is that of a Llama as small ones are."""
RATIOS = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.3, 0.6, 0.9))


def save(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """PRE and POST of a family on disk, with heads of 32."""
    import transformers as t

    torch.manual_seed(0)
    wide = {**LLAMA_LIKE, "hidden_size": 128, "num_hidden_layers": 3}
    config = {
        "llama": lambda: t.LlamaConfig(**wide),
        "tied": lambda: t.LlamaConfig(**wide, tie_word_embeddings=True),
        "qwen2": lambda: t.Qwen2Config(**wide),
        "gpt2": lambda: t.GPT2Config(n_embd=128, n_layer=3, n_head=4, vocab_size=VOCABULARY, n_positions=128),
    }[family]()
    model = t.AutoModelForCausalLM.from_config(config).eval()
    for side in ("pre", "post"):
        nudge(model, scale=0.1, seed=len(side))
        model.to(dtype).save_pretrained(folder / side)
        tokenizer().save_pretrained(folder / side)
    return folder / "pre", folder / "post"


def early_letters(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The reward."""
    return [sum(c in "abcdefgh" for c in r) + 0.01 * len(r) for r in responses]


def texts(lengths: Sequence[int], seed: int = 0) -> list[tuple[int, ...]]:
    random = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(4, VOCABULARY, (n,), generator=random).tolist()) for n in lengths]


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A pair with its engine and its resident model."""
    from counterpoise.averaging.vllm import VLLM

    pair = preflight(*save(tmp_path_factory.mktemp(request.param), request.param))
    cut = thirds(pair.names)
    engine = VLLM(pair.post.folder, torch.float32)
    return SimpleNamespace(
        family=request.param, pair=pair, cut=cut, engine=engine, resident=ResidentAverage(pair), words=tokenizer()
    )


def put_both(both: SimpleNamespace, ratios: Sequence[float]) -> None:
    both.engine.put(both.pair, both.cut.ratios(both.pair.names, ratios))
    both.resident.set(both.cut, ratios)


@needs_vllm
def test_greedy_texts_are_those_of_transformers_at_every_average(both: SimpleNamespace) -> None:
    prompts, greedy, seen = texts((3, 9, 33, 40, 5)), Drawing(max_new_tokens=24, temperature=0), []
    for ratios in RATIOS:
        put_both(both, ratios)
        found = sample(both.engine, both.words, prompts, greedy)
        assert found == sample(both.resident.model, both.words, prompts, greedy)
        seen.append(found)
    assert seen[0] != seen[1] != seen[2] != seen[0]


@needs_vllm
def test_log_probabilities_are_those_of_transformers(both: SimpleNamespace) -> None:
    contexts = texts((1, 7, 31, 32, 33, 64, 70))  # blocks of the cache hold 32 tokens
    choices = [texts((1, 3, 33), seed=i) for i in range(len(contexts))]
    for ratios in RATIOS:
        put_both(both, ratios)
        for _ in range(2):  # from the cache the second time
            found = torch.tensor(both.engine.score(contexts, choices))
            wanted = torch.tensor(continuation_logprobs(both.resident.model, contexts, choices))
            torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)


@needs_vllm
def test_choices_of_one_context_share_it_in_the_cache(both: SimpleNamespace) -> None:
    put_both(both, RATIOS[0])
    [context], seen = texts((70,), seed=9), []
    run = both.engine._run

    def watched(prompts: Any, how: Any) -> Any:
        found = run(prompts, how)
        seen.extend(one.num_cached_tokens or 0 for one in found)
        return found

    both.engine._run = watched
    try:
        both.engine.score([context], [texts((4, 4, 4, 4), seed=1)])
    finally:
        both.engine._run = run
    assert seen == [0, 64, 64, 64]


@needs_vllm
def test_draws_depend_on_prompt_reply_and_seed_alone(both: SimpleNamespace) -> None:
    put_both(both, RATIOS[2])
    prompts, two = texts((3, 20, 5)), Drawing(n=2, max_new_tokens=12)
    first = sample(both.engine, both.words, prompts, two)
    assert sample(both.engine, both.words, prompts[1:], two) == first[1:]
    assert [g[0] for g in sample(both.engine, both.words, prompts, Drawing(n=1, max_new_tokens=12))] == [
        g[0] for g in first
    ]
    assert all(a != b for a, b in first)
    [one, again] = sample(both.engine, both.words, [prompts[0]] * 2, two)
    assert one == first[0] != again
    assert sample(both.engine, both.words, prompts, Drawing(n=2, max_new_tokens=12, seed=1)) != first


@needs_vllm
def test_a_temperature_that_vllm_would_raise_is_refused(both: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=r"expected temperature 0, or at least 0.01, .* found 0.001"):
        sample(both.engine, both.words, texts((3,)), Drawing(max_new_tokens=2, temperature=0.001))


@needs_vllm
def test_a_response_ends_with_the_first_token_that_ends_one(both: SimpleNamespace) -> None:
    put_both(both, RATIOS[1])
    [long] = both.engine.draw(texts((5,)), [3], new=30, temperature=1.0, stops=())
    assert len(long) == 30
    end = long[9]
    [cut] = both.engine.draw(texts((5,)), [3], new=30, temperature=1.0, stops=(end,))
    assert cut == long[: long.index(end) + 1]


@needs_vllm
def test_what_does_not_fit_is_refused_in_place_of_being_cut(both: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=r"expected at most 128 tokens, .* found 130"):
        both.engine.draw(texts((100,)), [0], new=30, temperature=0.0, stops=())


@needs_vllm
def test_what_is_in_place_has_the_bits_of_the_averaged_checkpoint(both: SimpleNamespace, tmp_path: Path) -> None:
    pair = preflight(*save(tmp_path, both.family, torch.bfloat16))  # rounded stochastically
    average(tmp_path / "pre", tmp_path / "post", tmp_path / "out", Recipe(both.cut, RATIOS[2]))
    written = Checkpoint(tmp_path / "out")
    sides = Sides(str(tmp_path / "pre"), str(tmp_path / "post"), ())
    both.engine._in_place = None
    [found] = both.engine.llm.collective_rpc(put, args=(sides, both.cut.ratios(pair.names, RATIOS[2])))
    wanted: dict[str, int] = defaultdict(int)
    for name in written:
        layer = next((part for part in name.split(".") if part.isdecimal()), "")
        wanted[layer] += bits_of(written[name].float())
    assert found.sent == wanted
    assert not found.wrong
    assert found.compared >= 3
    both.engine.llm.reset_prefix_cache()
    out = ResidentAverage(preflight(tmp_path / "out", tmp_path / "out"), dtype=torch.float32)
    asked, greedy = texts((3, 9, 33)), Drawing(max_new_tokens=24, temperature=0)
    assert sample(both.engine, both.words, asked, greedy) == sample(out.model, both.words, asked, greedy)


@needs_vllm
def test_weights_that_stay_behind_are_noticed(both: SimpleNamespace) -> None:
    put_both(both, RATIOS[0])
    put_both(both, RATIOS[1])

    old = {n: both.pair.tensors(n)[1] for n in both.pair.names if ".1." in n}  # a layer of POST, where PRE is put

    def spoil(worker: Any) -> None:
        kept = worker.model_runner.reload_weights
        worker.model_runner.reload_weights = lambda weights_iterator: kept(
            weights_iterator=((n, old.get(n, t)) for n, t in weights_iterator)
        )

    def mend(worker: Any) -> None:
        del worker.model_runner.reload_weights

    pre = both.cut.ratios(both.pair.names, RATIOS[0])
    both.engine.llm.collective_rpc(spoil)
    try:
        with pytest.raises(CheckpointError, match="expected the weights that were put in place, found others"):
            both.engine.put(both.pair, pre)
    finally:
        both.engine.llm.collective_rpc(mend)
    both.engine.put(both.pair, pre)


@needs_vllm
def test_another_device_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    from counterpoise.averaging.vllm import VLLM

    with pytest.raises(ValueError, match="this vLLM computes on cpu, found --device cuda:1"):
        VLLM(tmp_path, torch.float32, "cuda:1")


def learn_early_letters(folder: Path) -> None:
    """POST: PRE after some steps on texts that the reward likes."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder / "pre")
    liked, random = tokenizer()("abcdefgh")["input_ids"], torch.Generator().manual_seed(0)
    steps = torch.optim.Adam(model.parameters(), lr=3e-3)
    for batch in torch.tensor(liked)[torch.randint(len(liked), (20, 8, 12), generator=random)]:
        model(input_ids=batch, labels=batch).loss.backward()
        steps.step()
        steps.zero_grad()
    model.save_pretrained(folder / "post")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair, prompts, and abilities of each kind that vLLM measures."""
    folder = tmp_path_factory.mktemp("world")
    save(folder, "llama")
    learn_early_letters(folder)
    letters = "abcdefghij"

    def lines(rows: list[dict[str, Any]]) -> str:
        return "".join(json.dumps(row) + "\n" for row in rows)

    words = ["".join(letters[(i * k) % 10] for k in (1, 3, 7, 9)) + str(i) for i in range(40)]
    (folder / "prompts.jsonl").write_text(lines([{"prompt": w} for w in words]))
    (folder / "guess.jsonl").write_text(lines([{"query": w, "choices": ["ab", "cd"], "gold": 0} for w in words]))
    (folder / "text.jsonl").write_text(lines([{"context": w, "continuation": w[::-1]} for w in words]))
    (folder / "say.jsonl").write_text(lines([{"prompt": w, "reference": "b"} for w in words]))
    return folder


def panel(world: Path, **how: Any) -> Panel:
    specs = [f"choices:{world / 'guess.jsonl'}", f"continue:{world / 'text.jsonl'}", f"generate:{world / 'say.jsonl'}"]
    drawing = Drawing(max_new_tokens=6, batch_size=8, **how)
    return Panel.load(world / "prompts.jsonl", early_letters, specs, drawing=drawing)


@needs_vllm
def test_the_tax_is_that_of_transformers_and_neither_reads_what_the_other_stored(world: Path, tmp_path: Path) -> None:
    ends, greedy = (world / "pre", world / "post"), panel(world, temperature=0)
    ours = measure_tax(*ends, greedy, work=tmp_path, engine=EngineSettings("vllm"))
    stored = {f.name for f in tmp_path.glob("*.json")}
    theirs = measure_tax(*ends, greedy, work=tmp_path)
    more = {f.name for f in tmp_path.glob("*.json")} - stored
    assert (
        len([n for n in more if n.startswith("ability-")]) == len([n for n in stored if n.startswith("ability-")]) == 6
    )
    assert ours["settings"] == {**theirs["settings"], "engine": "vllm", "tensor_parallel": 1}
    for a, b in zip(ours["tax"], theirs["tax"], strict=True):
        assert (a["pre"]["value"], a["post"]["value"]) == pytest.approx(
            (b["pre"]["value"], b["post"]["value"]), abs=1e-3
        )


@needs_vllm
def test_a_whole_restore_and_the_command_find_the_record_of_the_engine(world: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"searches": [HMA(proxy_size=8)], "work": tmp_path / "work"}
    engine = EngineSettings("vllm")
    found = restore(
        world / "pre", world / "post", tmp_path / "out", panel(world), details=Details(mean=0.5, engine=engine), **asked
    )
    assert found["settings"]["engine"] == "vllm"
    assert found["out"] == str(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "restore.json").read_text())["settings"]["engine"] == "vllm"
    with pytest.raises(CheckpointError, match="holds the result of other inputs or settings"):
        restore(world / "pre", world / "post", tmp_path / "out", panel(world), details=Details(mean=0.5), **asked)


@needs_vllm
def test_a_search_draws_its_responses_by_the_engine_and_its_recipe_says_so(world: Path, tmp_path: Path) -> None:
    found = {}
    for engine in (EngineSettings(), EngineSettings("vllm")):
        out = tmp_path / f"{engine.name}.json"
        wanted = Wanted(world / "pre", world / "post", out, HMA(proxy_size=8), 0.5, tmp_path / "work", 3, engine=engine)
        found[engine.name] = find_recipe(wanted, panel(world))[1]
    ours, theirs = found["vllm"], found["transformers"]
    assert (ours.settings["engine"], ours.settings["tensor_parallel"]) == ("vllm", 1)
    assert "engine" not in theirs.settings
    assert ours.settings["trace"] != theirs.settings["trace"]  # of other draws
    assert ours.partition.mean(ours.ratios) == pytest.approx(0.5)


def test_checksums_do_not_depend_on_order_or_padding_and_see_one_bit() -> None:
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert bits_of(values) == bits_of(values.T) == bits_of(torch.cat([values, torch.zeros(2, 4)]))
    other = values.clone()
    other.view(torch.int32)[3, 2] ^= 1
    assert bits_of(other) != bits_of(values)
    assert bits_of(values.to(torch.bfloat16)) != bits_of(values)
    layers = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(2)])})
    assert set(held(layers)) == {"0", "1"}


REFUSED = [
    (EngineSettings("ollama"), 0, "engine: expected transformers or vllm, found 'ollama'"),  # type: ignore[arg-type]
    (EngineSettings("transformers", 2), 0, "tensor_parallel: is of vLLM; add --engine vllm"),
    (EngineSettings("vllm", 0), 0, "tensor_parallel: expected at least 1 device, found 0"),
    (EngineSettings("vllm"), 1, "expected abilities from files .* found a task of lm-eval"),
]


def test_what_is_cut_up_is_refused_with_an_engine_before_the_pair_is_read(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"engine": EngineSettings("vllm"), "shard": 2}
    wanted = Wanted(tmp_path / "pre", tmp_path / "post", tmp_path / "out", HMA(), 0.5, tmp_path / "work", **asked)
    with pytest.raises(ValueError, match=r"shard: a model that is cut up is drawn from .* by transformers alone"):
        wanted.check()


@pytest.mark.parametrize(("engine", "tasks", "said"), REFUSED)
def test_what_an_engine_cannot_do_is_refused_first(engine: EngineSettings, tasks: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        engine.check(tasks)


def test_keys_and_records_name_an_engine_and_those_of_transformers_are_as_they_were() -> None:
    assert EngineSettings().told == {}
    assert EngineSettings("vllm", 2).told == {"engine": "vllm", "tensor_parallel": 2}


@pytest.mark.parametrize("more", [["--dry-run", "-o", "out"], ["-o", "out"], []], ids=["dry run", "restore", "tax"])
def test_commands_refuse_tasks_of_lm_eval_with_vllm_before_a_model_is_read(more: list[str], tmp_path: Path) -> None:
    command = ["restore" if more else "tax", str(tmp_path / "pre"), str(tmp_path / "post"), "--prompts", "p.jsonl"]
    asked = [*command, "--reward", "r.py:f", "--abilities", "arc_easy", "--engine", "vllm", *more]
    asked = [str(tmp_path / "out") if word == "out" else word for word in asked]
    found = CliRunner().invoke(app, asked)
    assert found.exit_code == 1
    assert "found a task of lm-eval; measure those with --engine transformers" in found.stderr


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is here")
def test_where_vllm_is_not_installed_it_is_said_how_to(tmp_path: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'counterpoise\[vllm\]'"):
        EngineSettings("vllm").check()


def test_several_processes_do_not_start_an_engine_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = ["restore", "pre", "post", "-o", str(tmp_path / "out"), "--prompts", "p.jsonl", "--reward", "r.py:f"]
    found = CliRunner().invoke(app, [*command, "--abilities", "choices:c.jsonl", "--engine", "vllm"])
    assert found.exit_code == 1
    assert "--engine vllm: expected one process, found 2" in found.stderr
