"""From two checkpoints to the averaged one: measured, searched, compared, picked, written."""
