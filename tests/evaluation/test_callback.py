"""The tax during training: what is logged, when it stops, what is kept, and that training does not notice."""

from __future__ import annotations

import json
import math
import random
import socket
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from counterpoise import Drawing, Panel, TaxCallback
from counterpoise.evaluation.abilities import load_abilities
from counterpoise.evaluation.in_training import undisturbed
from counterpoise.evaluation.measurement import difference
from tiny import tiny, tokenizer

WORDS = ("abc", "hello", "what?", "one two", "z", "go on", "so", "why not")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Forty texts, of which some are the validation part."""
    file = tmp_path_factory.mktemp("items") / "prose.jsonl"
    rows = [{"context": f"c{n} and", "continuation": WORDS[n % 8]} for n in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"continue:{file}"


def model_with_dropout(**more: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=64, n_positions=128, **more))


def rows(count: int = 24) -> Dataset:
    draw = torch.Generator().manual_seed(3)
    ids = [torch.randint(4, 40, (8,), generator=draw).tolist() for _ in range(count)]
    return Dataset.from_list([{"input_ids": i, "labels": i, "attention_mask": [1] * 8} for i in ids])


def arguments(out: Path, **more: Any) -> dict[str, Any]:
    given = {"per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 0.01, "lr_scheduler_type": "constant",
             "logging_steps": 2,
             "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 5}  # fmt: skip
    return {"output_dir": str(out), **given, **more}


def train(
    out: Path, *callbacks: TrainerCallback, model: nn.Module | None = None, resume: str | None = None, **more: Any
) -> Any:
    trainer = Trainer(model=model or model_with_dropout(), args=TrainingArguments(**arguments(out, **more)), train_dataset=rows(),
                      processing_class=tokenizer(), callbacks=list(callbacks))  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def taxed(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "tax/mean" in entry]


def test_training_does_not_notice(tmp_path: Path, spec: str) -> None:
    seen: list[Any] = []

    class Spy(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append((torch.rand(1), random.random(), np.random.rand(), kwargs["model"].training))  # noqa: NPY002

    def run(name: str, *callbacks: TrainerCallback) -> tuple[dict[str, torch.Tensor], list[Any], list[Any]]:
        seen.clear()
        model = model_with_dropout()
        model.transformer.h[0].eval()  # a part that is frozen stays frozen
        with warnings.catch_warnings(action="ignore"):
            trainer = train(tmp_path / name, *callbacks, Spy(), model=model, gradient_checkpointing=True)
        kept = [e for e in trainer.state.log_history if "loss" in e]
        return model.state_dict(), list(seen), kept

    plain, watched = run("plain"), run("watched", TaxCallback([spec], every=1, at_most=1e6))
    assert all(torch.equal(a, b) for a, b in zip(plain[0].values(), watched[0].values(), strict=True))
    assert plain[1] == watched[1]
    assert [e["loss"] for e in plain[2]] == [e["loss"] for e in watched[2]]


def test_modes_generators_and_settings_are_what_they_were() -> None:
    model = model_with_dropout().train()
    model.transformer.h[1].eval()
    model.config.use_cache = False
    states = torch.get_rng_state(), random.getstate()
    modes = [m.training for m in model.modules()]
    with undisturbed(model):
        model.eval()
        model.config.use_cache = True
        model.generation_config.max_new_tokens = 3
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        assert not model(torch.ones(1, 3, dtype=torch.long)).logits.requires_grad
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert [m.training for m in model.modules()] == modes
    assert (model.config.use_cache, model.generation_config.max_new_tokens) == (False, None)
    with pytest.raises(RuntimeError), undisturbed(model):
        model.eval().transformer.wte(torch.ones(1))
    assert [m.training for m in model.modules()] == modes


def test_what_is_logged_is_the_tax_against_the_model_at_the_start(tmp_path: Path, spec: str) -> None:
    told: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            told.append(logs)

    model = model_with_dropout()
    ability = load_abilities([spec])[0]
    (before,) = ability.measure(model, tokenizer(), "validation")
    trainer = Trainer(model=model, args=TrainingArguments(**arguments(tmp_path)), train_dataset=rows(),
                      processing_class=tokenizer(), callbacks=[Reporter()])  # fmt: skip
    callback = TaxCallback([spec], every=3, trainer=trainer)
    trainer.add_callback(callback)
    trainer.train()
    (after,) = ability.measure(model, tokenizer(), "validation")
    found = taxed(trainer)
    assert [e["step"] for e in found] == [3, 6]
    expected = {k: 100 * v for k, v in difference(before, after).items()}
    for key, end in (("value", ""), ("low", "_low"), ("high", "_high")):
        assert found[-1][f"tax/prose{end}"] == pytest.approx(expected[key], rel=1e-6)
        assert found[-1][f"tax/mean{end}"] == pytest.approx(expected[key], rel=1e-6)
        assert callback.taxes["prose"][key] == found[-1][f"tax/prose{end}"]
    assert [t["tax/prose"] for t in told if "tax/prose" in t] == [
        e["tax/prose"] for e in found
    ]  # a reporter before it too
    assert [e["step"] for e in trainer.state.log_history if "loss" in e] == [2, 4, 6]  # as without it
    assert (callback.stopped, callback.kept) == ("", None)


@pytest.mark.parametrize("strategy", [{"save_strategy": "steps", "save_steps": 100}, {"save_strategy": "epoch"}])
def test_it_stops_beyond_the_bound_and_the_last_checkpoint_inside_is_kept(
    tmp_path: Path, spec: str, strategy: dict[str, Any]
) -> None:
    callback = TaxCallback([spec], every=2, at_most=6.0)
    with pytest.warns(
        UserWarning, match=r"stopped at step \d+: prose lost .* at most 6 were asked for; the last checkpoint"
    ):
        trainer = train(tmp_path, callback, max_steps=100, learning_rate=3e-3, **strategy)
    step, last = trainer.state.global_step, callback.taxes["prose"]
    assert 2 < step < 100
    assert last["low"] > 6.0 >= taxed(trainer)[-2]["tax/prose_low"]
    kept = callback.kept
    assert kept is not None
    assert kept["step"] == step - 2 == taxed(trainer)[-2]["step"]
    written = [p.name for p in tmp_path.glob("checkpoint-*")]
    assert Path(kept["path"]).name in written
    assert f"checkpoint-{step}" not in written
    if "save_steps" in strategy:
        assert written == [f"checkpoint-{step - 2}"]  # each one takes the place of the one before
    held = type(trainer.model).from_pretrained(kept["path"])
    ability = load_abilities([spec])[0]
    before, after = (ability.measure(m, tokenizer(), "validation")[0] for m in (model_with_dropout(), held))
    assert 100 * difference(before, after)["low"] == pytest.approx(taxed(trainer)[-2]["tax/prose_low"], rel=1e-5)
    stored = json.loads((Path(kept["path"]) / "trainer_state.json").read_text())["stateful_callbacks"]["TaxCallback"]
    assert stored["attributes"]["restored"]["kept"] == kept


def test_the_trainers_own_checkpoints_are_looked_at_and_stay(tmp_path: Path, spec: str) -> None:
    callback = TaxCallback([spec], every=4, at_most={"prose": 1e6})
    trainer = train(tmp_path, callback, max_steps=9, save_strategy="steps", save_steps=3)
    assert [e["step"] for e in taxed(trainer)] == [3, 4, 6, 8, 9]
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
    assert callback.kept == {"path": str(tmp_path / "checkpoint-9"), "step": 9, "ours": False}


def test_a_resumed_run_is_measured_against_the_first_start(tmp_path: Path, spec: str) -> None:
    whole = taxed(train(tmp_path / "whole", TaxCallback([spec], every=2)))
    saved = {"save_strategy": "steps", "save_steps": 4}
    train(tmp_path / "half", TaxCallback([spec], every=2), max_steps=4, **saved)
    at = str(tmp_path / "half" / "checkpoint-4")
    other = model_with_dropout()  # its weights are replaced by the checkpoint's
    resumed = train(tmp_path / "half", TaxCallback([spec], every=2), model=other, resume=at)
    assert taxed(resumed)[-1]["tax/prose"] == whole[-1]["tax/prose"]
    with pytest.raises(ValueError, match="the panel that the checkpoint was trained with, found another one"):
        train(tmp_path / "half", TaxCallback([f"{spec}?limit=3"], every=2), resume=at)
    with pytest.raises(ValueError, match="leave out restore_callback_states_from_checkpoint"):
        train(tmp_path / "half", TaxCallback([spec], every=2), resume=at, restore_callback_states_from_checkpoint=True)


def test_a_resume_without_scores_of_pre_says_so(tmp_path: Path, spec: str) -> None:
    train(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    with pytest.warns(UserWarning, match="PRE is the model at step 2"):
        trainer = train(tmp_path, TaxCallback([spec], every=2), resume=str(tmp_path / "checkpoint-2"), save_strategy="steps",
                        save_steps=4)  # fmt: skip
    assert [e["step"] for e in taxed(trainer)] == [4, 6]


@pytest.mark.parametrize("lora", [False, True])
def test_trls_trainer_with_and_without_lora(tmp_path: Path, spec: str, lora: bool) -> None:
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    texts = Dataset.from_list([{"text": f"{WORDS[n % 8]} {n}"} for n in range(24)])
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if lora else None
    settings = SFTConfig(**arguments(tmp_path, bf16=False, save_strategy="steps", save_steps=100))
    trainer = SFTTrainer(model=tiny("llama"), args=settings, train_dataset=texts, processing_class=tokenizer(),
                         peft_config=config)  # fmt: skip
    trainer.add_callback(TaxCallback([spec], every=2, trainer=trainer, at_most=1e6))
    trainer.train()
    found = taxed(trainer)
    assert all("mean_token_accuracy" in e for e in trainer.state.log_history if "loss" in e)  # what TRL collects
    assert [e["step"] for e in found] == [2, 4, 6]
    assert all(e["tax/prose_low"] < e["tax/prose"] < e["tax/prose_high"] for e in found)
    assert (tmp_path / "checkpoint-6" / ("adapter_config.json" if lora else "config.json")).is_file()
    assert trainer.model.training


def test_an_ability_at_its_floor_has_no_bound_and_points_are_of_a_hundred(tmp_path: Path, spec: str) -> None:
    file = tmp_path / "luck.jsonl"
    items = [{"query": f"q{n}", "choices": ["a", "b"], "gold": n % 2} for n in range(60)]
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    panel = Panel((), len, load_abilities([spec, f"choices:{file}"]), limit=8, drawing=Drawing(batch_size=4))
    callback = TaxCallback(panel, every=6, at_most={"luck": 0})
    with pytest.warns(UserWarning, match="luck: not clear of chance at the start"):
        (entry,) = taxed(train(tmp_path / "out", callback, learning_rate=0.05))
    assert entry["tax/mean"] == entry["tax/prose"] != entry["tax/luck"]
    assert entry["tax/luck"] % 12.5 == 0  # accuracy of eight items
    assert callback.stopped == ""


def test_a_model_that_has_come_apart_is_stopped(tmp_path: Path, spec: str) -> None:
    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            with torch.no_grad():
                next(model.parameters()).fill_(math.nan)

    callback = TaxCallback([spec], every=1, at_most=5)
    with pytest.warns(UserWarning, match="prose lost inf points"):
        assert train(tmp_path, Break(), callback).state.global_step == 1


def test_reporters_that_are_not_told_are_named(tmp_path: Path, spec: str) -> None:
    trainer = Trainer(model=model_with_dropout(), args=TrainingArguments(**arguments(tmp_path)), train_dataset=rows(),
                      processing_class=tokenizer(), callbacks=[TaxCallback([spec], every=6)])  # fmt: skip
    trainer.args.report_to = ["tensorboard"]
    with pytest.warns(UserWarning, match="expected the trainer, to tell its reporters, found none"):
        trainer.train()
    assert [e["step"] for e in taxed(trainer)] == [6]


@pytest.mark.parametrize(("settings", "message"), [
    ({"every": 0}, "every: expected a number of steps above 0, found 0"),
    ({"every": 2, "at_most": -1.0}, "at_most: expected points of at least 0 for prose, found -1.0"),
    ({"every": 2, "at_most": {"verse": 1.0}}, "for prose, found 1.0 for 'verse'"),
])  # fmt: skip
def test_wrong_settings_are_named(spec: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaxCallback([spec], **settings)


def test_no_ability_one_called_mean_and_no_tokenizer_are_refused(tmp_path: Path, spec: str) -> None:
    for panel in ([], [f"{spec}?name=mean"]):
        with pytest.raises(ValueError, match="expected abilities with names other than 'mean'"):
            TaxCallback(panel, every=1)
    with pytest.raises(ValueError, match="expected a tokenizer, found none"):
        Trainer(model=model_with_dropout(), args=TrainingArguments(**arguments(tmp_path)), train_dataset=rows(),
                callbacks=[TaxCallback([spec], every=1)]).train()  # fmt: skip


def test_weights_that_are_cut_up_are_refused_by_name(spec: str) -> None:
    zero = tiny("llama")
    next(zero.parameters()).ds_id = 0  # how DeepSpeed marks what it has cut up
    for model, name in ((zero, "DeepSpeed ZeRO-3"), (cut_up(), "DTensor")):
        with pytest.raises(ValueError, match=f"expected whole weights in every process, found .*{name}"):
            TaxCallback([spec], every=1)._watch.start(model, tokenizer(), 0, None)


def cut_up() -> nn.Module:
    from torch.distributed.tensor import DeviceMesh, distribute_module

    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        return distribute_module(tiny("llama"), DeviceMesh("cpu", [0]))
    finally:
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def one_of_two(rank: int, port: int, spec: str, out: str) -> None:
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    callback = TaxCallback([spec], every=2, at_most=6.0)
    measured, alone = [], callback._watch._measured
    callback._watch._measured = lambda *asked: measured.append(1) or alone(*asked)  # type: ignore[assignment,func-returns-value]
    trainer = train(Path(out), callback, max_steps=60, learning_rate=3e-3, save_strategy="steps", save_steps=100)
    found: Sequence[Any] = (trainer.state.global_step, callback.stopped, callback.kept, taxed(trainer)[-1]["tax/prose"])
    (Path(out) / f"{rank}.json").write_text(json.dumps([found, trainer.args.world_size, len(measured)]))


def test_two_processes_stop_together(tmp_path: Path, spec: str) -> None:
    mp.spawn(one_of_two, (free_port(), spec, str(tmp_path)), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first[0] == second[0]
    steps, _, kept, _ = first[0]
    assert steps < 60
    assert Path(kept["path"]).is_dir()
    assert (first[1:], second[1:]) == ([2, 1 + steps // 2], [2, 0])  # the first one alone measures
