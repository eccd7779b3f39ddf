"""Our Hydra app: how its configs compose with the words of a command line, and which of them a file would mask.

Stands between the command line (`cli.py`) and `load_config`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dual_policy_plugin.config import Config
from dual_policy_plugin.errors import ConfigError, DualPolicyError
from dual_policy_plugin.hydra_app.interpolation import config_text, hide_variables, keep_requested
from dual_policy_plugin.hydra_app.loading import load_config
from dual_policy_plugin.hydra_app.mends import mend
from dual_policy_plugin.hydra_app.overrides import CONFIG_DIR, PRIMARY_CONFIG, search_path


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
    plain: Any = OmegaConf.to_container(compose_whole(overrides)["hydra"][name], resolve=True)
    return dict(plain)


def compose_whole(overrides: list[str]) -> DictConfig:
    """Our app's config with `overrides`, and with Hydra's own under `hydra`.

    Raises:
        ConfigError: the overrides do not compose.
    """
    return _compose(overrides, CONFIG_DIR, PRIMARY_CONFIG, with_hydra=True)


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
