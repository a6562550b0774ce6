"""The engine's figures in the text format of Prometheus."""

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

OF_MODALITIES = {
    "waiting": "Requests in the queue",
    "reading": "Requests whose prompts are being read",
    "running": "Requests that answer",
    "tokens_per_second": "Tokens of answers a second, of the last minute",
    "batch_size": "Mean rows a step, of the last minute",
}
GAUGES = {
    "batch_tokens": "Places of the running batch's cache, padding included",
    "kept_tokens": "Tokens kept for the next turns of conversations",
}


class _Figures:
    """A snapshot as a collector."""

    def __init__(self, figures: dict[str, Any]) -> None:
        self.figures = figures

    def collect(self) -> Iterable[Metric]:
        for name, text in OF_MODALITIES.items():
            gauge = GaugeMetricFamily(f"mixlora_{name}", text, labels=["modality"])
            for modality, shares in self.figures["modalities"].items():
                gauge.add_metric([modality], shares[name])
            yield gauge
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"mixlora_{name}", text, value=self.figures[name])
        yield CounterMetricFamily("mixlora_refused", "Requests that were not taken", value=self.figures["refused"])
        for name, label, text in (
            ("ended", "reason", "Requests that ended"),
            ("tokens", "kind", "Tokens of requests that ended"),
        ):
            counts = CounterMetricFamily(f"mixlora_{name}", text, labels=["modality", label])
            _add(counts, self.figures[name])
            yield counts
        waits = GaugeMetricFamily(
            "mixlora_first_token_seconds", "Arrival to first token, of the last minute", labels=["modality", "which"]
        )
        _add(waits, self.figures["first_token_seconds"])
        yield waits


def _add(family: Any, nested: dict[str, dict[str, float]]) -> None:
    for modality, values in nested.items():
        for name, value in values.items():
            family.add_metric([modality, name], value)


def exposition(figures: dict[str, Any]) -> bytes:
    """The body of `/metrics`, from what [`Engine.snapshot`] gives."""
    registry = CollectorRegistry()
    registry.register(_Figures(figures))
    return generate_latest(registry)
