"""The embedded engine's process: ``python -m budgetguard.adapters.rego.process FD``.

Lines of JSON over the socket FD. First the policies come (``{"name": "source"}``) and ``{"fields_read": [name, ...]}``
goes back (``null`` instead of the list: as in ``reads.py``), or ``{"refusal": ...}``, the sentence why they cannot be
used. Then each line is an ``input``, answered in order by ``{"result": ...}`` or
``{"fault": ..., "detail": ...}``. The process ends with the socket.
"""

import contextlib
import signal
import socket
import sys
from typing import Any

import orjson

from budgetguard.adapters.rego.engine import RegoEngine
from budgetguard.core.policy import PolicyFault, PolicyLoadError, PolicyUnavailableError

# What the parent has not ended by then has no parent any more: the alarm's default action ends the process. It runs
# while there is work, never while the process waits for a question.
COMPILE_SECONDS_MAX = 20
EVALUATE_SECONDS_MAX = 1
ANSWER_BYTES_MAX = 64 * 1024


def main(connection: socket.socket) -> None:
    """Serve one parent until it closes the connection."""
    # Ctrl-C reaches the whole foreground group; calls in flight are the parent's to drain.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with connection, connection.makefile("rb") as lines:
        signal.alarm(COMPILE_SECONDS_MAX)
        try:
            engine = RegoEngine(orjson.loads(lines.readline()))
        except PolicyLoadError as error:
            connection.sendall(orjson.dumps({"refusal": str(error)}) + b"\n")
            return
        signal.alarm(0)
        fields_read = None if engine.fields_read is None else sorted(engine.fields_read)
        connection.sendall(orjson.dumps({"fields_read": fields_read}) + b"\n")
        for line in lines:
            signal.alarm(EVALUATE_SECONDS_MAX)
            answer = _answer(engine, orjson.loads(line))
            signal.alarm(0)
            connection.sendall(answer + b"\n")


def _answer(engine: RegoEngine, document: Any) -> bytes:
    try:
        answer = orjson.dumps({"result": engine.evaluate(document)})
    except PolicyUnavailableError as error:
        return orjson.dumps({"fault": error.fault, "detail": error.detail})
    except TypeError as error:  # an integer beyond 64 bits
        return orjson.dumps({"fault": PolicyFault.WRONG_TYPED, "detail": str(error)})
    if len(answer) > ANSWER_BYTES_MAX:
        return orjson.dumps({"fault": PolicyFault.WRONG_TYPED, "detail": f"a decision of {len(answer)} bytes"})
    return answer


if __name__ == "__main__":
    # The parent may go away at any moment.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        main(socket.socket(fileno=int(sys.argv[1])))
