"""Where a host's name leads, and whether one may go there: never to this machine, its network or a cloud's metadata.

A name is looked up once, every address that it has is judged, and one of those is then connected to: whoever owns the
name cannot answer differently the second time (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import NamedTuple

from imagend.errors import DownloadFailed

PORT = 443
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Address(NamedTuple):
    ip: str
    port: int = PORT


Resolver = Callable[[str], list[Address]]


def resolve(host: str) -> list[Address]:
    """All addresses of a host. Raises OSError."""
    found = socket.getaddrinfo(host, PORT, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(Address(str(place[0])) for *_, place in found))


def is_public(ip: str) -> bool:
    """Whether an address is one of the internet at large, also of what is wrapped in it (IPv4 in IPv6)."""
    address = ipaddress.ip_address(ip.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        wrapped = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            wrapped.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        inside = [one for one in wrapped if one is not None]
        if inside or "%" in ip:
            return "%" not in ip and all(is_public(str(one)) for one in inside)
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def checked(host: str, resolver: Resolver, allow_private: bool = False) -> list[Address]:
    """The addresses of a host, if each of them is public. Raises DownloadFailed, OSError."""
    found = resolver(host)
    if not found:
        raise DownloadFailed(host, "it has no address")
    for address in found:
        if not (allow_private or is_public(address.ip)):
            raise DownloadFailed(
                host,
                f"its address {address.ip} is of this machine, of a private network or of no use, where nothing may be "
                "fetched from",
            )
    return found
