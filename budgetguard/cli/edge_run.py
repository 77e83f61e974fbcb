"""`budgetguard edge run`: Envoy as a container runs it, with the drain on SIGTERM that Envoy lacks by itself."""

import os
import signal
import subprocess
import tempfile
from pathlib import Path

from budgetguard.adapters.settings import Environment
from budgetguard.cli import edge
from budgetguard.cli.local.binaries import envoy_binary
from budgetguard.cli.local.envoy_admin import EnvoyAdmin

DRAIN_SECONDS = 60.0
STOP_SECONDS = 5.0


def run(environment: Environment, template: Path) -> int:
    """Run Envoy until it ends or a signal comes; then let the calls under way end. Returns Envoy's exit code.

    Raises:
        SettingsError: a value is missing or wrong.
        BinaryMissingError: Envoy is not installed.
    """
    settings = edge.EdgeSettings.from_environment(environment)
    edge.ensure_clusters_file(settings.clusters_path)
    signals: list[int] = []
    with tempfile.TemporaryDirectory(prefix="bg-edge-") as folder:
        configuration = Path(folder) / "edge.yaml"
        configuration.write_text(edge.render(settings, template.read_text(encoding="utf-8")), encoding="utf-8")
        process = subprocess.Popen(  # noqa: S603 - Envoy from its own wheel
            [*edge.command(envoy_binary(), configuration)],
            env={"PATH": os.defpath},
            start_new_session=True,
        )

        def stop(number: int, _frame: object) -> None:
            signals.append(number)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        while not signals and process.poll() is None:
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
        if process.poll() is not None:
            return process.returncode
        try:
            EnvoyAdmin(settings.admin_socket).drain(seconds=DRAIN_SECONDS, hurry=lambda: len(signals) > 1)
        except OSError as error:
            print(f"edge: no drain: {error}", flush=True)
        process.terminate()
        process.wait(STOP_SECONDS)
    return 0
