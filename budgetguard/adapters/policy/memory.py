"""Decisions that are remembered: the same answer as a fresh one, without asking.

Policies are fixed at the start, so a decision is a function of the fields that they read. ``docs/decisions/013`` says
why and where it ends.
"""

from collections import OrderedDict
from dataclasses import fields

import orjson

from budgetguard.core.policy import PolicyDecision, PolicyInput

# Tenants, keys and models in use at once; with the bound of a key and of a reason some 12 MB at worst, 2 MB usually.
REMEMBERED_MAX = 4096
# Tags and the session are the caller's, as long as headers may be.
KEY_BYTES_MAX = 1024
# The time is another at each call: what depends on it would never be recalled. An estimate does come again, with a
# request of the same size, and when it does not has cost two microseconds.
_FIELDS = frozenset(field.name for field in fields(PolicyInput)) - {"time"}


class DecisionMemory:
    """The latest decisions, by the values of the fields that the policies read; the longest unused is forgotten first.

    ``fields_read`` of ``None``, or with one that cannot be a key, remembers nothing.
    """

    def __init__(self, fields_read: frozenset[str] | None) -> None:
        self._names = sorted(fields_read) if fields_read is not None and fields_read <= _FIELDS else None
        self._decisions: OrderedDict[bytes, PolicyDecision] = OrderedDict()

    def key(self, question: PolicyInput) -> bytes | None:
        """Return what the decision depends on, or ``None`` when it is not to be remembered.

        It is the JSON that the engine is given, so that what differs there (1, true and 1.0) differs here.
        """
        if self._names is None:
            return None
        key = orjson.dumps([getattr(question, name) for name in self._names])
        return key if len(key) <= KEY_BYTES_MAX else None

    def recall(self, key: bytes | None) -> PolicyDecision | None:
        """Return the decision, if it is remembered."""
        if key is None or key not in self._decisions:
            return None
        self._decisions.move_to_end(key)
        return self._decisions[key]

    def remember(self, key: bytes | None, decision: PolicyDecision) -> None:
        """Keep a decision that the engine gave."""
        if key is None:
            return
        self._decisions[key] = decision
        if len(self._decisions) > REMEMBERED_MAX:
            self._decisions.popitem(last=False)
