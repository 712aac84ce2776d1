"""Fetch from the web: over https, within a time and a size, and with no secret in an error."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx

LOCAL = ("localhost", "127.0.0.1", "::1")   # where plain http is as good
STEP = 20       # seconds without a byte after which a connection is given up


def check_address(url):
    """ValueError unless an address is https (on this machine also http) and holds no password."""
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOCAL):
        raise ValueError(f"{parts.scheme}://{parts.hostname}: give an https address")
    if not parts.hostname or parts.username is not None or parts.password is not None:
        raise ValueError(f"https://{parts.hostname}: an address needs a host, and no password")


def fetch(url, path, *, limit, seconds=3600):
    """Write what lies at an address to a file; limit: bytes; seconds: for the whole."""
    with open(path, "wb") as file:
        asyncio.run(_stream("GET", url, file.write, limit=limit, seconds=seconds))


def post(url, value, *, key, limit=2 ** 20, seconds=60):
    """Send a JSON value with a key, and return the JSON answer; also within a notebook's loop."""
    parts = []
    headers = {"Authorization": f"Bearer {key}"}
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, _stream("POST", url, parts.append, limit=limit, seconds=seconds,
                                         headers=headers, value=value)).result()
    try:
        return json.loads(b"".join(parts))
    except ValueError:
        raise ValueError(f"{urlsplit(url).hostname}: the answer is not JSON") from None


async def _stream(method, url, write, *, limit, seconds, headers=None, value=None):
    """Write an answer part by part. No error says more than the host and what kind of thing it is.

    Redirections are followed, to https alone, unless something secret is sent.
    """
    check_address(url)
    host = urlsplit(url).hostname

    async def check(request):
        check_address(str(request.url))

    client = httpx.AsyncClient(timeout=STEP, follow_redirects=headers is None,
                               event_hooks={"request": [check]})
    try:
        async with asyncio.timeout(seconds), client, client.stream(
                method, url, headers=headers, json=value) as answer:
            if answer.status_code != 200:
                raise ValueError(f"{host}: answers with status {answer.status_code}")
            size = 0
            async for part in answer.aiter_bytes():
                size += len(part)
                if size > limit:
                    raise ValueError(f"{host}: sends more than {limit:,} bytes")
                write(part)
            length = answer.headers.get("content-length", "")
            if length.isdigit() and int(length) != answer.num_bytes_downloaded:
                raise ValueError(f"{host}: the answer was cut off")
    except TimeoutError:
        raise ValueError(f"{host}: not done within {seconds} seconds") from None
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise ValueError(f"{host}: cannot be fetched ({type(error).__name__})") from None
