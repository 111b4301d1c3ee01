"""Simulating a study: the one place that knows both sides."""

from fedseg.simulation.study import Options, simulate

__all__ = ["Options", "simulate"]
