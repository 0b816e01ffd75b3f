"""Figures for Prometheus."""

from collections.abc import Iterator

import jax
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from acestep_jax.serve.engine import BatchReport
from acestep_jax.serve.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Metrics:
    """The counters of one server; gauges are read from the service on each scrape."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        sizes = (1, 2, 4, 8, 16)
        self.songs = Counter("acestep_songs_made", "Songs made.", registry=self.registry)
        self.plans = Counter("acestep_plans_written", "Plans and descriptions written.", registry=self.registry)
        self.seconds = Counter("acestep_audio_seconds", "Seconds of audio made.", registry=self.registry)
        self.size = Histogram("acestep_batch_size", "Sizes of the batches.", buckets=sizes, registry=self.registry)
        self.filled = Histogram("acestep_batch_songs", "Songs in the batches.", buckets=sizes, registry=self.registry)
        self.time = Histogram(
            "acestep_batch_seconds",
            "Seconds of the batches, by whether their program ran for the first time.",
            ["first"],
            buckets=(0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1800),
            registry=self.registry,
        )
        self.compiled = Counter(
            "acestep_compilations", "Programs compiled, or read from the cache.", registry=self.registry
        )
        self.compile_time = Counter("acestep_compile_seconds", "Seconds of compilation.", registry=self.registry)
        jax.monitoring.register_event_duration_secs_listener(self._event)

    def batch(self, report: BatchReport, seconds: float) -> None:
        """Count a batch whose songs have a total duration of `seconds`."""
        self.songs.inc(len(report.works))
        self.seconds.inc(seconds)
        self.size.observe(report.program.size)
        self.filled.observe(len(report.works))
        self.time.labels(str(report.first).lower()).observe(report.seconds)

    def watch(self, service: Service) -> None:
        """Read the gauges from a service on each scrape."""
        self.registry.register(_State(service))  # type: ignore[arg-type]

    def text(self) -> bytes:
        """Return the figures in Prometheus' format."""
        return generate_latest(self.registry)

    def _event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILED:
            self.compiled.inc()
            self.compile_time.inc(duration_secs)


class _State:
    def __init__(self, service: Service):
        self.service = service

    def collect(self) -> Iterator[Metric]:
        records = GaugeMetricFamily("acestep_records", "Requests by state.", labels=["status"])
        for status, count in self.service.counts().items():
            records.add_metric([status], count)
        yield records
        yield GaugeMetricFamily("acestep_songs_waiting", "Waiting songs.", self.service.waiting())
        yield GaugeMetricFamily("acestep_ready", "Whether the server is ready.", int(self.service.engine.ready))
        memory = GaugeMetricFamily("acestep_device_bytes", "Memory in use, by device.", labels=["device"])
        for device in jax.local_devices():
            memory.add_metric([str(device)], (device.memory_stats() or {}).get("bytes_in_use", 0))
        yield memory
