"""Ports, with real sockets: what is taken is found before anything starts, and two servers get different ones."""

import contextlib
import socket
import sys
from collections.abc import Iterator

import pytest

from deployments.serve import ports
from deployments.serve.front_end import FrontEnd
from deployments.serve.ports import check_port, claimed_ports
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
    ("host", "message"),
    [("192.0.2.1", "not an address of this machine"), ("no.such.invalid", "not an address or a name")],
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


FIRST, LAST = "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"


@pytest.fixture
def front_end() -> FrontEnd:
    """Of a server on a port that is free."""
    with listener() as port:
        pass
    return FrontEnd("127.0.0.1", port)


@pytest.fixture
def haproxy_port(monkeypatch: pytest.MonkeyPatch) -> int:
    """The one port that HAProxy takes in these tests; free."""
    monkeypatch.delenv(FIRST, raising=False)
    with listener("0.0.0.0") as port:
        pass
    monkeypatch.setattr(ports, "HAPROXY_PORTS", {"RAYLINE_TEST_PORT": port})
    return port


def test_haproxy_gets_its_usual_port_or_the_next_free_one(front_end: FrontEnd, haproxy_port: int):
    with claimed_ports(front_end, haproxy=True) as chosen:
        assert int(chosen["RAYLINE_TEST_PORT"]) == haproxy_port
    with socket.create_server(("0.0.0.0", haproxy_port)), claimed_ports(front_end, haproxy=True) as chosen:
        port = int(chosen["RAYLINE_TEST_PORT"])
        assert port != haproxy_port
        check_port(FrontEnd("0.0.0.0", port))


def test_a_port_that_the_environment_gives_haproxy_stays_or_is_refused(
    monkeypatch: pytest.MonkeyPatch, front_end: FrontEnd, haproxy_port: int
):
    with listener("0.0.0.0") as port:
        monkeypatch.setenv("RAYLINE_TEST_PORT", str(port))
        with (
            pytest.raises(ConfigError, match=f"RAYLINE_TEST_PORT={port} is in use"),
            claimed_ports(front_end, haproxy=True),
        ):
            pass
    with claimed_ports(front_end, haproxy=True) as chosen:
        assert chosen["RAYLINE_TEST_PORT"] == str(port)


def test_without_haproxy_nothing_is_moved(front_end: FrontEnd):
    with claimed_ports(front_end, haproxy=False) as chosen:
        assert chosen == {}


@pytest.mark.skipif(sys.platform != "linux", reason="claims are names in Linux's abstract namespace")
class TestTwoServersThatStartTogether:
    """Neither has bound a port yet."""

    def test_one_port_is_for_one_server(self, front_end: FrontEnd):
        with (
            claimed_ports(front_end, haproxy=False),
            pytest.raises(ConfigError, match="is in use"),
            claimed_ports(front_end, haproxy=False),
        ):
            pass
        with claimed_ports(front_end, haproxy=False):
            pass

    def test_their_haproxies_and_routers_get_different_ports(self, front_end: FrontEnd, haproxy_port: int):
        with listener() as port:
            pass
        other = FrontEnd("127.0.0.1", port)
        with claimed_ports(front_end, haproxy=True) as ours:
            with claimed_ports(other, haproxy=True) as theirs:
                assert ours["RAYLINE_TEST_PORT"] != theirs["RAYLINE_TEST_PORT"]
                assert not int(theirs[FIRST]) <= int(ours[FIRST]) < int(theirs[LAST])
            with claimed_ports(other, haproxy=True) as next_ones:
                assert next_ones == theirs, "what a server had is free when it has ended"
