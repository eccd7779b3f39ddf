# ruff: noqa: E501  (a row of a Markdown table is one line)
"""The page `errors.md`: every message of the package by what the user was doing, with its mend and its exit code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from docs.messages import Message, collect, escaped

HEAD = """# Every message

Generated from the source by `make docs-reference`. `<name>` stands for what differs. The line on your screen begins with
`error: ` and the process ends with the exit code; a *warning* ends nothing. Texts of other programs (git, Slurm,
SkyPilot, the operating system) are passed on as `<error>`, `<reason>`, `<says>` and the like.
[troubleshooting.md](troubleshooting.md) has what happens most often, and how to see more.
"""
SECTIONS: dict[str, tuple[str, ...]] = {
    "The command line and the config": (
        "cli", "commands.", "hydra_app.", "config", "pool_config", "share_schedule", "matchmaking",
        "policies.build", "policies.nets", "envs.arena_config",
    ),
    "NPCs: naming and finding them": ("npc.", "roster"),
    "W&B and S3": ("wandb_runs", "commands.runs", "publishing", "report.loggers", "report.tensorboard"),
    "Policy files": (
        "checkpoint", "torch_file", "policies.", "players", "parts", "commands.import_policy", "snapshots", "npc.header",
    ),
    "The env": ("envs.", "rollout.", "seating"),
    "The run directory, stopping and continuing": (
        "files", "run.", "run_state", "mirror.", "continuation", "stop_signals",
        "report.", "train", "rng", "experience",
    ),
    "Memory, devices, the GPU": ("memory", "devices", "cuda_graph", "kernels.", "learning."),
    "Evaluation, gates, replay, report": (
        "evaluate", "evaluation.", "commands.evaluate", "commands.gate", "replay.", "report.page.", "commands.report",
        "commands.replay",
    ),
    "Curricula": ("curriculum.", "commands.curriculum"),
    "Several ranks": ("ranks.", "heartbeat"),
    "Slurm": ("slurm.", "launch.slurm_job"),
    "Launching, SkyPilot and `dual-policy watch`": ("launch.", "commands.launch", "commands.watch"),
    "In your own trainer": ("dual_policy", "foreign"),
    "Doctor and demo": ("demo", "commands.demo", "commands.doctor", "commands.completion"),
}  # fmt: skip
# For a message that names no mend of its own, behind a semicolon: the first pattern that it contains.
MENDS: tuple[tuple[str, str], ...] = (
    (r"no valid YAML|no KEY=VALUE", "mend the text at the place that the line names; in a shell, quote it"),
    (r"is no (whole number|count|number)|is not between|is none of|refuses the request|takes no words", "give the value "
     "that the line asks for; `--help` shows an example"),
    (r"needs submitit|needs the package", "run the command in the line"),
    (r"not launched, as was answered", "nothing to mend: the answer was no"),
    (r"copies are launched", "mend what the line says, and launch the others; those that are launched go on"),
    (r"env worker|agent left before|first parameter of|stands for", "mend the env; what its worker said stands above, "
     "and [own_env.md](own_env.md) says what an env must do"),
    (r"^arena state|not all files were sent", "a defect: please report the line with `LOG_LEVEL=DEBUG`"),
    (r"^(obs|actions|<name>) has |<name> has shape", "pass arrays of the shape and dtype in the line"),
    (r"^git ", "mend what git says, or give `--skip-git-check`"),
    (r"its version is not", "it is of a newer or older version of this package: use that one, or make the file anew"),
    (r"must have the keys|must be a |sha256 must|name must|metadata must|__metadata__|not valid JSON|its header|no "
     r".safetensors file", "the file is damaged or not what it should be: write or fetch it again"),
    (r"is taken over from|cannot note what|is queued again|^job <num>", "nothing to do: it says what goes on"),
    (r"cannot be (read|written|made)|could not be written", "see that the path exists and that you may read and write it"),
    (r"the service answered with", "the storage's server is set up wrongly, or is not the one you meant: look at "
     "`AWS_ENDPOINT_URL` and `WANDB_BASE_URL`"),
    (r"not found|there is no policy|pass the filters?$|passes the filter", "look at the spelling; `dual-policy npc resolve URI` shows what a text names"),
    (r"another file than", "it was replaced while it was fetched: run the command again"),
    (r"holds several", "name the file: `wandb://entity/project/type/name:version` of an artifact with one policy file"),
    (r"^the URI|^<shown>", "write the URI as [npcs.md](npcs.md#uris) shows"),
    (r"does not take|other shapes|cannot be built", "set `agent` and its settings to those that the policy was made with"),
    (r"cannot act|answers <num_rows>|not finite", "the policy's own code or weights are broken: mend it, or use another "
     "checkpoint"),
    (r"holds other NPC bytes", "give all ranks the same files, or one `npc.lock.json`"),
    (r"could not be published|what stands there", "mend what the line says; checkpoints are in the run directory, whole"),
    (r"as Slurm writes it|the ranks are", "set the variable as the line says, or start the ranks by `srun` or `torchrun`"),
    (r"refuses the job|could not begin", "change the key of `hydra.launcher` that is meant; [slurm.md](slurm.md)"),
    (r"^training cannot work here", "mend what the lines above say"),
    (r"no best one was written|lists this group|has a comma", "mend what the errors above say"),
    (r"W&B answers", "mend what W&B says; `dual-policy doctor` looks at the login"),
)  # fmt: skip


def error_page(package: Path) -> str:
    """The page's text."""
    sections: dict[str, list[Message]] = {title: [] for title in SECTIONS}
    for message in collect(package):
        sections[section_of(message.module)].append(message)
    parts = [HEAD]
    for title, messages in sections.items():
        rows = dict.fromkeys(_rows(messages))
        if rows:
            parts.append(f"## {title}\n\n| message | what to do | exit |\n|---|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def section_of(module: str) -> str:
    """The section of a module's messages: that of the longest name that it begins with."""
    fits = [(len(name), title) for title, names in SECTIONS.items() for name in names if module.startswith(name)]
    if not fits:
        raise SystemExit(f"docs/error_page.py: {module} has messages and no section; add it to SECTIONS")
    return max(fits)[1]


def mend_of(text: str) -> tuple[str, str]:
    """(what is wrong, what to do) of a message: split at its semicolon, or by MENDS where it has none."""
    what, _, mend = text.partition("; ")
    if mend:
        return what, "as the line says" if re.fullmatch(r"<\w+>", mend) else mend
    for pattern, known in MENDS:
        if re.search(pattern, text):
            return text, known
    raise SystemExit(f"docs/error_page.py: no mend for {text!r}; end the message with `; <mend>`, or add to MENDS")


def _rows(messages: list[Message]) -> Iterator[str]:
    for message in messages:
        what, mend = mend_of(message.text)
        code = "*warning*" if message.exit_code is None else str(message.exit_code)
        yield f"| {escaped(what)} | {mend if (mend in dict(MENDS).values()) else escaped(mend)} | {code} |"
