"""Envoy's clusters from provider rows: a file that Envoy watches, replaced whole."""

import ipaddress
import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from betterproto2 import Message
from envoy_data_plane.envoy.config.cluster.v3 import (
    CircuitBreakers,
    CircuitBreakersThresholds,
    Cluster,
    ClusterDiscoveryType,
    ClusterDnsLookupFamily,
    UpstreamConnectionOptions,
)
from envoy_data_plane.envoy.config.core.v3 import (
    Address,
    DataSource,
    Http1ProtocolOptions,
    Http2ProtocolOptions,
    SocketAddress,
    TcpKeepalive,
    TransportSocket,
)
from envoy_data_plane.envoy.config.core.v3 import (
    HttpProtocolOptions as ConnectionOptions,
)
from envoy_data_plane.envoy.config.endpoint.v3 import ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints
from envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 import (
    CertificateValidationContext,
    CommonTlsContext,
    SubjectAltNameMatcher,
    SubjectAltNameMatcherSanType,
    TlsParameters,
    TlsParametersTlsProtocol,
    UpstreamTlsContext,
)
from envoy_data_plane.envoy.extensions.upstreams.http.v3 import (
    HttpProtocolOptions,
    HttpProtocolOptionsAutoHttpConfig,
    HttpProtocolOptionsExplicitHttpConfig,
)
from envoy_data_plane.envoy.service.discovery.v3 import DiscoveryResponse
from envoy_data_plane.envoy.type.matcher.v3 import StringMatcher
from envoy_data_plane.google.protobuf import Any as PackedMessage

from budgetguard.core.catalog import ProviderSpec

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5
# As long as the edge lets a stream be silent; a shorter one would cut a model that thinks.
IDLE_SECONDS = 900
# Envoy's own default of 1,024 would refuse calls that were admitted and held for.
CONCURRENT_MAX = 65_536
KEEPALIVE_SECONDS = 30
_PROTOCOL_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_CA_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
)


class ProviderUrlError(ValueError):
    """A provider's base URL cannot be turned into a cluster."""


def find_ca_bundle(configured: str | None = None) -> Path | None:
    """Return the file of certificate authorities that upstreams are checked against; ``None`` when there is none."""
    for candidate in (configured,) if configured else _CA_BUNDLES:
        if Path(candidate).is_file():
            return Path(candidate)
    return None


def cluster_of(provider: ProviderSpec, *, ca_bundle: Path | None) -> Cluster:
    """Build a provider's cluster.

    Raises:
        ProviderUrlError: the URL is not ``http(s)://host[:port][/path]``, or TLS has nothing to be checked against.
    """
    url = urlsplit(provider.base_url)
    host, port = _endpoint(url)
    secure = url.scheme == "https"
    if secure and ca_bundle is None:
        raise ProviderUrlError(
            f"{provider.provider_id}: expected a file of certificate authorities for {host}, got none"
        )
    return Cluster(
        name=provider.cluster,
        # A name is resolved again and again, and every address of it is used.
        type=ClusterDiscoveryType.STATIC if _is_address(host) else ClusterDiscoveryType.STRICT_DNS,
        dns_lookup_family=ClusterDnsLookupFamily.V4_PREFERRED,
        connect_timeout=timedelta(seconds=CONNECT_SECONDS),
        load_assignment=ClusterLoadAssignment(
            cluster_name=provider.cluster,
            endpoints=[LocalityLbEndpoints(lb_endpoints=[_lb_endpoint(host, port)])],
        ),
        circuit_breakers=CircuitBreakers(
            thresholds=[
                CircuitBreakersThresholds(
                    max_connections=CONCURRENT_MAX,
                    max_pending_requests=CONCURRENT_MAX,
                    max_requests=CONCURRENT_MAX,
                )
            ]
        ),
        upstream_connection_options=UpstreamConnectionOptions(
            tcp_keepalive=TcpKeepalive(keepalive_time=KEEPALIVE_SECONDS)
        ),
        transport_socket=_tls(host, ca_bundle) if secure and ca_bundle else None,
        typed_extension_protocol_options={_PROTOCOL_OPTIONS: PackedMessage.pack(_http_options(secure=secure))},
    )


def _endpoint(url: SplitResult) -> tuple[str, int]:
    try:
        host, port = url.hostname, url.port
    except ValueError as error:
        raise ProviderUrlError(
            f"expected a provider's URL as https://host[:port][/path], got {url.geturl()!r}"
        ) from error
    if url.scheme not in ("http", "https") or not host or url.username or url.query or url.fragment:
        raise ProviderUrlError(f"expected a provider's URL as https://host[:port][/path], got {url.geturl()!r}")
    return host, port or (443 if url.scheme == "https" else 80)


def _lb_endpoint(host: str, port: int) -> LbEndpoint:
    address = Address(socket_address=SocketAddress(address=host, port_value=port))
    return LbEndpoint(endpoint=Endpoint(address=address, hostname=host))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _tls(host: str, ca_bundle: Path) -> TransportSocket:
    """Check that the upstream is the host of the row: its name is asked for (SNI) and must be in the certificate."""
    kind = SubjectAltNameMatcherSanType.IP_ADDRESS if _is_address(host) else SubjectAltNameMatcherSanType.DNS
    context = UpstreamTlsContext(
        sni="" if _is_address(host) else host,
        common_tls_context=CommonTlsContext(
            tls_params=TlsParameters(tls_minimum_protocol_version=TlsParametersTlsProtocol.TLSv1_2),
            validation_context=CertificateValidationContext(
                trusted_ca=DataSource(filename=str(ca_bundle)),
                match_typed_subject_alt_names=[SubjectAltNameMatcher(san_type=kind, matcher=StringMatcher(exact=host))],
            ),
        ),
    )
    return TransportSocket(name="envoy.transport_sockets.tls", typed_config=PackedMessage.pack(context))


def _http_options(*, secure: bool) -> HttpProtocolOptions:
    options = HttpProtocolOptions(
        common_http_protocol_options=ConnectionOptions(idle_timeout=timedelta(seconds=IDLE_SECONDS))
    )
    if secure:  # the upstream chooses between HTTP/2 and HTTP/1.1 by ALPN
        options.auto_config = HttpProtocolOptionsAutoHttpConfig(
            http_protocol_options=Http1ProtocolOptions(), http2_protocol_options=Http2ProtocolOptions()
        )
    else:
        options.explicit_http_config = HttpProtocolOptionsExplicitHttpConfig(
            http_protocol_options=Http1ProtocolOptions()
        )
    return options


def clusters_file(providers: Sequence[ProviderSpec], *, version: int, ca_bundle: Path | None) -> str:
    """Spell the discovery response that Envoy reads. A provider that cannot be built is left out, and said."""
    clusters: list[Message] = []
    for provider in providers:
        try:
            clusters.append(cluster_of(provider, ca_bundle=ca_bundle))
        except ProviderUrlError:
            logger.exception("provider %s has no cluster: its calls are answered 503", provider.provider_id)
    response = DiscoveryResponse(
        version_info=str(version), resources=[PackedMessage.pack(cluster) for cluster in clusters]
    )
    return response.to_json(indent=2) + "\n"


def write_clusters(path: Path, text: str) -> bool:
    """Replace the file in one step, if its text differs; Envoy sees the old one or the new one, never a part."""
    try:
        if path.read_text(encoding="utf-8") == text:
            return False
    except FileNotFoundError:
        pass
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    return True
