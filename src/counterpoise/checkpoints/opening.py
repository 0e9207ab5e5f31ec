"""Open a checkpoint: a folder, a hub id, or a LoRA adapter on either."""

from __future__ import annotations

from pathlib import Path

from counterpoise.checkpoints.checkpoint import Checkpoint
from counterpoise.checkpoints.configs import understood
from counterpoise.checkpoints.files import CheckpointError, resolve
from counterpoise.checkpoints.known import plain


def open_checkpoint(source: str | Path, *, base: Checkpoint | None = None) -> Checkpoint:
    """Open a local folder or a hub id (`org/name` or `org/name@revision`).

    A folder that holds a PEFT LoRA adapter is read as `base` with the adapter applied.

    Raises:
        CheckpointError: nothing there, pickled weights, incomplete shards, an adapter without its base, a
            config with values of a wrong type.
    """
    folder = resolve(source)
    if (folder / "adapter_config.json").is_file():
        if base is None:
            raise CheckpointError(
                f"{source}: a LoRA adapter, expected a whole checkpoint here; only POST may be an adapter"
            )
        from counterpoise.checkpoints.lora import LoraCheckpoint

        return LoraCheckpoint(base, folder, source=str(source))
    checkpoint = Checkpoint(folder, source=str(source))
    if not plain(checkpoint.config):
        understood(checkpoint.config, folder / "config.json")
    return checkpoint
