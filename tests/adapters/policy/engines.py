"""The engines that the contract suite runs, and the calls it puts to them."""

import asyncio
import os
import signal
import subprocess
from pathlib import Path

import pytest

from budgetguard.adapters.policy.embedded import EmbeddedPolicy
from budgetguard.adapters.policy.opa import OpaPolicy
from budgetguard.core.policy import PolicyInput, PolicyUnavailableError

CHECKOUT = Path(__file__).parents[3]
OPA = CHECKOUT / ".tools" / "bin" / "opa"
CONTRACT = CHECKOUT / "tests" / "fixtures" / "policies" / "contract"


def call(model, **changes):
    return PolicyInput(
        **{
            "tenant_id": "acme",
            "key_id": "k3j9x0a1b2c3d4e5",
            "route": "openai.chat",
            "model": model,
            "priced_model": model,
            "stream": False,
            "estimate_usd": "0.00123",
            "estimate_nanos": 1_230_000,
            "output_tokens_bound": 4096,
            "time": "2026-01-31T12:00:00Z",
            **changes,
        }
    )


async def until_decides(policy):
    async with asyncio.timeout(20):
        while True:
            try:
                return await policy.decide(call("allow"))
            except PolicyUnavailableError:
                await asyncio.sleep(0.02)


class Embedded:
    """Two processes as in production; ``kill`` kills both."""

    def __init__(self):
        self.policies = []

    async def open(self, policy_dir=CONTRACT, **settings):
        policy = await EmbeddedPolicy.open(policy_dir, **settings)
        self.policies.append(policy)
        return policy

    def pids(self):
        return [engine._process.pid for policy in self.policies for engine in policy._engines]

    def kill(self):
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)

    def start_again(self):
        """The product does that by itself."""

    async def close(self):
        for policy in self.policies:
            await policy.close()


class Opa:
    def __init__(self, address, url):
        self.address, self.url = address, url
        self.policies = []
        self.process = None
        self.policy_dir = CONTRACT

    async def open(self, policy_dir=CONTRACT, **settings):
        self.policy_dir = policy_dir
        self.start_again()
        policy = OpaPolicy(self.url, **settings)
        self.policies.append(policy)
        await until_healthy(policy)
        return policy

    def start_again(self):
        if not OPA.exists():
            pytest.fail(f"no {OPA.relative_to(CHECKOUT)}: run `make {OPA.relative_to(CHECKOUT)}`")
        self.process = subprocess.Popen(
            [OPA, "run", "--server", "--addr", self.address, "--skip-version-check", "--log-level=error", "."],
            cwd=self.policy_dir,
            stdout=subprocess.DEVNULL,
        )

    def kill(self):
        self.process.kill()
        self.process.wait()

    async def close(self):
        for policy in self.policies:
            await policy.close()
        if self.process is not None:
            self.kill()


async def until_healthy(policy):
    async with asyncio.timeout(20):
        while True:
            try:
                return await policy.health()
            except PolicyUnavailableError:
                await asyncio.sleep(0.02)
