"""One HTTP/2 request by a client that listens while it sends."""

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import h2.config
import h2.connection
import h2.events


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    ended: bool = False


def post_over_http2(base_url: str, path: str, *, headers: Mapping[str, str | bytes], body: bytes) -> Answer:
    url = urlsplit(base_url)
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    connection.initiate_connection()
    names = {":method": "POST", ":scheme": "http", ":authority": url.netloc, ":path": path, **headers}
    sent_headers = {name.lower(): value.encode() if isinstance(value, str) else value for name, value in names.items()}
    connection.send_headers(1, [(name.encode(), value) for name, value in sent_headers.items()])
    answer, sent = Answer(), 0
    with socket.create_connection((url.hostname, url.port), timeout=20) as wire:
        wire.sendall(connection.data_to_send())
        while not answer.ended:
            room = min(connection.local_flow_control_window(1), connection.max_outbound_frame_size, len(body) - sent)
            if room > 0:
                connection.send_data(1, body[sent : sent + room], end_stream=sent + room == len(body))
                sent += room
                wire.sendall(connection.data_to_send())
                continue
            received = wire.recv(65_536)
            assert received, "the edge closed the connection without an answer"
            for event in connection.receive_data(received):
                match event:
                    case h2.events.ResponseReceived():
                        answer.headers = dict(event.headers)
                        answer.status = int(answer.headers[":status"])
                    case h2.events.DataReceived():
                        answer.body += event.data
                        connection.acknowledge_received_data(event.flow_controlled_length, 1)
                    case h2.events.StreamEnded() | h2.events.StreamReset():
                        answer.ended = True
            wire.sendall(connection.data_to_send())
    return answer
