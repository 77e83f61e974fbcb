"""A real Envoy on envoy/edge.yaml, with stand-ins for the programs behind it that a test can look into and steer."""

import json
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import pytest
from envoy.config.core.v3.base_pb2 import HeaderValue, HeaderValueOption
from envoy.service.auth.v3 import external_auth_pb2_grpc as auth_grpc
from envoy.service.auth.v3.external_auth_pb2 import CheckRequest, CheckResponse, DeniedHttpResponse, OkHttpResponse
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as proc_grpc
from envoy.service.ext_proc.v3.external_processor_pb2 import (
    BodyResponse,
    HeadersResponse,
    ProcessingRequest,
    ProcessingResponse,
)
from envoy.type.v3.http_status_pb2 import HttpStatus
from google.rpc.status_pb2 import Status

from budgetguard.cli import edge
from budgetguard.cli.local.binaries import envoy_binary
from budgetguard.cli.local.envoy_admin import EnvoyAdmin
from budgetguard.cli.local.parts import free_port

CLUSTER = "provider-test"
START_SECONDS = 20


def header(name: str, value: str) -> HeaderValueOption:
    return HeaderValueOption(
        header=HeaderValue(key=name, value=value), append_action=HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
    )


def admit(_request: CheckRequest) -> CheckResponse:
    answer = CheckResponse(
        status=Status(code=0),
        ok_response=OkHttpResponse(
            headers=[header("x-budgetguard-cluster", CLUSTER)],
            response_headers_to_add=[header("x-admitted", "yes")],
        ),
    )
    answer.dynamic_metadata.update({"operation_id": "op", "tenant_id": "acme"})
    return answer


def refuse(_request: CheckRequest) -> CheckResponse:
    return CheckResponse(
        status=Status(code=7),
        denied_response=DeniedHttpResponse(
            status=HttpStatus(code=402), headers=[header("content-type", "application/json")], body='{"ours":1}'
        ),
    )


class Authorization(auth_grpc.AuthorizationServicer):
    """ext_authz, as the test wants it."""

    def __init__(self) -> None:
        self.answer: Callable[[CheckRequest], CheckResponse] = admit
        self.seen: list[CheckRequest] = []

    def Check(self, request, context):  # noqa: N802 - the protocol's name
        self.seen.append(request)
        return self.answer(request)


class Processor(proc_grpc.ExternalProcessorServicer):
    """ext_proc that lets everything pass and writes down what it was told."""

    def __init__(self) -> None:
        self.seen: list[ProcessingRequest] = []
        self.broken = False
        self.hold: threading.Event | None = None

    def Process(self, requests, context):  # noqa: N802 - the protocol's name
        if self.broken:
            context.abort(grpc.StatusCode.INTERNAL, "broken by the test")
        if self.hold is not None:
            self.hold.wait(20)
        for request in requests:
            self.seen.append(request)
            match request.WhichOneof("request"):
                case "request_headers":
                    yield ProcessingResponse(request_headers=HeadersResponse())
                case "response_headers":
                    yield ProcessingResponse(response_headers=HeadersResponse())
                case "response_body":
                    yield ProcessingResponse(response_body=BodyResponse())


@dataclass
class Received:
    """A request as the provider got it; header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Provider:
    """An upstream that echoes the size of what it got."""

    received: list[Received] = field(default_factory=list)
    response_headers: dict[str, str] = field(default_factory=dict)
    response_body: bytes = b'{"object":"test"}'
    hold: threading.Event | None = None

    def __post_init__(self) -> None:
        provider = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = read_body(self)
                headers = {name.lower(): value for name, value in self.headers.items()}
                provider.received.append(Received(self.command, self.path, headers, body))
                if provider.hold is not None:
                    provider.hold.wait(30)
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(provider.response_body)))
                for name, value in provider.response_headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(provider.response_body)

            def log_message(self, *_arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def read_body(handler: BaseHTTPRequestHandler) -> bytes:
    if handler.headers.get("transfer-encoding", "") != "chunked":
        return handler.rfile.read(int(handler.headers.get("content-length", 0)))
    body = b""
    while size := int(handler.rfile.readline().strip(), 16):
        body += handler.rfile.read(size)
        handler.rfile.readline()
    handler.rfile.readline()
    return body


class Edge:
    """The edge and its stand-ins; ``authz`` are the sockets of ext_authz, of which the first is started."""

    def __init__(self, folder: Path, *, authz: tuple[str, ...] = ("authz",)) -> None:
        self.folder = folder
        self.settings = edge.EdgeSettings(
            listen_address="127.0.0.1",
            port=free_port(),
            admin_socket=folder / "admin.sock",
            ext_authz_sockets=tuple(folder / f"{name}.sock" for name in authz),
            ext_proc_socket=folder / "proc.sock",
            control_plane_socket=folder / "control.sock",
            clusters_path=folder / "clusters" / "clusters.json",
            access_log_path=folder / "access.log",
        )
        self.base_url = f"http://127.0.0.1:{self.settings.port}"
        self.admin = EnvoyAdmin(self.settings.admin_socket)
        self.authorization = Authorization()
        self.processor = Processor()
        self.provider = Provider()
        self._servers: dict[str, grpc.Server] = {}
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        self.start_server("authz")
        self.start_server("proc")
        self.write_clusters({CLUSTER: self.provider.port})
        configuration = self.folder / "edge.yaml"
        configuration.write_text(edge.render(self.settings, edge.TEMPLATE.read_text()))
        log = (self.folder / "envoy.log").open("wb")
        self._process = subprocess.Popen(
            [*edge.command(envoy_binary(), configuration), "--concurrency", "1"], stdout=log, stderr=log
        )
        log.close()
        deadline = time.monotonic() + START_SECONDS
        while not (self.admin.is_live() and self.knows(CLUSTER, self.provider.port)):
            said = (self.folder / "envoy.log").read_text()[-2000:]
            assert self._process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.02)

    def start_server(self, name: str) -> None:
        options = [("grpc.max_receive_message_length", 2**24)]
        server = grpc.server(ThreadPoolExecutor(16), options=options)
        if name.startswith("authz"):
            auth_grpc.add_AuthorizationServicer_to_server(self.authorization, server)
        else:
            proc_grpc.add_ExternalProcessorServicer_to_server(self.processor, server)
        server.add_insecure_port(f"unix:{self.folder / name}.sock")
        server.start()
        self._servers[name] = server

    def stop_server(self, name: str) -> None:
        self._servers.pop(name).stop(0).wait()

    def knows(self, cluster: str, port: int) -> bool:
        return self.admin.reaches(cluster, f"http://127.0.0.1:{port}")

    def write_clusters(self, ports: dict[str, int]) -> None:
        """Write clusters as the control plane does: a new file, moved into place."""
        path = self.settings.clusters_path
        path.parent.mkdir(exist_ok=True)
        resources = [
            {
                "@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster",
                "name": name,
                "type": "STRICT_DNS",
                "load_assignment": {
                    "cluster_name": name,
                    "endpoints": [
                        {
                            "lb_endpoints": [
                                {
                                    "endpoint": {
                                        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}
                                    }
                                }
                            ]
                        }
                    ],
                },
            }
            for name, port in ports.items()
        ]
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"version_info": str(time.time_ns()), "resources": resources}))
        unfinished.replace(path)

    def access_log(self, *, lines: int) -> list[dict]:
        """Return the log once it has so many lines; Envoy flushes it every second or so."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            path = self.settings.access_log_path
            found = path.read_text().splitlines() if path.exists() else []
            if len(found) >= lines:
                return [json.loads(line) for line in found]
            assert time.monotonic() < deadline, found
            time.sleep(0.05)

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        for server in self._servers.values():
            server.stop(0).wait()
        self.provider.stop()


@pytest.fixture
def bare_edge():
    """A fresh edge with stand-ins behind it."""
    with running_edge() as running:
        yield running


@contextmanager
def running_edge(*, authz: tuple[str, ...] = ("authz",)):
    # A Unix socket's path has at most 107 bytes, which pytest's own folders may exceed.
    folder = Path(tempfile.mkdtemp(prefix="bg-edge-", dir="/tmp"))
    running = Edge(folder, authz=authz)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder, ignore_errors=True)
