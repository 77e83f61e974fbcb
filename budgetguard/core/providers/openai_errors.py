"""OpenAI's error object, with the facts that explain a refusal."""

from typing import Any

from budgetguard.core.reasons import Deny


def error_object(deny: Deny) -> dict[str, Any]:
    """Spell a refusal as the value of ``error``."""
    return {
        "message": deny.message,
        "type": deny.telling.openai_type,
        "param": deny.param,
        "code": deny.reason.value,
        **deny.facts,
    }
