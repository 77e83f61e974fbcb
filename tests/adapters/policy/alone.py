"""The engine by itself, run in a process of its own: its library corrupts the heap beside some that the tests load."""

import orjson

from budgetguard.adapters.rego.engine import RegoEngine
from budgetguard.adapters.rego.reads import PURE_BUILTINS
from budgetguard.core.policy import PolicyUnavailableError


def fields_read(modules):
    return RegoEngine(modules).fields_read


def answer_all(modules, documents):
    """What the policies read, and the answer to each input, each evaluated."""
    engine = RegoEngine(modules)
    return engine.fields_read, [_answer(engine, orjson.loads(document)) for document in documents]


def names_unknown_to_the_engine():
    interpreter = RegoEngine({"own.rego": "package budgetguard\n\ndecision := 1\n"})._interpreter
    return [name for name in PURE_BUILTINS.split() if not interpreter.is_builtin(name)]


def _answer(engine, document):
    try:
        return {"result": engine.evaluate(document)}
    except PolicyUnavailableError as error:
        return {"fault": error.fault, "detail": error.detail}
