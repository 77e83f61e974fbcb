"""What Envoy alone decides: who reaches what, what is taken out, what it answers itself. The programs are stand-ins."""

import json
import re
import socket
import threading
import time

import h2.connection
import h2.events
import httpx
import pytest
from envoy.service.auth.v3.external_auth_pb2 import CheckResponse

from budgetguard.core.reasons import TELLING, Reason
from ext_authz.call import HEADERS_READ
from tests.plugins.edge import CLUSTER, admit, header, refuse, running_edge

PAID = ("/v1/chat/completions", "/v1/responses", "/v1/embeddings")
MIB = 2**20
FIRST = "request_headers"


@pytest.fixture
def http(bare_edge):
    with httpx.Client(base_url=bare_edge.base_url, timeout=20) as client:
        yield client


def error_of(answer: httpx.Response) -> dict:
    """Return the error object, insisting on the shape that OpenAI's SDKs read."""
    assert answer.headers["content-type"] == "application/json"
    (name, error), *more = answer.json().items()
    assert name == "error"
    assert not more
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize("path", PAID)
def test_a_paid_route_is_checked_metered_and_forwarded(bare_edge, http, path):
    answer = http.post(path, json={"model": "m"})
    assert answer.status_code == 200
    assert answer.headers["x-admitted"] == "yes"
    assert answer.headers["server"] == "budgetguard"
    (check,) = bare_edge.authorization.seen
    asked = check.attributes.request.http
    assert (asked.method, asked.path) == ("POST", path)
    assert json.loads(asked.raw_body) == {"model": "m"}
    kinds = [request.WhichOneof("request") for request in bare_edge.processor.seen]
    assert kinds[:2] == ["request_headers", "response_headers"]
    assert set(kinds[2:]) == {"response_body"}
    (received,) = bare_edge.provider.received
    assert (received.path, json.loads(received.body)) == (path, {"model": "m"})
    assert received.headers["host"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/responses", 405),
        ("POST", "/v1/chat/completions/", 404),
        ("POST", "/v1/chat", 404),
        ("POST", "/v1/chat/completionsx", 404),
        ("POST", "/v1/images/generations", 404),
        ("GET", "/", 404),
        ("POST", "/administration", 404),
        ("POST", "/envoy.service.auth.v3.Authorization/Check", 404),
        ("POST", "/v1/chat/completions/../../../v1/files", 404),
        ("POST", "/v1%2Fchat/completions", 400),
    ],
)
def test_what_nobody_meters_does_not_exist(bare_edge, method, path, status):
    answer = raw(bare_edge, f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
    assert answer.status_code == status
    assert error_of(answer)["type"] == "invalid_request_error"
    assert bare_edge.authorization.seen == []
    assert bare_edge.provider.received == []


@pytest.mark.parametrize("path", ["//v1/chat/completions", "/v1/./chat/completions", "/v1/files/../chat//completions"])
def test_spellings_of_a_paid_path_are_that_path(bare_edge, path):
    answer = raw(bare_edge, f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{{}}")
    assert answer.status_code == 200
    assert bare_edge.authorization.seen[0].attributes.request.http.path == "/v1/chat/completions"
    assert bare_edge.provider.received[0].path == "/v1/chat/completions"


def raw(edge, request: str | bytes) -> httpx.Response:
    """Send bytes that a client library would tidy first."""
    request = request.encode() if isinstance(request, str) else request
    with socket.create_connection(("127.0.0.1", edge.settings.port), timeout=10) as connection:
        connection.sendall(request.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n", 1))
        text = b""
        while piece := connection.recv(65536):
            text += piece
    head, _, body = text.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = [tuple(part.strip() for part in line.split(":", 1)) for line in lines]
    if ("transfer-encoding", "chunked") in headers:
        headers.remove(("transfer-encoding", "chunked"))
        body = b"".join(re.split(rb"[0-9a-f]+\r\n", body)).replace(b"\r\n", b"")
    return httpx.Response(int(status.split()[1]), headers=headers, content=body)


def test_callers_cannot_set_what_is_ours(bare_edge, http):
    ours = {
        "x-budgetguard-cluster": "control_plane",
        "X-BudgetGuard-Anything": "mine",
        "x-request-id": "mine",
        "x-envoy-upstream-rq-timeout-ms": "1",
        "x-envoy-original-path": "/elsewhere",
        "x-forwarded-for": "6.6.6.6",
    }
    for path in (*PAID, "/v1/files"):
        http.post(path, json={}, headers=ours)
    told = [request.request_headers.headers.headers for request in bare_edge.processor.seen if request.HasField(FIRST)]
    assert len(told) == len(bare_edge.authorization.seen) == len(PAID)
    for check, seen in zip(bare_edge.authorization.seen, told, strict=True):
        headers = {header.key: header.raw_value.decode() for header in seen}
        # ext_authz' own word, not the caller's.
        assert {name: headers[name] for name in headers if name.startswith("x-budgetguard-")} == {
            "x-budgetguard-cluster": CLUSTER
        }
        assert {name for name in headers if name.startswith("x-envoy-")} <= {"x-envoy-external-address"}
        assert headers["x-envoy-external-address"] == "127.0.0.1"
        assert re.fullmatch(r"[0-9a-f-]{36}", headers["x-request-id"])
        assert ("x-request-id", headers["x-request-id"].encode()) in headers_of(check)
    assert len({operation_id(check) for check in bare_edge.authorization.seen}) == len(PAID)
    assert len(bare_edge.provider.received) == len(PAID)


def headers_of(check) -> list[tuple[str, bytes]]:
    return [(header.key, header.raw_value) for header in check.attributes.request.http.header_map.headers]


def operation_id(check) -> bytes:
    return dict(headers_of(check))["x-request-id"]


def test_admission_is_told_what_it_reads_and_byte_by_byte(bare_edge):
    read = [name for name in HEADERS_READ if name != "x-request-id"]
    sent = [(name, f"{name}-\xf6".encode("latin-1")) for name in read]
    sent += [("x-session-id", b"again"), ("x-tags", b"again"), ("cookie", b"secret"), ("user-agent", b"any")]
    lines = b"".join(b"%s: %s\r\n" % (name.encode(), value) for name, value in sent)
    answer = raw(bare_edge, b"POST /v1/responses HTTP/1.1\r\nhost: x\r\n" + lines + b"content-length: 2\r\n\r\n{}")
    assert answer.status_code == 200
    (check,) = bare_edge.authorization.seen
    told = [pair for pair in headers_of(check) if pair[0] not in ("x-request-id", "x-envoy-auth-partial-body")]
    assert sorted(told) == sorted(sent[:-2])
    assert operation_id(check)


def test_nothing_of_ours_or_of_the_callers_network_reaches_the_provider(bare_edge, http):
    private = dict.fromkeys(
        [
            *("x-api-key", "x-admin-key", "x-tenant-id", "x-tags", "x-session-id", "x-session-name", "x-session-path"),
            *("x-user-id", "cookie", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "forwarded", "via"),
            *("traceparent", "tracestate", "baggage", "x_api_key"),
        ],
        "private",
    )
    answer = http.post(PAID[0], json={}, headers={**private, "accept-encoding": "gzip", "openai-beta": "x=1"})
    assert answer.status_code == 200
    (received,) = bare_edge.provider.received
    assert set(received.headers) == {
        *("host", "accept", "accept-encoding", "user-agent", "content-type", "content-length", "openai-beta"),
    } | ({"transfer-encoding"} & set(received.headers))
    assert received.headers["accept-encoding"] == "identity"


def test_the_meter_is_told_who_called_but_no_secret(bare_edge, http):
    secrets = {
        "authorization": "Bearer secret",
        "x-api-key": "secret",
        "cookie": "a=secret",
        "x-admin-key": "secret",
        "x-goog-api-key": "secret",
    }
    bare_edge.provider.response_headers["set-cookie"] = "secret=1"
    answer = http.post(PAID[0], json={}, headers=secrets)
    assert "set-cookie" not in answer.headers
    told = bare_edge.processor.seen
    assert "secret" not in str(told)
    metadata = told[0].metadata_context.filter_metadata["envoy.filters.http.ext_authz"]
    assert metadata["tenant_id"] == "acme"
    response = next(request for request in told if request.HasField("response_headers"))
    attributes = response.attributes["envoy.filters.http.ext_proc"]
    assert attributes["response.code_details"] == "via_upstream"


def test_ext_authz_chooses_cluster_path_and_key(bare_edge, http):
    def elsewhere(request):
        answer = admit(request)
        answer.ok_response.headers.append(header(":path", "/openai/v1/chat/completions"))
        answer.ok_response.headers.append(header("authorization", "Bearer provider-key"))
        return answer

    bare_edge.authorization.answer = elsewhere
    answer = http.post(PAID[0], json={}, headers={"authorization": "Bearer tenant-key"})
    assert answer.status_code == 200
    (received,) = bare_edge.provider.received
    assert received.path == "/openai/v1/chat/completions"
    assert received.headers["authorization"] == "Bearer provider-key"


def test_a_refusal_arrives_as_it_was_written(bare_edge, http):
    bare_edge.authorization.answer = refuse
    answer = http.post(PAID[0], json={})
    assert (answer.status_code, answer.text) == (402, '{"ours":1}')
    assert answer.headers["content-type"] == "application/json"
    assert bare_edge.provider.received == []


def test_an_admission_that_names_no_cluster_ends_here(bare_edge, http):
    bare_edge.authorization.answer = lambda _request: CheckResponse(status={"code": 0})
    answer = http.post(PAID[0], json={})
    assert answer.status_code == 503
    assert error_of(answer)["type"] == "server_error"
    assert bare_edge.provider.received == []


def test_a_provider_that_is_gone_is_told_as_such(bare_edge, http):
    def unknown(request):
        answer = admit(request)
        answer.ok_response.headers[0].header.value = "provider-gone"
        return answer

    bare_edge.authorization.answer = unknown
    answer = http.post(PAID[0], json={})
    telling = TELLING[Reason.PROVIDER_UNAVAILABLE]
    assert answer.status_code == telling.http_status
    assert error_of(answer) == {
        "message": telling.message,
        "type": telling.openai_type,
        "param": None,
        "code": Reason.PROVIDER_UNAVAILABLE,
    }
    assert answer.headers["x-budgetguard-operation-id"]


def test_own_answers_say_what_the_table_of_reasons_says(bare_edge, http):
    for answer, reason in (
        (http.post("/v1/files"), Reason.ROUTE_UNKNOWN),
        (http.post(PAID[0], content=b"x" * (11 * MIB)), Reason.BODY_TOO_LARGE),
    ):
        telling = TELLING[reason]
        assert answer.status_code == telling.http_status
        expected = {"message": telling.message, "type": telling.openai_type, "param": None, "code": reason.value}
        assert error_of(answer) == expected


def test_without_ext_authz_nothing_passes(bare_edge, http):
    bare_edge.stop_server("authz")
    answer = http.post(PAID[0], json={})
    telling = TELLING[Reason.ADMISSION_UNAVAILABLE]
    assert answer.status_code == telling.http_status == 503
    assert error_of(answer) == {
        "message": telling.message,
        "type": telling.openai_type,
        "param": None,
        "code": Reason.ADMISSION_UNAVAILABLE,
    }
    assert bare_edge.provider.received == []


def test_of_several_ext_authz_processes_one_that_is_gone_is_passed_over():
    with running_edge(authz=("authz", "authz_2")) as edge, httpx.Client(base_url=edge.base_url, timeout=20) as http:

        def admitted() -> int:
            statuses = [http.post(PAID[0], json={}).status_code for _ in range(20)]
            assert set(statuses) <= {200, 503}
            return statuses.count(200)

        # Whoever finds out is refused, once in a second or two; half of them would be without that.
        first = admitted()
        edge.start_server("authz_2")
        time.sleep(3)  # until it is asked again
        edge.stop_server("authz")
        second = admitted()
        assert min(first, second) >= 16
        assert len(edge.authorization.seen) == len(edge.provider.received) == first + second


@pytest.mark.parametrize("how", ["gone", "broken"])
def test_without_the_meter_the_provider_is_not_called(bare_edge, http, how):
    if how == "gone":
        bare_edge.stop_server("proc")
    bare_edge.processor.broken = True
    answer = http.post(PAID[0], json={})
    assert answer.status_code == 503
    assert "metering" in error_of(answer)["message"]
    assert bare_edge.provider.received == []


def test_a_meter_that_hangs_is_told_as_one_that_is_gone(bare_edge, http):
    bare_edge.processor.hold = threading.Event()
    answer = http.post(PAID[0], json={})
    bare_edge.processor.hold.set()
    assert (answer.status_code, error_of(answer)["code"]) == (503, Reason.METERING_UNAVAILABLE)
    assert bare_edge.provider.received == []


def test_an_ext_authz_that_hangs_is_a_503(bare_edge, http):
    released = threading.Event()

    def hang(request):
        released.wait(20)
        return admit(request)

    bare_edge.authorization.answer = hang
    answer = http.post(PAID[0], json={})
    released.set()
    assert answer.status_code == 503
    assert bare_edge.provider.received == []


@pytest.mark.parametrize("http2", [False, True], ids=["h1", "h2"])
def test_bodies_up_to_the_bound_pass_and_above_it_do_not(bare_edge, http2):
    with httpx.Client(base_url=bare_edge.base_url, http1=not http2, http2=http2, timeout=30) as client:
        passed = client.post(PAID[0], content=b"x" * (9 * MIB), headers={"content-type": "application/json"})
        assert (passed.status_code, passed.http_version) == (200, "HTTP/2" if http2 else "HTTP/1.1")
        assert len(bare_edge.provider.received[0].body) == 9 * MIB
        if http2:  # httpx sends on without looking at the answer, and gets stuck
            assert status_of_http2_post(bare_edge, PAID[0], body_bytes=11 * MIB) == 413
        else:
            assert client.post(PAID[0], content=b"x" * (11 * MIB)).status_code == 413
    assert len(bare_edge.authorization.seen) == 1
    assert len(bare_edge.provider.received) == 1


def status_of_http2_post(edge, path: str, *, body_bytes: int) -> int:
    """Post over HTTP/2 as far as the server wants it, and return the answer's status."""
    connection = h2.connection.H2Connection()
    with socket.create_connection(("127.0.0.1", edge.settings.port), timeout=20) as wire:
        connection.initiate_connection()
        length = ("content-length", str(body_bytes))
        connection.send_headers(
            1, [(":method", "POST"), (":path", path), (":scheme", "http"), (":authority", "x"), length]
        )
        left = body_bytes
        while True:
            wire.sendall(connection.data_to_send())
            while left and (room := min(connection.local_flow_control_window(1), 16_384, left)):
                connection.send_data(1, b"x" * room)
                left -= room
                wire.sendall(connection.data_to_send())
            for event in connection.receive_data(wire.recv(65_536)):
                if isinstance(event, h2.events.ResponseReceived):
                    return int(dict(event.headers)[b":status"])


def test_answers_are_compressed_here_and_nowhere_else(bare_edge, http):
    bare_edge.provider.response_body = json.dumps({"text": "a" * 10_000}).encode()
    answer = http.post(PAID[0], json={}, headers={"accept-encoding": "gzip"})
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.json() == {"text": "a" * 10_000}
    seen = b"".join(request.response_body.body for request in bare_edge.processor.seen)
    assert seen == bare_edge.provider.response_body
    assert "content-encoding" not in http.post(PAID[0], json={}, headers={"accept-encoding": "identity"}).headers


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\n\r\n", 426),
        (b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"x" * 70_000 + b"\r\n\r\n", 431),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ],
)
def test_what_is_no_request_gets_an_answer(bare_edge, sent, status):
    with socket.create_connection(("127.0.0.1", bare_edge.settings.port), timeout=10) as wire:
        wire.sendall(sent)
        received = b""
        while piece := wire.recv(65_536):
            received += piece
            if b"\r\n\r\n" in received:
                break
    assert received.startswith(f"HTTP/1.1 {status} ".encode())
    assert bare_edge.processor.seen == []


def test_the_access_log_explains_a_call_and_holds_no_key(bare_edge, http):
    keys = {"authorization": "Bearer secret", "x-api-key": "secret"}
    answer = http.post(PAID[0] + "?key=secret", json={"secret": 1}, headers=keys)
    assert answer.status_code == 200
    http.get("/admin/tenant", headers={"x-admin-key": "secret"})
    entries = bare_edge.access_log(lines=2)
    assert "secret" not in json.dumps(entries)
    entry = entries[0]
    assert entry["operation_id"].encode() == operation_id(bare_edge.authorization.seen[0])
    assert (entry["path"], entry["status"], entry["details"]) == (PAID[0], 200, "via_upstream")
    assert (entry["route"], entry["provider"], entry["tenant_id"]) == ("admitted", CLUSTER, "acme")
    assert entry["duration_ms"] >= 0


def test_a_new_provider_is_live_without_a_restart(bare_edge, http):
    def second(request):
        answer = admit(request)
        answer.ok_response.headers[0].header.value = "provider-second"
        return answer

    bare_edge.authorization.answer = second
    assert http.post(PAID[0], json={}).status_code == 503
    bare_edge.write_clusters({CLUSTER: bare_edge.provider.port, "provider-second": bare_edge.provider.port})
    deadline = time.monotonic() + 10
    while not bare_edge.knows("provider-second", bare_edge.provider.port):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert http.post(PAID[0], json={}).status_code == 200


def test_without_the_control_plane_its_routes_say_so(http):
    for path in ("/admin/tenant", "/v1/admin/tenants", "/health"):
        answer = http.get(path)
        assert answer.status_code == 503
        assert "control plane" in error_of(answer)["message"]


def test_a_drain_waits_for_calls_under_way_and_takes_no_new_ones(bare_edge, http):
    bare_edge.provider.hold = threading.Event()
    answers = []
    call = threading.Thread(target=lambda: answers.append(http.post(PAID[0], json={})))
    call.start()
    deadline = time.monotonic() + 10
    while not bare_edge.provider.received:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    waits = []

    def waiting(count: int) -> None:
        waits.append(count)
        with pytest.raises(httpx.ConnectError):
            httpx.post(bare_edge.base_url + PAID[0], json={})
        bare_edge.provider.hold.set()

    assert bare_edge.admin.drain(seconds=20, hurry=lambda: False, waiting=waiting) == 0
    call.join()
    assert waits[0] == 1
    assert answers[0].status_code == 200
