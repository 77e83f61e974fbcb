"""Turns ``envoy/edge.yaml`` into configuration that Envoy runs, and has Envoy validate it."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from string import Template

from budgetguard.adapters.settings import UNIX_PATH_BYTES_MAX, Environment, SettingsError
from budgetguard.cli.local.binaries import CHECKOUT, envoy_binary

TEMPLATE = CHECKOUT / "envoy" / "edge.yaml"
# The public services as `make gen` compiles them from proto/; REST is an image of these.
DESCRIPTOR_SET = CHECKOUT / "envoy" / "budgetguard.desc"
PORT_DEFAULT = 3000
# What a value may not hold, since it lands between double quotes in YAML and % starts one of Envoy's own variables.
_UNSAFE = re.compile(r'["\\$%\x00-\x1f\x7f]')
_ENDPOINT = '{endpoint: {address: {pipe: {path: "%s"}}}}'
# Until the control plane writes the providers' clusters there are none, but Envoy insists on a file.
NO_CLUSTERS = '{"version_info":"0","resources":[]}\n'
VALIDATE_SECONDS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeSettings:
    """What the template leaves open. Sockets are paths of Unix sockets; each of ext_authz' processes has one."""

    listen_address: str
    port: int
    admin_socket: Path
    ext_authz_sockets: tuple[Path, ...]
    ext_proc_socket: Path
    control_plane_socket: Path
    clusters_path: Path
    access_log_path: Path
    descriptor_set_path: Path = DESCRIPTOR_SET

    @classmethod
    def from_environment(cls, environment: Environment) -> "EdgeSettings":
        """Read the variables that the programs read too, so that both ends of a socket have one name.

        Raises:
            SettingsError: a value is missing or wrong.
        """
        return cls(
            listen_address=environment.text("LISTEN_ADDRESS", "127.0.0.1"),
            port=environment.integer("PORT", PORT_DEFAULT, minimum=1, maximum=65_535),
            admin_socket=environment.path("EDGE_ADMIN_SOCKET"),
            ext_authz_sockets=_sockets(environment, "EXT_AUTHZ_ADDRESS"),
            ext_proc_socket=_socket(environment, "EXT_PROC_ADDRESS"),
            control_plane_socket=_socket(environment, "CONTROL_PLANE_ADDRESS"),
            clusters_path=environment.path("EDGE_CLUSTERS_PATH"),
            access_log_path=environment.path("EDGE_ACCESS_LOG_PATH", Path("/dev/stdout")),
        )


def _sockets(environment: Environment, name: str) -> tuple[Path, ...]:
    """Read one or several addresses, separated by commas: calls go to all of them in turn."""
    addresses = environment.text(name).split(",")
    return tuple(_socket(Environment({name: address}), name) for address in addresses)


def _socket(environment: Environment, name: str) -> Path:
    address = environment.address(name)
    if not address.startswith("unix:"):
        raise SettingsError(f"{name}: expected unix:/path.sock, since Envoy reaches it over a socket, got {address!r}")
    return Path(address.removeprefix("unix:"))


def render(settings: EdgeSettings, template: str) -> str:
    """Fill in the template.

    Raises:
        SettingsError: a value cannot stand in YAML, or a socket's path is too long for the kernel.
    """
    values = {
        "LISTEN_ADDRESS": settings.listen_address,
        "PORT": str(settings.port),
        "ADMIN_SOCKET": str(settings.admin_socket),
        "EXT_PROC_SOCKET": str(settings.ext_proc_socket),
        "CONTROL_PLANE_SOCKET": str(settings.control_plane_socket),
        "EDGE_CLUSTERS_PATH": str(settings.clusters_path),
        "EDGE_CLUSTERS_DIR": str(settings.clusters_path.parent),
        "ACCESS_LOG_PATH": str(settings.access_log_path),
        "DESCRIPTOR_SET_PATH": str(settings.descriptor_set_path),
    }
    for name, value in values.items():
        _check(name, value)
    for socket in settings.ext_authz_sockets:
        _check("EXT_AUTHZ_SOCKET", str(socket))
    endpoints = ", ".join(_ENDPOINT % socket for socket in settings.ext_authz_sockets)
    return Template(template).substitute(values, EXT_AUTHZ_ENDPOINTS=endpoints)


def _check(name: str, value: str) -> None:
    if not value or _UNSAFE.search(value):
        raise SettingsError(f"{name}: expected no quotes, backslashes, $ or % in {value!r}")
    if name.endswith("_SOCKET") and len(value.encode()) > UNIX_PATH_BYTES_MAX:
        raise SettingsError(f"{name}: expected a path of at most {UNIX_PATH_BYTES_MAX} bytes, got {value!r}")


def command(binary: Path, configuration: Path) -> list[str]:
    """Spell Envoy's command line.

    No hot restart: it shares memory between all Envoys of a machine that do not choose another base id. A drain tells
    every connection at once, since nothing else takes over its callers. The access log is on disk within a second.
    """
    options = ["--disable-hot-restart", "--drain-strategy", "immediate", "--file-flush-interval-msec", "1000"]
    return [str(binary), "-c", str(configuration), "--log-level", "warning", *options]


def ensure_clusters_file(path: Path) -> None:
    """Put an empty list of clusters where the control plane will write the real one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(NO_CLUSTERS, encoding="utf-8")


def validate(template: str) -> str | None:
    """Have Envoy itself check the template with stand-in paths; return what it says against it, or ``None``."""
    with tempfile.TemporaryDirectory(prefix="bg-edge-") as name:
        folder = Path(name)
        settings = EdgeSettings(
            listen_address="127.0.0.1",
            port=PORT_DEFAULT,
            admin_socket=folder / "admin.sock",
            ext_authz_sockets=(folder / "ext_authz.sock", folder / "ext_authz_2.sock"),
            ext_proc_socket=folder / "ext_proc.sock",
            control_plane_socket=folder / "control_plane.sock",
            clusters_path=folder / "edge" / "clusters.json",
            access_log_path=folder / "access.log",
        )
        ensure_clusters_file(settings.clusters_path)
        rendered = folder / "edge.yaml"
        rendered.write_text(render(settings, template), encoding="utf-8")
        result = subprocess.run(  # noqa: S603 - Envoy from its own wheel, on a file of ours
            [envoy_binary(), "--mode", "validate", "--log-level", "error", "-c", rendered],
            capture_output=True,
            text=True,
            timeout=VALIDATE_SECONDS,
            check=False,
        )
        return None if result.returncode == 0 else (result.stderr or result.stdout).strip()
