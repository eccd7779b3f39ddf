"""Our Hydra app as a command line speaks of it: where its configs stand, and how a word of it is written and read.

Knows the grammar of overrides and nothing of what they come to; `hydra_app/composition.py` does.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException

_PACKAGE = Path(__file__).resolve().parent.parent
# In a wheel the configs travel inside the package; in a checkout they stand beside it.
CONFIG_DIR = _PACKAGE / "app_configs" if (_PACKAGE / "app_configs").is_dir() else _PACKAGE.parent / "configs"
PRIMARY_CONFIG = "train"
SEAT_KEYS = ("training_agents_pct", "policy_a_percentage", "assignment")
"""Of trainer.dual_policy: which seats are whose, whoever plays there."""


def quote_override(key: str, value: str) -> str:
    """`key=value` for a shell, with the inner quotes that let Hydra read any character in `value`."""
    return shlex.quote(text_override(key, value))


def text_override(key: str, value: str) -> str:
    """`key=value` as Hydra reads it, for a text with any characters."""
    text = re.sub(r'(\\*)"', r'\1\1\\"', value)  # Hydra: \" is a quote; a backslash counts before one only
    text = re.sub(r"(\\+)$", r"\1\1", text)
    return f'{key}="{text}"'


def search_path(folder: Path) -> str:
    """The override that lets configs be found in `folder` too."""
    text = re.sub(r'(\\*)"', r'\1\1\\"', f"file://{folder}")
    return f'hydra.searchpath=["{text}"]'


def keep_run_names(overrides: Sequence[str]) -> list[str]:
    """The overrides with a run's name as it was typed: Hydra reads run=2025_11_21 as the number 20251121."""
    numeric = re.compile(r"(\+{0,2}run)=([+-]?\d[\d_.eE+-]*)")
    return [numeric.sub(r"\1='\2'", word) if numeric.fullmatch(word) else word for word in overrides]


def with_seats(overrides: Sequence[str]) -> list[str]:
    """The overrides of a command that is told who plays, but for the seats: the config's own NPC is switched off.

    Whoever says more of trainer.dual_policy than the seats is asked by the config what is meant.
    """
    keys = [word.partition("=")[0].lstrip("+") for word in overrides]
    said = {key.rpartition(".")[2] for key in keys if key.startswith("trainer.dual_policy.")}
    is_seats_alone = said and said <= set(SEAT_KEYS) and "dual_policy" not in keys
    return [*overrides, "trainer.dual_policy.enabled=false"] if is_seats_alone else list(overrides)


def count_jobs(overrides: Sequence[str]) -> int:
    """How many jobs a sweep over these values has; 1 where only Hydra can tell, or will say what is wrong with them."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException:
        return 1
    listed = [one for one in parsed if one.is_discrete_sweep() and not isinstance(one.value(), Glob)]
    return math.prod(sum(1 for _ in one.sweep_iterator()) for one in listed)
