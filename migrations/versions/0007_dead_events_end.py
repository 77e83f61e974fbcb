"""Whose a dead event is, and how an administrator ended it: counters of other tenants do not wait for it."""

from hashlib import sha256

import orjson
from alembic import op
from sqlalchemy import text

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

# Of the table in one read.
BATCH = 1_000

COLUMNS = """
    ALTER TABLE dead_events
        ADD COLUMN tenant_id text NOT NULL DEFAULT '',
        ADD COLUMN state text NOT NULL DEFAULT 'STANDING' CHECK (state IN ('STANDING', 'RETRIED', 'DISCARDED')),
        ADD COLUMN reason text NOT NULL DEFAULT '',
        ADD COLUMN resolved_at timestamptz,
        ADD CHECK ((state = 'STANDING') = (resolved_at IS NULL)),
        ADD CHECK ((state = 'DISCARDED') = (reason <> ''))
"""

# Before there was a column: by the event itself, where it names a tenant that there is, in that tenant's shard.
READ = text(
    """
    SELECT shard, event_id, fields FROM dead_events WHERE (shard, event_id) > (:shard, :event_id)
    ORDER BY shard, event_id LIMIT :batch
    """
)
TELL = text(
    """
    UPDATE dead_events SET tenant_id = :tenant_id WHERE shard = :shard AND event_id = :event_id
        AND EXISTS (SELECT FROM tenants WHERE tenants.tenant_id = :tenant_id)
    """
)

GUARDS = [
    "CREATE INDEX dead_events_standing ON dead_events (shard) WHERE state = 'STANDING'",
    # It ends once, and nothing else of it ever changes; nobody takes it away.
    """
    CREATE TRIGGER dead_events_end_once BEFORE UPDATE ON dead_events FOR EACH ROW
    WHEN (OLD.state <> 'STANDING'
        OR (NEW.shard, NEW.event_id, NEW.fields, NEW.error, NEW.recorded_at, NEW.tenant_id)
            IS DISTINCT FROM (OLD.shard, OLD.event_id, OLD.fields, OLD.error, OLD.recorded_at, OLD.tenant_id))
    EXECUTE FUNCTION refuse_change()
    """,
    """
    CREATE TRIGGER dead_events_kept BEFORE DELETE ON dead_events
    FOR EACH ROW EXECUTE FUNCTION refuse_change()
    """,
    """
    CREATE TRIGGER dead_events_no_truncate BEFORE TRUNCATE ON dead_events
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()
    """,
    "ALTER TABLE dead_events ENABLE ALWAYS TRIGGER dead_events_end_once",
    "ALTER TABLE dead_events ENABLE ALWAYS TRIGGER dead_events_kept",
    "ALTER TABLE dead_events ENABLE ALWAYS TRIGGER dead_events_no_truncate",
    "GRANT UPDATE (state, reason, resolved_at) ON dead_events TO budgetguard_app",
]

REFUSE_TO_FORGET = """
    DO $$
    BEGIN
        IF EXISTS (SELECT FROM dead_events WHERE state <> 'STANDING') THEN
            RAISE EXCEPTION 'downgrade refused: dead events were ended, and would stand again'
                USING HINT = 'Drop the database if that is what you mean.';
        END IF;
    END $$
"""


def tenant_of(shard: int, fields: bytes) -> str:
    try:
        told = orjson.loads(orjson.loads(fields)["facts"])["tenant_id"]
        return told if sha256(told.encode()).digest()[0] == shard and "\x00" not in told else ""
    except (KeyError, TypeError, AttributeError, ValueError):
        return ""


def upgrade() -> None:
    op.execute(COLUMNS)
    connection, after = op.get_bind(), (-1, "")
    while rows := connection.execute(READ, {"shard": after[0], "event_id": after[1], "batch": BATCH}).all():
        for shard, event_id, fields in rows:
            if tenant_id := tenant_of(shard, fields):
                connection.execute(TELL, {"shard": shard, "event_id": event_id, "tenant_id": tenant_id})
        after = (rows[-1].shard, rows[-1].event_id)
    for statement in GUARDS:
        op.execute(statement)


def downgrade() -> None:
    op.execute(REFUSE_TO_FORGET)
    op.execute("REVOKE UPDATE (state, reason, resolved_at) ON dead_events FROM budgetguard_app")
    op.execute("DROP TRIGGER dead_events_end_once ON dead_events")
    op.execute("DROP TRIGGER dead_events_kept ON dead_events")
    op.execute("DROP TRIGGER dead_events_no_truncate ON dead_events")
    op.execute("DROP INDEX dead_events_standing")
    op.execute(
        "ALTER TABLE dead_events DROP COLUMN tenant_id, DROP COLUMN state, DROP COLUMN reason, DROP COLUMN resolved_at"
    )
