"""What the embedded engine would get wrong, found in its own compiled plan (OPA's intermediate representation).

The engine compiles much that OPA's compiler refuses: an unknown function or a misspelled variable is merely undefined,
so that a rule which should deny never does. The plan names every call, local and string, however the source spells it.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from budgetguard.core.policy import DECISION_PATH, PolicyLoadError

# How a plan names the function of the rule that is asked for.
_DECISION = f"g0.data.{DECISION_PATH.replace('/', '.')}"
# Locals 0 and 1 are ``input`` and ``data``.
_GIVEN_LOCALS = {0, 1}
# The members of a statement that name a local which it sets.
_SETTING = ("target", "result", "key", "value")
# sprintf verbs that the engine squeezes into 32 bits: $5 in nanos would read as 705032704.
_INTEGER_VERB = re.compile(r"%[-+# 0-9.\[\]*]*[bcdoxXU]")
NEEDS_ESCAPE = re.compile(r'["\\\x00-\x1f]')


def check_plan(plan: dict[str, Any], *, is_builtin: Callable[[str], bool]) -> None:
    """Refuse a plan that would decide otherwise than its source says.

    Raises:
        PolicyLoadError: there is no decision, or the policies use what the engine lacks or gets wrong.
    """
    functions = plan["funcs"]["funcs"]
    defined = {function["name"] for function in functions}
    if _DECISION not in defined:
        raise PolicyLoadError("no policy defines data.budgetguard.decision")
    builtins = {builtin["name"] for builtin in plan["static"]["builtin_funcs"]}
    called = {statement["func"] for statement in _objects(functions) if isinstance(statement.get("func"), str)}
    lacking = sorted(name for name in (builtins | called) - defined if not is_builtin(name))
    if lacking:
        raise PolicyLoadError(
            f"the embedded engine has no {', '.join(lacking)}: leave it out, or set OPA_URL to a real OPA"
        )
    files = [file["value"] for file in plan["static"]["files"]]
    for function in functions:
        _check_locals(function, files)
    for string in plan["static"]["strings"]:
        _check_string(string["value"], uses_sprintf="sprintf" in builtins)


def spell(text: str) -> str:
    """Spell a string as the engine keeps literals inside: with JSON's escapes, where JSON needs them."""
    return json.dumps(text, ensure_ascii=False)[1:-1] if NEEDS_ESCAPE.search(text) else text


def _objects(part: object) -> Iterator[dict[str, Any]]:
    if isinstance(part, dict):
        yield part
        for member in part.values():
            yield from _objects(member)
    elif isinstance(part, list):
        for member in part:
            yield from _objects(member)


def _check_locals(function: dict[str, Any], files: list[str]) -> None:
    """Refuse a local that is read and never set: a variable that nothing defines."""
    statements = [part["stmt"] for part in _objects(function["blocks"]) if "stmt" in part]
    known = _GIVEN_LOCALS.union(function["params"])
    for statement in statements:
        known.update(statement[name] for name in _SETTING if isinstance(statement.get(name), int))
    place = function["name"].removeprefix("g0.")
    for statement in statements:
        if "file" in statement:
            place = f"{files[statement['file']]}:{statement['row'] + 1}"
        if statement.get("target") in _GIVEN_LOCALS:
            # `{"model": "x"} = input` is compiled to an assignment, which always holds, and not to a comparison.
            raise PolicyLoadError(f"{place}: input or data is compared with =, which the embedded engine reads as :=")
        operands = [*statement.values(), *statement.get("args", ())]
        for operand in operands:
            if isinstance(operand, dict) and operand.get("type") == "local" and operand["value"] not in known:
                raise PolicyLoadError(f"{place}: a variable is used that nothing defines")


def _check_string(text: str, *, uses_sprintf: bool) -> None:
    """Refuse a string that the engine would compare or print wrongly.

    It compares strings as they were spelled: an escape that could be written plainly never equals the plain character.
    """
    inner = text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text
    try:
        canonical = spell(json.loads(f'"{inner}"', strict=False))
    except ValueError:
        canonical = inner
    if canonical != inner:
        raise PolicyLoadError(
            f'the embedded engine compares strings as they are spelled: write "{canonical}" instead of "{inner}"'
        )
    if uses_sprintf and _INTEGER_VERB.search(inner):
        raise PolicyLoadError(f'the embedded engine cuts integers of sprintf to 32 bits: use %v in "{inner}"')
