"""What the sources over the network share: bounded retries with jitter, checked bytes, and no secret in a log line.

`s3_objects.py` and `wandb_artifacts.py` turn what their clients raise into `Transient` (another attempt may mend it)
or an NpcError (it will not). The texts of the clients' own errors are never shown: they hold signed URLs and keys.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import ipaddress
import logging
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from dual_policy_plugin.errors import NpcError
from dual_policy_plugin.waiting import waiting

MAX_BYTES = 16 * 1024**3
CHUNK_BYTES = 1 << 20
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0
"""Silence after which an attempt is given up."""
SLOWEST_BYTES_PER_S = 64 * 1024
"""An attempt may take a minute, and as long again as its bytes take at this rate."""

T = TypeVar("T")

_jitter = random.SystemRandom()  # never the global generator, whose draws belong to training


@dataclass(kw_only=True, slots=True, frozen=True)
class Retries:
    """How often and how patiently."""

    attempts: int = 6
    first_wait_s: float = 0.2
    max_wait_s: float = 5.0

    def wait_s(self, attempt: int) -> float:
        """Seconds before the attempt after `attempt` (0, 1, ...): doubled each time, the later half of it drawn."""
        return _jitter.uniform(0.5, 1.0) * min(self.max_wait_s, self.first_wait_s * 2.0**attempt)


RETRIES = Retries()


class Transient(Exception):  # noqa: N818 (not an error yet)
    """One attempt failed; another may not. Its text is shown to the user when it was the last one."""

    def __init__(self, reason: str, *, wait: bool = True) -> None:
        super().__init__(reason)
        self.wait = wait


def with_retries(once: Callable[[], T], what: str) -> T:
    """What `once` returns at the first attempt that is not Transient.

    Raises:
        NpcError: the last attempt failed as well; the line begins with `what`.
    """
    for attempt in range(RETRIES.attempts):
        try:
            return once()
        except Transient as error:
            reason = str(error)
            if error.wait and attempt + 1 < RETRIES.attempts:
                time.sleep(RETRIES.wait_s(attempt))
    raise NpcError(f"{what}: {reason}; gave up after {RETRIES.attempts} attempts, try again later")


def read_checked(read: Callable[[], tuple[bytes, bool]], what: str) -> bytes:
    """Bytes for which a digest of the service stands, or else two reads that agree.

    Args:
        read: gives the bytes and whether a digest was compared; Transient where one was and did not agree.
        what: begins the line of an error.
    """
    seen: set[bytes] = set()

    def once() -> bytes:
        data, is_vouched = read()
        if is_vouched:
            return data
        digest = hashlib.sha256(data).digest()
        if digest not in seen:
            seen.add(digest)
            raise Transient("no two reads gave the same bytes", wait=False)
        return data

    return with_retries(once, what)


def check_bytes(data: bytes, *, num_bytes: int, md5: str) -> bool:
    """Whether `data` was compared with a digest.

    Args:
        data: what came.
        num_bytes: its right length.
        md5: hex or base64; anything else is no MD5 and compared with nothing.

    Raises:
        Transient: other bytes came.
    """
    if len(data) != num_bytes:
        raise Transient(f"{len(data)} of {num_bytes} bytes arrived")
    if not (wanted := md5_hex(md5)):
        return False
    if hashlib.md5(data, usedforsecurity=False).hexdigest() != wanted:
        raise Transient("bytes arrived damaged")
    return True


def check_sha256(data: bytes, sha256: str) -> bool:
    """True; Transient where `data` has another digest than its publisher noted (64 hex digits)."""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Transient("bytes arrived damaged, or are not those that were published")
    return True


def md5_hex(text: str) -> str:
    """An MD5 in hex from hex or base64; empty if `text` is neither."""
    if re.fullmatch(r"[0-9a-fA-F]{32}", text):
        return text.lower()
    if re.fullmatch(r"[A-Za-z0-9+/]{22}==", text):
        try:
            return base64.b64decode(text, validate=True).hex()
        except binascii.Error:
            return ""
    return ""


def read_body(chunks: Callable[[int], bytes], num_bytes: int, what: str) -> bytes:
    """All bytes of a body, at most one more than `num_bytes`; Transient where it comes too slowly.

    Args:
        chunks: gives up to so many further bytes, none at the end.
        num_bytes: how many are expected.
        what: it is, for whoever waits.
    """
    end = time.monotonic() + 60 + num_bytes / SLOWEST_BYTES_PER_S
    body = bytearray()
    with waiting(f"fetching {what}", num_bytes, unit="B") as advance:
        while len(body) <= num_bytes and (chunk := chunks(min(CHUNK_BYTES, num_bytes + 1 - len(body)))):
            body += chunk
            advance(len(chunk))
            if time.monotonic() > end:
                raise Transient(f"only {len(body)} of {num_bytes} bytes arrived in time")
    return bytes(body)


def get_signed(url: str, *, num_bytes: int, service: str, what: str) -> bytes:
    """The bytes behind a signed URL that the configured service gave out; no redirect is followed.

    Args:
        url: it is a secret: it stands in no message.
        num_bytes: how many are expected; at most one more is read.
        service: the configured service's own URL.
        what: it is, for whoever waits.

    Raises:
        Transient: it failed in a way that may pass.
        NpcError: the URL leads where no file of the service can be.
    """
    import requests

    check_host(url, service)
    quiet_logs()
    try:
        with requests.Session() as session:
            session.auth = _no_auth
            session.max_redirects = 0
            timeout = (CONNECT_TIMEOUT_S, READ_TIMEOUT_S)
            with session.get(
                url, stream=True, timeout=timeout, allow_redirects=False, headers={"Accept-Encoding": "identity"}
            ) as response:
                if response.status_code != 200:
                    raise Transient(f"the file's storage answered with status {response.status_code}")
                return read_body(lambda size: bytes(response.raw.read(size)), num_bytes, what)
    except (requests.RequestException, OSError) as error:
        raise Transient(f"the connection failed ({type(error).__name__})") from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "urllib3":
            raise
        raise Transient(f"the connection failed ({type(error).__name__})") from None


def _no_auth(request: Any) -> Any:
    """Keeps requests from adding a .netrc login: a signed URL carries its own."""
    return request


def check_host(url: str, service: str) -> None:
    """Raises an NpcError where a URL from a service leads into this machine or its cloud's metadata, or to plain HTTP.

    A service on loopback or in a private network may name such addresses too.
    """
    try:
        target, own = urlsplit(url), urlsplit(service)
        host, own_host = target.hostname or "", own.hostname or ""
    except ValueError:
        raise NpcError("the service answered with a download address that is none") from None
    if target.scheme not in ("http", "https") or (target.scheme == "http" and own.scheme == "https"):
        raise NpcError(f"the service answered with a {target.scheme[:16]!a} address; only https:// is followed")
    if not host or target.username or target.password:
        raise NpcError("the service answered with a download address without a host or with a login in it")
    if host == own_host:
        return
    is_inner, is_own_inner = _is_inner(host), _is_inner(own_host)
    if _is_link_local(host) or (is_inner and not is_own_inner):
        raise NpcError(f"the service answered with the address {host}, which is inside this machine or its network")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _is_inner(host: str) -> bool:
    address = _address(host)
    if address is not None:
        return not address.is_global
    return (
        host == "localhost"
        or host.endswith((".localhost", ".internal"))
        or re.fullmatch(r"[\dxa-f.]+", host) is not None
    )


def _is_link_local(host: str) -> bool:
    address = _address(host)
    return address.is_link_local if address is not None else host == "metadata.google.internal"


class _NoQueries(logging.Filter):
    """Cuts what follows a `?` (a signature) from the URLs in a record."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Always True, after the record has been cleaned."""
        record.msg, record.args = _without_queries(record.getMessage()), None
        record.exc_info = record.exc_text = None
        return True


_no_queries = _NoQueries()


def _without_queries(text: str) -> str:
    return re.sub(r"\?[^\s'\"<>)]+", "?...", text)


def quiet_logs() -> None:
    """Keeps keys and signatures out of the clients' own log lines, whatever the program's log level is.

    urllib3 logs whole URLs, at WARNING when it retries; botocore logs headers and credentials' parts at DEBUG.
    """
    for name in ("urllib3.connectionpool", "urllib3.util.retry", "urllib3.connection"):
        logger = logging.getLogger(name)
        if _no_queries not in logger.filters:
            logger.addFilter(_no_queries)
    for name in ("boto3", "botocore", "s3transfer"):
        logger = logging.getLogger(name)
        if logger.level < logging.INFO:
            logger.setLevel(logging.INFO)
