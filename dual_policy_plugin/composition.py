"""Our Hydra app: where its configs stand, how they compose, and one line with the mend where they do not.

Stands between the command line (`cli.py`) and `load_config`. Hydra's own messages name the grammar rule that failed or
the file it did not find; ours name what to type instead.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from traceback import walk_tb
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dual_policy_plugin.config import Config
from dual_policy_plugin.config_loading import known_keys, load_config
from dual_policy_plugin.config_nodes import nearest_key
from dual_policy_plugin.errors import ConfigError, DualPolicyError, RunError
from dual_policy_plugin.interpolation import config_text, hide_variables, keep_requested

_PACKAGE = Path(__file__).resolve().parent
# In a wheel the configs travel inside the package; in a checkout they stand beside it.
CONFIG_DIR = _PACKAGE / "app_configs" if (_PACKAGE / "app_configs").is_dir() else _PACKAGE.parent / "configs"
PRIMARY_CONFIG = "train"


def compose_config(
    overrides: list[str], *, folder: Path = CONFIG_DIR, primary: str = PRIMARY_CONFIG
) -> tuple[Config, str]:
    """The `Config` of our app with `overrides`, and the composed config as YAML, without running anything.

    Args:
        overrides: as on the command line, without Hydra's flags.
        folder: where the primary config stands; our own configs are found from there too.
        primary: its name.

    Raises:
        ConfigError: the overrides do not compose, or the result is not possible.
    """
    cfg = keep_requested(_compose(overrides, folder, primary))
    try:
        return load_config(cfg), config_text(cfg)
    except ConfigError as error:
        hide_variables(error, cfg)
        raise


def compose_hydra_node(overrides: list[str], name: str) -> dict[str, Any]:
    """A node of Hydra's own config, for example `launcher`, as our app composes it with `overrides`.

    Raises:
        ConfigError: the overrides do not compose.
    """
    cfg = _compose(overrides, CONFIG_DIR, PRIMARY_CONFIG, with_hydra=True)
    plain: Any = OmegaConf.to_container(cfg["hydra"][name], resolve=True)
    return dict(plain)


def _compose(overrides: list[str], folder: Path, primary: str, *, with_hydra: bool = False) -> DictConfig:
    search = [] if folder == CONFIG_DIR else [search_path(CONFIG_DIR)]
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            cfg = compose(primary, [*search, *overrides], return_hydra_config=with_hydra)
            _refuse_masked(primary, search, overrides)
            return cfg
    except DualPolicyError:
        raise
    except Exception as error:
        line = mend(error, overrides)
        if line is None:
            raise
        raise line from error


def keep_run_names(overrides: Sequence[str]) -> list[str]:
    """The overrides with a run's name as it was typed: Hydra reads run=2025_11_21 as the number 20251121."""
    numeric = re.compile(r"(\+{0,2}run)=([+-]?\d[\d_.eE+-]*)")
    return [numeric.sub(r"\1='\2'", word) if numeric.fullmatch(word) else word for word in overrides]


def count_jobs(overrides: Sequence[str]) -> int:
    """How many jobs a sweep over these values has; 1 where only Hydra can tell, or will say what is wrong with them."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException:
        return 1
    listed = [one for one in parsed if one.is_discrete_sweep() and not isinstance(one.value(), Glob)]
    return math.prod(sum(1 for _ in one.sweep_iterator()) for one in listed)


def search_path(folder: Path) -> str:
    """The override that lets configs be found in `folder` too."""
    text = re.sub(r'(\\*)"', r'\1\1\\"', f"file://{folder}")
    return f'hydra.searchpath=["{text}"]'


def mend(error: Exception, overrides: list[str]) -> DualPolicyError | None:
    """The one-line error for an exception that Hydra raised outside of a job; None where it is no mistake of a user.

    Args:
        error: what came out of Hydra.
        overrides: the words of the command line, without Hydra's flags.
    """
    if isinstance(error, OverrideParseException):
        return ConfigError(_mend_override(str(error.override)))
    if type(error).__module__.startswith("yaml."):
        return ConfigError(f"{_config_file(error)} is no valid YAML: {_one_line(str(error))}")
    if any(frame.f_globals.get("__name__") == "optuna.storages" for frame, _ in walk_tb(error.__traceback__)):
        return ConfigError(
            f"hydra.sweeper.storage cannot be used ({type(error).__name__}): Optuna 2 needs SQLAlchemy below 2 for it; "
            "leave it null, with hydra.sweeper.sampler.seed the same command repeats the study"
        )
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        where = f"{error.filename}: " if error.filename else ""
        return RunError(f"{where}{error.strerror}; choose another run=, train_dir= or hydra.run.dir=")
    if not isinstance(error, HydraException | OmegaConfBaseException | ValueError):
        return None
    text = _text_of(error)
    for pattern, describe in _MENDS:
        match = re.search(pattern, text)
        if match:
            return ConfigError(_one_line(describe(match, overrides, error)))
    return ConfigError(_one_line(text))


def refuse_masked_choices() -> None:
    """Makes sure that each group choice of the command line (agent=mlp) is still in force in the running job.

    A `+user=` file that lists `/agent/fast` is composed later and would replace the choice without a word.

    Raises:
        ConfigError: a choice is masked; names the file that does it and both mends.
    """
    if not GlobalHydra.instance().is_initialized():
        return
    hydra = HydraConfig.get()
    words: Any = OmegaConf.to_container(hydra.overrides, resolve=False)  # as typed, not with what a variable holds
    _refuse_masked(hydra.job.config_name or PRIMARY_CONFIG, words["hydra"], words["task"])


def _refuse_masked(config_name: str, hydra_words: list[str], words: list[str]) -> None:
    loader = GlobalHydra.instance().config_loader()
    parsed = OverridesParser.create().parse_overrides(words)
    choices = [override for override in parsed if loader.get_group_options(override.key_or_group)]
    if len(choices) < 2:  # one to be masked, one that brings the file that does it
        return
    entries = loader.compute_defaults_list(config_name, [*hydra_words, *words], RunMode.MULTIRUN).defaults
    for override in choices:
        group, choice = override.key_or_group, override.value()
        path = f"{group}/{choice}"
        positions = [i for i, entry in enumerate(entries) if entry.config_path == path and not entry.is_self]
        if not positions:
            continue
        package = entries[positions[-1]].package or ""
        for entry in entries[positions[-1] + 1 :]:
            is_listed = entry.parent not in (None, config_name) and not entry.is_self
            covers = f"{package}.".startswith(f"{entry.package}.")  # never the whole config (package "")
            if is_listed and covers and entry.config_path != path:
                raise ConfigError(_masked(override.input_line or path, group, str(entry.config_path), entry.parent))


def _masked(word: str, group: str, other: str, parent: str | None) -> str:
    line = f"{word} is masked by `/{other}` in the defaults of {parent}.yaml"
    if word.startswith("+"):
        return f"{line}; remove that line there, or put {word} behind the word that adds that file"
    return f"{line}; write `override /{group}: {Path(other).name}` there, or leave {word} away"


def quote_override(key: str, value: str) -> str:
    """`key=value` for a shell, with the inner quotes that let Hydra read any character in `value`."""
    return shlex.quote(text_override(key, value))


def text_override(key: str, value: str) -> str:
    """`key=value` as Hydra reads it, for a text with any characters."""
    text = re.sub(r'(\\*)"', r'\1\1\\"', value)  # Hydra: \" is a quote; a backslash counts before one only
    text = re.sub(r"(\\+)$", r"\1\1", text)
    return f'{key}="{text}"'


def _mend_override(word: str) -> str:
    key, equals, value = word.partition("=")
    if not equals or not re.fullmatch(r"[+~]*[\w./@:$-]+", key):
        near = nearest_key(word.partition("=")[0].lstrip("+~"), known_keys())
        hint = f"for example {near}=..." if near else "for example trainer.horizon=32"
        return f"{word!r} cannot be read; an override is key=value, {hint}"
    if value[:1] == value[-1:] and value[:1] in "'\"" and len(value) > 1:
        return f"{word} cannot be read; a quote inside the quoted value needs a backslash before it"
    if value.startswith("~/"):
        value = os.path.expanduser(value)
    return f"{word} cannot be read, the value has a special character; write {quote_override(key, value)}"


def _text_of(error: BaseException) -> str:
    text = str(error).strip()
    return text or (_text_of(error.__cause__) if error.__cause__ is not None else type(error).__name__)


def _one_line(text: str) -> str:
    """Hydra's text without its search path, links and line breaks."""
    text = re.split(r"\n\s*(?:Config search path|See https)", text)[0]
    lines = [line.strip() for line in text.splitlines() if line.strip() and "object_type=" not in line]
    return "; ".join(line.rstrip(".:;") if i + 1 < len(lines) else line for i, line in enumerate(lines))


def _config_file(error: BaseException) -> str:
    """The config that Hydra was reading when `error` arose; Hydra's messages do not say."""
    found, frame = "a config file", error.__traceback__
    while frame is not None:
        path = frame.tb_frame.f_locals.get("config_path")
        if isinstance(path, str) and frame.tb_frame.f_code.co_name == "load_config":
            found = f"{path.removesuffix('.yaml')}.yaml"
        frame = frame.tb_next
    return found


Describe = Callable[["re.Match[str]", list[str], Exception], str]


def _sweep(match: re.Match[str], overrides: list[str], error: Exception) -> str:
    key, _, value = match[1].partition("=")
    return f"{match[1]} has a comma; to run one job for each value add -m, else write {quote_override(key, value)}"


def _not_in_struct(match: re.Match[str], overrides: list[str], error: Exception) -> str:
    key = match[1]
    of_hydra = key.startswith("hydra.")
    near = nearest_key(key, sorted(_composed_keys(with_hydra=of_hydra) | set([] if of_hydra else known_keys())))
    hint = f"did you mean {near}?" if near else f"`--cfg {'hydra' if of_hydra else 'job'}` lists all keys"
    if key.startswith(("env.", "agent.")) and key.count(".") == 1:
        hint += f" (a setting that the config does not list is added with a plus: +{key}=...)"
    return f"{key} is not a known key; {hint}"


def _no_sweeper_key(match: re.Match[str], overrides: list[str], error: Exception) -> str:
    key, name = match[1], match[2]
    names = list(ConfigStore.instance().load("hydra/sweeper/dual_policy_curriculum.yaml").node)
    if name == "dry_run":
        return (
            "--dry-run shows the stages of a curriculum, and none is chosen; add +sweep=curriculum_builtin, or "
            "hydra/sweeper=dual_policy_curriculum with hydra.sweeper.ladder=[...]"
        )
    if name in names:
        return f"{key} is a key of curriculum sweeps; add hydra/sweeper=dual_policy_curriculum, or a +sweep= config"
    near = nearest_key(f"hydra.sweeper.{name}", [f"hydra.sweeper.{one}" for one in names])
    return f"{key} is not a known key" + (f"; did you mean {near}?" if near else f"; curricula have {', '.join(names)}")


def _composed_keys(*, with_hydra: bool = False) -> set[str]:
    """The keys of the primary config as it stands, envs' and nets' settings included."""
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        plain = OmegaConf.to_container(compose(PRIMARY_CONFIG, return_hydra_config=with_hydra))
    keys: set[str] = set()

    def walk(node: object, prefix: str) -> None:
        if isinstance(node, dict):
            for name, value in node.items():
                keys.add(f"{prefix}{name}")
                walk(value, f"{prefix}{name}.")

    walk(plain, "")
    return keys


def _no_such_config(match: re.Match[str], overrides: list[str], error: Exception) -> str:
    parent, missing = match[1] or "", match[2]
    where = f"{parent}.yaml: " if "/" in parent else ""
    folder = parent.rpartition("/")[0]
    if folder not in ("", "hydra") and missing.startswith(f"{folder}/"):
        name = missing.removeprefix(f"{folder}/")
        return (
            f"{where}the defaults list names {name} beside itself, where there is none; begin with a slash: `- /{name}`"
        )
    options = re.findall(r"\n\t(\S+)", _text_of(error).partition("Config search path")[0])
    near = difflib.get_close_matches(missing.rpartition("/")[2], options, n=1)
    group = missing.rpartition("/")[0]
    plus = "+" if any(word.startswith(f"+{group}=") for word in overrides) else ""
    hint = f"did you mean {plus}{group}={near[0]}? " if near else ""
    there = f"there are {', '.join(options)}" if options else "see `dual-policy train --help` for what there is"
    return f"{where}there is no {missing}; {hint}{there}"


def _no_submitit(match: re.Match[str], overrides: list[str], error: Exception) -> str:
    return (
        f"hydra/launcher={match[1]} comes with hydra-submitit-launcher, which is not installed; "
        "pip install 'dual-policy-plugin[slurm]'"
    )


def _no_optuna(match: re.Match[str], overrides: list[str], error: Exception) -> str:
    return (
        "hydra/sweeper=optuna comes with hydra-optuna-sweeper, which is not installed; "
        "pip install 'dual-policy-plugin[optuna]'"
    )


def _no_trial(match: re.Match[str], overrides: list[str], error: Exception) -> str:
    return "every trial of the study has failed; the errors above say why, and no best one was written down"


def _listed_twice(match: re.Match[str], overrides: list[str], error: Exception) -> str:
    key = match[1]
    return (
        f"the group {key} is listed twice, by the app and by a file of yours; "
        f"in your file write `- override /{key}: NAME` instead of `- /{key}: NAME`"
    )


def _two_values(match: re.Match[str], overrides: list[str], error: Exception) -> str:
    group, value = match[1], match[2]
    word = next((one for one in overrides if one.startswith(f"+{group}=")), None)
    if word is None:
        return f"two values for the group {group}; in your file write `- override /{group}: {value}`"
    return f"{word} adds a group that the app's defaults already list; write {word[1:]}, without the plus"


def _yaml_bool(match: re.Match[str], overrides: list[str], error: Exception) -> str:
    return (
        f"{_config_file(error)}: the defaults list has an unquoted off, on, yes or no, which YAML reads as true or "
        'false; quote it, for example `- wandb: "off"`'
    )


def _not_listed(match: re.Match[str], overrides: list[str], error: Exception) -> str:
    group = match[1]
    word = next((one for one in overrides if one.startswith(f"{group}=")), group)
    if real := re.search(r"Did you mean to override (\S+)\?", _text_of(error)):
        return f"{word} is not how the app lists this group; write {real[1]}={word.partition('=')[2]}"
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        options = GlobalHydra.instance().config_loader().get_group_options(group)
    value = word.partition("=")[2]
    if value and options and value not in options:
        near = difflib.get_close_matches(value, options, n=1)
        hint = f"did you mean +{group}={near[0]}? " if near else ""
        return f"there is no {group}/{value}; {hint}there are {', '.join(options)}"
    return f"{word} overrides a group that the app does not list; write +{word}"


def _group_value(match: re.Match[str], overrides: list[str], error: Exception) -> str:
    groups = [path.name for path in CONFIG_DIR.iterdir() if path.is_dir()]
    word = next((one for one in overrides if one.partition("=")[0] in groups), "a group")
    return f"{word} is not possible; a group of configs takes the name of one, for example agent=fast"


_MENDS: list[tuple[str, Describe]] = [
    (r"Ambiguous value for argument '(.+)'\n", _sweep),
    (r"Could not override '(hydra\.sweeper\.(\w+)[^']*)'", _no_sweeper_key),
    (r"Could not override '([^']+)'\.\s+To append to your config", _not_in_struct),
    (r"Could not (?:find|load) 'hydra/launcher/(submitit_\w+)'", _no_submitit),
    (r"Could not (?:find|load) 'hydra/sweeper/optuna'", _no_optuna),
    (r"(?:In '([^']+)': )?Could not (?:find|load) '([^']+)'", _no_such_config),
    (r"No trials are completed yet", _no_trial),
    (r"(\S+) appears more than once in the final defaults list", _listed_twice),
    (r"Multiple values for (\S+)\. .*override \S+: ([^']+)'", _two_values),
    (r"Unsupported item value in defaults : bool", _yaml_bool),
    (r"Could not override '([^']+)'\.\s+(?:No match in the defaults list|Did you mean)", _not_listed),
    (r"Config group override must be a string or a list", _group_value),
]
