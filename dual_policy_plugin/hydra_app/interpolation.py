"""`${npc:<uri>}` in the config of any Hydra app: the immutable URI of the policy that the text inside means now.

The plugin registers it (`hydra_plugins/dual_policy/search_path.py`) at the start of every Hydra app, so importing this
is light. A config asks each question once: OmegaConf keeps the answer with the config, and with its copies.

In our own app a policy's URI may be written so too. There the run's lock pins it, under the text that the user wrote:
`keep_requested` puts that text back, so that a restart plays the locked policy and not what `latest` means by then.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.resolvers import oc

RESOLVER = "npc"
_TEXT_RESOLVER = "npc_text"
# The policies that a run pins and locks: the nodes that hold them, and the names in those; a list holds texts or nodes.
_URI_NAMES = ("uri", "checkpoint_path", "policy_uri")
_POLICY_NODES = (
    "trainer.dual_policy.checkpoint_npc",
    "trainer.dual_policy.pool",
    "trainer.initial_policy",
    "evals.opponents",
    "evals.held_out",
)
_VARIABLE = re.compile(r"\$\{oc\.env:\s*['\"]?(\w+)")
_MIN_SECRET = 8  # letters; what is shorter is a word or a number, which would be taken out of the middle of others
_WHOLE = re.compile(rf"\$\{{{RESOLVER}:(.*)\}}", re.DOTALL)


def register_resolver() -> None:
    """Makes `${npc:...}` known to OmegaConf; an app's own resolver of that name stays."""
    if not OmegaConf.has_resolver(RESOLVER):
        OmegaConf.register_new_resolver(RESOLVER, pinned_uri, use_cache=True)
    if not OmegaConf.has_resolver(_TEXT_RESOLVER):
        OmegaConf.register_new_resolver(_TEXT_RESOLVER, _one_text)


def pinned_uri(*words: object) -> str:
    """The immutable URI of what `${npc:<uri>}` names now; a relative path begins where the app was started.

    Raises:
        NpcError: the text is not one URI, or nothing can be had there.
    """
    from dual_policy_plugin.config import PolicySource
    from dual_policy_plugin.npc.resolver import choose

    (found,) = choose(PolicySource(uri=_one_text(*words)), seed=0, base=_start_folder())
    return found.uri  # found, not fetched: whoever plays it fetches and verifies it


def keep_requested(cfg: DictConfig) -> DictConfig:
    """A copy of our app's config in which `${npc:X}` as a policy's whole URI is X, for the run to pin and lock."""
    result = copy.deepcopy(cfg)
    for key in _POLICY_NODES:
        _keep_in(OmegaConf.select(result, key))
    return result


def config_text(cfg: DictConfig) -> str:
    """A config as YAML, resolved but for texts from the environment: `${oc.env:NAME}` stays as it was written, in
    whatever way a value came to hold it. So no file of a run holds a secret, and a restart reads the variable again.
    """
    return OmegaConf.to_yaml(OmegaConf.create(config_values(cfg)))


def config_values(cfg: DictConfig) -> Any:
    """What `config_text` writes, as plain values."""
    real = OmegaConf.to_container(cfg, resolve=True)
    OmegaConf.register_new_resolver("oc.env", _variable_text, replace=True)
    try:
        told = OmegaConf.to_container(cfg, resolve=True)
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
    return _without_variables(real, told)


def hide_variables(error: BaseException, cfg: DictConfig) -> None:
    """Puts `${oc.env:NAME}` in place of what such a variable of the config holds into the texts of an error and of what
    led to it, before they are shown, logged or sent: a secret under a wrong key is not to be read in the message.
    """
    names = _VARIABLE.findall(OmegaConf.to_yaml(cfg))
    held = {value: f"${{oc.env:{name}}}" for name in names if len(value := os.environ.get(name, "")) >= _MIN_SECRET}
    one: BaseException | None = error
    while held and one is not None:
        one.args = tuple(_hidden(text, held) if isinstance(text, str) else text for text in one.args)
        one = one.__cause__ or one.__context__


def _hidden(text: str, held: Mapping[str, str]) -> str:
    for value in sorted(held, key=len, reverse=True):
        for form in (value, repr(value)[1:-1], ascii(value)[1:-1]):
            text = text.replace(form, held[value])
    return text


def _variable_text(*words: object) -> str:
    """`${oc.env:...}` for its arguments, a name and perhaps a default."""
    texts = ["null" if word is None else str(word) for word in words]
    quoted = [text if re.fullmatch(r"[\w./:+-]*", text) else repr(text) for text in texts]
    return f"${{oc.env:{','.join(quoted)}}}"


def _without_variables(real: Any, told: Any) -> Any:
    """`told` where a text holds what came from the environment, else `real`: a number or a flag is no secret."""
    if isinstance(real, dict) and isinstance(told, dict):
        return {key: _without_variables(item, told.get(key)) for key, item in real.items()}
    if isinstance(real, list) and isinstance(told, list):
        return [_without_variables(*pair) for pair in zip(real, told, strict=True)]
    return real if real is None or isinstance(real, bool | int | float) else told


def _keep_in(node: object) -> None:
    """Puts the texts back in place: in the names of a node that are a URI, or in all of a list."""
    if not isinstance(node, DictConfig | ListConfig):
        return
    raw: Any = OmegaConf.to_container(node, resolve=False)
    places: Sequence[Any] = [name for name in _URI_NAMES if name in raw] if isinstance(raw, dict) else range(len(raw))
    for place in places:
        text = raw[place]
        match = _WHOLE.fullmatch(text) if isinstance(text, str) else None
        if match is not None:
            node[place] = f"${{{_TEXT_RESOLVER}:{match[1]}}}"
        elif isinstance(text, dict):  # an entry of a pool
            _keep_in(node[place])


def _one_text(*words: object) -> str:
    if len(words) == 1 and type(words[0]) in (str, int):  # a bool is an int, and no name
        return str(words[0])
    from dual_policy_plugin.errors import NpcError
    from dual_policy_plugin.npc.uri import holds_credentials

    shown = ",".join(map(str, words))
    shown = "..." if any(holds_credentials(str(word)) for word in words) else shown
    raise NpcError(
        f"${{npc:{shown}}} does not hold one URI; put it into quotes, for example ${{npc:'{shown or 'URI'}'}}"
    )


def _start_folder() -> Path | None:
    """Where the Hydra app was started, also if the job has a working directory of its own; None outside of a job."""
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.cwd) if HydraConfig.initialized() else None
