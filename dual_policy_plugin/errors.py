"""The whole error tree. Every message names the key or file, what came, and what would be right.

DualPolicyError
├── ConfigError            a key of the config: unknown, out of range, contradicting another
├── EnvError               an env that cannot be built, or died while running
├── NpcError               an NPC that cannot be had
│   ├── NpcNotFoundError   nothing stands at the URI
│   └── DigestError        other bytes than those that were pinned
├── CheckpointError        a policy file that cannot be read
│   └── SpacesError        a policy made for other observations or actions
├── RunError               the run directory: locked, unwritable, made by another config, disk full
│   └── StorageError       what the run directory is mirrored to was lost for too long
├── RankLostError          another rank of this job is gone
├── LaunchError            a cluster or a cloud refuses a job, lost it, or is not there
│   └── LimitError         a limit that the launch was given ended the run
├── DivergedError          training made a number that is not finite
├── CurriculumStopped      a sweep ended before its last stage, as its on_fail says
└── WandbError             Weights & Biases was asked for its runs, and
    ├── NoRunsError        has none
    ├── NoLoginError       does not know who asks, or does not let them
    └── NoNetworkError     cannot be reached

The command line prints a DualPolicyError as one line and exits with its `exit_code`; anything else is a defect of
ours and keeps its traceback.

Exit codes: 0 done; 1 a gate stays shut; 2 the user's mistake; 3 diverged; 4 to 6 W&B's; 7 a limit of the launch was
reached; 75 something was lost and the same command goes on; 128 + n ended by signal n. Launchers start a job again on
75 and on no other.
"""

from __future__ import annotations

EXIT_LIMIT = 7
"""A limit that the launch was given ended the run; its state is saved."""
EXIT_AGAIN = 75
"""A machine, a rank, a storage or a network was lost: the same command goes on (EX_TEMPFAIL of sysexits.h)."""


class DualPolicyError(Exception):
    """An error whose one-line message is all that the user needs."""

    exit_code = 2


class ConfigError(DualPolicyError):
    """A config value that cannot work; names the key, the value and the mend."""


class EnvError(DualPolicyError):
    """An env that cannot be built, or whose worker died."""


class NpcError(DualPolicyError):
    """An NPC that cannot be had."""


class NpcNotFoundError(NpcError):
    """Nothing stands at the URI."""


class DigestError(NpcError):
    """The bytes are not those that were pinned."""


class CheckpointError(DualPolicyError):
    """A policy file that cannot be read."""


class SpacesError(CheckpointError):
    """A policy that was made for other observations or actions than the env has."""


class RunError(DualPolicyError):
    """A run directory that cannot be used: locked, unwritable, made by another config, disk full."""


class StorageError(RunError):
    """The storage that a run is mirrored to could not be reached for too long; the local run directory is whole."""

    exit_code = EXIT_AGAIN


class RankLostError(DualPolicyError):
    """Another rank of a job with several ranks has ended, or never came.

    Where it ended with an error of its own, `exit_code` is the one of that error: a mistake is not started again.
    """

    exit_code = EXIT_AGAIN


class LaunchError(DualPolicyError):
    """A cluster or a cloud is not there, refuses a job, or lost it."""


class LimitError(LaunchError):
    """A limit that the launch was given ended the run; its state is saved."""

    exit_code = EXIT_LIMIT


class DivergedError(DualPolicyError):
    """Training produced a number that is not finite; the last healthy checkpoint is intact."""

    exit_code = 3


class CurriculumStopped(DualPolicyError):  # noqa: N818  (no mistake: what the user asked for where a gate stays shut)
    """A curriculum sweep ended before its last stage; its state says why."""

    exit_code = 1


class WandbError(DualPolicyError):
    """Weights & Biases cannot answer as it was asked."""


class NoRunsError(WandbError):
    """There is no such run."""

    exit_code = 4


class NoLoginError(WandbError):
    """No login, a refused one, or one without access."""

    exit_code = 5


class NoNetworkError(WandbError):
    """The server cannot be reached, or fails."""

    exit_code = 6
