"""What a server says at /metrics."""

from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


def samples(text: str) -> Iterator[Sample]:
    """Every number, with its name and labels, of the text format of Prometheus."""
    families: Iterator[Metric] = text_string_to_metric_families(text)
    for family in families:
        yield from family.samples
