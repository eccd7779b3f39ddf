"""Live view of a training run: a panel on a terminal, one line every ten seconds elsewhere.

Takes the metrics and timing that `train.py` logs once an iteration; draws at most four times a second, from a thread of
its own, so that an update costs microseconds and the clock goes on during a long iteration. While the panel is up, log
messages and anything printed appear above it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dual_policy_plugin.report.figures import (
    ASCII_SPARKS,
    SPARKS,
    History,
    format_duration,
    format_number,
    format_percent,
    format_rate,
    sparkline,
)
from dual_policy_plugin.waiting import current_line, move_log_streams, panel_shows_waits, restore_log_streams

_REFRESHES_PER_S = 4
_LINE_INTERVAL_S = 10.0
_MIN_EPISODES = 500
_MAX_WIDTH = 100
_GAP = "   "
_LOSSES = (
    ("policy", "losses/policy_loss"),
    ("value", "losses/value_loss"),
    ("entropy", "losses/entropy"),
    ("kl", "losses/approx_kl"),
    ("clipped", "losses/clipfrac"),
    ("explained", "losses/explained_variance"),
    ("grad", "losses/grad_norm"),
)


class Progress:
    """The view of one run; use it as a context manager around the training loop.

    The win rate shown is over the newest iterations that have 500 episodes together, since that of a single iteration
    jumps; the small graph beside it is the whole run so far, from 0 at the bottom to 1 at the top.
    """

    def __init__(
        self,
        title: str,
        total_steps: int,
        *,
        npc: str | None = None,
        digest: str | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepares the view.

        Args:
            title: the run's name.
            total_steps: learner steps of the whole run.
            npc: the NPC's name; None if nobody plays against the learner.
            digest: its sha256, shown short.
            console: where to draw; None: stdout.
            clock: seconds; only differences count.
        """
        self._title = title
        self._total_steps = total_steps
        self._npc = npc
        self._digest = (digest or "").removeprefix("sha256:")[:8]
        self._console = console or Console()
        self._clock = clock
        self._is_live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live: Live | None = None
        self._stack = ExitStack()
        self._seen: dict[str, float] = {}
        self._iteration = 0
        self._checkpoint = ""
        self._recent: tuple[tuple[float, float], ...] = ()
        self._history = History(capacity=64)
        self._start = clock()
        self._first: tuple[float, float] | None = None
        self._last_line = float("-inf")
        self._is_line_due = False

    def __enter__(self) -> Self:
        """Draws the panel, if there is a terminal, and lets log messages go above it."""
        self._start = self._clock()
        if self._is_live:
            self._live = Live(
                get_renderable=self._panel,
                console=self._console,
                refresh_per_second=_REFRESHES_PER_S,
                vertical_overflow="crop",
            )
            self._stack.enter_context(panel_shows_waits())
            self._live.start(refresh=True)
            self._stack.callback(restore_log_streams, move_log_streams())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Draws the last state and leaves it on the screen."""
        self._stack.close()
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._is_line_due:
            self._print_line()

    def update(
        self,
        iteration: int,
        metrics: Mapping[str, float],
        timing: Mapping[str, float],
        *,
        checkpoint: str | None = None,
    ) -> None:
        """Takes the figures of an iteration; figures that are absent stay as they were.

        Args:
            iteration: its number.
            metrics: by the names of the metrics (charts/agent_step, dual_policy/win_rate, losses/...).
            timing: likewise (charts/learner_SPS, charts/env_agent_SPS, cost/accrued_total, ...).
            checkpoint: name of the checkpoint that was just saved.
        """
        now = self._clock()
        # replaced, not changed: the drawing thread may be reading the old one
        self._seen = {**self._seen, **metrics, **timing}
        self._iteration = iteration
        self._checkpoint = checkpoint or self._checkpoint
        if self._first is None:
            self._first = (now, self._seen.get("charts/agent_step", 0.0))
        if "dual_policy/win_rate" in metrics:
            self._history.add(metrics["dual_policy/win_rate"])
            newest = (metrics["dual_policy/win_rate"], metrics.get("dual_policy/episodes", 1.0))
            self._recent = _newest_episodes((*self._recent, newest))
        if not self._is_live:
            self._is_line_due = True
            if now - self._last_line >= _LINE_INTERVAL_S:
                self._print_line()

    def message(self, text: str) -> None:
        """Prints a line above the panel (or between the lines, after the one that is due)."""
        if not self._is_live and self._is_line_due:
            self._print_line()
        self._console.print(Text(text), soft_wrap=True)

    def _print_line(self) -> None:
        self._last_line = self._clock()
        self._is_line_due = False
        self._console.print(Text(self._line()), soft_wrap=True)

    def _line(self) -> str:
        """All that matters on one line of plain text."""
        steps = self._seen.get("charts/agent_step", 0.0)
        parts = [
            f"{self._title}: {format_percent(steps, self._total_steps)}",
            f"{steps:,.0f}/{self._total_steps:,} learner steps",
            f"iteration {self._iteration}",
            self._speed(),
            f"elapsed {format_duration(self._clock() - self._start)}, left {format_duration(self._left_s())}",
        ]
        returns = self._returns()
        parts += [self._win_rate(), returns and f"return {returns}", self._losses(_LOSSES), self._cost()]
        parts.append(self._checkpoint)
        return " | ".join(part.replace(_GAP, ", ") for part in parts if part)

    def _panel(self) -> Panel:
        """The panel as it is now."""
        steps = self._seen.get("charts/agent_step", 0.0)
        width = min(self._console.width, _MAX_WIDTH)
        done = Table.grid(padding=(0, 1))
        for _ in range(3):
            done.add_column(no_wrap=True)
        done.add_row(
            ProgressBar(
                total=self._total_steps,
                completed=min(steps, self._total_steps),
                width=max(10, width - 62),
                style="dim",
                complete_style="green",
                finished_style="green",
            ),
            Text(format_percent(steps, self._total_steps), style="bold"),
            Text(f"{steps:,.0f} of {self._total_steps:,}"),
        )
        rows = Table.grid(padding=(0, 2))
        rows.add_column(no_wrap=True, min_width=10)
        rows.add_column(no_wrap=True, overflow="ellipsis")
        rows.add_row("steps", done)
        rows.add_row("speed", self._speed())
        elapsed, left = format_duration(self._clock() - self._start), format_duration(self._left_s())
        rows.add_row("time", f"elapsed {elapsed}   left {left}   iteration {self._iteration:,}")
        if self._npc is not None:
            rows.add_row("win rate", self._win_rate_with_graph(width - 50))
        rows.add_row("return", self._returns() or "no episode has ended yet")
        rows.add_row("losses", self._losses(_LOSSES[:3]) or "none yet")
        rows.add_row("", self._losses(_LOSSES[3:]))
        if cost := self._cost():
            rows.add_row("cost", cost)
        rows.add_row("checkpoint", self._checkpoint or "none yet")
        if waits := current_line():
            rows.add_row("waiting", Text(waits))
        return Panel(Group(rows), title=self._heading(width - 6), title_align="left", width=width, border_style="dim")

    def _heading(self, width: int) -> Text:
        """Run and NPC in at most `width` columns; of a long NPC name the end stays, since the start is its store."""
        if self._npc is None:
            return Text(self._title, style="bold")
        title = Text(self._title, style="bold")
        title.truncate(width // 2, overflow="ellipsis")
        room = width - title.cell_len - len(f" against  {self._digest}")
        npc = self._npc if len(self._npc) <= room else f"…{self._npc[len(self._npc) - room + 1 :]}"
        return title.append(f" against {npc} {self._digest}".rstrip(), style="not bold")

    def _speed(self) -> str:
        learner, env_agents = self._seen.get("charts/learner_SPS"), self._seen.get("charts/env_agent_SPS")
        return f"learner {format_rate(learner)}{_GAP}env agents {format_rate(env_agents)}"

    def _win_rate(self) -> str:
        num_episodes = sum(count for _, count in self._recent)
        if not num_episodes:
            return ""
        rate = sum(rate * count for rate, count in self._recent) / num_episodes
        return f"win rate {rate:.3f} over {num_episodes:,.0f} episodes"

    def _win_rate_with_graph(self, width: int) -> Text:
        if not self._recent:
            return Text("no episode has ended yet")
        _, _, rate, rest = self._win_rate().split(" ", 3)
        sparks = ASCII_SPARKS if self._console.options.ascii_only else SPARKS
        text = Text(rate, style="bold")
        text.append(f" {rest}   ", style="not bold")
        return text.append(sparkline(self._history.values(max(8, width)), sparks), style="not bold green")

    def _returns(self) -> str:
        pairs = (("learner", "dual_policy/policy_a_reward"), ("NPC", "dual_policy/npc_reward"))
        shown = [f"{name} {format_number(self._seen[key])}" for name, key in pairs if key in self._seen]
        return f"{_GAP.join(shown)} (mean per agent)" if shown else ""

    def _losses(self, losses: tuple[tuple[str, str], ...]) -> str:
        return _GAP.join(f"{name} {format_number(self._seen[key])}" for name, key in losses if key in self._seen)

    def _cost(self) -> str:
        accrued, hourly = self._seen.get("cost/accrued_total"), self._seen.get("cost/hourly_total")
        if accrued is None:
            return ""
        return f"${accrued:,.2f}" + (f" at ${hourly:,.2f} an hour" if hourly is not None else "")

    def _left_s(self) -> float | None:
        """Seconds to the end at the mean speed since the first update; at the reported one until there is a mean."""
        steps = self._seen.get("charts/agent_step", 0.0)
        if self._first is None:
            return None
        passed, gained = self._clock() - self._first[0], steps - self._first[1]
        speed = gained / passed if passed > 0 and gained > 0 else self._seen.get("charts/learner_SPS", 0.0)
        return max(0.0, self._total_steps - steps) / speed if speed > 0 else None


def _newest_episodes(rates: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    """The shortest tail of (win rate, episodes) pairs that has enough episodes; all of them if none has."""
    num_episodes = sum(count for _, count in rates)
    start = 0
    while num_episodes - rates[start][1] >= _MIN_EPISODES:
        num_episodes -= rates[start][1]
        start += 1
    return rates[start:]
