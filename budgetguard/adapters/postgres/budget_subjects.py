"""Whether calls can be of a budget's subject: a budget on what is not there, a typing error, would limit nothing."""

from datetime import datetime

from budgetguard.adapters.postgres.pool import Connection
from budgetguard.core.entities import SUBJECT_FIELDS, BudgetDraft
from budgetguard.core.errors import InvalidError, NotFoundError
from budgetguard.core.pricing import PriceUnknownError, shipped_rate_card
from budgetguard.core.snapshot import SubjectKind


async def check_subject(connection: Connection, tenant_id: str, draft: BudgetDraft, *, path: str = "") -> None:
    """Refuse a subject that no call can be of. Sessions and end users need not be known: calls bring them up.

    Raises:
        NotFoundError: the tenant has no such API key.
        InvalidError: it has no such tag, or there is no such provider, or the model has no price; names the field.
    """
    if draft.each:
        return
    expected = ""
    if draft.subject_kind is SubjectKind.API_KEY:
        query = "SELECT true FROM api_keys WHERE key_id = $1 AND tenant_id = $2"
        if not await connection.fetchval(query, draft.subject, tenant_id):
            raise NotFoundError("api key", draft.subject)
    elif draft.subject_kind is SubjectKind.TAG:
        query = "SELECT true FROM tags WHERE tag_id = $1 AND tenant_id = $2"
        if not await connection.fetchval(query, draft.subject, tenant_id):
            expected = "a tag of this tenant"
    elif draft.subject_kind is SubjectKind.PROVIDER:
        if not await connection.fetchval("SELECT true FROM providers WHERE provider_id = $1", draft.subject):
            expected = "the id of a provider that is set up"
    elif draft.subject_kind is SubjectKind.MODEL and not await _has_price(connection, draft.subject):
        expected = "a model that has a price, ours or a shipped one, at a provider that is set up"
    if expected:
        field = f"{path}{SUBJECT_FIELDS[draft.subject_kind]}"
        raise InvalidError(field, f"expected {expected}; there is no {draft.subject[:80]!r}")


async def _has_price(connection: Connection, model: str) -> bool:
    """Whether calls of this model are admitted, now or from a time on that a price row names."""
    # Caseless as calls are: core/pricing.py's caseless(), whatever the database's own collation takes for one letter.
    query = """
        SELECT true FROM prices
        WHERE lower(model COLLATE "C") = lower($1::text COLLATE "C") AND (ends_at > now()) IS NOT false LIMIT 1
    """
    if await connection.fetchval(query, model):
        return True
    at: datetime = await connection.fetchval("SELECT now()")
    for row in await connection.fetch("SELECT provider_id FROM providers"):
        try:
            shipped_rate_card(provider_id=row["provider_id"], model=model, at=at)
        except PriceUnknownError:
            continue
        return True
    return False
