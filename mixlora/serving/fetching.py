"""Pictures from addresses: only from hosts on a list, which must be public, over https, without redirects."""

import asyncio
import ipaddress
import socket
from typing import Any

import httpx

from mixlora.serving.media import MediaError

SECONDS = 10.0


class PinnedTransport(httpx.AsyncHTTPTransport):
    """Connects to the address that was checked, so that a second look-up can't lead elsewhere."""

    def __init__(self, address: str, **options: Any) -> None:
        super().__init__(**options)
        self.address = address

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        request.headers["Host"] = request.url.netloc.decode()
        request.extensions = {**request.extensions, "sni_hostname": host}
        request.url = request.url.copy_with(host=self.address)
        return await super().handle_async_request(request)


async def public_address(host: str) -> str:
    """An address of a host.

    Raises:
        MediaError: it has none, or one that is not public.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    except OSError as error:
        raise MediaError(f"image_url: {host} can't be found") from error
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(ipaddress.ip_address(address).is_global for address in addresses):
        raise MediaError(f"image_url: {host} has an address that is not public")
    return addresses[0]


async def fetch(
    url: str, hosts: frozenset[str], most: int, transport: httpx.AsyncBaseTransport | None = None
) -> bytes:
    """The bytes at an address.

    Args:
        hosts: those that may be asked.
        most: bytes that are taken.
        transport: instead of a connection to the host, for tests.

    Raises:
        MediaError: another host or scheme, a redirect or an error, too many bytes, or too slow an answer.
    """
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise MediaError("image_url: not an address") from error
    if parsed.scheme != "https" or parsed.host not in hosts or parsed.userinfo or parsed.port not in (None, 443):
        allowed = f"https addresses of {', '.join(sorted(hosts))}" if hosts else "no addresses"
        raise MediaError(f"image_url: data URLs are read, and {allowed}; nothing else is fetched")
    try:
        async with asyncio.timeout(SECONDS):
            pinned = transport or PinnedTransport(await public_address(parsed.host))
            # trust_env: a proxy of the environment would look the host up itself
            async with httpx.AsyncClient(transport=pinned, trust_env=False, follow_redirects=False) as client:
                return await _body(client, parsed, most)
    except TimeoutError as error:
        raise MediaError(f"image_url: {parsed.host} did not answer within {SECONDS:g} seconds") from error
    except httpx.HTTPError as error:
        raise MediaError(f"image_url: {parsed.host} can't be reached") from error


async def _body(client: httpx.AsyncClient, url: httpx.URL, most: int) -> bytes:
    async with client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as response:
        if response.status_code != 200:
            raise MediaError(f"image_url: {url.host} answered with status {response.status_code}")
        if packed := response.headers.get("content-encoding"):  # it may unpack to any size
            raise MediaError(f"image_url: {url.host} sent it packed as {packed}")
        data = bytearray()
        async for piece in response.aiter_bytes():
            data += piece
            if len(data) > most:
                raise MediaError(f"image_url: more than {most} bytes")
        return bytes(data)
