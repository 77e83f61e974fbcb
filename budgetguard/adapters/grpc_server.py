"""The gRPC server of the control plane: grpc.aio with limits, an address, health, and a drain that loses no call."""

import asyncio
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse

from budgetguard.adapters.serving import SOCKET_MODE, ListenError, remove_stale_socket, unix_path

# Envoy hands ext_authz bodies of up to 10 MiB; gRPC's default of 4 MiB would turn a legal call into a 503.
MESSAGE_BYTES_MAX = 16 * 2**20
# Bounds what one client connection may have in flight. Envoy opens one stream a call, all over one or two connections.
CONCURRENT_STREAMS_MAX = 4096
KEEPALIVE_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 10_000
DRAIN_SECONDS = 20.0


class GrpcServer:
    """One ``grpc.aio`` server on one address, with grpc.health.v1 on it.

    Services are added to ``.grpc`` before ``start``. ``address`` is ``unix:/path.sock`` or ``host:port``.
    """

    def __init__(
        self,
        address: str,
        *,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        drain_seconds: float = DRAIN_SECONDS,
    ) -> None:
        self.address = address
        self._drain_seconds = drain_seconds
        self.health = health.aio.HealthServicer()
        self.grpc = grpc.aio.server(
            interceptors=tuple(interceptors),
            options=(
                ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
                ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
                ("grpc.max_concurrent_streams", CONCURRENT_STREAMS_MAX),
                ("grpc.keepalive_time_ms", KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
                ("grpc.keepalive_permit_without_calls", 1),
                # Clients may ping as often as we do without being cut off for it.
                ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 3),
                # Otherwise a second process on the same port is accepted in silence and takes half of the calls.
                ("grpc.so_reuseport", 0),
            ),
        )
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.grpc)

    async def start(self) -> None:
        """Listen and serve.

        Raises:
            ListenError: the address is in use, or may not be listened on.
        """
        path = unix_path(self.address)
        if path is not None:
            await asyncio.to_thread(remove_stale_socket, path)
        try:
            self.grpc.add_insecure_port(self.address)
        except RuntimeError as error:
            raise ListenError(f"cannot listen on {self.address}: it is in use, or not ours to use") from error
        await self.grpc.start()
        if path is not None:
            await asyncio.to_thread(path.chmod, SOCKET_MODE)

    async def set_serving(self, *, serving: bool) -> None:
        """Tell health checks whether calls would succeed."""
        status = HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING
        await self.health.set("", status)

    async def stop(self) -> None:
        """Refuse new calls, let those in flight end, and cancel what is left after the drain time."""
        await self.health.enter_graceful_shutdown()
        await self.grpc.stop(self._drain_seconds)
        path = unix_path(self.address)
        if path is not None:
            await asyncio.to_thread(path.unlink, missing_ok=True)
