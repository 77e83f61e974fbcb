"""What the parts of a stack are given."""

import socket

from budgetguard.cli.local.parts import free_port, free_ports_from, program_part


def test_ports_that_are_taken_are_passed_over():
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        port = taken.getsockname()[1]
        ports = free_ports_from(port, count=3)
    assert len(ports) == 3
    assert sorted(set(ports)) == ports
    assert ports[0] > port


def test_a_free_port_is_none_that_a_connection_may_be_given():
    ports = {free_port() for _ in range(50)}
    assert len(ports) > 1
    assert max(ports) < 32_768


def test_no_more_ports_than_there_are():
    assert len(free_ports_from(65_535, count=2)) <= 1


def test_each_process_of_a_program_gets_an_address_for_its_metrics():
    part = program_part(
        "ext_authz",
        address="unix:/run/two.sock",
        metrics_address="127.0.0.1:9466",
        variables={"EXT_AUTHZ_METRICS_ADDRESS": "127.0.0.1:1"},
        own={},
        name="ext_authz_2",
    )
    assert part.environment["EXT_AUTHZ_METRICS_ADDRESS"] == "127.0.0.1:9466"
    assert part.where == "unix:/run/two.sock  http://127.0.0.1:9466/metrics"
