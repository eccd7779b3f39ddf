"""`python -m dual_policy_plugin` is the `dual-policy` command."""

import sys

from dual_policy_plugin.cli import main

if __name__ == "__main__":  # worker processes import this module too
    sys.exit(main())
