"""MLflow: a metric for each number, sent by a thread, so that a slow server holds nothing up."""

import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from .extras import missing

try:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run
    from mlflow.utils.time import get_current_time_millis
except ModuleNotFoundError as error:
    raise missing("mlflow", "mlflow") from error

MOST = 1000  # metrics that MLflow takes in one request
FORBIDDEN = re.compile(r"[^\w\-. :/]")  # in names of metrics: brackets of rows, for example


class MLflow:
    """``run``: what ``mlflow.start_run()`` returned, or a run's id; None on ranks without one, which write nothing.

    What the server refuses is raised with a later record, or by ``close``, which waits until all has been sent. (MLflow
    would send from several threads, which mix the order, and keep failures to itself.)
    """

    def __init__(self, run: Run | str | None) -> None:
        self._run = run.info.run_id if isinstance(run, Run) else run
        self._client = MlflowClient()
        self._sender = ThreadPoolExecutor(1, "distclip-mlflow")
        self._waiting: list[Future[None]] = []

    def __call__(self, numbers: Mapping[str, float], step: int) -> None:
        now = get_current_time_millis()
        metrics = [Metric(FORBIDDEN.sub("_", key), number, now, step) for key, number in numbers.items()]
        done = [each for each in self._waiting if each.done()]
        self._waiting = [each for each in self._waiting if each not in done]
        self._waiting.append(self._sender.submit(self._send, metrics))
        for each in done:
            each.result()

    def close(self) -> None:
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            each.result()

    def _send(self, metrics: list[Metric]) -> None:
        for at in range(0, len(metrics), MOST):
            self._client.log_batch(self._run, metrics=metrics[at : at + MOST], synchronous=True)
