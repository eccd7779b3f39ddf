"""The loopback services as fixtures."""

from tests.services.fixtures import s3_server, wandb_server  # noqa: F401
