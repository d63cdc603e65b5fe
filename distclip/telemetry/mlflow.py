"""MLflow: a metric for each number, sent by a thread of MLflow's, so that a slow server holds nothing up."""

import re
from collections.abc import Mapping

from .extras import missing

try:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run
    from mlflow.utils.async_logging.run_operations import RunOperations
    from mlflow.utils.time import get_current_time_millis
except ModuleNotFoundError as error:
    raise missing("mlflow", "mlflow") from error

MOST = 1000  # metrics that MLflow takes in one request
FORBIDDEN = re.compile(r"[^\w\-. :/]")  # in names of metrics: brackets of rows, for example


class MLflow:
    """``run``: what ``mlflow.start_run()`` returned, or a run's id; None on ranks without one, which write nothing.

    What the server refuses later is in MLflow's own log. ``close`` waits until all has been sent.
    """

    def __init__(self, run: Run | str | None) -> None:
        self._run = run.info.run_id if isinstance(run, Run) else run
        self._client = MlflowClient()
        self._latest: RunOperations | None = None  # they are sent one after the other

    def __call__(self, numbers: Mapping[str, float], step: int) -> None:
        now = get_current_time_millis()
        metrics = [Metric(FORBIDDEN.sub("_", key), number, now, step) for key, number in numbers.items()]
        for at in range(0, len(metrics), MOST):
            some = metrics[at : at + MOST]
            self._latest = self._client.log_batch(self._run, metrics=some, synchronous=False)

    def close(self) -> None:
        if self._latest is not None:
            self._latest.wait()
