"""OpenTelemetry: a gauge for each number, through the meter provider that the program has set up."""

from collections.abc import Mapping
from typing import Any

from . import keys
from .extras import missing

try:
    from opentelemetry.metrics import get_meter
except ModuleNotFoundError as error:
    raise missing("opentelemetry-api", "opentelemetry") from error


class OpenTelemetry:
    """Gauges named ``distclip/grad_norm/pre_clip`` and so on; those of layers have the attribute ``layer``."""

    def __init__(self) -> None:
        self._meter = get_meter("distclip")
        self._gauges: dict[str, Any] = {}

    def __call__(self, numbers: Mapping[str, float], step: int) -> None:
        for key, number in {**numbers, keys.STEP: step}.items():
            name, layer = keys.name_and_layer(key)
            if name not in self._gauges:
                self._gauges[name] = self._meter.create_gauge(f"distclip/{name}")
            self._gauges[name].set(number, {"layer": layer} if layer else {})
