"""Runs the Lua scripts by their digest, and makes sure that a script's text names the Redis process it is loaded into.

The process' run id is a constant of the text, so its digest changes with it. A restarted Redis knows no script (they
are loaded by EVAL, which is replicated by its effects; SCRIPT LOAD would come back from the append-only file): it
answers NOSCRIPT, and only then, over one connection that cannot outlive the process, the run id is read and the text
loaded. So no script ever runs under another process' name.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha1
from importlib.resources import files

from budgetguard.adapters.redis.client import Argument, RedisClient, RedisReplyError, Reply

_LUA = files("budgetguard.adapters.redis") / "lua"


@dataclass(slots=True)
class Script:
    """One transition: the file ``lua/<name>.lua`` below the shared prelude."""

    name: str
    body: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.body = (_LUA / "common.lua").read_text() + (_LUA / f"{self.name}.lua").read_text()

    def text(self, run_id: str) -> str:
        """Spell the script for one Redis process."""
        return f"local RUN_ID = '{run_id}'\n{self.body}"


class ScriptRunner:
    """Runs scripts on one Redis."""

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis
        self._run_id = ""
        self._digests: dict[str, str] = {}

    async def run(self, script: Script, keys: Sequence[str], arguments: Sequence[Argument]) -> Reply:
        """Run one script, atomically.

        Raises:
            CountersUnavailableError: Redis did not answer, or answered with an error; the script may have run unless
                the error is a ``RedisReplyError``.
        """
        digest = self._digests.get(script.name)
        if digest is not None:
            try:
                return await self._redis.command("EVALSHA", digest, len(keys), *keys, *arguments)
            except RedisReplyError as error:
                if not error.says("NOSCRIPT"):
                    raise
        async with self._redis.pinned() as connection:
            run_id = run_id_of(await connection.command("INFO", "server"))
            text = script.text(run_id)
            reply = await connection.command("EVAL", text, len(keys), *keys, *arguments)
        if run_id != self._run_id:
            self._run_id, self._digests = run_id, {}
        self._digests[script.name] = sha1(text.encode(), usedforsecurity=False).hexdigest()
        return reply


def run_id_of(info: str) -> str:
    """Find the run id in the reply of ``INFO server``."""
    return info_field(info, "run_id")


def info_field(info: str, name: str) -> str:
    """Find one field in a reply of INFO; empty when it is not there."""
    for line in info.splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return value
    return ""
