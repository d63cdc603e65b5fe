"""Prometheus: a page of gauges to scrape. It can be read, and nothing can be written through it."""

import re
from collections.abc import Callable, Mapping
from math import isfinite

from . import keys
from .extras import missing

try:
    from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
except ModuleNotFoundError as error:
    raise missing("prometheus_client", "prometheus") from error

NOT_IN_NAMES = re.compile(r"\W")


class Prometheus:
    """Serves ``http://addr:port/metrics`` from the first record on, on the one rank that writes.

    Gauges: ``distclip_grad_norm_pre_clip`` and so on, ``distclip_grad_norm_layer`` with the label ``layer``, and
    ``distclip_clip_step``. Gauges show the latest record, so bad steps in between are counted:
    ``distclip_skipped_steps_total`` and ``distclip_nonfinite_steps_total``.

    * ``addr``: loopback unless told otherwise; there is no password. ``port``: 0 takes a free one, see ``port`` later.
    """

    def __init__(self, port: int, addr: str = "127.0.0.1") -> None:
        self.port, self.addr = port, addr
        self._stop: Callable[[], None] | None = None  # while it serves
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._skipped = Counter("distclip_skipped_steps", "Steps that were skipped", registry=self._registry)
        self._nonfinite = Counter("distclip_nonfinite_steps", "Steps of a non-finite norm", registry=self._registry)

    def __call__(self, numbers: Mapping[str, float], step: int) -> None:
        self._skipped.inc(numbers[keys.SKIPPED])
        self._nonfinite.inc(not isfinite(numbers[keys.PRE_CLIP]))
        for key, number in {**numbers, keys.STEP: step}.items():
            name, layer = keys.name_and_layer(key)
            gauge = self._gauge(name, ["layer"] if layer else [])
            (gauge.labels(layer) if layer else gauge).set(number)
        if self._stop is None:  # last: where the port is taken, the next record tries again
            self._serve()

    def close(self) -> None:
        """Stop serving."""
        if self._stop is not None:
            self._stop()
            self._stop = None

    def _gauge(self, name: str, labels: list[str]) -> Gauge:
        allowed = f"distclip_{NOT_IN_NAMES.sub('_', name)}"
        if allowed not in self._gauges:
            self._gauges[allowed] = Gauge(allowed, f"{name} of the latest record", labels, registry=self._registry)
        return self._gauges[allowed]

    def _serve(self) -> None:
        server, thread = start_http_server(self.port, self.addr, self._registry)
        self.port = server.server_port

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self._stop = stop
