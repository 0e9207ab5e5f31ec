"""The documented Lightning recipe, and the same loop in plain PyTorch."""

import copy

import lightning
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from counterpoise.multitask import BanditMTL

from .toy import TASKS, Toy, rows


class Model(lightning.LightningModule):
    """The recipe of counterpoise.multitask's docstring."""

    def __init__(self) -> None:
        super().__init__()
        self.toy = Toy()
        self.balance = BanditMTL(TASKS, min_effective_tasks=2)

    def training_step(self, batch, batch_idx):
        return self.balance(*self.toy.losses(*batch))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.balance.step()
        self.log_dict(self.balance.metrics())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def loader(tasks=None) -> DataLoader:
    return DataLoader(TensorDataset(*rows(24, 0, tasks)), batch_size=6)


def fit(model, folder, epochs: int, checkpoint=None, tasks=None):
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model, loader(tasks), ckpt_path=checkpoint)
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_the_recipe_is_the_plain_loop_and_resumes_bitwise(tmp_path):
    toy, balance = Toy(), BanditMTL(TASKS, min_effective_tasks=2)
    optimizer = torch.optim.SGD(toy.parameters(), lr=0.05)
    for _ in range(2):
        for batch in loader():
            optimizer.zero_grad()
            balance(*toy.losses(*batch)).backward()
            optimizer.step()
            balance.step()
    half = Model()
    trainer = fit(half, tmp_path, 1)
    assert {"weight/books", "kl"} <= trainer.callback_metrics.keys()
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    half_weights = copy.deepcopy(half.balance.weights())
    resumed = Model()
    fit(resumed, tmp_path, 2, checkpoint=tmp_path / "half.ckpt")
    assert resumed.balance.weights() == balance.weights() != half_weights
    assert all(map(torch.equal, resumed.toy.parameters(), toy.parameters()))


@pytest.mark.filterwarnings("ignore")
def test_one_task_a_batch_moves_the_weights_and_resumes_bitwise(tmp_path):
    tasks = [0] * 6 + [1] * 6 + [2] * 6 + [0] * 6
    straight, half, resumed = Model(), Model(), Model()
    fit(straight, tmp_path, 2, tasks=tasks)
    assert max(straight.balance.weights()) > 0.35
    fit(half, tmp_path, 1, tasks=tasks).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, tmp_path, 2, checkpoint=tmp_path / "half.ckpt", tasks=tasks)
    assert resumed.balance.weights() == straight.balance.weights() != half.balance.weights()
