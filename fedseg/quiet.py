"""Flower's settings wherever fedseg starts it: nothing is reported, asked for or installed."""

from __future__ import annotations

from types import MappingProxyType

QUIET = MappingProxyType(
    {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
)
