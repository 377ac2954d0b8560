"""How much this process has asked of buckets. Free of boto3, so that a run on folders needs none."""

import threading

from pipeline.storage.store import Traffic


class TrafficMeter:
    """Traffic counters that many threads may add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total = Traffic(0, 0, 0)

    def add(self, *, requests: int = 0, bytes_received: int = 0, retries: int = 0) -> None:
        """Add to the totals."""
        with self._lock:
            more = Traffic(requests, bytes_received, retries)
            # field by field: Traffic is a tuple, and + would join two of them
            self._total = Traffic(*(a + b for a, b in zip(self._total, more, strict=True)))

    def read(self) -> Traffic:
        """Return the totals so far."""
        return self._total


traffic_meter = TrafficMeter()


def count_traffic(*, requests: int, bytes_received: int, retries: int) -> None:
    """Add the traffic of a process that works for this one."""
    traffic_meter.add(requests=requests, bytes_received=bytes_received, retries=retries)
