"""One Rego interpreter (regopy): compiles the policies once, refuses what it would get wrong, then evaluates.

The interpreter keeps state between its calls, so one engine serves one thread. Nothing here can be interrupted: a
policy that takes long takes long, which is why ``process.py`` runs it in a process of its own.
"""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
from regopy import Bundle, Input, Interpreter, LogLevel, RegoError

from budgetguard.adapters.rego.plan import check_plan, spell
from budgetguard.adapters.rego.reads import fields_read
from budgetguard.core.policy import DECISION_PATH, PolicyFault, PolicyLoadError, PolicyUnavailableError

# The first word of a module, after comments: the engine takes a file without it for an empty module.
_PACKAGE = re.compile(r"(?:\s|#[^\n]*\n)*package\s")


class RegoEngine:
    """The compiled policies.

    ``modules`` maps a file name, for messages, to Rego source. ``fields_read`` are the members of ``input`` that the
    decision can depend on; ``None`` is all of them, or more than ``input``.
    """

    def __init__(self, modules: Mapping[str, str]) -> None:
        """Compile.

        Raises:
            PolicyLoadError: a module does not parse, the decision is not defined, or the policies use what this engine
                lacks or gets wrong.
        """
        self._interpreter = Interpreter()
        self._interpreter.log_level = LogLevel.NONE
        for name, source in modules.items():
            if not _PACKAGE.match(source):
                raise PolicyLoadError(f"{name}: expected a package declaration first")
            try:
                self._interpreter.add_module(name, source)
            except RegoError as error:
                raise PolicyLoadError(f"{name}{_line_of(error, source)}: {_message_of(error)}") from error
        try:
            self._bundle: Bundle = self._interpreter.build(None, [DECISION_PATH])
            if not self._bundle.ok():
                # The engine has no words for it, and aborts the process when such a bundle is used.
                raise PolicyLoadError("the policies do not compile together: `opa check --strict` says why")
            plan = self._plan()
        except RegoError as error:
            raise PolicyLoadError(_message_of(error)) from error
        check_plan(plan, is_builtin=self._interpreter.is_builtin)
        self.fields_read: frozenset[str] | None = fields_read(plan)

    def evaluate(self, document: Mapping[str, Any]) -> object:
        """Evaluate ``data.budgetguard.decision`` with ``document`` as ``input``; return its JSON value.

        Raises:
            PolicyUnavailableError: undefined, or the engine reports an error.
        """
        self._interpreter.set_input(Input(_spelled(document)))
        try:
            results = self._interpreter.query_bundle_entrypoint(self._bundle, DECISION_PATH).results
        except (RegoError, ValueError) as error:
            # The engine writes its errors where JSON should be, so that they arrive as malformed JSON.
            raise PolicyUnavailableError(
                PolicyFault.FAILED, "rules in conflict, or a builtin that cannot work"
            ) from error
        if len(results) != 1:
            raise PolicyUnavailableError(PolicyFault.FAILED, f"rules in conflict: {len(results)} results")
        if not results[0].expressions:
            raise PolicyUnavailableError(PolicyFault.UNDEFINED, "no rule gives a decision for this call")
        value: object = results[0].expressions[0]
        return value

    def _plan(self) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="budgetguard-rego-") as folder:
            self._interpreter.save_bundle(folder, self._bundle)
            plan: dict[str, Any] = orjson.loads((Path(folder) / "plan.json").read_bytes())
        return plan


def _spelled(value: Any) -> Any:
    """Spell every string as the engine compares them; given raw, it would also end them at a NUL."""
    if isinstance(value, str):
        return spell(value)
    if isinstance(value, Mapping):
        return {spell(name): _spelled(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_spelled(member) for member in value]
    return value


def _message_of(error: RegoError) -> str:
    """Find the sentence in the tree that the engine reports."""
    text = str(error)
    start = re.search(r"\(errormsg (\d+):", text)
    return text[start.end() : start.end() + int(start[1])] if start else text[:500] or "the policies do not compile"


def _line_of(error: RegoError, source: str) -> str:
    place = re.search(r"\|(\d+)\|\d+", str(error))
    if place is None:
        return ""
    line = source.encode().count(b"\n", 0, int(place[1])) + 1
    return f":{line}"
