"""`TaxCallback` for Lightning: `counterpoise.evaluation.callback` has what it logs and when it stops."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.callbacks import Callback

from counterpoise.evaluation.in_training import Taxes, Watch, logged
from counterpoise.evaluation.panel import Panel
from counterpoise.evaluation.parts import Part


class TaxCallback(Callback):
    """Measures abilities on the live model as it is trained, against the model at the start; see `callback.TaxCallback`.

    The last checkpoint inside the bound is `tax-inside.ckpt` in the trainer's default_root_dir.

    Args:
        tokenizer: of the model.
        model: the attribute of the LightningModule that holds the language model.
    """

    def __init__(
        self, panel: Panel | Sequence[str], *, every: int, tokenizer: Any, at_most: float | Mapping[str, float] | None = None,
        part: Part = "validation", model: str = "model",
    ) -> None:  # fmt: skip
        self.watch, self.tokenizer, self.model = Watch(panel, every, at_most, part), tokenizer, model
        self.taxes: Taxes = {}
        self._looked = -1
        self._stored: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """PRE's scores, kept in every checkpoint."""
        return self.watch.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave; Lightning calls it when a run is resumed."""
        self._stored = state_dict

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Measure PRE, or take its scores from the checkpoint."""
        self.watch.start(getattr(pl_module, self.model), self.tokenizer, trainer.global_step, self._stored)
        self._looked = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look, if it is time to."""
        step = trainer.global_step
        if step == self._looked or step % self.watch.every:  # batches that are accumulated are no step
            return
        self._looked = step
        self.taxes = self.watch.look(getattr(pl_module, self.model), self.tokenizer, step)
        pl_module.log_dict(logged(self.taxes))
        if self.watch.stopped:
            trainer.should_stop = True
        elif self.watch.bounds:
            path = os.path.join(trainer.default_root_dir, "tax-inside.ckpt")
            self.watch.kept = {"path": path, "step": step}
            trainer.save_checkpoint(path)
