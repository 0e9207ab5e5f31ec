"""Checkpoints averaged and merged: the one place where two tensors become one, on disk and in memory."""
