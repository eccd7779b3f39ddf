"""S3 as the sources use it: listings and ranged reads through boto3, retried, with errors that show no secret.

The lower half of `s3_objects.py`, which knows what a policy is.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from dual_policy_plugin.errors import DigestError, NpcError, NpcNotFoundError
from dual_policy_plugin.npc.sources import http
from dual_policy_plugin.npc.sources.http import Transient, read_body, with_retries
from dual_policy_plugin.npc.uri import S3Name

MAX_KEYS = 20_000
NUM_CONNECTIONS = 8

NUMBERED = re.compile(r"model_(\d{1,18})\.(safetensors|pt)")
_POLICY = re.compile(r".+\.(safetensors|pt)")
_GONE = ("NoSuchKey", "NoSuchBucket", "NoSuchVersion", "404", "NotFound")
_CHANGED = ("PreconditionFailed", "412", "InvalidRange", "416")


@dataclass(kw_only=True, slots=True, frozen=True)
class Listed:
    """A policy file in a listing."""

    key: str
    size: int
    etag: str
    created: str

    @property
    def folder(self) -> str:
        """The key up to and with its last slash."""
        return self.key[: self.key.rfind("/") + 1]

    @property
    def epoch(self) -> int | None:
        """From model_<epoch>; None for other names."""
        match = NUMBERED.fullmatch(self.key[len(self.folder) :])
        return int(match[1]) if match else None


def list_objects(name: S3Name, asked: str) -> list[Listed]:
    """The policy files whose keys begin with a prefix.

    Raises:
        NpcError: there are more than MAX_KEYS keys.
    """
    listed: list[Listed] = []
    num_keys, token = 0, ""
    while True:
        page = with_retries(functools.partial(_list_page, name, token, asked), asked)
        for entry in page.get("Contents", ()):
            num_keys += 1
            key = str(entry["Key"])
            if _POLICY.fullmatch(key) and key.isprintable() and not {".", ".."} & set(key.split("/")):
                listed.append(
                    Listed(
                        key=key,
                        size=int(entry["Size"]),
                        etag=str(entry.get("ETag") or ""),
                        created=time_of(entry.get("LastModified")),
                    )
                )
        if num_keys > MAX_KEYS:
            raise NpcError(f"{asked}: more than {MAX_KEYS} objects are under this prefix; name a longer one")
        token = str(page.get("NextContinuationToken") or "")
        if not page.get("IsTruncated") or not token:
            return listed


def _list_page(name: S3Name, token: str, asked: str) -> Mapping[str, Any]:
    more = {"ContinuationToken": token} if token else {}
    with errors(asked):
        page: Mapping[str, Any] = client().list_objects_v2(Bucket=name.bucket, Prefix=name.key, **more)
    return page


def get_range(name: S3Name, start: int, stop: int, *, etag: str, where: str) -> tuple[bytes, Mapping[str, Any]]:
    """Bytes [start, stop) of an object, fewer at its end, and the answer's head."""

    def once() -> tuple[bytes, Mapping[str, Any]]:
        with errors(where):
            arguments = arguments_of(name, etag)
            try:
                answer = client().get_object(Range=f"bytes={start}-{stop - 1}", **arguments)
            except Exception as error:
                if start or _code(error) not in ("InvalidRange", "416"):
                    raise
                return b"", client().head_object(**arguments)  # it is empty
            try:
                wanted = min(stop, size_of(answer)) - start
                data = read_body(answer["Body"].read, wanted, where)
            finally:
                answer["Body"].close()
        if len(data) != wanted:
            raise Transient(f"{len(data)} of {wanted} bytes arrived")
        return data, answer

    return with_retries(once, where)


def size_of(head: Mapping[str, Any]) -> int:
    """The object's size, also from the head of a ranged answer."""
    match = re.fullmatch(r"bytes \d+-\d+/(\d+)", str(head.get("ContentRange", "")))
    return int(match[1]) if match else int(head["ContentLength"])


def arguments_of(name: S3Name, etag: str) -> dict[str, str]:
    """The arguments of get_object that insist on a version and an ETag."""
    arguments = {"Bucket": name.bucket, "Key": name.key}
    if name.version_id:
        arguments["VersionId"] = name.version_id
    if etag:
        arguments["IfMatch"] = etag
    return arguments


def client() -> Any:
    """A client under the environment as it is now; made once for one environment."""
    return _client_of(
        tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_") or "_proxy" in k.lower()))
    )


@functools.lru_cache(maxsize=1)
def _client_of(environment: tuple[tuple[str, str], ...]) -> Any:
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise NpcError("s3:// needs boto3; install it with: pip install 'dual-policy-plugin[s3]'") from None
    http.quiet_logs()
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},  # `with_retries` does it, bodies included
        connect_timeout=http.CONNECT_TIMEOUT_S,
        read_timeout=http.READ_TIMEOUT_S,
        max_pool_connections=NUM_CONNECTIONS,
    )
    try:
        return boto3.session.Session().client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise NpcError(
            f"S3: the AWS settings do not work ({type(error).__name__}); check AWS_PROFILE, AWS_ENDPOINT_URL and ~/.aws"
        ) from None


@contextmanager
def errors(where: str) -> Iterator[None]:
    """Turns what boto3 raises into a Transient or an NpcError that shows nothing of its text."""
    try:
        yield
    except (NpcError, Transient):
        raise
    except Exception as error:
        from botocore import exceptions as boto

        code, kind = _code(error), type(error).__name__
        status = _answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if isinstance(error, boto.ClientError):
            reason = f"S3 answered {code} (status {status})" if re.fullmatch(r"\w{1,64}", code) else f"status {status}"
            if status >= 500 or status in (408, 409, 425, 429) or code in ("SlowDown", "RequestTimeout", "BadDigest"):
                raise Transient(reason) from None
            if code in _GONE:
                raise NpcNotFoundError(f"{where}: not found, {reason}") from None
            if code in _CHANGED:
                raise DigestError(
                    f"{where}: another object stands there than the one that was found; {reason}"
                ) from None
            if status in (400, 401, 403):
                raise NpcError(f"{where}: no access, {reason}; check the AWS login and its rights") from None
            raise NpcError(f"{where}: {reason}; check AWS_ENDPOINT_URL and the bucket's region") from None
        if "Credential" in kind or "Token" in kind or "SSO" in kind or "Profile" in kind:
            raise NpcError(f"{where}: no access, no AWS login was found ({kind}); log in, or set AWS_PROFILE") from None
        if isinstance(error, boto.HTTPClientError | boto.ConnectionError | OSError):
            raise Transient(f"no network, or S3 cannot be reached ({kind})") from None
        if isinstance(error, boto.FlexibleChecksumError | boto.IncompleteReadError):
            raise Transient(f"bytes arrived damaged ({kind})") from None
        if isinstance(error, boto.BotoCoreError) and "Parser" in kind:
            raise Transient(f"S3's answer arrived damaged ({kind})") from None
        if isinstance(error, boto.BotoCoreError | boto.ClientError):
            raise NpcError(f"{where}: boto3 refuses the request ({kind})") from None
        raise


def _answer(error: Exception) -> Mapping[str, Any]:
    """What S3 answered; a lost connection has a `response` too, that is None."""
    answer = getattr(error, "response", None)
    return answer if isinstance(answer, Mapping) else {}


def _code(error: Exception) -> str:
    return str(_answer(error).get("Error", {}).get("Code", ""))


def time_of(value: object) -> str:
    """A time of S3 in ISO 8601, in UTC; empty where it is none."""
    return value.astimezone(UTC).isoformat(timespec="milliseconds") if isinstance(value, datetime) else ""
