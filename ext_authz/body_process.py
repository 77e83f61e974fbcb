"""Reads large request bodies in a process of its own: ``python -m ext_authz.body_process FD``.

Over the socket FD comes one request after the other (which API, how many bytes, the body), and for each goes back a
length and JSON: ``{"facts": {...}}`` or ``{"invalid": "...", "param": ...}``. The process ends with the socket.
"""

import contextlib
import signal
import socket
import sys
from struct import Struct

import orjson

from budgetguard.core.providers import REGISTRY
from budgetguard.core.providers.api import InvalidRequestError

APIS = tuple(REGISTRY.values())
REQUEST_HEAD = Struct(">BI")  # index of the API, bytes of the body
ANSWER_HEAD = Struct(">I")  # bytes of the answer


def main(connection: socket.socket) -> None:
    """Serve one parent until it closes the connection."""
    # Ctrl-C reaches the whole foreground group; calls in flight are the parent's to drain.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with connection, connection.makefile("rb") as requests:
        while len(head := requests.read(REQUEST_HEAD.size)) == REQUEST_HEAD.size:
            index, size = REQUEST_HEAD.unpack(head)
            body = requests.read(size)
            if len(body) < size:
                return
            answer = _answer(index, body)
            connection.sendall(ANSWER_HEAD.pack(len(answer)) + answer)


def _answer(index: int, body: bytes) -> bytes:
    try:
        return orjson.dumps({"facts": APIS[index].parse_request(body)})
    except InvalidRequestError as invalid:
        return orjson.dumps({"invalid": str(invalid), "param": invalid.param})


if __name__ == "__main__":
    # The parent may go away at any moment.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        main(socket.socket(fileno=int(sys.argv[1])))
