"""Fronts, intervals and comparisons: plain arrays in, no model."""
