"""Who can reach an address that a server listens at."""

import ipaddress

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens at `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def names_of(host: str) -> tuple[str, ...]:
    """The names by which a server at `host` may be called.

    At loopback these are its own, so that a web page elsewhere can't reach it under a name that points here.
    """
    return LOOPBACK if is_loopback(host) else ("*",)
