"""A mirror under a prefix of S3 (`places.py` says what a place is): conditional writes, and retries within bounds."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from dual_policy_plugin.errors import DigestError, NpcError, NpcNotFoundError, RunError, StorageError
from dual_policy_plugin.heartbeat import beat
from dual_policy_plugin.mirror.places import CONFLICTS, MAX_PUT_BYTES, Found, Guard
from dual_policy_plugin.npc.sources import s3_client
from dual_policy_plugin.npc.sources.http import RETRIES, Transient, read_body

T = TypeVar("T")


@dataclass(kw_only=True, slots=True, frozen=True)
class S3Place:
    """Objects under s3://<bucket>/<prefix>, through boto3 with the user's own configuration of it."""

    bucket: str
    prefix: str
    _versions: dict[str, str | None] = field(default_factory=dict)
    """What stands there, as far as our own writes tell; None: nothing."""

    @property
    def where(self) -> str:
        """The prefix as a URI."""
        return f"s3://{self.bucket}/{self.prefix}"

    def get(self, name: str) -> Found | None:
        """See Place."""

        def once() -> Found | None:
            client = s3_client.client()
            try:
                answer = client.get_object(Bucket=self.bucket, Key=self.prefix + name)
            except client.exceptions.NoSuchKey:
                return None
            size = int(answer["ContentLength"])
            try:
                data = read_body(answer["Body"].read, size, f"{self.where}{name}")
            finally:
                answer["Body"].close()
            if len(data) != size:
                raise Transient(f"{len(data)} of {size} bytes arrived")
            return Found(data=data, version=str(answer["ETag"]), age_s=_age_s(answer))

        return self._try(name, "read", once)

    def has(self, name: str) -> bool:
        """See Place."""
        try:
            self._try(name, "looked for", lambda: self._head(name))
        except NpcNotFoundError:
            return False
        return True

    def put(self, name: str, data: bytes, guard: Guard) -> bool:
        """See Place."""
        if name not in self._versions:
            self._versions[name] = self._version(name)
        before = self._versions[name]
        for _ in range(CONFLICTS):
            version = self._put(name, data, self._versions[name], guard.check)
            if version is not None:
                self._versions[name] = version
                return version != before
            guard.confirm()  # else it is our own write, whose answer was lost, or a late one of an earlier owner
            self._versions[name] = self._version(name)
        raise StorageError(f"{self.where}{name} could not be written: others write it; end them, or use another run=")

    def swap(self, name: str, data: bytes, version: str | None) -> str | None:
        """See Place."""
        return self._put(name, data, version)

    def delete(self, name: str) -> None:
        """See Place."""
        self._versions.pop(name, None)
        arguments = {"Bucket": self.bucket, "Key": self.prefix + name}
        self._try(name, "removed", lambda: s3_client.client().delete_object(**arguments))

    def clean_up(self) -> None:
        """See Place. S3 keeps no half of an object that came in one request."""

    def _head(self, name: str) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = s3_client.client().head_object(Bucket=self.bucket, Key=self.prefix + name)
        return answer

    def _version(self, name: str) -> str | None:
        try:
            return str(self._try(name, "looked for", lambda: self._head(name))["ETag"])
        except NpcNotFoundError:
            return None

    def _put(self, name: str, data: bytes, version: str | None, check: Callable[[], None] = lambda: None) -> str | None:
        """Writes an object in the place of `version` and gives its new one; None where another one stands there."""
        if len(data) > MAX_PUT_BYTES:
            raise RunError(
                f"{self.where}{name} could not be written: {len(data)} bytes are more than the {MAX_PUT_BYTES} that S3 "
                "takes in one request; use a folder for trainer.sync_uri"
            )
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}

        def once() -> str:
            client = s3_client.client()
            answer = client.put_object(Bucket=self.bucket, Key=self.prefix + name, Body=_Body(data), **condition)
            return str(answer["ETag"])

        try:
            return self._try(name, "written", once, check)
        except DigestError:
            return None
        except NpcNotFoundError as error:
            if version is not None and "NoSuchBucket" not in str(error):
                return None  # what was to be replaced is gone
            raise RunError(str(error)) from None

    def _try(self, name: str, what: str, once: Callable[[], T], check: Callable[[], None] = lambda: None) -> T:
        """What `once` returns at the first attempt that does not fail in a way that may pass.

        Args:
            name: the object.
            what: is done to it, for messages.
            once: one request.
            check: before each attempt; raises where there is to be none.

        Raises:
            StorageError: every attempt failed.
            NpcNotFoundError, DigestError: for the caller to judge.
            RunError: S3 refuses.
        """
        failed, reason = f"{self.where}{name} could not be {what}", ""
        for attempt in range(RETRIES.attempts):
            if attempt:
                time.sleep(RETRIES.wait_s(attempt - 1))
            check()
            try:
                with s3_client.errors(failed):
                    return once()
            except Transient as error:
                reason = str(error)
            except (NpcNotFoundError, DigestError) as error:
                if "NoSuchBucket" in str(error):
                    raise RunError(f"{failed}: there is no bucket {self.bucket}; mend trainer.sync_uri") from None
                raise
            except NpcError as error:
                raise RunError(str(error)) from None
        raise StorageError(f"{failed}: {reason}; gave up after {RETRIES.attempts} attempts")


class _Body(io.BytesIO):
    """Bytes on their way: a sign of life with each part that has gone."""

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes."""
        beat()
        return super().read(size)


def _age_s(answer: Mapping[str, Any]) -> float:
    """Seconds between an object's last write and now, both as S3's own clock has them."""
    date = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    written = answer.get("LastModified")
    if date is None or not isinstance(written, datetime):
        return 0.0
    return max(0.0, (parsedate_to_datetime(date) - written).total_seconds())
