"""docker-compose.yml says what the code reads, runs what exists, and opens no door but the edge's."""

import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml

from budgetguard.adapters.postgres.migrate import APP_ROLE
from budgetguard.adapters.settings import Environment
from budgetguard.cli import migrate
from budgetguard.cli.edge import EdgeSettings
from budgetguard.cli.local.parts import free_port, is_listening
from budgetguard.cli.local.redis import EmbeddedRedis
from control_plane.settings import Settings as ControlPlaneSettings
from ext_authz.settings import Settings as ExtAuthzSettings
from ext_proc.settings import Settings as ExtProcSettings

ROOT = Path(__file__).resolve().parents[1]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
PROGRAMS = {
    "control_plane": ControlPlaneSettings.from_environment,
    "ext_authz": ExtAuthzSettings.from_environment,
    "ext_proc": ExtProcSettings.from_environment,
    "envoy": lambda variables: EdgeSettings.from_environment(Environment(variables)),
}
SECRETS = {
    "POSTGRES_PASSWORD": "owner-password",
    "APP_DATABASE_PASSWORD": "app-password",
    "ADMIN_API_KEY": "a" * 32,
    "OPENAI_API_KEY": "sk-provider",
}


class Watched(Mapping[str, str]):
    """An environment that knows which of its variables were looked at."""

    def __init__(self, variables: dict[str, str]) -> None:
        self._variables = variables
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self.read.add(name)
        return self._variables[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._variables)

    def __len__(self) -> int:
        return len(self._variables)


def environment(service: str) -> dict[str, str]:
    """Return a service's environment as compose would, with our secrets."""

    def value(match: re.Match) -> str:
        name, _, default = match[1].partition(":")
        return SECRETS.get(name) or default.removeprefix("-")

    given = SERVICES[service].get("environment", {})
    return {name: re.sub(r"\$\{([^}]+)\}", value, str(text)) for name, text in given.items()}


def test_the_services_are_the_architecture():
    assert set(SERVICES) == {*PROGRAMS, "postgres", "redis", "opa", "migrate"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_variable_is_one_that_the_program_reads(name):
    watched = Watched(environment(name))
    # ext_authz also keeps the whole environment, for provider keys that rows name: that is no reading.
    settings = PROGRAMS[name](watched)
    lazily = {"OPENAI_API_KEY"} if name == "ext_authz" else set()
    if lazily:
        assert settings.provider_key("OPENAI_API_KEY") == SECRETS["OPENAI_API_KEY"]
        source = (ROOT / "ext_authz/settings.py").read_text()
        for variable in set(environment(name)) - lazily:
            assert f'"{variable}"' in source
    else:
        assert set(environment(name)) <= watched.read


def test_both_ends_of_each_socket_have_one_path():
    edge = EdgeSettings.from_environment(Environment(environment("envoy")))
    assert f"unix:{edge.ext_authz_sockets[0]}" == ExtAuthzSettings.from_environment(environment("ext_authz")).address
    assert f"unix:{edge.ext_proc_socket}" == ExtProcSettings.from_environment(environment("ext_proc")).address
    control_plane = environment("control_plane")
    assert f"unix:{edge.control_plane_socket}" == control_plane["CONTROL_PLANE_ADDRESS"]
    assert str(edge.clusters_path) == control_plane["EDGE_CLUSTERS_PATH"]
    for name in PROGRAMS:
        assert "run:/run/budgetguard" in SERVICES[name]["volumes"]


@pytest.mark.parametrize("name", [*PROGRAMS, "migrate"])
def test_each_command_exists(name):
    command = SERVICES[name]["command"]
    if command[0] == "python":
        module = Path(*command[2].split("."))
        assert (ROOT / module.with_suffix(".py")).is_file() or (ROOT / module / "__main__.py").is_file()
    else:
        assert command == ["budgetguard", "edge", "run"]
    assert SERVICES[name]["image"] == "budgetguard"


@pytest.mark.parametrize("name", PROGRAMS)
def test_health_checks_ask_where_the_program_listens(name):
    variables = environment(name)
    listens = f"envoy:{variables['EDGE_ADMIN_SOCKET']}" if name == "envoy" else variables[f"{name.upper()}_ADDRESS"]
    assert SERVICES[name]["healthcheck"]["test"] == ["CMD", "budgetguard", "health", listens]


def test_whoever_is_waited_for_says_when_it_is_healthy():
    assert {name for name, service in SERVICES.items() if "healthcheck" not in service} == {"migrate"}
    for service in SERVICES.values():
        for name, how in service.get("depends_on", {}).items():
            expected = "service_completed_successfully" if name == "migrate" else "service_healthy"
            assert how["condition"] == expected


def test_opa_can_ask_itself():
    """The very command, against a real OPA; another port stands for an OPA that is down."""
    _, binary, *rest = SERVICES["opa"]["healthcheck"]["test"]
    assert binary == "/opa"
    port = free_port()
    opa = ROOT / ".tools" / "bin" / "opa"
    server = subprocess.Popen(
        [opa, "run", "--server", f"--addr=127.0.0.1:{port}", "--log-level=error", ROOT / "policies"]
    )
    try:
        deadline = time.monotonic() + 20
        while not is_listening("127.0.0.1", port):
            assert time.monotonic() < deadline, "OPA does not listen"
            time.sleep(0.05)
        for asked, expected in ((port, 0), (free_port(), 1)):
            command = [opa, *(part.replace("8181", str(asked)) for part in rest)]
            assert subprocess.run(command, capture_output=True, timeout=20).returncode == expected
    finally:
        server.terminate()
        server.wait(10)


def test_only_the_edge_is_published_and_the_data_leads_nowhere():
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["envoy"]
    assert SERVICES["envoy"]["ports"] == ["${PORT:-3000}:3000"]
    assert environment("envoy")["PORT"] == "3000"
    assert COMPOSE["networks"]["data"] == {"internal": True}
    assert {name for name, service in SERVICES.items() if service["networks"] != ["data"]} == {"envoy"}


@pytest.mark.parametrize("name", ["ext_authz", "ext_proc"])
def test_metrics_are_served_where_a_prometheus_on_the_inner_network_can_scrape(name):
    settings = PROGRAMS[name](environment(name))
    assert settings.metrics_address == "0.0.0.0:9464"
    assert f"{name}:9464" in (ROOT / "docker-compose.yml").read_text()


def test_secrets_come_from_outside_and_each_part_gets_its_own():
    text = (ROOT / "docker-compose.yml").read_text()
    assert not re.search(r"(PASSWORD|KEY): *\"?[a-z0-9]", text)
    holders = {
        secret: {name for name in SERVICES if value in str(environment(name).values())}
        for secret, value in SECRETS.items()
    }
    assert holders == {
        "POSTGRES_PASSWORD": {"postgres", "migrate"},
        "APP_DATABASE_PASSWORD": {"migrate", "control_plane"},
        "ADMIN_API_KEY": {"control_plane"},
        "OPENAI_API_KEY": {"ext_authz"},
    }


def test_programs_log_in_as_the_role_that_owns_nothing():
    assert environment("control_plane")["DATABASE_URL"] == environment("migrate")["DATABASE_URL"]
    assert f"//{APP_ROLE}:" in environment("control_plane")["DATABASE_URL"]
    assert migrate.app_password(environment("migrate")["DATABASE_URL"]) == SECRETS["APP_DATABASE_PASSWORD"]


def test_redis_keeps_money_as_our_own_redis_does(tmp_path):
    ours = EmbeddedRedis(data_dir=tmp_path, socket_path=tmp_path / "s").argv
    options = {name.removeprefix("--"): value for name, value in zip(ours[1::2], ours[2::2], strict=True)}
    command = dict(part.removeprefix("--").split(" ") for part in SERVICES["redis"]["command"][1:])
    for name in ("appendonly", "appendfsync", "maxmemory-policy"):
        assert command[name] == options[name]
    assert command["save"] == '""'
    assert "redis:/data" in SERVICES["redis"]["volumes"]


def test_containers_of_ours_can_do_little():
    for name in (*PROGRAMS, "migrate", "opa"):
        service = SERVICES[name]
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^USER 10001:10001$", dockerfile, re.MULTILINE)
    assert "--require-hashes" in dockerfile
