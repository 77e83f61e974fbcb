"""Configuration, the append-only ledger with its partitions, and the role that the programs use."""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TIMES = "created_at timestamptz NOT NULL DEFAULT now(), updated_at timestamptz NOT NULL DEFAULT now()"

# Exact milliseconds: extract() gives a numeric.
FUNCTIONS = [
    """
    CREATE FUNCTION epoch_ms(moment timestamptz) RETURNS bigint
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
    RETURN floor(extract(epoch FROM moment) * 1000)::bigint
    """,
    """
    CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION '% of % is refused: it is append-only', TG_OP, TG_TABLE_NAME
            USING ERRCODE = 'restrict_violation', HINT = 'Post a correcting row instead.';
    END $$
    """,
]

CONFIGURATION = [
    f"""
    CREATE TABLE tenants (
        tenant_id text PRIMARY KEY CHECK (tenant_id ~ '^[a-z0-9]([a-z0-9-]{{0,61}}[a-z0-9])?$'),
        name text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
        status text NOT NULL CHECK (status IN ('ACTIVE', 'SUSPENDED', 'DELETED')),
        version bigint NOT NULL CHECK (version > 0),
        requests_per_minute integer NOT NULL CHECK (requests_per_minute >= 0),
        output_tokens_max integer NOT NULL CHECK (output_tokens_max > 0),
        clamp boolean NOT NULL,
        {TIMES},
        deleted_at timestamptz,
        CHECK ((status = 'DELETED') = (deleted_at IS NOT NULL))
    )
    """,
    f"""
    CREATE TABLE api_keys (
        key_id text PRIMARY KEY CHECK (key_id ~ '^[a-z0-9]{{16}}$'),
        tenant_id text NOT NULL REFERENCES tenants,
        name text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
        secret_sha256 text NOT NULL CHECK (secret_sha256 ~ '^[0-9a-f]{{64}}$'),
        status text NOT NULL CHECK (status IN ('ACTIVE', 'REVOKED')),
        version bigint NOT NULL CHECK (version > 0),
        requests_per_minute integer CHECK (requests_per_minute >= 0),
        expires_at timestamptz,
        {TIMES},
        revoked_at timestamptz,
        CHECK ((status = 'REVOKED') = (revoked_at IS NOT NULL))
    )
    """,
    "CREATE INDEX tenants_by_change ON tenants (updated_at)",
    "CREATE INDEX api_keys_by_tenant ON api_keys (tenant_id, key_id)",
    "CREATE INDEX api_keys_by_change ON api_keys (updated_at)",
    # Kinds (subject, window, mode) are checked in code, where later kinds are added; the counter's name is made of
    # budget_id, so that must not hold a separator.
    f"""
    CREATE TABLE budgets (
        budget_id text PRIMARY KEY CHECK (budget_id ~ '^[A-Za-z0-9_-]{{1,64}}$'),
        tenant_id text NOT NULL REFERENCES tenants,
        subject_kind text NOT NULL,
        subject text NOT NULL,
        window_kind text NOT NULL,
        zone text NOT NULL,
        mode text NOT NULL,
        limit_nanos bigint NOT NULL CHECK (limit_nanos >= 0),
        spec_version integer NOT NULL CHECK (spec_version > 0),
        version bigint NOT NULL CHECK (version > 0),
        starts_at timestamptz,
        ends_at timestamptz,
        {TIMES},
        deleted_at timestamptz,
        CHECK (starts_at < ends_at)
    )
    """,
    "CREATE INDEX budgets_by_tenant ON budgets (tenant_id, budget_id) WHERE deleted_at IS NULL",
    f"""
    CREATE TABLE providers (
        provider_id text PRIMARY KEY CHECK (provider_id ~ '^[a-z0-9]([a-z0-9-]{{0,61}}[a-z0-9])?$'),
        kind text NOT NULL,
        base_url text NOT NULL,
        api_key_env text NOT NULL,
        enabled boolean NOT NULL,
        version bigint NOT NULL CHECK (version > 0),
        {TIMES}
    )
    """,
    f"""
    CREATE TABLE prices (
        price_id text PRIMARY KEY CHECK (price_id ~ '^[A-Za-z0-9_.-]{{1,64}}$'),
        provider_id text NOT NULL REFERENCES providers,
        model text NOT NULL,
        usd jsonb NOT NULL,
        starts_at timestamptz NOT NULL,
        ends_at timestamptz,
        {TIMES},
        CHECK (starts_at < ends_at)
    )
    """,
    # One row: the version of what all tenants share (providers, prices).
    "CREATE TABLE catalog_state (single boolean PRIMARY KEY DEFAULT true CHECK (single), version bigint NOT NULL)",
    "INSERT INTO catalog_state (version) VALUES (1)",
    """
    CREATE TABLE request_ids (
        method text NOT NULL,
        request_id text NOT NULL CHECK (length(request_id) BETWEEN 1 AND 128),
        fingerprint text NOT NULL,
        answer jsonb,
        created_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (method, request_id)
    )
    """,
    "CREATE INDEX request_ids_by_age ON request_ids (created_at)",
    """
    CREATE TABLE admin_audit (
        audit_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        happened_at timestamptz NOT NULL DEFAULT now(),
        actor text NOT NULL,
        action text NOT NULL,
        kind text NOT NULL,
        resource_id text NOT NULL,
        tenant_id text,
        before jsonb,
        after jsonb
    )
    """,
    "CREATE INDEX admin_audit_by_tenant ON admin_audit (tenant_id, audit_id)",
    """
    CREATE TABLE drain_positions (
        shard smallint PRIMARY KEY CHECK (shard BETWEEN 0 AND 255),
        stream_ms bigint NOT NULL,
        stream_sequence bigint NOT NULL,
        updated_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    # Events that cannot become ledger rows, byte for byte, for a person to judge.
    """
    CREATE TABLE dead_events (
        shard smallint NOT NULL,
        event_id text NOT NULL,
        fields bytea NOT NULL,
        error text NOT NULL,
        recorded_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (shard, event_id)
    )
    """,
]

LEDGER = [
    """
    CREATE TABLE usage_ledger (
        held_at timestamptz NOT NULL,
        operation_id text NOT NULL,
        rank smallint NOT NULL CHECK (rank BETWEEN 1 AND 4),
        sequence integer NOT NULL,
        end_state text NOT NULL,
        tenant_id text NOT NULL,
        key_id text NOT NULL,
        api text NOT NULL,
        provider_id text NOT NULL,
        model text NOT NULL,
        stream boolean NOT NULL,
        price_version text NOT NULL,
        rate_tier text NOT NULL,
        delta_nanos bigint NOT NULL,
        amount_nanos bigint NOT NULL CHECK (amount_nanos >= 0),
        hold_nanos bigint NOT NULL CHECK (hold_nanos >= 0),
        usage jsonb,
        status integer NOT NULL,
        detail text NOT NULL,
        ended_at timestamptz NOT NULL,
        recorded_at timestamptz NOT NULL DEFAULT now(),
        shard smallint NOT NULL,
        event_id text NOT NULL,
        PRIMARY KEY (held_at, operation_id, rank, sequence)
    ) PARTITION BY RANGE (held_at)
    """,
    "CREATE INDEX usage_ledger_by_tenant ON usage_ledger (tenant_id, held_at, operation_id, rank, sequence)",
    "CREATE INDEX usage_ledger_by_key ON usage_ledger (tenant_id, key_id, held_at)",
    "CREATE INDEX usage_ledger_by_operation ON usage_ledger (operation_id)",
    # A row trigger on the parent is cloned to each partition; TRUNCATE fires statement triggers only, and those of a
    # partition truncated directly are its own. ALWAYS: also when a session claims to be a replica.
    """
    CREATE TRIGGER usage_ledger_append_only BEFORE UPDATE OR DELETE ON usage_ledger
    FOR EACH ROW EXECUTE FUNCTION refuse_change()
    """,
    "ALTER TABLE usage_ledger ENABLE ALWAYS TRIGGER usage_ledger_append_only",
    "CREATE TABLE usage_ledger_default PARTITION OF usage_ledger DEFAULT",
]

APPEND_ONLY = [
    statement
    for table in ("usage_ledger", "usage_ledger_default", "admin_audit")
    for statement in (
        f"""
        CREATE TRIGGER {table}_no_truncate BEFORE TRUNCATE ON {table}
        FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()
        """,
        f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER {table}_no_truncate",
    )
] + [
    """
    CREATE TRIGGER admin_audit_append_only BEFORE UPDATE OR DELETE ON admin_audit
    FOR EACH ROW EXECUTE FUNCTION refuse_change()
    """,
    "ALTER TABLE admin_audit ENABLE ALWAYS TRIGGER admin_audit_append_only",
]

PARTITIONS = [
    # Attached rather than created in place: that locks the parent so little that inserts go on.
    """
    CREATE FUNCTION make_ledger_partition(month date) RETURNS text LANGUAGE plpgsql
    SET search_path = pg_catalog, public, pg_temp SET timezone = 'UTC' SET lock_timeout = '5s' AS $$
    DECLARE
        first timestamptz := date_trunc('month', month::timestamptz);
        name text := 'usage_ledger_' || to_char(first, 'YYYY_MM');
    BEGIN
        PERFORM pg_advisory_xact_lock(hashtext('make_ledger_partition'));
        IF to_regclass('public.' || name) IS NOT NULL THEN
            RETURN 'exists';
        END IF;
        BEGIN
            EXECUTE format('CREATE TABLE public.%I (LIKE public.usage_ledger INCLUDING DEFAULTS INCLUDING CONSTRAINTS)',
                name);
            EXECUTE format('CREATE TRIGGER %I BEFORE TRUNCATE ON public.%I FOR EACH STATEMENT '
                'EXECUTE FUNCTION public.refuse_change()', name || '_no_truncate', name);
            EXECUTE format('ALTER TABLE public.%I ENABLE ALWAYS TRIGGER %I', name, name || '_no_truncate');
            EXECUTE format('ALTER TABLE public.usage_ledger ATTACH PARTITION public.%I FOR VALUES FROM (%L) TO (%L)',
                name, first, first + interval '1 month');
        EXCEPTION WHEN check_violation THEN
            -- Rows of this month are in the DEFAULT partition already: see rehome_ledger_default().
            RETURN 'blocked';
        END;
        RETURN 'made';
    END $$
    """,
    # What the programs may call: last month (for late events), this one and the next ones, as the owner.
    """
    CREATE FUNCTION make_ledger_partitions(months_ahead integer)
    RETURNS TABLE (month date, outcome text) LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, public, pg_temp SET timezone = 'UTC' AS $$
    BEGIN
        IF months_ahead IS NULL OR months_ahead NOT BETWEEN 0 AND 24 THEN
            RAISE EXCEPTION 'months_ahead: expected 0 to 24, got %', months_ahead;
        END IF;
        FOR i IN -1..months_ahead LOOP
            month := (date_trunc('month', now()) + make_interval(months => i))::date;
            outcome := public.make_ledger_partition(month);
            RETURN NEXT;
        END LOOP;
    END $$
    """,
    # For the owner, by hand, when the DEFAULT partition's alarm went off: no row is deleted, they are written anew into
    # partitions of their months, and the emptied table is dropped. It locks the ledger while it runs.
    """
    CREATE FUNCTION rehome_ledger_default() RETURNS bigint LANGUAGE plpgsql
    SET search_path = pg_catalog, public, pg_temp SET timezone = 'UTC' AS $$
    DECLARE
        moved bigint;
    BEGIN
        LOCK TABLE public.usage_ledger IN ACCESS EXCLUSIVE MODE;
        ALTER TABLE public.usage_ledger DETACH PARTITION public.usage_ledger_default;
        PERFORM public.make_ledger_partition(months.month)
            FROM (SELECT DISTINCT date_trunc('month', held_at)::date FROM public.usage_ledger_default) AS months(month);
        INSERT INTO public.usage_ledger SELECT * FROM public.usage_ledger_default;
        GET DIAGNOSTICS moved = ROW_COUNT;
        DROP TABLE public.usage_ledger_default;
        CREATE TABLE public.usage_ledger_default PARTITION OF public.usage_ledger DEFAULT;
        CREATE TRIGGER usage_ledger_default_no_truncate BEFORE TRUNCATE ON public.usage_ledger_default
            FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_change();
        ALTER TABLE public.usage_ledger_default ENABLE ALWAYS TRIGGER usage_ledger_default_no_truncate;
        GRANT SELECT ON public.usage_ledger_default TO budgetguard_app;
        RETURN moved;
    END $$
    """,
    "REVOKE ALL ON FUNCTION make_ledger_partition(date) FROM PUBLIC",
    "REVOKE ALL ON FUNCTION make_ledger_partitions(integer) FROM PUBLIC",
    "REVOKE ALL ON FUNCTION rehome_ledger_default() FROM PUBLIC",
    "SELECT make_ledger_partitions(2)",
]

# Roles belong to the whole server, so another database may have made it already, or be making it now.
APP_ROLE = """
    DO $$
    BEGIN
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'budgetguard_app') THEN
            CREATE ROLE budgetguard_app LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE;
        END IF;
    EXCEPTION
        WHEN duplicate_object OR unique_violation THEN NULL;
        WHEN insufficient_privilege THEN
            RAISE EXCEPTION 'the role budgetguard_app is missing and % may not create it', current_user
                USING HINT = 'As an administrator: CREATE ROLE budgetguard_app LOGIN;';
    END $$
"""

GRANTS = [
    "GRANT SELECT, INSERT, UPDATE ON tenants, api_keys, budgets, providers, prices, drain_positions TO budgetguard_app",
    "GRANT SELECT, UPDATE ON catalog_state TO budgetguard_app",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON request_ids TO budgetguard_app",
    "GRANT SELECT, INSERT ON usage_ledger, admin_audit, dead_events TO budgetguard_app",
    "GRANT SELECT ON usage_ledger_default TO budgetguard_app",
    "GRANT EXECUTE ON FUNCTION make_ledger_partitions(integer) TO budgetguard_app",
]

REFUSE_TO_LOSE_MONEY = """
    DO $$
    BEGIN
        IF EXISTS (SELECT FROM usage_ledger) OR EXISTS (SELECT FROM dead_events) THEN
            RAISE EXCEPTION 'downgrade refused: the usage ledger holds rows, and they would be lost'
                USING HINT = 'Drop the database if that is what you mean.';
        END IF;
    END $$
"""


def upgrade() -> None:
    for statement in [*FUNCTIONS, *CONFIGURATION, *LEDGER, *APPEND_ONLY, APP_ROLE, *PARTITIONS, *GRANTS]:
        op.execute(statement)


def downgrade() -> None:
    op.execute(REFUSE_TO_LOSE_MONEY)
    op.execute(
        "DROP TABLE usage_ledger, dead_events, drain_positions, admin_audit, request_ids, catalog_state, prices, "
        "providers, budgets, api_keys, tenants"
    )
    op.execute("DROP FUNCTION rehome_ledger_default(), make_ledger_partitions(integer), make_ledger_partition(date)")
    op.execute("DROP FUNCTION refuse_change(), epoch_ms(timestamptz)")
    # The role stays: it belongs to the server, and other databases may use it.
