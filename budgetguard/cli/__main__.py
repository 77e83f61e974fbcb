"""The ``budgetguard`` command."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from budgetguard.adapters.settings import Environment, SettingsError
from budgetguard.cli import edge, edge_run, health, up
from budgetguard.cli.local.binaries import BinaryMissingError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; what the user can put right is one sentence and exit code 1."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "up":
            return up.main(os.environ)
        if options.command == "health":
            return 0 if health.is_healthy(options.target) else 1
        if options.action == "render":
            settings = edge.EdgeSettings.from_environment(Environment(os.environ))
            sys.stdout.write(edge.render(settings, options.template.read_text(encoding="utf-8")))
            return 0
        if options.action == "run":
            return edge_run.run(Environment(os.environ), options.template)
        complaint = edge.validate(options.template.read_text(encoding="utf-8"))
    except (SettingsError, BinaryMissingError) as error:
        sys.stderr.write(f"budgetguard: {error}\n")
        return 1
    if complaint:
        sys.stderr.write(f"{options.template}: {complaint}\n")
        return 1
    print(f"{options.template}: Envoy accepts it")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="budgetguard", description="A FinOps gateway for AI APIs.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="start the whole product on this machine and keep it running", description=up.HELP)
    health_parser = commands.add_parser("health", help="tell by the exit code whether a part answers")
    health_parser.add_argument("target", help=health.HELP)
    edge_parser = commands.add_parser("edge", help="Envoy's configuration")
    actions = edge_parser.add_subparsers(dest="action", required=True)
    for name, text in (
        ("run", "run Envoy on the configuration that the environment asks for, and drain it on SIGTERM"),
        ("render", "print the configuration that the environment asks for"),
        ("validate", "have Envoy itself check the template"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("--template", type=Path, default=edge.TEMPLATE)
    return parser


if __name__ == "__main__":
    sys.exit(main())
