"""A process that has imported everything once and forks ranks: jobs of several processes in a second, not in five.

Started by `conftest.py`. Reads one JSON request a line, {program, world, args, cwd}; answers when all ranks have ended:
for each its exit code (negative: the signal), its output, its stderr and the second in which it ended.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import _dynamo  # noqa: F401

import dual_policy_plugin.train  # noqa: F401
from tests.ranks import programs


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def run_rank(request: dict[str, Any], rank: int, port: int) -> int:
    """A rank: its exit code, with what it says in files of the folder."""
    from dual_policy_plugin.errors import DualPolicyError

    folder, world = Path(request["cwd"]), request["world"]
    for name, target in (("out", 1), ("err", 2)):
        descriptor = os.open(folder / f"rank{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, target)
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | request.get("env", {})
    try:
        getattr(programs, request["program"])(**request["args"])
    except DualPolicyError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as leaving:
        return int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run(request: dict[str, Any]) -> list[dict[str, Any]]:
    port, begun, folder = free_port(), time.monotonic(), Path(request["cwd"])
    ranks: dict[int, int] = {}
    for rank in range(request["world"]):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = run_rank(request, rank, port)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        ranks[child] = rank
    ended: dict[int, dict[str, Any]] = {}
    children = dict(ranks)
    while ranks:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            if time.monotonic() - begun > request["limit_s"]:
                for one in ranks:
                    os.kill(one, 9)
            time.sleep(0.01)
            continue
        rank = ranks.pop(child)
        ended[rank] = {"code": os.waitstatus_to_exitcode(status), "at_s": time.monotonic() - begun}
    for rank, facts in ended.items():
        facts |= {name: (folder / f"rank{rank}.{name}").read_text() for name in ("out", "err")}
    assert len(ended) == len(children)
    return [ended[rank] for rank in sorted(ended)]


def main() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
