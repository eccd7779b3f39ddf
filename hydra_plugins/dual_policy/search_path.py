"""Gives every Hydra app of this environment the group `dual_policy` and `${npc:...}`; run at its start, so light."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from dual_policy_plugin.hydra_app.interpolation import register_resolver

register_resolver()  # here, not in the class: a job in a process of its own imports this module and no more


class DualPolicySearchPath(SearchPathPlugin):
    """Appends our groups behind the app's own, so that an app can replace them."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Appends the package's `conf` folder to `search_path`."""
        search_path.append(provider="dual_policy", path="pkg://dual_policy_plugin.conf")
