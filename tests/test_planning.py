"""Dry runs: numbers by hand for a tiny decoder, memory against what autograd keeps, and the commands."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from typer.main import get_command
from typer.testing import CliRunner, Result

from counterpoise.cli.app import app
from counterpoise.cli.options import devices_like
from counterpoise.evaluation.panel import PanelFiles
from counterpoise.language.costs import Lengths, Plan, Stage, drawing, forward, measuring, training
from counterpoise.language.engine import EngineSettings
from counterpoise.language.footprints import cache_bytes, optimiser_bytes, step_bytes, trained, training_bytes
from counterpoise.language.sampling import Drawing
from counterpoise.language.scoring import Example, response_nll
from counterpoise.language.shapes import Items, Shape, shape_of
from counterpoise.language.work import PROJECTED, Speed, Work
from counterpoise.planning.shorter import Ways, restore_fits, shorter as shortened
from counterpoise.planning.stages import DISTANCE, Loop, align_stages, heal_stages, restore_stages
from counterpoise.restoration.request import Details, Heal, Request
from counterpoise.search.candidates import CONTROLS, HMA, PASSES, Extent, TwoSided, two_sided_passes
from tiny import tiny, tokenizer
from world import make

LLAMA = Shape(
    layers=6,
    hidden=16,
    intermediate=24,
    queries=16,
    keys=8,
    vocabulary=64,
    parameters=13_776,
    body=11_520,
    active=11_520,
    head=1_024,
    largest=1_024,
    edges=1_392,
)
"""tests/tiny.py's Llama by hand. A layer: q and o 16 x 16, k and v 8 x 16, three of 24 x 16: 512 + 256 + 1152 = 1920;
two norms of 16. Six layers, a norm of 16, two tables of 64 x 16: 11520 + 192 + 16 + 2048. Edges of a layer:
2 (16 + 16) + 2 (16 + 8) + 3 (16 + 24) = 232, times six."""


def run(*args: object) -> Result:
    return CliRunner().invoke(app, list(map(str, args)), env={"COLUMNS": "250"})


def test_the_shape_of_a_llama_by_hand() -> None:
    with torch.device("meta"):
        assert shape_of(tiny("llama")) == LLAMA


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma", "gpt2", "gpt_neox", "qwen2"])
def test_parameters_are_the_models_and_a_tied_head_counts_once_but_multiplies(family: str) -> None:
    model = tiny(family)
    shape = shape_of(model)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.head == 64 * 16
    flat = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    tables = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    tables[id(model.get_output_embeddings().weight)] = 64 * 16  # type: ignore[operator]
    assert shape.body == shape.parameters - flat - sum(tables.values())


def test_operations_by_hand_and_by_torchs_own_counter() -> None:
    # 10 tokens: 2 x 11520 x 10; logits of 4: 2 x 1024 x 4; attention: 4 x 6 layers x 16 x (10 x 11 / 2).
    assert forward(LLAMA, 10, logits=4) == Work(230_400 + 8_192 + 21_120)
    # 3 tokens after 10 in the cache see 11 + 12 + 13 = 36 positions.
    assert forward(LLAMA, 3, start=10) == Work(69_120 + 4 * 6 * 16 * 36)
    passed = training(LLAMA, 6, 4, sequences=2)
    assert passed.flops == passed.trained == 6 * (230_400 + 8_192 + 21_120)
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny("llama")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones(2, 10, dtype=torch.long))
    ours = forward(LLAMA, 10, sequences=2, logits=10).flops
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.15)  # it may count attention's whole square


def test_drawing_runs_a_prompt_once_and_reads_the_weights_at_every_step() -> None:
    # 4 prompts x 8 responses, 16 at once: 2 batches of 3 steps.
    work = drawing(LLAMA, 10, 3, prompts=4, n=8, batch=16, itemsize=2)
    prompts = 4 * (230_400 + 2_048 + 21_120)
    responses = 32 * (69_120 + 3 * 2_048 + 4 * 6 * 16 * 36)
    assert (work.flops, work.drawn, work.steps) == (prompts + responses, responses, 2 * 3)
    cache = 32 * 2 * 6 * 8 * (11 + 12 + 13)
    assert work.traffic == 2 * (2 * 3 * (11_520 + 1_024) + cache)
    assert work.seconds(Speed(1e9, 1e3)) == work.traffic / 1e3
    assert work.seconds(Speed(1e3, 1e9)) == pytest.approx(work.flops / 1e3)


def test_items_share_a_context_except_in_lm_eval() -> None:
    shared = measuring(LLAMA, Items("a", 5, 10, 4, 2), batch=4, itemsize=4)
    assert shared == forward(LLAMA, 10, sequences=5, logits=1) + forward(LLAMA, 2, sequences=20, logits=2, start=10)
    apart = measuring(LLAMA, Items("a", 5, 10, 4, 2, shared=False), batch=4, itemsize=4)
    assert apart == forward(LLAMA, 12, sequences=20, logits=12)
    drawn = measuring(LLAMA, Items("a", 5, 10, generated=7), batch=4, itemsize=4)
    assert drawn == drawing(LLAMA, 10, 7, prompts=5, batch=4, itemsize=4)


def test_bytes_by_hand() -> None:
    assert trained(LLAMA) == 13_776
    assert trained(LLAMA, lora=2) == 2_784
    assert optimiser_bytes(100, 4) == {"gradients": 400, "Adam's moments": 800}
    assert step_bytes(LLAMA, 100, 4, fused=False, cuda=True) == 400
    assert step_bytes(LLAMA, 100, 4, fused=False, cuda=False) == 8_192
    assert step_bytes(LLAMA, 100, 4, fused=True, cuda=True) == 0
    assert cache_bytes(LLAMA, 3, 10, 2) == 2 * 6 * 8 * 3 * 10 * 2
    plan = Plan((Stage("a", "", memory=7), Stage("b", "", Work(4.0), 5)), {"weights": 10, "moments": 20}, "float32")
    assert plan.peak == 37
    assert plan.seconds(Speed(2.0, 1.0)) == 2.0


def test_lora_trains_as_many_as_peft_does() -> None:
    peft = pytest.importorskip("peft", reason="needs the extra align")
    model = tiny("llama")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules="all-linear"), model)
    assert trained(shape_of(tiny("llama")), lora=2) == sum(p.numel() for p in model.parameters() if p.requires_grad)


WIDE: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(**WIDE, intermediate_size=192, num_key_value_heads=2),
        transformers.MistralConfig(**WIDE, intermediate_size=224, num_key_value_heads=1),
        transformers.GemmaConfig(**WIDE, intermediate_size=256, num_key_value_heads=4, head_dim=32),
    ],
    ids=lambda c: str(c.model_type),
)
def test_memory_of_a_gradient_is_what_autograd_keeps(config: Any, dtype: torch.dtype) -> None:
    """The very call of search and training, its saved tensors counted by storage, the model's own left out."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept[place] = tensor.untyped_storage()  # held, so that its place is not given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        response_nll(model, [Example(tuple(range(3, 33)), tuple(range(3, 18)))] * 4)
    measured = sum(storage.nbytes() for storage in kept.values())
    estimate = training_bytes(shape_of(model), 4, 30, 15, dtype.itemsize)
    assert measured / 1.25 < estimate < measured * 1.25


@pytest.mark.parametrize(
    "config",
    [
        transformers.Qwen3MoeConfig(
            **WIDE, head_dim=16, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=2
        ),
        transformers.MixtralConfig(**WIDE, intermediate_size=24, num_local_experts=4, num_experts_per_tok=1),
        transformers.Qwen2MoeConfig(
            **WIDE,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
            num_experts=8,
            num_experts_per_tok=3,
        ),
    ],
    ids=lambda c: str(c.model_type),
)
def test_a_token_meets_its_own_experts_alone(config: Any) -> None:
    with torch.device("meta"):
        shape = shape_of(transformers.AutoModelForCausalLM.from_config(config))
    held = config.num_local_experts if config.model_type == "mixtral" else config.num_experts
    of_one = 3 * 64 * 24
    assert shape.body - shape.active == 3 * (held - config.num_experts_per_tok) * of_one
    assert forward(shape, 1).flops == 2 * shape.active + 4 * shape.layers * shape.queries
    read = drawing(shape, 10, 3, prompts=4, batch=4, itemsize=2).traffic
    assert read > 2 * 3 * shape.body  # several sequences meet all of them


def test_points_and_passes_by_hand() -> None:
    means = [0.3, 0.7, 1.2]
    assert [s.averages(means) for s in (HMA(), *CONTROLS, TwoSided((1.0, 2.0)))] == [2, 2, 2, 2, 2, 2, 4]
    assert two_sided_passes(1) == 10 + 2 * 15


def test_stages_scale_as_what_they_count() -> None:
    at = Lengths(10, 10, 3, 2, 4)
    parts = {"validation": 5, "held-out": 4, "proxy": 100}
    items = {"validation": [Items("a", 5, 10, 4, 2)], "held-out": [Items("a", 5, 10, 4, 2)]}
    scale = Extent(LLAMA, None, at, parts["proxy"], [0.5])
    stages = {s.name: s for s in restore_stages(scale, parts, items, [HMA(proxy_size=8)], 1, 1)}  # type: ignore[arg-type]
    one = training(LLAMA, 10, 3, sequences=8) + Work(update=13_776 * (1 + 8 / 2 * PROJECTED))  # 4 batches of 2
    assert astuple(stages["search: HMA"].work) == pytest.approx(astuple(one * 4))  # passes for three blocks
    drawing_both = drawing(LLAMA, 10, 3, prompts=10, n=2, batch=16, itemsize=4)
    assert stages["proxies of POST"].work == drawing_both + Work(update=13_776)
    [_, search] = HMA(proxy_size=256).cost(scale)
    assert "over 80 responses each" in search.what  # the best 40 % of two to each of 100 prompts
    assert HMA("3", 8).cost(scale) == HMA(3, 8).cost(scale)  # as --blocks gives it
    [_, search] = HMA("layerwise", 8).cost(scale)
    assert astuple(search.work) == pytest.approx(astuple(one * PASSES))
    assert stages["validation data"].what == "4 averages x (5 responses, 5 items)"
    loop = Loop("rsf", 3, 20, 4, 2, draw=16)
    drawn, learned = align_stages(LLAMA, None, at, loop)
    assert drawn.work == drawing(LLAMA, 10, 3, prompts=20, n=4, batch=16, itemsize=4) * 3
    assert learned.work == training(LLAMA, 10, 3, sequences=20) * 6
    [pairs] = align_stages(LLAMA, None, at, Loop("dpo", 1, 20, 1, 3))
    assert pairs.work == (training(LLAMA, 10, 3, sequences=40) + forward(LLAMA, 13, sequences=40, logits=3)) * 3


def test_a_search_without_the_memory_for_its_gradient_is_told_as_it_would_run() -> None:
    free = Lengths(10, 10, 3, 2, 4)
    whole = free.training_memory(LLAMA)
    for room, less in ((None, False), (whole, False), (whole - 1, True)):
        [_, search] = HMA(3, 8).cost(Extent(LLAMA, None, replace(free, room=room), 100, [0.5]))
        kept = training_bytes(LLAMA, 2, 10, 3, 4, recompute=less)
        assert search.memory == kept + LLAMA.largest * 4 <= whole
        assert ("computed again" in search.what) == less
        passes = training(LLAMA, 10, 3, sequences=8) * (4 / 3 if less else 1)
        assert search.work.flops == pytest.approx(4 * passes.flops)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make(tmp_path_factory.mktemp("planned"))
    pairs = [{"prompt": f"ab {n}", "chosen": "yes", "rejected": "no no"} for n in range(20)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    for side in ("pre", "post"):
        (folder / f"{side}-config").mkdir()
        (folder / f"{side}-config" / "config.json").write_text((folder / side / "config.json").read_text())
    return folder


def restore(world: Path, *more: object, pre: str | Path = "pre", post: str | Path = "post") -> Result:
    files = ["--prompts", world / "prompts.jsonl", "--reward", "world:early_letters"]
    abilities = ["--abilities", f"continue:{world / 'text.jsonl'}", "--abilities", f"choices:{world / 'guess.jsonl'}"]
    out = ["-o", world / "out", "--max-new-tokens", 6, "--dry-run", "--speed", "1e9,1e9"]
    return run("restore", world / pre, world / post, *files, *abilities, *out, *more)


def test_companions_that_are_left_are_named_as_the_run_names_them(world: Path, tmp_path: Path) -> None:
    for side in ("pre", "post"):
        shutil.copytree(world / side, tmp_path / side)
        (tmp_path / side / f"{side}.py").write_text("")
    for donor in ("pre", "post"):
        out = " ".join(restore(world, "--donor", donor, pre=tmp_path / "pre", post=tmp_path / "post").output.split())
        assert f"warning: not copied from {tmp_path / donor}: {donor}.py (weights, archives, code, " in out


def align(world: Path, method: str, *more: object, source: str = "pre") -> Result:
    out = ["-o", world / "aligned", "--method", method, "--dry-run", "--speed", "1e9,1e9"]
    return run("align", world / source, *out, *more)


def listing(folder: Path) -> dict[str, int]:
    return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in folder.rglob("*")}


def test_a_dry_run_of_restore_tells_and_writes_nothing(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = listing(world)
    monkeypatch.chdir(world)
    found = restore(world, "--search", "both", "--lambdas", "1,2", "--means", "0.5,1.2")
    assert found.exit_code == 0, found.output
    assert "57 tensors fit" in found.output
    surely = "to within 5 points: about 2,800 validation prompts, for an average that keeps just that (assumed"
    assert f"--keep-reward 0.95 at --confidence 0.9, {surely}" in found.output
    assert "about 430 validation prompts" in restore(world, "--confidence", 0.5).output
    words = " ".join(found.output.split())
    for told in (
        "search: HMA",
        "search: both",
        "peak memory",
        "as given",
        "an estimate",
        "words of PRE",
    ):
        assert told in words
    assert "text: " in words
    assert "guess: " in words
    assert listing(world) == before


@pytest.mark.parametrize(("pre", "post"), [("pre-config", "post-config"), ("pre", "post-config")])
def test_a_dry_run_needs_no_weights(world: Path, pre: str, post: str) -> None:
    found = restore(world, pre=pre, post=post)
    assert found.exit_code == 0, found.output
    assert "no weights: preflight on shapes only" in found.output
    assert "no tokenizer: 4 characters a token" in found.output


def test_a_dry_run_without_a_speed_times_the_model_on_the_device(world: Path) -> None:
    found = align(world, "dpo", "--preferences", world / "pairs.jsonl", "--lora", "2", "--dtype", "bfloat16")
    assert found.exit_code == 0, found.output
    assert "mitigations: lora 2" in found.output
    probed = run("align", world / "pre", "-o", world / "aligned", "--method", "dpo", "--dry-run", "--preferences",
                 world / "pairs.jsonl")  # fmt: skip
    assert "6 of the model's 6 layers in float32, timed just now" in " ".join(probed.output.split())


@pytest.mark.parametrize("method", ["rsf", "ppo"])
def test_a_dry_run_of_align_resolves_its_settings_and_writes_nothing(world: Path, method: str) -> None:
    before = listing(world)
    data = ["--prompts", world / "prompts.jsonl", "--reward", "world:early_letters", "--max-new-tokens", 6]
    found = align(world, method, *data, "--iterations", 3, "--kd", 0.1, "--sma", 0.9)
    assert found.exit_code == 0, found.output
    words = " ".join(found.output.split())
    assert "iterations 3" in words
    assert {"rsf": "learning_rate 1e-05", "ppo": "learning_rate 1e-06"}[method] in words
    assert f"3 iterations x 120 prompts x {32 if method == 'rsf' else 1} responses" in words
    assert "PRE, frozen" in words
    assert "moving average" in words
    assert listing(world) == before


def test_what_a_dry_run_refuses_is_named(world: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((world / "post" / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    ranker = tmp_path / "ranker"
    ranker.mkdir()
    (ranker / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaPairRanker"]}))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    lost = tmp_path / "lost.jsonl"
    probing = ["-o", world / "aligned", "--method", "dpo", "--preferences", world / "pairs.jsonl", "--dry-run"]
    cases = [
        (run("align", world / "pre", *probing, "--device", "cuda:99"), "for a device elsewhere give its --speed"),
        (restore(world, "--prompts", lost), f"{lost}: expected a file or folder, found nothing of that name"),
        (restore(world, "--abilities", f"choices:{lost}"), f"{lost}: expected a file or folder"),
        (restore(world, post=str(other)), "has the shape"),
        (restore(world, post="nowhere"), "nowhere"),
        (restore(world, "--reward", "world:nothing"), "world has no callable named 'nothing'"),
        (restore(world, "--reward", ranker), "expected a sequence-classification model, found LlamaPairRanker"),
        (restore(world, "--means", "-1"), "means: expected numbers of at least 0"),
        (restore(world, "--search", "both", "--lambdas", "x"), "--lambdas: expected numbers"),
        (restore(world, "--max-new-tokens", 500), "max_new_tokens: expected less than the model's context of 128"),
        (restore(world, "--speed", "1"), "--speed: expected FLOP/s, bytes/s and perhaps bytes"),
        (restore(world, "-o", tmp_path / "full"), "expected a new or empty folder"),
        (align(world, "rsf"), "rsf: expected --prompts and --reward, found no --prompts"),
        (align(world, "dpo", "--preferences", lost), f"{lost}: expected a file or folder"),
        (align(world, "dpo", "--preferences", world / "pairs.jsonl", "--kl", 1), "--kl: not a setting of dpo"),
        (align(world, "dpo", "--preferences", world / "pairs.jsonl", "--freeze", 6), "--freeze: expected 0 to 5"),
        (align(world, "dpo", "--preferences", world / "pairs.jsonl", "--l2", -1), "l2: expected a strength"),
    ]
    for found, message in cases:
        assert found.exit_code == 1, found.output
        assert message in " ".join(found.output.split()), found.output
        assert "Traceback" not in found.output
    assert not (world / "out").exists()


def test_a_real_restore_takes_the_operations_of_its_dry_run(world: Path, tmp_path: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from counterpoise.planning.restore import plan_restore
    from counterpoise.restoration.restore import restore as really
    from world import panel

    specs = [f"continue:{world / 'text.jsonl'}", f"choices:{world / 'guess.jsonl'}"]
    ends = (str(world / "pre"), str(world / "post"))
    settings: dict[str, Any] = {"searches": [HMA(proxy_size=12)], "mean": 0.5}
    files = PanelFiles(world / "prompts.jsonl", "world:early_letters", specs, 8, 20, Drawing(1, 6, batch_size=32))
    plan = plan_restore(Request(*ends, tmp_path / "out", **settings), files)
    with FlopCounterMode(display=False) as counter:
        own = {"searches": settings["searches"], "details": Details(mean=settings["mean"])}
        result = really(*ends, tmp_path / "out", panel(world, limit=8, prompt_limit=20), **own)
    assert result["out"]
    measured = [p for p in result["points"] if p["part"] == "validation"]
    assert len(measured) == 4
    did, said = counter.get_total_flops(), sum(s.work.flops for s in plan.stages)
    [search] = (s.work.flops for s in plan.stages if s.name == "search: HMA")
    [found] = result["search"]  # a plan takes four passes for granted; it has no padding and no check of what agrees
    assert said + search * (found["passes"] / 4 - 1) == pytest.approx(did, rel=0.25)
    assert not [line for line in plan.told if "--keep-reward" in line]  # at a fixed mean nothing is demanded
    told = plan_restore(Request(*ends, tmp_path / "out", keep_reward=0.7), files).told
    [line] = [
        line for line in told if line.startswith("--keep-reward 0.7 at --confidence 0.9, to within 5 points: about ")
    ]
    assert f"from PRE and POST in {tmp_path / 'out' / 'restore.json'}" in line


@pytest.mark.parametrize(("dtype", "held"), [(torch.float32, 3), (torch.float64, 5)])
def test_healing_beside_averages_holds_a_student_and_teachers_that_are_not_mapped(
    world: Path, tmp_path: Path, dtype: torch.dtype, held: int
) -> None:
    from counterpoise.planning.restore import plan_restore

    files = PanelFiles(world / "prompts.jsonl", "world:early_letters", [f"choices:{world / 'guess.jsonl'}"])
    files = replace(files, drawing=Drawing(1, 6, batch_size=32))
    wanted = Request(world / "pre", world / "post", tmp_path / "out", heal=Heal(2), dtype=dtype)
    plans = [plan_restore(wanted, files), plan_restore(wanted, files, present=False, memory=1)]
    at, model = plans[0].at, plans[0].model
    assert at is not None
    assert model is not None
    weights = plans[0].resident["weights"]
    for plan, count, draw in zip(
        plans, (held, min(4, held)), (128, 1), strict=True
    ):  # in little memory they take turns
        bare = heal_stages(shape_of(model), replace(at, batch=32), Heal(2).teaching(32), draw=draw)
        found = [s.memory for s in plan.stages if s.name.startswith("healing")]
        assert found == [s.memory + count * weights for s in bare]


def test_pickled_weights_do_not_pass_for_a_config_alone(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text((world / "post" / "config.json").read_text())
    (folder / "pytorch_model.bin").write_bytes(b"")
    found = restore(world, post=str(folder))
    assert found.exit_code == 1
    assert "expected safetensors, found the pickle pytorch_model.bin" in found.output


def test_a_reward_model_is_sized_without_being_loaded(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "judge"
    tiny("bert").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    found = restore(world, "--reward", folder)
    assert found.exit_code == 0, found.output
    assert "billion parameters in float32" in found.output
    assert "reward model" in found.output


def test_a_task_of_lm_eval_is_looked_up_without_its_data(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    (tmp_path / "parity.yaml").write_text(
        "task: parity\noutput_type: multiple_choice\ntest_split: test\ndataset_path: not/there\n"
        "doc_to_text: '{{q}}:'\ndoc_to_choice: '{{options}}'\ndoc_to_target: gold\n"
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    bounded = restore(world, "--abilities", f"{tmp_path}?limit=40")
    assert bounded.exit_code == 0, bounded.output
    assert "parity: 40 validation items" in bounded.output
    free = restore(world, "--abilities", tmp_path)
    assert "parity: 1,000 items a part (data sets of lm-eval are not loaded" in free.output
    wrong = restore(world, "--abilities", f"{tmp_path}?task=odd")
    assert wrong.exit_code == 1
    assert "expected one of parity as ?task=NAME" in wrong.output


def test_the_commands_for_the_papers_models_are_ones_that_the_command_line_knows() -> None:
    path = Path(__file__).parents[1] / "experiments" / "hma" / "paper_models.py"
    spec = importlib.util.spec_from_file_location("paper_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["paper_models"] = module
    spec.loader.exec_module(module)
    found = module.commands()
    assert {c.words[0] for c in found} == {"align", "restore", "judge"}
    for command in found:
        words = ["align", "model", *command.words[1:]] if command.words[0] == "align" else command.words
        group, rest = get_command(app), list(words)
        while hasattr(group, "commands"):
            group = group.commands[rest.pop(0)]
        options = group.make_context(words[0], [*rest, "--dry-run"]).params
        assert options["dry_run"]
        assert options["device" if "--device" in words else "out"]


def test_a_dry_run_is_json_when_asked(world: Path) -> None:
    for found in (restore(world, "--json"), align(world, "dpo", "--preferences", world / "pairs.jsonl", "--json")):
        assert found.exit_code == 0, found.output
        plan = json.loads(found.stdout)
        assert plan["seconds"] == pytest.approx(sum(s["seconds"] for s in plan["stages"]))
        assert plan["peak"] >= sum(plan["resident"].values())
        assert {"told", "assumed", "disk", "mapped", "device"} <= set(plan)


def heal(world: Path, *more: object) -> Result:
    teachers = ["--align-teacher", world / "post", "--keep-teacher", world / "pre", "-o", world / "healed", "--dry-run"]
    asked = ["--prompts", world / "prompts.jsonl", "--abilities", f"choices:{world / 'guess.jsonl'}"]
    return run("heal", world / "post", *teachers, *asked, *more)


def test_what_would_be_shorter_takes_as_long_as_its_own_dry_run_says(world: Path) -> None:
    slow = ["--json", "--speed", "3e4,3e6", "--max-new-tokens", 64]  # the last one counts
    pairs = ["--prompts", world / "prompts.jsonl", "--reward", "world:early_letters"]
    for command, more in ((restore, ()), (align, ("ppo", *pairs)), (heal, ("--steps", 100))):
        whole = json.loads(command(world, *more, *slow).stdout)
        assert whole["seconds"] > 86400
        assert 1 <= len(whole["shorter"]) <= 3
        for told in whole["shorter"]:
            assert told["seconds"] < 86400
            again = json.loads(command(world, *more, *slow, *told["options"].split()).stdout)
            assert again["seconds"] == pytest.approx(told["seconds"])
    assert json.loads(restore(world, "--json").stdout)["shorter"] == []  # minutes


def test_of_several_processes_the_first_alone_looks_and_speaks(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("counterpoise.cli.plan.free_memory", lambda device: 1)  # or it would be refused
    for number, status in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", number)
        found = run("align", world / "pre", "-o", world / "aligned", "--method", "dpo", "--dry-run", "--preferences",
                    world / "pairs.jsonl")  # fmt: skip
        assert (found.exit_code, found.stdout) == (status, "")


@pytest.mark.parametrize("command", [restore, align, heal])
def test_what_does_not_fit_is_refused_with_what_would(command: Any, world: Path) -> None:
    more = ("dpo", "--preferences", world / "pairs.jsonl") if command is align else ()
    free = json.loads(command(world, *more, "--json", "--speed", "1e12,1e12").stdout)
    assert free["memory"] is None
    weights = sum(free["resident"].values())
    # Fewer rows at a time would do in training. What restore draws and scores is halved by itself: not so its distances.
    distance = [s["memory"] for s in free["stages"] if s["name"] == DISTANCE]
    half = weights * 3 // 4 + distance[0] if command is restore else (weights + free["peak"]) // 2
    found = command(world, *more, "--speed", f"1e12,1e12,{half}")
    assert found.exit_code == 1, found.output
    said = " ".join(found.output.split())
    assert "of memory, found" in said
    options = said.split("; with ")[1].removesuffix(" it fits").split()
    fits = command(world, *more, "--json", "--speed", f"1e12,1e12,{half}", *options)
    assert fits.exit_code == 0, fits.output
    assert json.loads(fits.stdout)["memory"] == half
    none = command(world, *more, "--speed", f"1e12,1e12,{weights / 5}")
    assert none.exit_code == 1
    assert "such devices: take a smaller model" in " ".join(none.output.split())


def test_a_pair_above_one_device_fits_cut_up_among_as_many_as_is_said(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=8, vocab_size=128256, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)

    def planned(*more: object) -> Result:
        return restore(world, "--json", "--speed", "1e15,1e13,80e9", *more, pre=tmp_path, post=tmp_path)

    found = planned()
    assert found.exit_code == 1
    said = " ".join(found.output.split())
    assert said.endswith(
        "expected 143 GB of memory, found 80 GB; with --shard under torchrun --nproc-per-node 4 it fits"
    )
    monkeypatch.setenv("WORLD_SIZE", "4")
    fits = planned("--shard")
    assert fits.exit_code == 0, fits.output
    plan = json.loads(fits.stdout)
    assert plan["resident"]["weights"] == pytest.approx(2 * 70.55e9 / 4, rel=1e-3)
    assert plan["resident"]["weights"] < plan["peak"] < 80e9
    assert not [line for line in plan["assumed"] if "torchrun has not said" in line]
    monkeypatch.setenv("WORLD_SIZE", "2")
    two = planned("--shard")
    assert two.exit_code == 1
    assert " ".join(two.output.split()).endswith("; with torchrun --nproc-per-node 4 it fits")
    monkeypatch.delenv("WORLD_SIZE")
    plan = json.loads(planned("--shard").stdout)
    assert [line for line in plan["assumed"] if line.startswith("8 processes, as torchrun has not said")]
    files = ("--prompts", world / "prompts.jsonl", "--reward", "world:early_letters")
    alone = run("search", world / "pre", world / "post", "-o", tmp_path / "r.json", "--mean", 0.5, *files, "--shard")
    assert alone.exit_code == 1
    assert "shard: expected several processes, found one; start it with torchrun" in " ".join(alone.output.split())
    refused = planned("--shard", "--heal", 2)
    assert refused.exit_code == 1
    assert "shard: expected no healing, which has a command of its own" in " ".join(refused.output.split())


def test_no_more_processes_are_advised_than_there_are_devices(world: Path) -> None:
    asked = Request(world / "pre", world / "post", world / "out"), PanelFiles("prompts", "reward", ())
    counts = {d: {r.shard for _, (r, _) in restore_fits(asked, d)} for d in (devices_like("cpu", None), 4)}
    assert counts == {1: {1}, 4: {1, 2, 4}}
    assert devices_like("cuda", "1e15,1e13,80e9") == 8


def test_what_does_not_fit_beside_vllm_is_cut_up_by_transformers(world: Path) -> None:
    asked = Request(world / "pre", world / "post", world / "out", engine=EngineSettings("vllm", 8))
    found = [(typed, r) for typed, (r, _) in restore_fits((asked, PanelFiles("prompts", "reward", ())))]
    alone, several = ([(typed, r.engine.name) for typed, r in found if (r.shard > 1) == cut] for cut in (False, True))
    assert {name for _, name in alone} == {"vllm"}
    assert {name for _, name in several} == {"transformers"}
    assert all("--engine transformers --shard under torchrun" in typed for typed, _ in several)


@pytest.mark.parametrize("typed", [True, False])
def test_a_dry_run_of_responding_finds_its_device_and_says_what_would_be_halved(world: Path, typed: bool) -> None:
    files = ["--prompts", world / "prompts.jsonl", "-o", world / "said.json", "--max-new-tokens", 6]

    def respond(*more: object) -> Result:
        on = ("--device", "cpu") if typed else ()
        return run("judge", "respond", world / "post", *files, *on, "--dry-run", "--json", *more)

    here = respond()
    assert here.exit_code == 0, here.output
    assert json.loads(here.stdout)["device"] in ("cpu", "cuda")
    free = json.loads(respond("--speed", "1e12,1e12").stdout)
    weights = sum(free["resident"].values())
    found = respond("--speed", f"1e12,1e12,{(weights + free['peak']) // 2}")
    assert "16 at once would be halved to 8" in json.loads(found.stdout)["stages"][0]["what"]
    none = respond("--speed", f"1e12,1e12,{weights}")
    assert none.exit_code == 1
    assert "no batch beside it" in " ".join(none.output.split())


@pytest.mark.parametrize("command", [restore, align, heal])
def test_what_a_run_would_halve_is_told_and_auto_takes_what_fits(command: Any, world: Path) -> None:
    option = "--draw-batch-size" if command is align else "--batch-size"
    data = ("--prompts", world / "prompts.jsonl", "--reward", "world:early_letters")
    more = ("ppo", *data, "--micro-batch-size", 1) if command is align else ()
    more = ("--micro-batch-size", 1) if command is heal else more

    def planned(rows: object, memory: object = "") -> Any:
        speed = f"1e12,1e12,{memory}".rstrip(",")
        found = command(world, *more, "--max-new-tokens", 32, option, rows, "--json", "--speed", speed)
        assert found.exit_code == 0, found.output
        return json.loads(found.stdout)

    def said(plan: Any) -> list[int]:
        return [int(n) for s in plan["stages"] for n in re.findall(r", (\d+) at once(?! would)", s["what"])]

    asked = 256 if command is restore else 4096  # of a search's gradient half as many, which a run does not halve
    free = planned(asked)
    weights, largest = sum(free["resident"].values()), max(s["memory"] for s in free["stages"])
    assert not any("halved" in s["what"] for s in free["stages"])
    assert set(said(planned("auto"))) == {64}  # nobody knows how much memory there is
    taken = said(planned("auto", weights + largest))
    assert taken
    assert all(1 <= n <= 1024 and n & (n - 1) == 0 for n in taken)
    halved = planned(asked, weights + int(0.4 * largest))
    assert re.search(r"(4096|1024) at once would be halved to (1024|512|256)", str(halved["stages"])), halved["stages"]
    assert halved["peak"] <= halved["memory"]


def test_options_go_together_where_one_alone_is_not_enough() -> None:
    def planned(size: float) -> Plan:
        return Plan((Stage("all", "", Work(size)),), {}, "float32")

    ways = {"--half": lambda s: s / 2, "--third": lambda s: s / 3, "--same": lambda s: s}
    speed = Speed(1.0, 1.0)

    def shorter(asked: float, ways: Ways[float]) -> list[tuple[str, float]]:
        return shortened(asked, planned(asked), ways, planned, speed)

    assert shorter(5 * 3600.0, ways) == [("--third --half", 5 * 600)]
    assert shorter(2.5 * 3600, ways) == [("--third", 3000.0)]
    assert shorter(3599.0, ways) == []
    for name, said in (("--third", 80), ("--half", 120)):
        assert (name, said * 3600.0) in shorter(240 * 3600.0, {name: ways[name]})
