pytest_plugins = [
    "tests.plugins.edge",
    "tests.plugins.postgres_server",
    "tests.plugins.redis_server",
    "tests.plugins.stack",
]
