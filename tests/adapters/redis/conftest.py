import asyncio

import uvloop

BOTH = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
ONE = {"asyncio": asyncio.new_event_loop}


def pytest_asyncio_loop_factories(item):
    """The programs run on uvloop and tests on asyncio's own loop: what talks to a socket itself is held to both."""
    return BOTH if item.path.name in {"test_client.py", "test_connection.py"} else ONE
