"""What a node does while it pretrains: CPU, memory, disk, network and GPUs, by MLflow's own monitors.

They become the metrics `system/<node>/...` of the run that started the step last, under the tab "System metrics". Samples that
cannot be sent are dropped: unlike the curves, they are of no use later. Nothing here raises or makes the training wait."""

import contextlib
import logging
import socket
import threading
from collections.abc import Iterator
from typing import Any

from pipeline.tracking.connection import client_of, root_cause
from pipeline.tracking.names import KIND_TAG
from pipeline.tracking.runs import parents_of

log = logging.getLogger(__name__)


@contextlib.contextmanager
def node_metrics(uri: str, run_id: str, *, every_s: float = 10.0) -> Iterator[None]:
    """Sample this node while the body runs. `run_id`: the step's run; without one, or if it is no pretraining, nothing happens."""
    if not uri or not run_id:
        yield
        return
    ended = threading.Event()
    # a daemon that nobody waits for: a server that hangs must not keep a finished training
    threading.Thread(target=_sample, args=(uri, run_id, every_s, ended), name="node-metrics", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _sample(uri: str, run_id: str, every_s: float, ended: threading.Event) -> None:
    monitor, failures = None, 0
    while not ended.wait(every_s):
        try:
            if monitor is None:
                parent = _parent_of_pretraining(uri, run_id)
                if not parent:
                    return
                monitor = _monitor(uri, parent)
            monitor.collect_metrics()
            monitor.publish_metrics(monitor.aggregate_metrics())
        except Exception as cause:  # noqa: BLE001 - whatever MLflow or a driver raises, training goes on
            failures += 1
            if failures == 1:
                log.info("this node's system metrics are not recorded at the moment: %s", root_cause(cause))


def _parent_of_pretraining(uri: str, run_id: str) -> str:
    if client_of(uri).get_run(run_id).data.tags.get(KIND_TAG) != "pretrain":
        return ""
    return next(reversed(parents_of(uri, run_id)), "")


def _monitor(uri: str, run_id: str) -> Any:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    return SystemMetricsMonitor(run_id, resume_logging=True, node_id=socket.gethostname(), tracking_uri=uri)
