"""What a server counts, for Prometheus."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from .pool import Pool


SHARED = "PROMETHEUS_MULTIPROC_DIR"  # where several workers keep their counts
_PREFIX = "hf_visual_peft"


class Metrics:
    """Counts of one process; with several workers, `text` has the sum."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        self.requests = Counter(f"{_PREFIX}_requests", "Requests by answer", ["status"], registry=own)
        self.images = Counter(f"{_PREFIX}_images", "Predictions by adapter", ["adapter"], registry=own)
        self.latency = Histogram(f"{_PREFIX}_request_seconds", "Time of a prediction request", registry=own)
        sizes = (1, 2, 4, 8, 16, 32, 64, 128)
        self.batch = Histogram(f"{_PREFIX}_batch_images", "Images in a batch", buckets=sizes, registry=own)
        self.active = Gauge(
            f"{_PREFIX}_active_images", "Admitted and not answered", registry=own, multiprocess_mode="livesum"
        )
        self.loaded = Gauge(
            f"{_PREFIX}_loaded_adapters", "Adapters in memory", registry=own, multiprocess_mode="livesum"
        )
        self.loads = Counter(f"{_PREFIX}_adapter_loads", "Adapters loaded", registry=own)
        self.evictions = Counter(f"{_PREFIX}_adapter_evictions", "Adapters that gave way to others", registry=own)
        self._counted = (0, 0)

    def pool(self, pool: Pool) -> None:
        """Count what a pool did since the last call."""
        self.loaded.set(len(pool.loaded))
        self.loads.inc(pool.loads - self._counted[0])
        self.evictions.inc(pool.evictions - self._counted[1])
        self._counted = (pool.loads, pool.evictions)

    def text(self) -> bytes:
        """In the format of Prometheus."""
        registry = self.registry
        if SHARED in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        return generate_latest(registry)
