"""Budgets in full: every subject and window, top-ups, what is carried from window to window, thresholds crossed."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

COLUMNS = {
    "each": "boolean NOT NULL DEFAULT false",
    "subjects_max": "integer NOT NULL DEFAULT 10000 CHECK (subjects_max > 0)",
    "anchor_day": "smallint NOT NULL DEFAULT 1 CHECK (anchor_day BETWEEN 1 AND 31)",
    "anchor_month": "smallint NOT NULL DEFAULT 1 CHECK (anchor_month BETWEEN 1 AND 12)",
    "rolling_ms": "bigint CHECK (rolling_ms > 0)",
    "rollover_cap_nanos": "bigint CHECK (rollover_cap_nanos >= 0)",
    "threshold_bps": "integer[] NOT NULL DEFAULT '{5000,8000,10000}'",
    # Budgets that were there before are enforced already.
    "seeding": "boolean NOT NULL DEFAULT false",
    "previous_spec": "jsonb CHECK (previous_spec IS NULL OR seeding)",
    "carries_since": "timestamptz NOT NULL DEFAULT now()",
}

TABLES = [
    """
    CREATE TABLE budget_top_ups (
        top_up_id text PRIMARY KEY CHECK (top_up_id ~ '^[A-Za-z0-9_-]{1,64}$'),
        budget_id text NOT NULL REFERENCES budgets,
        amount_nanos bigint NOT NULL CHECK (amount_nanos > 0),
        reason text NOT NULL CHECK (length(reason) BETWEEN 1 AND 500),
        starts_at timestamptz NOT NULL,
        expires_at timestamptz,
        created_at timestamptz NOT NULL DEFAULT now(),
        removed_at timestamptz,
        CHECK (starts_at < expires_at)
    )
    """,
    "CREATE INDEX budget_top_ups_by_budget ON budget_top_ups (budget_id, created_at, top_up_id)",
    # limit_nanos is the budget's own limit as the window before closed: a later edit does not change what it left.
    """
    CREATE TABLE budget_carries (
        budget_id text NOT NULL REFERENCES budgets,
        spec_version integer NOT NULL,
        window_starts_at timestamptz NOT NULL,
        carried_nanos bigint NOT NULL CHECK (carried_nanos >= 0),
        limit_nanos bigint NOT NULL CHECK (limit_nanos >= 0),
        updated_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (budget_id, spec_version, window_starts_at)
    )
    """,
    """
    CREATE TABLE budget_events (
        event_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        tenant_id text NOT NULL REFERENCES tenants,
        budget_id text NOT NULL REFERENCES budgets,
        subject text NOT NULL,
        threshold_bps integer NOT NULL CHECK (threshold_bps > 0),
        spent_nanos bigint NOT NULL,
        limit_nanos bigint NOT NULL,
        mode text NOT NULL,
        window_starts_at timestamptz NOT NULL,
        window_resets_at timestamptz,
        happened_at timestamptz NOT NULL DEFAULT now(),
        UNIQUE (budget_id, subject, window_starts_at, threshold_bps)
    )
    """,
    "CREATE INDEX budget_events_by_tenant ON budget_events (tenant_id, event_id)",
    "CREATE INDEX budget_events_by_budget ON budget_events (budget_id, event_id)",
    """
    CREATE TRIGGER budget_events_append_only BEFORE UPDATE OR DELETE ON budget_events
    FOR EACH ROW EXECUTE FUNCTION refuse_change()
    """,
    "ALTER TABLE budget_events ENABLE ALWAYS TRIGGER budget_events_append_only",
    """
    CREATE TRIGGER budget_events_no_truncate BEFORE TRUNCATE ON budget_events
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()
    """,
    "ALTER TABLE budget_events ENABLE ALWAYS TRIGGER budget_events_no_truncate",
    # What was written lately, for jobs that look after it: rows come in this order, so a range of blocks is a range of
    # times, and the index costs a row next to nothing.
    "CREATE INDEX usage_ledger_by_record ON usage_ledger USING brin (recorded_at) WITH (autosummarize = on)",
    "CREATE INDEX budgets_seeding ON budgets (tenant_id) WHERE seeding",
    "GRANT SELECT, INSERT, UPDATE ON budget_top_ups, budget_carries TO budgetguard_app",
    "GRANT SELECT, INSERT ON budget_events TO budgetguard_app",
]

REFUSE_TO_FORGET = """
    DO $$
    BEGIN
        IF EXISTS (SELECT FROM budget_top_ups) OR EXISTS (SELECT FROM budget_events)
            OR EXISTS (SELECT FROM budget_carries WHERE carried_nanos > 0)
            OR EXISTS (SELECT FROM budgets WHERE each OR anchor_day <> 1 OR anchor_month <> 1
                OR subject_kind NOT IN ('TENANT', 'API_KEY') OR window_kind IN ('QUARTER', 'YEAR', 'ROLLING')) THEN
            RAISE EXCEPTION 'downgrade refused: budgets have subjects, windows, money or events that would be lost'
                USING HINT = 'Drop the database if that is what you mean.';
        END IF;
    END $$
"""


def upgrade() -> None:
    op.execute("ALTER TABLE budgets " + ", ".join(f"ADD COLUMN {name} {kind}" for name, kind in COLUMNS.items()))
    for statement in TABLES:
        op.execute(statement)


def downgrade() -> None:
    op.execute(REFUSE_TO_FORGET)
    op.execute("DROP INDEX usage_ledger_by_record")
    op.execute("DROP TABLE budget_events, budget_carries, budget_top_ups")
    op.execute("ALTER TABLE budgets " + ", ".join(f"DROP COLUMN {name}" for name in COLUMNS))
