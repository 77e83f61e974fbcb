"""Serves a program's metrics to Prometheus, at an address of their own."""

import logging

from prometheus_client import CollectorRegistry, start_http_server

from budgetguard.adapters.serving import split_host_port

logger = logging.getLogger(__name__)


def serve_metrics(address: str | None, registry: CollectorRegistry) -> None:
    """Serve ``GET /metrics`` at ``address`` (``host:port``) until the process ends; ``None``: do not.

    A thread of its own answers, so what the registry reads at a scrape must be of one piece at any moment: a number, or
    a value that is replaced and never changed.

    Calls are worth more than their metrics: an address that cannot be listened on is an alarm, no reason to be away.
    """
    if address is None:
        return
    host, port = split_host_port(address)
    try:
        start_http_server(port, addr=host, registry=registry)
    except OSError:
        logger.exception("alarm=metrics_not_served address=%s", address)
