"""One line with the mend in place of an exception of Hydra's, OmegaConf's or a sweeper's.

Their own messages name the grammar rule that failed or the file that was not found; ours name what to type instead.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from traceback import walk_tb

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dual_policy_plugin.errors import ConfigError, DualPolicyError, RunError
from dual_policy_plugin.hydra_app.loading import known_keys
from dual_policy_plugin.hydra_app.nodes import nearest_key
from dual_policy_plugin.hydra_app.overrides import CONFIG_DIR, PRIMARY_CONFIG, quote_override


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
