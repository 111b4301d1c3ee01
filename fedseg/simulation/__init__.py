"""Simulating a study: the one place that knows both sides."""

from fedseg.simulation.options import Options
from fedseg.simulation.study import simulate

__all__ = ["Options", "simulate"]
