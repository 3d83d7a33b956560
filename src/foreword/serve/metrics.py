"""Figures for Prometheus. No label holds what a client chooses, so their number is bounded."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from foreword.serve.engine import Engine
from foreword.serve.limits import Limits

__all__ = ["Metrics"]

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The server's own figures, and the engine's at the time of a scrape.

    Args:
        engine, limits: asked when scraped.
    """

    def __init__(self, engine: Engine, limits: Limits):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "foreword_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "foreword_request_seconds", "Time of a request.", ["route"], buckets=SECONDS, registry=self.registry
        )
        self.first_token = Histogram(
            "foreword_time_to_first_token_seconds",
            "Time from a text's request to its first token.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.input_tokens = Counter("foreword_input_tokens", "Tokens of x.", registry=self.registry)
        self.output_tokens = Counter("foreword_output_tokens", "Tokens of y.", registry=self.registry)
        self.abandoned = Counter("foreword_abandoned", "Requests whose client hung up.", registry=self.registry)
        under_way = Gauge("foreword_texts_under_way", "Texts that were let in.", registry=self.registry)
        under_way.set_function(lambda: limits.under_way)
        self.registry.register(_OfEngine(engine))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _OfEngine(Collector):
    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        figures = self.engine.figures()
        for name, what, value in (
            ("running", "Texts that are computed.", figures.running),
            ("waiting", "Texts that wait for a row, or for their prefix.", figures.waiting),
            ("resident_prefixes", "Prefixes in memory.", figures.resident_prefixes),
            ("resident_bytes", "Memory of the prefixes.", figures.resident_bytes),
            ("resident_budget_bytes", "The most that prefixes may take.", figures.budget_bytes),
        ):
            yield GaugeMetricFamily(f"foreword_engine_{name}", what, value)
        for name, what, value in (
            ("prefix_hits", "Texts whose prefix was in memory.", figures.hits),
            ("prefix_loads", "Prefixes read from the store.", figures.loads),
            ("prefix_evictions", "Prefixes that made room for others.", figures.evictions),
        ):
            yield CounterMetricFamily(f"foreword_engine_{name}", what, value)
        for name, more in figures.more.items():
            yield GaugeMetricFamily(f"foreword_engine_{name}", "Of this engine alone.", more)
