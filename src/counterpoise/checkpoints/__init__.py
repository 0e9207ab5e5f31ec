"""Weights on disk: read, compared, written whole or not at all."""
