"""A loopback stand-in for S3: moto's server over HTTP, behind a proxy that records requests and lets faults through.

    with S3Server() as server:
        server.client().create_bucket(Bucket="policies")
        server.faults.add("GET /policies/a.safetensors", "truncate")

moto keeps multipart uploads, ranges, versions, If-None-Match, If-Match and presigned URLs as S3 does. It checks neither
signatures nor checksums: that bytes are right is for our own digests to show. Its state is one per process, so only one
S3Server may be open at a time.
"""

from __future__ import annotations

import http.client
import logging
import threading
from typing import Any

from tests.services.faults import Faults
from tests.services.faulty_http import Exchange, FaultyHttpServer, Request, Response

HOP_BY_HOP = {"connection", "content-length", "expect", "keep-alive", "transfer-encoding"}


class S3Server:
    """S3 on a free port of 127.0.0.1 (`url` is the proxy); empty at the start."""

    def __init__(self, faults: Faults | None = None) -> None:
        from moto.core import DEFAULT_ACCOUNT_ID
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from moto.s3.models import s3_backends
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request, whatever `verbose` says
        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].reset()
        # moto's ThreadedMotoServer, with a poll that does not take half a second to stop.
        application = DomainDispatcherApplication(create_backend_app)
        self._moto = make_server("127.0.0.1", 0, application, threaded=True)
        self._thread = threading.Thread(target=self._moto.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self._http = FaultyHttpServer(self._forward, faults)
        self.faults = self._http.faults
        self.url = self._http.url

    def __enter__(self) -> S3Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop both servers; an error inside them fails the test here."""
        self._http.close()
        self._moto.shutdown()
        self._thread.join()
        self._moto.server_close()
        if self._http.errors:
            raise self._http.errors[0]

    @property
    def env(self) -> dict[str, str]:
        """The environment of an S3 client: this server alone, keys of nobody, no instance metadata, few retries."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "AKIALOOPBACKEXAMPLE0",
            "AWS_SECRET_ACCESS_KEY": "loopback/secret/access/key/of/nobody/000",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "3",
            "AWS_RETRY_MODE": "standard",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "HTTP_PROXY": self.url,
            "HTTPS_PROXY": self.url,
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def client(self, **config: Any) -> Any:
        """A boto3 client of this server, whatever the process's environment; `config` goes to botocore's Config."""
        import boto3
        from botocore.config import Config

        env = self.env
        session = boto3.session.Session(
            aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
            region_name=env["AWS_DEFAULT_REGION"],
        )
        config.setdefault("retries", {"mode": "standard", "total_max_attempts": 3})
        config.setdefault("read_timeout", 5)
        return session.client("s3", endpoint_url=self.url, config=Config(proxies={}, **config))

    @property
    def exchanges(self) -> list[Exchange]:
        """All requests so far."""
        return self._http.exchanges

    @property
    def foreign_hosts(self) -> list[str]:
        """Every host other than this one that a client under `env` tried to reach."""
        return self._http.foreign_hosts

    def count(self, match: str) -> int:
        """How many requests had `match` in `METHOD /path?query`."""
        return sum(match in f"{exchange.method} {exchange.target}" for exchange in self.exchanges)

    @property
    def num_bytes_sent(self) -> int:
        """All body bytes that went to clients."""
        return sum(exchange.num_bytes_sent for exchange in self.exchanges)

    def _forward(self, request: Request) -> Response:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
        upstream = http.client.HTTPConnection("127.0.0.1", self._moto.port, timeout=30)
        try:
            upstream.request(request.method, request.target, body=request.body, headers=headers)
            answer = upstream.getresponse()
            body = answer.read()
        finally:
            upstream.close()
        kept = {
            name: value for name, value in answer.getheaders() if name.lower() not in HOP_BY_HOP | {"server", "date"}
        }
        if request.method == "HEAD":
            kept["Content-Length"] = answer.getheader("Content-Length") or "0"
        return Response(status=answer.status, body=body, headers=kept)
