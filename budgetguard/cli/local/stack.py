"""One machine's whole stack, as `budgetguard up` and the end-to-end tests run it."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import redis

from budgetguard.adapters.settings import Environment
from budgetguard.cli import edge
from budgetguard.cli.local import parts
from budgetguard.cli.local.admin import AdminClient, AdminError
from budgetguard.cli.local.demo import PROVIDER, ensure_provider
from budgetguard.cli.local.envoy_admin import EnvoyAdmin
from budgetguard.cli.local.home import Home
from budgetguard.cli.local.postgres import EmbeddedPostgres, PostgresError
from budgetguard.cli.local.redis import EmbeddedRedis
from budgetguard.cli.local.supervisor import POLL_SECONDS, StartError, StoppedError, Supervisor
from budgetguard.core.catalog import cluster_name

DATABASE = "budgetguard"
APP_ROLE = "budgetguard_app"
# In the order in which nothing that is still needed goes first: callers, admission, meters, the ledger's writer, data.
STOP_ORDER = ("envoy", "ext_authz", "fake_provider", "ext_proc", "control_plane", "redis", "postgres")
# Each takes a core when it is busy, so more than a machine has would only wait for each other.
EXT_AUTHZ_PROCESSES_MAX = 64
# Below those that the kernel gives to outgoing connections: a part that starts again finds its port free.
METRICS_PORT_DEFAULT = 9464
MIGRATE_SECONDS = 300.0
DRAIN_SECONDS = 60.0
HURRY_SECONDS = 2.0
REDIS_CONNECT_SECONDS = 5.0
# The control plane writes the cluster and Envoy reads it.
PROVIDER_SECONDS = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StackSettings:
    """What the user may choose. URLs are ``None`` for servers of our own; ``variables`` is the whole environment.

    ``port`` 0 picks a free one. ``fake_provider`` runs the built-in provider and sends calls there. Envoy shares calls
    out over ``ext_authz_processes``. ext_proc and each ext_authz serve metrics at the first free ports from
    ``metrics_port`` on.
    """

    home: Path
    listen_address: str
    port: int
    database_url: str | None
    migrate_database_url: str | None
    redis_url: str | None
    admin_key: str | None
    fake_provider: bool
    ext_authz_processes: int
    metrics_port: int
    variables: Mapping[str, str]

    @classmethod
    def from_environment(cls, variables: Mapping[str, str]) -> "StackSettings":
        """Read and check.

        Raises:
            SettingsError: a value is malformed.
        """
        environment = Environment(variables)

        def url(name: str, *schemes: str) -> str | None:
            return environment.url(name, schemes=schemes) if environment.optional(name) else None

        return cls(
            home=environment.path("BUDGETGUARD_HOME", Path(".budgetguard")),
            listen_address=environment.text("LISTEN_ADDRESS", "127.0.0.1"),
            port=environment.integer("PORT", edge.PORT_DEFAULT, minimum=0, maximum=65_535),
            database_url=url("DATABASE_URL", "postgresql", "postgres"),
            migrate_database_url=url("MIGRATE_DATABASE_URL", "postgresql", "postgres"),
            redis_url=url("REDIS_URL", "redis", "rediss", "unix"),
            admin_key=environment.secret("ADMIN_API_KEY") if environment.optional("ADMIN_API_KEY") else None,
            fake_provider=not any(environment.optional(name) for name in parts.PROVIDER_KEY_VARIABLES),
            ext_authz_processes=environment.integer(
                "BUDGETGUARD_EXT_AUTHZ_PROCESSES", 1, minimum=1, maximum=EXT_AUTHZ_PROCESSES_MAX
            ),
            metrics_port=environment.integer("METRICS_PORT", METRICS_PORT_DEFAULT, minimum=1, maximum=65_000),
            variables=dict(variables),
        )

    @property
    def ext_authz_names(self) -> tuple[str, ...]:
        """Name the parts that decide calls: ``ext_authz``, ``ext_authz_2`` ..."""
        return ("ext_authz", *(f"ext_authz_{number}" for number in range(2, self.ext_authz_processes + 1)))


class Stack:
    """Start, ``tend`` several times a second, stop. ``say`` tells the user a line."""

    def __init__(self, settings: StackSettings, *, say: Callable[[str], None]) -> None:
        self.settings = settings
        self.home = Home(settings.home)
        self.port = settings.port or parts.free_port(settings.listen_address)
        self.admin_key = settings.admin_key or ""
        self.admin_key_is_new = False
        self.fake_provider_url: str | None = None
        self._say = say
        self._supervisor: Supervisor | None = None
        self._run_dir: Path | None = None

    @property
    def base_url(self) -> str:
        """Where callers and administrators go."""
        host = self.settings.listen_address
        host = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::", "::1") else host
        return f"http://{host}:{self.port}"

    @property
    def supervisor(self) -> Supervisor:
        """The parts that run."""
        if self._supervisor is None:
            raise StartError("the stack was not started")
        return self._supervisor

    @property
    def admin(self) -> AdminClient:
        """An administrator's client."""
        return AdminClient(base_url=f"http://127.0.0.1:{self.port}", admin_key=self.admin_key)

    def start(self, *, stopping: Callable[[], bool] = lambda: False) -> None:
        """Start everything and wait until calls can pass. On an error whatever was started is stopped again.

        Raises:
            StartError, HomeError, PostgresError, BinaryMissingError, SettingsError: one sentence for the user.
            StoppedError: ``stopping`` said so.
        """
        problem = parts.port_problem(self.settings.listen_address, self.port)
        if problem:
            raise StartError(
                f"cannot listen on {self.settings.listen_address}:{self.port}: {problem.lower()} (set PORT for another)"
            )
        self.home.open()
        try:
            self._start(stopping)
        except BaseException:
            self.stop(hurry=lambda: True)
            raise

    def _start(self, stopping: Callable[[], bool]) -> None:
        self._run_dir = self.home.run_dir()
        self._supervisor = Supervisor(logs=self.home.logs, record=self.home.pids, say=self._say)
        self._supervisor.end_leftovers()
        if not self.settings.admin_key:
            self.admin_key, self.admin_key_is_new = self.home.admin_key()
        database_url, migrate_url, redis_url = self._start_data(stopping)
        self._migrate(database_url=database_url, migrate_url=migrate_url)
        if stopping():
            raise StoppedError
        self._start_control_plane(database_url=database_url, redis_url=redis_url)
        self._start_fake_provider()
        self._wait("control_plane", *(["fake_provider"] if self.fake_provider_url else []), stopping=stopping)
        self._start_edge()
        self._wait("envoy", stopping=stopping)
        self._set_up_provider(stopping)
        # After the provider: ext_authz then knows it from its first moment.
        self._start_data_plane(redis_url)
        self._wait(*self.settings.ext_authz_names, "ext_proc", stopping=stopping)

    def tend(self) -> None:
        """Restart what died."""
        self.supervisor.tend()

    def stop(self, *, hurry: Callable[[], bool] = lambda: False) -> None:
        """Let the calls under way end, then stop everything in order. ``hurry`` is asked again and again."""
        if self._supervisor is not None:
            self._drain(hurry)
            for name in self._stop_order():
                self._supervisor.stop(name, HURRY_SECONDS if hurry() and name not in ("redis", "postgres") else None)
        if self._run_dir is not None:
            shutil.rmtree(self._run_dir, ignore_errors=True)
        self.home.close()

    def _stop_order(self) -> list[str]:
        names: list[str] = []
        for name in STOP_ORDER:
            names += self.settings.ext_authz_names if name == "ext_authz" else (name,)
        return names

    def _drain(self, hurry: Callable[[], bool]) -> None:
        if "envoy" not in self.supervisor.names() or hurry():
            return

        def waiting(count: int) -> None:
            self._say(f"waiting for {count} {'call' if count == 1 else 'calls'} under way (Ctrl-C again: cut them off)")

        try:
            left = EnvoyAdmin(self._socket("admin")).drain(seconds=DRAIN_SECONDS, hurry=hurry, waiting=waiting)
        except OSError:
            return  # It does not run, so there is nothing to wait for.
        if left:
            self._say(f"cutting off {left} {'call' if left == 1 else 'calls'}; what they used is settled by estimate")

    # --- starting, in order

    def _start_data(self, stopping: Callable[[], bool]) -> tuple[str, str, str]:
        """Start or check the databases; return the programs', the migrations' and Redis' URL."""
        settings, own = self.settings, []
        database_url = settings.database_url
        migrate_url = settings.migrate_database_url or settings.database_url
        if database_url is None or migrate_url is None:
            postgres = EmbeddedPostgres(self.home.postgres_data, self._sockets / "pg")
            try:
                postgres.prepare()
            except subprocess.TimeoutExpired as error:
                raise PostgresError(f"PostgreSQL's data folder could not be made in {error.timeout:.0f} s") from error
            own.append(parts.postgres_part(postgres))
            database_url = postgres.url(database=DATABASE, user=APP_ROLE)
            migrate_url = postgres.url(database=DATABASE)
        redis_url = settings.redis_url
        if redis_url is None:
            server = EmbeddedRedis(data_dir=self.home.redis_data, socket_path=self._socket("redis"))
            own.append(parts.redis_part(server))
            redis_url = server.url
        self.supervisor.start(*own)
        self._wait(*(part.name for part in own), stopping=stopping)
        if settings.redis_url is not None:
            _check_redis(settings.redis_url)
        return database_url, migrate_url, redis_url

    def _migrate(self, *, database_url: str, migrate_url: str) -> None:
        """Run the migrations in a process of their own: they load a lot that nobody needs afterwards."""
        log_path = self.supervisor.log_path("migrate")
        result = subprocess.run(
            (sys.executable, "-P", "-m", "budgetguard.cli.migrate"),
            env={**self.settings.variables, "DATABASE_URL": database_url, "MIGRATE_DATABASE_URL": migrate_url},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=MIGRATE_SECONDS,
            check=False,
            start_new_session=True,
        )
        log_path.write_text(result.stdout + result.stderr, encoding="utf-8")
        if result.returncode != 0:
            lines = result.stderr.strip().splitlines()
            raise StartError(lines[-1] if lines else f"migrations failed (exit code {result.returncode})")

    def _start_program(
        self, program: str, own: Mapping[str, str], *, name: str = "", metrics_port: int | None = None
    ) -> None:
        name = name or program
        part = parts.program_part(
            program,
            address=f"unix:{self._socket(name)}",
            metrics_address=None if metrics_port is None else f"127.0.0.1:{metrics_port}",
            variables=self.settings.variables,
            own=own,
            name=name,
        )
        self.supervisor.start(part)

    def _start_control_plane(self, *, database_url: str, redis_url: str) -> None:
        own = {
            "DATABASE_URL": database_url,
            "REDIS_URL": redis_url,
            "ADMIN_API_KEY": self.admin_key,
            "EDGE_CLUSTERS_PATH": str(self._clusters_path),
        }
        edge.ensure_clusters_file(self._clusters_path)
        self._start_program("control_plane", own)

    def _start_data_plane(self, redis_url: str) -> None:
        variables = self.settings.variables
        keys = {name: value for name in parts.PROVIDER_KEY_VARIABLES if (value := variables.get(name, ""))}
        if self.fake_provider_url:
            keys = {"OPENAI_API_KEY": "fake-provider-takes-any-key"}
        names = self.settings.ext_authz_names
        ports = parts.free_ports_from(self.settings.metrics_port, count=1 + len(names))
        if len(ports) <= len(names):
            raise StartError(f"no free ports for metrics from {self.settings.metrics_port} on (set METRICS_PORT lower)")
        own = {"REDIS_URL": redis_url, "SPOOL_DIR": str(self.home.spool)}
        self._start_program("ext_proc", own, metrics_port=ports[0])
        own = {"REDIS_URL": redis_url, "EXT_PROC_ADDRESS": f"unix:{self._socket('ext_proc')}", **keys}
        for name, port in zip(names, ports[1:], strict=True):
            self._start_program("ext_authz", own, name=name, metrics_port=port)

    def _start_fake_provider(self) -> None:
        if self.settings.fake_provider:
            port = parts.free_port()
            self.fake_provider_url = f"http://127.0.0.1:{port}"
            self.supervisor.start(parts.fake_provider_part(port, variables=self.settings.variables))

    def _set_up_provider(self, stopping: Callable[[], bool]) -> None:
        """Point calls at the provider, and wait until Envoy knows it."""
        try:
            base_url = ensure_provider(self.admin, self.home, fake_provider_url=self.fake_provider_url)
        except AdminError as error:
            raise StartError(f"the provider could not be set up: {error}") from error
        envoy = EnvoyAdmin(self._socket("admin"))
        until = time.monotonic() + PROVIDER_SECONDS
        while not envoy.reaches(cluster_name(PROVIDER), base_url):
            if stopping():
                raise StoppedError
            if time.monotonic() > until:
                raise StartError(f"Envoy did not hear of the provider at {base_url} within {PROVIDER_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)

    def _start_edge(self) -> None:
        settings = edge.EdgeSettings(
            listen_address=self.settings.listen_address,
            port=self.port,
            admin_socket=self._socket("admin"),
            ext_authz_sockets=tuple(self._socket(name) for name in self.settings.ext_authz_names),
            ext_proc_socket=self._socket("ext_proc"),
            control_plane_socket=self._socket("control_plane"),
            clusters_path=self._clusters_path,
            access_log_path=self.supervisor.log_path("access"),
        )
        configuration = self.home.edge / "edge.yaml"
        configuration.write_text(edge.render(settings, edge.TEMPLATE.read_text(encoding="utf-8")), encoding="utf-8")
        self.supervisor.start(parts.envoy_part(settings, configuration=configuration, url=self.base_url))

    def _wait(self, *names: str, stopping: Callable[[], bool]) -> None:
        def on_ready(name: str, seconds: float) -> None:
            self._say(f"{name:<14} ready ({seconds:.1f} s)")

        self.supervisor.wait_ready(*names, stopping=stopping, on_ready=on_ready)

    @property
    def _clusters_path(self) -> Path:
        return self.home.edge / "clusters" / "clusters.json"

    def _socket(self, name: str) -> Path:
        return self._sockets / f"{name}.sock"

    @property
    def _sockets(self) -> Path:
        if self._run_dir is None:
            raise StartError("the stack was not started")
        return self._run_dir


def _check_redis(url: str) -> None:
    client: redis.Redis = redis.Redis.from_url(
        url, socket_connect_timeout=REDIS_CONNECT_SECONDS, socket_timeout=REDIS_CONNECT_SECONDS
    )
    try:
        client.ping()
    except (redis.RedisError, OSError) as error:
        raise StartError(f"REDIS_URL: Redis does not answer: {error}") from error
    finally:
        client.close()
