"""Opens W&B's client with its login tried, and so that its service process always answers before it stops waiting.

The client hands each request to a service process (wandb-core). That one tries again for minutes by default, while the
client waits some seconds, says that the service is busy, and cancels. This hides the cause. Worse, a service that is
told to end just while it cancels may never end (wandb 0.31), and a program waits for its service when it exits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dual_policy_plugin.npc.sources.http import quiet_logs

if TYPE_CHECKING:
    import wandb

ATTEMPT_S = 8
"""How long one attempt of a request may take where the user's WANDB_HTTP_TIMEOUT does not say."""
MARGIN_S = 1
"""How much longer the client waits than the service can take."""
_RETRIES, _TIMEOUT = "x_graphql_retry_max", "x_graphql_timeout_seconds"
_SHORTEST_WAIT, _LONGEST_WAIT = "x_graphql_retry_wait_min_seconds", "x_graphql_retry_wait_max_seconds"
_DEFAULTS: dict[str, float] = {_RETRIES: 1, _TIMEOUT: ATTEMPT_S, _SHORTEST_WAIT: 1, _LONGEST_WAIT: 1}
"""Settings of the service, for requests of our own; to the client 0 and None mean its own default."""


def open_client(attempt_s: int = ATTEMPT_S) -> wandb.Api | None:
    """A `wandb.Api` whose login W&B has taken; None where no login is found. Asks nothing at a terminal.

    Of logins only keys are tried here: an identity token is tried with the first request.
    What the user's own WANDB variables say about retries and timeouts stays, and the client waits for as long as that
    can take. Runs that are opened later have the client's own retries.

    Args:
        attempt_s: how long one attempt of a request may take; there are two.

    Raises:
        ImportError: the package is missing.
        Exception: of the client's own; W&B cannot be reached or refuses the login.
    """
    import wandb

    quiet_logs()
    settings = wandb.setup().settings
    before = {key: getattr(settings, key) for key in (*_DEFAULTS, "silent")}
    bounds = {key: before[key] or value for key, value in {**_DEFAULTS, _TIMEOUT: attempt_s}.items()}
    waits_s = bounds[_RETRIES] * max(bounds[_SHORTEST_WAIT], bounds[_LONGEST_WAIT])
    # not silent, login would ask the server for the user's name, and wait 5 s for it whatever the service does
    for key, value in {**bounds, "silent": True}.items():
        setattr(settings, key, value)
    try:
        # without a login Api() would ask at a terminal
        if not settings.identity_token_file and not wandb.login(prompt=False, verify=False):
            return None
        return wandb.Api(timeout=math.ceil((bounds[_RETRIES] + 1) * bounds[_TIMEOUT] + waits_s) + MARGIN_S)
    finally:
        for key, value in before.items():
            setattr(settings, key, value)
