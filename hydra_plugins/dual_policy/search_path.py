"""Gives every Hydra app of this environment the config group `dual_policy`; imported at each app's start, so light."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class DualPolicySearchPath(SearchPathPlugin):
    """Appends our groups behind the app's own, so that an app can replace them."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Appends the package's `conf` folder to `search_path`."""
        search_path.append(provider="dual_policy", path="pkg://dual_policy_plugin.conf")
