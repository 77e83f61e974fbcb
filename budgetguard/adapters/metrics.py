"""Serves a program's metrics to Prometheus, at an address of their own."""

from prometheus_client import CollectorRegistry, start_http_server

from budgetguard.adapters.serving import ListenError, split_host_port


def serve_metrics(address: str | None, registry: CollectorRegistry) -> None:
    """Serve ``GET /metrics`` at ``address`` (``host:port``) until the process ends; ``None``: do not.

    A thread of its own answers, so what the registry reads at a scrape must be of one piece at any moment: a number, or
    a value that is replaced and never changed.

    Raises:
        ListenError: the address cannot be listened on.
    """
    if address is None:
        return
    host, port = split_host_port(address)
    try:
        start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise ListenError(f"cannot listen on {address} for metrics: {error.strerror or error}") from error
