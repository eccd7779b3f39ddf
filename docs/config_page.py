# ruff: noqa: E501  (a row of a Markdown table is one line)
"""The page `configuration.md`: every key with type, default, meaning and range, from the config's dataclasses.

Takes the source of the dataclasses (fields, the docstrings under them, the ranges that `__post_init__` checks), the
YAML presets with their comments, and the one table of older spellings. A field without a docstring is an error.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from docs.messages import escaped
from dual_policy_plugin.config import (
    AgentConfig,
    Config,
    DualPolicyConfig,
    EnvConfig,
    EvalsConfig,
    PolicySource,
    TrainerConfig,
    WandbConfig,
)
from dual_policy_plugin.curriculum.config import CurriculumConfig
from dual_policy_plugin.envs.arena_config import ArenaConfig
from dual_policy_plugin.envs.mettagrid import MettagridConfig
from dual_policy_plugin.hydra_app.dual_policy_node import OLDER_SPELLINGS
from dual_policy_plugin.launch.sky_settings import SkyLauncherConfig
from dual_policy_plugin.pool_config import MatchmakingConfig, SelfPlayConfig, ShareSchedule

HEAD = """# Configuration

Generated from the source by `make docs-reference`. Any key is set on the command line (`trainer.horizon=64`), in a
[file of yours](quick_start.md#a-file-of-your-own) (`+user=mine`), or swept (`-m seed=1,2,3`); a wrong one is answered
with the nearest right one. `null` leaves a default. `dual-policy train --cfg job` prints what a command means, and a
run writes it to its `config.yaml`.
"""
DUAL_POLICY_HEAD = """`+dual_policy=checkpoint` and `+dual_policy=self_play` switch this node on; in another Hydra app they put it there.
Every value is null until you say something, so that the program can tell what you said from what is a default. A setting
without `enabled` is an error, not a guess. Older names work and are warned about once: {older}. `npc_type` (`checkpoint`
or `scripted`) is an older key too: what the URI names says it.
"""
VARIABLES = """## Variables of the environment

| variable | meaning |
|---|---|
| `LOG_LEVEL` | `DEBUG`, `INFO` (default), `WARNING`, `ERROR`; `DEBUG` also shows the traceback of an error |
| `HYDRA_FULL_ERROR` | `1`: the traceback of an error |
| `METTA_HOURLY_COST` | dollars per hour of this machine, for the cost metrics |
| `DUAL_POLICY_CACHE`, `DUAL_POLICY_CACHE_GB` | where fetched policies are kept (`~/.cache/dual-policy`), and how much (20) |
| `DUAL_POLICY_NPC_URI` | the recipes' NPC where none is named |
| `DUAL_POLICY_HEARTBEAT` | a file that a run touches; `dual-policy watch` sets it |
| `DUAL_POLICY_VENV` | on a SkyPilot node: an environment that is installed already ([skypilot.md](skypilot.md)) |
| `DUAL_POLICY_COMMIT` | on a launched node: the commit that the log names |
| `WANDB_API_KEY`, `WANDB_BASE_URL`, `WANDB_MODE`, `WANDB_PROJECT`, `WANDB_ENTITY` | as W&B reads them |
| `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, `AWS_REGION`, `AWS_ENDPOINT_URL` | as boto3 reads them |
| `CUDA_VISIBLE_DEVICES` | which GPUs there are; empty: none |
| `OMP_NUM_THREADS`, `OMP_WAIT_POLICY` | threads of what torch calls, and how they wait; `trainer.threads` sets torch's own |
| `NO_COLOR`, `COLUMNS` | no colours; how wide a help or a table may be |
| `MASTER_ADDR`, `MASTER_PORT`, `RANK`, `WORLD_SIZE`, `LOCAL_RANK` | several ranks, as `torchrun` sets them ([distributed.md](distributed.md)) |
| `GIT_TOKEN`, `GIT_SSH_KEY_PATH` | for nodes that fetch a private remote ([launch.md](launch.md)) |
"""


@dataclass(frozen=True)
class Section:
    """One table: the fields of one dataclass under one key."""

    title: str
    key: str
    """What stands before each name; empty: the top."""
    cls: type
    text: str = ""
    without: tuple[str, ...] = ()
    """Fields that have a section of their own, or are set elsewhere."""
    renamed: tuple[tuple[str, str], ...] = ()
    unset: bool = False
    """Whether the node says null and the default is filled in later."""


SECTIONS = (
    Section("The run", "", Config, without=("trainer", "agent", "env", "evals", "wandb")),
    Section("The trainer", "trainer.", TrainerConfig, without=("initial_policy", "dual_policy")),
    Section(
        "Who plays against the learner", "trainer.dual_policy.", DualPolicyConfig, DUAL_POLICY_HEAD,
        without=("self_play", "pct_schedule"), renamed=(("npc", "checkpoint_npc"),), unset=True,
    ),
    Section(
        "A policy by its URI", "trainer.dual_policy.checkpoint_npc.", PolicySource,
        "The same keys for each entry of `trainer.dual_policy.pool`, and for `trainer.initial_policy` (but `act` and "
        "`weight`). [npcs.md](npcs.md) has URIs and selectors.\n", unset=True,
    ),
    Section(
        "Matchmaking", "trainer.dual_policy.matchmaking_args.", MatchmakingConfig,
        "What `trainer.dual_policy.matchmaking` reads. A setting that the chosen one does not read is an error.\n",
        without=("type",), unset=True,
    ),
    Section("Self-play", "trainer.dual_policy.self_play.", SelfPlayConfig, unset=True),
    Section("A share that changes", "trainer.dual_policy.pct_schedule.", ShareSchedule, unset=True),
    Section("The net", "agent.", AgentConfig, "`agent=fast` or `agent=mlp`; [own_architecture.md](own_architecture.md)"
            " for one of yours. Arguments of the net stand beside the name: `agent.hidden_size` (128) of both.\n"),
    Section("The env", "env.", EnvConfig, "`env=arena`, `env=mettagrid`, `env=pettingzoo`; [own_env.md](own_env.md) "
            "for one of yours. The env's own settings stand beside the name.\n"),
    Section("The arena", "env.", ArenaConfig, "Of `env=arena`.\n", unset=True),
    Section("MettaGrid", "env.", MettagridConfig, "Of `env=mettagrid`.\n", unset=True),
    Section("Evaluation", "evals.", EvalsConfig),
    Section("Weights & Biases", "wandb.", WandbConfig, "`wandb=off`, `wandb=online`, `wandb=offline`.\n"),
    Section("Curriculum sweeps", "hydra.sweeper.", CurriculumConfig,
            "Of `hydra/sweeper=dual_policy_curriculum` and `+sweep=...`; [curriculum.md](curriculum.md).\n"),
    Section("SkyPilot sweeps", "hydra.launcher.", SkyLauncherConfig,
            "Of `hydra/launcher=skypilot`; [skypilot.md](skypilot.md).\n"),
)  # fmt: skip
PRESETS = (
    ("PettingZoo", "env.", "env/pettingzoo.yaml", "Of `env=pettingzoo`."),
    ("Slurm", "hydra.launcher.", "hydra/launcher/dual_policy_slurm.yaml",
     "Of `hydra/launcher=dual_policy_slurm`; every other key is submitit's. `dual_policy_slurm_gpu` has a process for each GPU."
     " [slurm.md](slurm.md)."),
)  # fmt: skip


def config_page(root: Path) -> str:
    """The page's text; `root` is the checkout."""
    parts = [HEAD]
    for section in SECTIONS:
        parts.append(_section(section))
        if section.title == "MettaGrid":
            parts.append(_preset(*PRESETS[0], root / "configs"))
    parts += [_preset(*PRESETS[1], root / "configs"), VARIABLES]
    return "\n".join(parts)


def _section(section: Section) -> str:
    source = ast.parse(inspect.getsource(section.cls)).body[0]
    assert isinstance(source, ast.ClassDef)
    texts, types, ranges = _docstrings(source), _types(source), dict(_ranges(source))
    older = ", ".join(f"`{old}` for `{new}`" for new, olds in OLDER_SPELLINGS.items() for old in olds)
    rows = []
    for field in fields(section.cls):
        if field.name in section.without:
            continue
        if field.name not in texts:
            raise SystemExit(f"docs/config_page.py: {section.cls.__name__}.{field.name} has no docstring under it")
        key = dict(section.renamed).get(field.name, field.name)
        rows.append(_row(key, types[field.name], _default(field), texts[field.name], ranges.get(field.name)))
    text = section.text.format(older=older) + "\n" if section.text else ""
    return f"## {section.title}\n\n{text}{_prefix(section.key)}" + _table(rows)


def _preset(title: str, key: str, file: str, text: str, configs: Path) -> str:
    """A table of a YAML file's own keys with the comments behind them."""
    rows = []
    for name, value, comment in re.findall(
        r"^(\w+): ?([^#\n]*?) *(?:# (.*))?$", (configs / file).read_text("utf-8"), re.M
    ):
        if name not in ("defaults", "name", "num_envs") and value:
            rows.append(f"| `{name}` | `{value}` | {escaped(comment)} |")
    return f"## {title}\n\n{text}\n\n{_prefix(key)}" + _table(rows)


def _prefix(key: str) -> str:
    """What is said above a table whose keys stand under another one."""
    return f"Under `{key.rstrip('.')}`:\n\n" if key else ""


def _table(rows: list[str]) -> str:
    return "| key | type and default | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _row(key: str, kind: str, default: str, text: str, bounds: tuple[str, str] | None) -> str:
    kind = kind.replace(" | None", "").replace("PolicySource", "node").replace("MatchmakingConfig", "str")
    kind = {"dict[str, Any]": "node", "Path": "path", "Path | dict[str, Any]": "path or node"}.get(kind, kind)
    kind = (
        kind.replace("str", "text")
        .replace("bool", "true or false")
        .replace("float", "number")
        .replace("int", "whole number")
    )
    said = f" From {bounds[0]} to {bounds[1]}." if bounds else ""
    return f"| `{key}` | {escaped(kind)}<br>`{default}` | {escaped(_for_readers(text))}{said} |"


def _for_readers(text: str) -> str:
    """A field's docstring as a user of the config reads it: null for None, no mark of a design decision."""
    return re.sub(r" \(D\d+\)", "", text.replace("None:", "null:"))


def _default(field: Any) -> str:
    if field.default is MISSING and field.default_factory is MISSING:
        return "required"
    value = field.default if field.default is not MISSING else field.default_factory()
    if is_dataclass(value):
        return "uniform" if hasattr(value, "latest_share") else "see below"
    plain = {None: "null", True: "true", False: "false"}
    return plain[value] if value is None or isinstance(value, bool) else str(value).replace("'", "")


def _docstrings(cls: ast.ClassDef) -> dict[str, str]:
    """The text under each field."""
    found = {}
    for before, after in zip(cls.body, cls.body[1:], strict=False):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and is_text:
            found[before.target.id] = " ".join(ast.literal_eval(after.value).split())
    return found


def _types(cls: ast.ClassDef) -> dict[str, str]:
    annotated = [node for node in cls.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return {node.target.id: ast.unparse(node.annotation) for node in annotated if isinstance(node.target, ast.Name)}


def _ranges(cls: ast.ClassDef) -> Iterator[tuple[str, tuple[str, str]]]:
    """(field, (low, high)) of what `__post_init__` checks: `check_range` calls, and tables of (name, low, high)."""
    check = next(
        (node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"), None
    )
    for node in ast.walk(check) if check else ():
        if isinstance(node, ast.Tuple) and len(node.elts) == 3 and isinstance(node.elts[0], ast.Constant):
            name, low, high = node.elts
            is_row = isinstance(name, ast.Constant) and isinstance(name.value, str)
            if is_row and not (isinstance(low, ast.Constant) and isinstance(low.value, str)):
                yield name.value, (_number(low), _number(high))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "check_range":
            _, value, low, high = node.args
            if isinstance(value, ast.Attribute) and not isinstance(low, ast.Name):
                yield value.attr, (_number(low), _number(high))


def _number(node: ast.expr) -> str:
    """A bound as it is written for a reader: 2147483647, 1e-9, 10^15."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return f"{_number(node.left)}^{_number(node.right)}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
        return f"{_number(node.left)} - {_number(node.right)}"
    assert isinstance(node, ast.Constant)
    whole = int(node.value)
    return f"{whole:,}" if whole == node.value else str(node.value)
