"""Ports, with real sockets: what is taken is found before anything starts, and two servers get different ones."""

import contextlib
import os
import socket
from collections.abc import Iterator

import pytest

from deployments.serve import ports
from deployments.serve.front_end import FrontEnd
from deployments.serve.ports import check_port, haproxy_ports, router_ports
from llm.errors import ConfigError


@contextlib.contextmanager
def listener(host: str = "127.0.0.1", *, shares: bool = False) -> Iterator[int]:
    with socket.socket() as server:
        if shares:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind((host, 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.mark.parametrize("shares", [False, True], ids=["alone", "shared as Serve does"])
@pytest.mark.parametrize("theirs", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("ours", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_port_in_use_is_refused(theirs: str, ours: str, shares: bool):
    with listener(theirs, shares=shares) as port, pytest.raises(ConfigError, match=f"port {port} .* is in use"):
        check_port(FrontEnd(ours, port))


def test_a_port_whose_server_has_just_ended_is_free():
    """Its last connections may linger in TIME_WAIT."""
    with listener() as port:
        pass
    with socket.create_server(("127.0.0.1", port)) as server, socket.create_connection(("127.0.0.1", port)) as client:
        connection, _ = server.accept()
        connection.close()
        assert client.recv(1) == b""
    check_port(FrontEnd("127.0.0.1", port))


@pytest.mark.parametrize(
    ("host", "message"), [("192.0.2.1", "not an address of this machine"), ("no.such.invalid", "no address or name")]
)
def test_hosts_that_cannot_be_listened_on(host: str, message: str):
    with pytest.raises(ConfigError, match=message):
        check_port(FrontEnd(host, 8000))


@pytest.mark.parametrize("options", [{"port": 0}, {"port": "80"}, {"port": 70000}, {"port": True}, {"host": ""}])
def test_http_options_that_cannot_be_used(options: dict):
    with pytest.raises(ConfigError, match=r"http_options\.(port|host)"):
        FrontEnd.of_options(options)


def test_options_left_out_are_serves_own():
    assert FrontEnd.of_options({}) == FrontEnd("0.0.0.0", 8000)


def test_a_second_haproxy_gets_free_ports(monkeypatch: pytest.MonkeyPatch):
    with listener("0.0.0.0") as taken, listener() as other:
        pass
    monkeypatch.setattr(ports, "HAPROXY_PORTS", {"RAYLINE_TEST_A": taken, "RAYLINE_TEST_B": other})
    assert haproxy_ports() == {"RAYLINE_TEST_A": str(taken), "RAYLINE_TEST_B": str(other)}
    with socket.create_server(("0.0.0.0", taken)):
        chosen = haproxy_ports()
    assert chosen["RAYLINE_TEST_A"] != str(taken)
    check_port(FrontEnd("0.0.0.0", int(chosen["RAYLINE_TEST_A"])))


def test_ports_that_the_environment_gives_haproxy_stay_or_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ports, "HAPROXY_PORTS", {"RAYLINE_TEST_A": 1})
    with listener() as port:
        monkeypatch.setenv("RAYLINE_TEST_A", str(port))
        with pytest.raises(ConfigError, match=f"RAYLINE_TEST_A={port} is in use"):
            haproxy_ports()
    assert haproxy_ports() == {}


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="claims are names in Linux's abstract namespace")
def test_routers_of_two_servers_get_ports_from_different_ranges():
    """Else a router may get the port to which the other server's HAProxy still sends requests."""
    with router_ports() as ours:
        with router_ports() as theirs:
            first, last = (int(theirs[f"RAY_SERVE_DIRECT_INGRESS_{end}_HTTP_PORT"]) for end in ("MIN", "MAX"))
            assert not first <= int(ours["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"]) < last
        with router_ports() as next_ones:
            assert next_ones == theirs, "a range is free again when its server ends"
