"""Tags and closed sessions of tenants, tags fixed on keys, the limits that records carry, what calls name sessions."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

REFUSE_TO_FORGET = """
    DO $$
    BEGIN
        IF EXISTS (SELECT FROM usage_ledger WHERE session_name <> '' OR session_path <> '') THEN
            RAISE EXCEPTION 'downgrade refused: ledger rows tell names or paths of sessions, and would lose them'
                USING HINT = 'Drop the database if that is what you mean.';
        END IF;
    END $$
"""

UPGRADE = [
    # Constant defaults: no row is rewritten.
    """
    ALTER TABLE tenants
        ADD COLUMN tokens_per_minute integer NOT NULL DEFAULT 0 CHECK (tokens_per_minute >= 0),
        ADD COLUMN concurrent_calls integer NOT NULL DEFAULT 0 CHECK (concurrent_calls >= 0),
        ADD COLUMN unbounded_share integer NOT NULL DEFAULT 8 CHECK (unbounded_share > 0),
        ADD COLUMN stream_slice_tokens integer NOT NULL DEFAULT 4096 CHECK (stream_slice_tokens >= 0),
        ADD COLUMN overrun boolean NOT NULL DEFAULT false,
        ADD COLUMN required_tags text[] NOT NULL DEFAULT '{}'
    """,
    """
    ALTER TABLE api_keys
        ADD COLUMN tokens_per_minute integer CHECK (tokens_per_minute >= 0),
        ADD COLUMN concurrent_calls integer CHECK (concurrent_calls >= 0),
        ADD COLUMN tags text[] NOT NULL DEFAULT '{}'
    """,
    # A path is the ids from the root to the tag itself. Byte order, so that '/' sorts a tree together everywhere.
    """
    CREATE TABLE tags (
        tenant_id text NOT NULL REFERENCES tenants,
        tag_id text NOT NULL CHECK (tag_id ~ '^[A-Za-z0-9][A-Za-z0-9._:-]{0,62}$'),
        name text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
        parent_id text NOT NULL CHECK (parent_id <> tag_id),
        path text COLLATE "C" NOT NULL,
        status text NOT NULL CHECK (status IN ('ACTIVE', 'INACTIVE')),
        version bigint NOT NULL CHECK (version > 0),
        created_at timestamptz NOT NULL DEFAULT now(),
        updated_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (tenant_id, tag_id),
        CHECK (CASE WHEN parent_id = '' THEN path = tag_id
            ELSE path = parent_id || '/' || tag_id OR right(path, length(parent_id || tag_id) + 2)
                = '/' || parent_id || '/' || tag_id END)
    )
    """,
    # Sessions need no registration: here are only those that an administrator has closed, or opened again.
    """
    CREATE TABLE sessions (
        tenant_id text NOT NULL REFERENCES tenants,
        session_id text NOT NULL CHECK (length(session_id) BETWEEN 1 AND 200),
        status text NOT NULL CHECK (status IN ('ACTIVE', 'INACTIVE')),
        created_at timestamptz NOT NULL DEFAULT now(),
        updated_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (tenant_id, session_id)
    )
    """,
    """
    ALTER TABLE usage_ledger ADD COLUMN session_name text NOT NULL DEFAULT '',
        ADD COLUMN session_path text NOT NULL DEFAULT ''
    """,
    """
    CREATE INDEX usage_ledger_by_session ON usage_ledger (tenant_id, session_id, held_at) WHERE session_id <> ''
    """,
    "GRANT SELECT, INSERT, UPDATE ON tags, sessions TO budgetguard_app",
]


def upgrade() -> None:
    for statement in UPGRADE:
        op.execute(statement)


def downgrade() -> None:
    op.execute(REFUSE_TO_FORGET)
    op.execute("DROP INDEX usage_ledger_by_session")
    op.execute("ALTER TABLE usage_ledger DROP COLUMN session_name, DROP COLUMN session_path")
    op.execute("DROP TABLE sessions, tags")
    op.execute("ALTER TABLE api_keys DROP COLUMN tokens_per_minute, DROP COLUMN concurrent_calls, DROP COLUMN tags")
    op.execute(
        "ALTER TABLE tenants DROP COLUMN tokens_per_minute, DROP COLUMN concurrent_calls, DROP COLUMN unbounded_share, "
        "DROP COLUMN stream_slice_tokens, DROP COLUMN overrun, DROP COLUMN required_tags"
    )
