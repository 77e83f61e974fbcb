"""Refused attempts: the first ten a minute, key and reason, and counts of all. Indexes by tag and end user."""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# Diagnoses, not money: a quarter explains what happened, counts of a year and a month compare.
CALLS_KEPT = "90 days"
TALLIES_KEPT = "400 days"
# Of each table in one go, so that it never takes long.
FORGOTTEN_MAX = 10_000

TABLES = [
    # The key allows ten rows of a minute, key and reason, whoever writes them.
    """
    CREATE TABLE refused_calls (
        refusal_id bigint GENERATED ALWAYS AS IDENTITY,
        tenant_id text NOT NULL,
        key_id text NOT NULL,
        reason text NOT NULL,
        minute timestamptz NOT NULL,
        number smallint NOT NULL CHECK (number BETWEEN 1 AND 10),
        refused_at timestamptz NOT NULL,
        operation_id text NOT NULL,
        api text NOT NULL,
        provider_id text NOT NULL,
        model text NOT NULL,
        status integer NOT NULL,
        message text NOT NULL,
        facts jsonb NOT NULL,
        tags jsonb NOT NULL,
        session_id text NOT NULL,
        end_user text NOT NULL,
        recorded_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (tenant_id, minute, key_id, reason, number)
    )
    """,
    "CREATE INDEX refused_calls_by_time ON refused_calls (refused_at, refusal_id)",
    "CREATE INDEX refused_calls_by_tenant ON refused_calls (tenant_id, refused_at, refusal_id)",
    "CREATE INDEX refused_calls_by_key ON refused_calls (tenant_id, key_id, refused_at, refusal_id)",
    """
    CREATE INDEX refused_calls_by_session ON refused_calls (tenant_id, session_id, refused_at, refusal_id)
    WHERE session_id <> ''
    """,
    # A source has one writer and its count only rises; what was refused in a minute is the sum over sources.
    """
    CREATE TABLE refused_tallies (
        tenant_id text NOT NULL,
        key_id text NOT NULL,
        reason text NOT NULL,
        minute timestamptz NOT NULL,
        source text NOT NULL,
        count bigint NOT NULL CHECK (count > 0),
        recorded_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (tenant_id, minute, key_id, reason, source)
    )
    """,
    "CREATE INDEX refused_tallies_by_time ON refused_tallies (minute)",
    # Apart from dead_events: those are missing money, and counters wait for them.
    """
    CREATE TABLE dead_refusals (
        shard smallint NOT NULL,
        entry text NOT NULL,
        fields bytea NOT NULL,
        error text NOT NULL,
        recorded_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (shard, entry)
    )
    """,
]

KEPT = [
    # As refuse_change(), but what is older than its argument may go.
    """
    CREATE FUNCTION refuse_early_delete() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF OLD.minute < now() - TG_ARGV[0]::interval THEN
            RETURN OLD;
        END IF;
        RAISE EXCEPTION '% of % is refused: it is append-only for %', TG_OP, TG_TABLE_NAME, TG_ARGV[0]
            USING ERRCODE = 'restrict_violation';
    END $$
    """,
    """
    CREATE TRIGGER refused_calls_append_only BEFORE UPDATE ON refused_calls
    FOR EACH ROW EXECUTE FUNCTION refuse_change()
    """,
    """
    CREATE TRIGGER refused_tallies_only_rise BEFORE UPDATE ON refused_tallies FOR EACH ROW
    WHEN (NEW.count < OLD.count OR (NEW.tenant_id, NEW.key_id, NEW.reason, NEW.minute, NEW.source)
        IS DISTINCT FROM (OLD.tenant_id, OLD.key_id, OLD.reason, OLD.minute, OLD.source))
    EXECUTE FUNCTION refuse_change()
    """,
    "ALTER TABLE refused_calls ENABLE ALWAYS TRIGGER refused_calls_append_only",
    "ALTER TABLE refused_tallies ENABLE ALWAYS TRIGGER refused_tallies_only_rise",
] + [
    statement
    for table, kept in (("refused_calls", CALLS_KEPT), ("refused_tallies", TALLIES_KEPT))
    for statement in (
        f"""
        CREATE TRIGGER {table}_kept BEFORE DELETE ON {table}
        FOR EACH ROW EXECUTE FUNCTION refuse_early_delete('{kept}')
        """,
        f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER {table}_kept",
        f"""
        CREATE TRIGGER {table}_no_truncate BEFORE TRUNCATE ON {table}
        FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()
        """,
        f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER {table}_no_truncate",
    )
]

FORGET = [
    # As the owner: the programs' role may delete nothing by itself, and here only what is old.
    f"""
    CREATE FUNCTION forget_refusals() RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, public, pg_temp AS $$
    DECLARE
        calls bigint;
        tallies bigint;
    BEGIN
        DELETE FROM public.refused_calls WHERE ctid = ANY (ARRAY(
            SELECT ctid FROM public.refused_calls
            WHERE refused_at < now() - interval '{CALLS_KEPT}' ORDER BY refused_at LIMIT {FORGOTTEN_MAX}));
        GET DIAGNOSTICS calls = ROW_COUNT;
        DELETE FROM public.refused_tallies WHERE ctid = ANY (ARRAY(
            SELECT ctid FROM public.refused_tallies WHERE minute < now() - interval '{TALLIES_KEPT}'
            ORDER BY minute LIMIT {FORGOTTEN_MAX}));
        GET DIAGNOSTICS tallies = ROW_COUNT;
        RETURN calls + tallies;
    END $$
    """,
    "REVOKE ALL ON FUNCTION forget_refusals() FROM PUBLIC",
]

GRANTS = [
    "GRANT SELECT, INSERT ON refused_calls, dead_refusals TO budgetguard_app",
    "GRANT SELECT, INSERT, UPDATE ON refused_tallies TO budgetguard_app",
    "GRANT EXECUTE ON FUNCTION forget_refusals() TO budgetguard_app",
]

# Indexes of the parent: partitions that are attached later get theirs by that.
LEDGER = [
    "CREATE INDEX usage_ledger_by_end_user ON usage_ledger (tenant_id, end_user, held_at) WHERE end_user <> ''",
    "CREATE INDEX usage_ledger_by_tag ON usage_ledger USING gin (tags)",
]

REFUSE_TO_FORGET = """
    DO $$
    BEGIN
        IF EXISTS (SELECT FROM refused_calls) OR EXISTS (SELECT FROM refused_tallies) THEN
            RAISE EXCEPTION 'downgrade refused: refused calls are recorded, and would be lost'
                USING HINT = 'Drop the database if that is what you mean.';
        END IF;
    END $$
"""


def upgrade() -> None:
    for statement in [*TABLES, *KEPT, *FORGET, *GRANTS, *LEDGER]:
        op.execute(statement)


def downgrade() -> None:
    op.execute(REFUSE_TO_FORGET)
    op.execute("DROP INDEX usage_ledger_by_end_user, usage_ledger_by_tag")
    op.execute("DROP FUNCTION forget_refusals()")
    op.execute("DROP TABLE dead_refusals, refused_tallies, refused_calls")
    op.execute("DROP FUNCTION refuse_early_delete()")
