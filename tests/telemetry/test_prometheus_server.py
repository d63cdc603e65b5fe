"""A Prometheus server, on loopback, scrapes a training and is asked what it has seen.

Skipped where there is none: `bash tests/telemetry/prometheus.sh` unpacks one and runs this.
"""

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distclip import Clipper
from distclip.telemetry import Log

pytest.importorskip("prometheus_client")
SERVER = shutil.which("prometheus")
pytestmark = pytest.mark.skipif(
    SERVER is None, reason="no Prometheus server on the PATH: bash tests/telemetry/prometheus.sh brings one"
)
PATIENCE = 60  # seconds
CONFIG = """\
global: {scrape_interval: 200ms, scrape_timeout: 200ms}
scrape_configs: [{job_name: training, static_configs: [{targets: ["127.0.0.1:%d"]}]}]
"""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture
def ports(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """The port that a server scrapes, and its own."""
    assert SERVER is not None
    ours, its = free_port(), free_port()
    config = tmp_path / "prometheus.yml"
    config.write_text(CONFIG % ours, encoding="utf-8")
    own = {"config.file": config, "storage.tsdb.path": tmp_path / "data", "web.listen-address": f"127.0.0.1:{its}"}
    line = [SERVER, *(f"--{name}={value}" for name, value in own.items())]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(line, stdout=log, stderr=log) as server:
        yield ours, its
        server.terminate()


def asked(port: int, query: str) -> list[dict[str, Any]]:
    """What the server answers; nothing while it starts."""
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        with urllib.request.urlopen(url, timeout=5) as page:
            found: list[dict[str, Any]] = json.load(page)["data"]["result"]
            return found
    except OSError:
        return []


def value_of(port: int, query: str, wanted: float) -> float | None:
    """The value once it is the wanted one, or what it was last when patience ends."""
    value, end = None, time.monotonic() + PATIENCE
    while value != wanted and time.monotonic() < end:
        answer = asked(port, query)
        value = float(answer[0]["value"][1]) if answer else None
        time.sleep(0.1)
    return value


def test_a_server_sees_norms_layers_and_bad_steps(ports):
    from distclip.telemetry.prometheus import Prometheus

    ours, its = ports
    model = nn.Linear(4, 1)
    clipper = Clipper(model, 1.0, watch="parameters")
    with Log(clipper, Prometheus(ours), every=4):
        for step in range(1, 9):
            model.weight.grad = torch.full((1, 4), nan if step == 6 else step / 2)
            model.bias.grad = torch.zeros(1)
            clipper.clip_()
        assert value_of(its, "distclip_clip_step", 8.0) == 8.0
        assert value_of(its, "distclip_grad_norm_pre_clip", 8.0) == 8.0
        assert value_of(its, 'distclip_grad_norm_layer{layer="weight"}', 8.0) == 8.0
        assert value_of(its, "distclip_skipped_steps_total", 1.0) == 1.0
        assert value_of(its, "distclip_nonfinite_steps_total", 1.0) == 1.0
        assert value_of(its, "up", 1.0) == 1.0
    assert value_of(its, "up", 0.0) == 0.0  # nothing is served after close()
