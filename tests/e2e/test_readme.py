"""Every example of the README is run as it stands there."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from string import Template

import pytest

from tests.e2e.admin import monthly
from tests.e2e.curl import run_curl

CHECKOUT = Path(__file__).parents[2]
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    command
    for block in BLOCKS
    for command in block.replace("\\\n", " ").splitlines()
    if command.startswith(("curl", "grpcurl"))
]


def test_the_readme_has_examples_of_each_kind():
    assert sum(command.startswith("grpcurl") for command in COMMANDS) >= 4
    assert sum(command.startswith("curl") for command in COMMANDS) >= 8


@pytest.mark.timeout(120)
def test_every_example_works(stack, new_tenant):
    tenant = new_tenant(monthly("10"))
    environment = {
        "PATH": f"{CHECKOUT / '.tools' / 'bin'}:{os.environ['PATH']}",
        "TENANT_KEY": tenant.key,
        "TENANT_ID": tenant.tenant_id,
        "ADMIN_KEY": stack.admin_key,
        "BUDGET_ID": tenant.budgets[0]["id"],
    }
    metrics = stack.stack.supervisor.part("ext_proc").where.split()[-1]
    for command in COMMANDS:
        here = command.replace("localhost:3000", stack.base_url.removeprefix("http://"))
        here = here.replace("http://127.0.0.1:9464/metrics", metrics)
        if here.startswith("curl"):
            answer = run_curl([Template(word).substitute(environment) for word in shlex.split(here)])
            assert answer.status_code == 200, f"{shlex.quote(command)}: {answer.text}"
            continue
        result = subprocess.run(["bash", "-c", here], env=environment, capture_output=True, text=True, timeout=30)
        assert result.returncode == 0, f"{shlex.quote(command)}: {result.stdout}{result.stderr}"


def test_the_two_commands_are_targets():
    makefile = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make\s([a-z]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
