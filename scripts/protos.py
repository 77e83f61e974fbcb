"""Generates code and the edge's descriptor set from proto/ (`make gen`); --check tells what is stale or broken."""

import filecmp
import os
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
BUF = ROOT / ".venv/bin/buf"
GENERATED = Path("budgetguard/v1")
# What Envoy's transcoder reads. It has google/rpc/error_details.proto too: without it, an error with details would
# come back as an empty 404.
DESCRIPTORS = Path("envoy/budgetguard.desc")
GOOGLEAPIS = Path(".tools/googleapis")
GOOGLE_PROTOS = (
    "google/api/annotations.proto",
    "google/api/field_behavior.proto",
    "google/api/http.proto",
    "google/api/httpbody.proto",
    "google/rpc/error_details.proto",
    "google/rpc/status.proto",
)


def buf(*arguments: str, folder: Path = ROOT) -> None:
    """Run buf; it prints what is wrong itself."""
    environment = {**os.environ, "BUF_CACHE_DIR": str(ROOT / ".tools/buf")}
    subprocess.run([BUF, *arguments], cwd=folder, env=environment, check=True)  # noqa: S603 - arguments of this file


def provide_googleapis() -> None:
    """Put the imported googleapis protos where buf finds them, from the locked package."""
    package = files("google.api").joinpath("..", "..")
    for name in GOOGLE_PROTOS:
        target = ROOT / GOOGLEAPIS / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(package.joinpath(name).read_bytes())


def generate(out: Path) -> None:
    """Generate everything below ``out``."""
    (out / DESCRIPTORS).parent.mkdir(parents=True, exist_ok=True)
    buf("generate", "--output", str(out))
    descriptors = f"{out / DESCRIPTORS}#format=binpb"
    buf("build", "--as-file-descriptor-set", "--exclude-source-info", "--output", descriptors)


def stale(fresh: Path) -> list[str]:
    """Name what differs between the checkout and what was generated just now."""
    expected = {path.relative_to(fresh) for path in fresh.rglob("*") if path.is_file()}
    kept = {GENERATED / "__init__.py"}
    present = {
        path.relative_to(ROOT)
        for path in (ROOT / GENERATED).iterdir()
        if path.is_file() and path.suffix in {".py", ".pyi"}
    }
    differing = {
        path
        for path in expected
        if not (ROOT / path).is_file() or not filecmp.cmp(fresh / path, ROOT / path, shallow=False)
    }
    return sorted(str(path) for path in differing | (present - expected - kept))


def check_breaking() -> None:
    """Compare with what main promises, where there is a git history that has it."""
    listing = subprocess.run(
        ["git", "ls-tree", "-r", "--name-only", "main", "proto/"],  # noqa: S607 - git is wherever the user has it
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    names = listing.stdout.split() if listing.returncode == 0 else []
    if not names:
        return
    with TemporaryDirectory() as temporary:
        before = Path(temporary)
        for name in names:
            shown = subprocess.run(  # noqa: S603 - names come from git itself
                ["git", "show", f"main:{name}"],  # noqa: S607 - git is wherever the user has it
                cwd=ROOT,
                capture_output=True,
                check=True,
            )
            (before / name).parent.mkdir(parents=True, exist_ok=True)
            (before / name).write_bytes(shown.stdout)
        shutil.copytree(ROOT / GOOGLEAPIS, before / GOOGLEAPIS)
        shutil.copy(ROOT / "buf.yaml", before)
        buf("breaking", "--against", str(before))


def main() -> int:
    """Generate, or check."""
    provide_googleapis()
    if "--check" not in sys.argv:
        for path in (ROOT / GENERATED).glob("*_pb2*"):
            path.unlink()
        generate(ROOT)
        return 0
    buf("format", "--diff", "--exit-code", "proto")
    buf("lint")
    check_breaking()
    with TemporaryDirectory() as temporary:
        generate(Path(temporary))
        found = stale(Path(temporary))
    if found:
        print(f"stale, run `make gen` and commit: {', '.join(found)}")
    return 1 if found else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
