"""The tax during training under Lightning: the same numbers, weights that do not notice, a stop and a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from counterpoise.evaluation.abilities import load_abilities
from counterpoise.evaluation.lightning import TaxCallback
from counterpoise.evaluation.measurement import difference
from tiny import tiny, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny("llama").train()
        self.drop = torch.nn.Dropout(0.1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        (ids,) = batch
        logits = self.drop(self.model(input_ids=ids).logits[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def fit(folder: Path, *callbacks: Any, steps: int = 6, resume: str | None = None) -> tuple[Module, Any]:
    torch.manual_seed(1)
    module, ids = Module(), torch.randint(4, 40, (24, 8), generator=torch.Generator().manual_seed(3))
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=False, default_root_dir=folder, callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    torch.manual_seed(2)
    trainer.fit(module, DataLoader(TensorDataset(ids), batch_size=4), ckpt_path=resume)
    return module, trainer


@pytest.fixture
def spec(tmp_path: Path) -> str:
    items = [{"context": f"c{n} and", "continuation": ("abc", "what?", "so")[n % 3]} for n in range(40)]
    (tmp_path / "prose.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return f"continue:{tmp_path / 'prose.jsonl'}"


def test_it_logs_the_tax_and_training_does_not_notice(tmp_path: Path, spec: str) -> None:
    plain, _ = fit(tmp_path / "plain")
    callback = TaxCallback([spec], every=2, tokenizer=tokenizer(), at_most=1e6)
    watched, trainer = fit(tmp_path / "watched", callback)
    assert all(map(torch.equal, plain.state_dict().values(), watched.state_dict().values()))
    ability = load_abilities([spec])[0]
    before, after = (ability.measure(m, tokenizer(), "validation")[0] for m in (Module().model, watched.model))
    expected = 100 * difference(before, after)["value"]
    assert callback.taxes["prose"]["value"] == pytest.approx(expected)
    assert float(trainer.callback_metrics["tax/mean"]) == pytest.approx(expected, rel=1e-5)
    assert {"tax/prose_low", "tax/prose_high"} <= trainer.callback_metrics.keys()
    again = TaxCallback([spec], every=2, tokenizer=tokenizer())
    assert callback.watch.kept is not None
    fit(tmp_path / "again", again, steps=8, resume=callback.watch.kept["path"])
    assert again.watch.state()["pre"] == callback.watch.state()["pre"]  # not of the resumed model


def test_it_stops_and_keeps_the_last_checkpoint_inside(tmp_path: Path, spec: str) -> None:
    callback = TaxCallback([spec], every=2, tokenizer=tokenizer(), at_most=6.0)
    _, trainer = fit(tmp_path / "out", callback, steps=200)
    assert 2 < trainer.global_step < 200
    assert callback.taxes["prose"]["low"] > 6.0
    kept = callback.watch.kept
    assert kept is not None
    assert torch.load(kept["path"], weights_only=False)["global_step"] == kept["step"] == trainer.global_step - 2
