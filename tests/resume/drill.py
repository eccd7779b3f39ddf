"""A run is killed again and again, most of all inside its saves, and ends as one that never was.

    python -m tests.resume.drill [--kills 200] [--seed 1] [--folder DIR] [--sabotage plain | late]
    python -m tests.resume.drill --calls N [--folder DIR]

`dual-policy train` (arena, self-play with snapshots, matchmaking by payoffs, a recurrent NPC, the state saved after
every iteration) runs once in peace, which gives every version of every file that may ever stand in the run directory.
Then it runs under SIGKILL, and the same command is given again after each. A kill is aimed in one of three ways: at any
time since the start; at a random part of the length of a save that has just begun; or at a call inside a save, before
which the process ends itself. Where a dead process was, stands in memory that it shared with us (`witness.py`).

After each kill, and before the next start, every file is read as its readers read it: none may be unreadable, none may
hold bytes that the peaceful run never wrote, and nothing that had been saved may be gone. In the end all files are the
same, but for times. Each start is a fork of this process, which has imported everything and runs one thread, so a kill
costs tenths of a second; the run in peace is compared with one of a fresh `python -m dual_policy_plugin train` too.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.resume.reading import Faults, Peace, differences, look
from tests.resume.runs import RUN, SABOTAGES, SHORT, TIMEOUT_S, await_end, run_fresh, run_in_peace, start
from tests.resume.witness import Page, Place


@dataclass(kw_only=True, slots=True)
class Drill(Faults):
    """What a drill found."""

    places: list[Place] = field(default_factory=list)
    """Where each kill hit."""
    num_rounds: int = 0
    """Runs that were brought to their end."""

    def inside(self) -> Counter[str]:
        """Kills inside a save, by kind of file."""
        return Counter(place.kind for place in self.places if place.kind)


def drill(folder: Path, *, kills: int, seed: int, sabotage: str = "", per_round: int = 25) -> Drill:
    """Runs the command in peace and under kills, and compares; a sabotaged one only until a fault is found.

    Args:
        folder: an empty one, for all runs and their output.
        kills: how often.
        seed: of the aims; where a kill hits is a matter of the clock too.
        sabotage: a key of SABOTAGES, or "".
        per_round: about how many kills a run takes until it comes to its end, and the next one begins anew.
    """
    found, rng, log = Drill(), random.Random(seed), folder / "killed.log"
    peace = run_in_peace(folder, sabotage=sabotage)
    while len(found.places) < kills and not (sabotage and found.all()):
        found.num_rounds += 1
        work = folder / f"killed_{found.num_rounds}"
        work.mkdir()
        iteration, place = -1, None
        while len(found.places) < kills and not (sabotage and found.all()):
            place = kill_once(work, log, peace, rng, per_round, sabotage)
            if place is None:
                break
            found.places.append(place)
            num_faults = len(found.all())
            iteration = look(work / RUN, peace, iteration, found)
            if len(found.all()) > num_faults:
                shutil.copytree(work, folder / f"fault_{len(found.places)}")
        if sabotage and found.all():
            break  # where it goes on from is of no interest
        if place is not None:
            await_end(start(work, log, Page(), sabotage=sabotage), log)
        found.wrong += differences(peace.run, work / RUN)
        shutil.rmtree(work)
        print(f"run {found.num_rounds}: {len(found.places)} kills, {len(found.all())} faults", flush=True)
    return found


def kill_once(work: Path, log: Path, peace: Peace, rng: random.Random, kills: int, sabotage: str) -> Place | None:
    """Starts the command and kills it; gives where it was, or None if it came to its end before."""
    # as many saves from one kill to the next as bring a round of `kills` to the run's end, and what is done again
    aim, save = rng.choice(("time", "save", "save", "call")), rng.randint(1, max(4, 3 * len(peace.saves) // kills))
    page = Page()
    child = start(work, log, page, die_at=(save, rng.randint(1, 8)) if aim == "call" else None, sabotage=sabotage)
    if aim == "time":
        time.sleep(rng.uniform(0.0, 2.0) * peace.start_s)
        os.kill(child, signal.SIGKILL)
    elif aim == "save":
        part = rng.random()
        if _await_save(child, page, save):
            kind = page.read().kind
            time.sleep(part * peace.length_s.get(kind, 0.0))
            os.kill(child, signal.SIGKILL)
    code = await_end(child, log)
    place = page.read()
    page.close()
    return place if code else None


def _await_save(child: int, page: Page, save: int) -> bool:
    """Waits until a child saves its file number `save` or the next one that is no line; False: it ended before."""
    deadline = time.monotonic() + TIMEOUT_S
    while (place := page.read()).num_saves < save or place.kind in ("", "metrics", "timing"):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise RuntimeError(f"the run did not come to its save {save} in {TIMEOUT_S:.0f} s")
        time.sleep(5e-5)
    return True


def drill_calls(folder: Path, *, every: int = 1) -> Drill:
    """Kills the short run before each call of its last iteration's saves, and lets it come to its end.

    Those are all that there are: metrics and timing, index, checkpoint, its copy, the removal of an old one, state, the
    index again with the snapshot that joined the pool, result.

    Args:
        folder: an empty one.
        every: only each so many-th call of a save, from its first one on.
    """
    found, log = Drill(), folder / "calls.log"
    peace = run_in_peace(folder, SHORT)
    first = [i for i, (kind, _) in enumerate(peace.saves) if kind == "state"][-2] + 1
    for save, (kind, num_calls) in enumerate(peace.saves[first:], first):
        for call in range(1, num_calls + 1, every):
            work, page = folder / f"call_{save}_{call}", Page()
            work.mkdir()
            await_end(start(work, log, page, SHORT, die_at=(save + 1, call)), log)
            found.places.append(page.read())
            look(work / RUN, peace, 7, found)
            await_end(start(work, log, Page(), SHORT), log)
            found.num_rounds += 1
            wrong = differences(peace.run, work / RUN)
            found.wrong += [f"killed before call {call} of a save of {kind}: {line}" for line in wrong]
            if not found.all():
                shutil.rmtree(work)
    return found


def main() -> int:
    """Runs the drill; 1 where something was not as in peace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None, help="an empty one that is kept; else a temporary one")
    parser.add_argument("--sabotage", choices=sorted(SABOTAGES), default="", help="a fault that the drill must find")
    parser.add_argument(
        "--calls", type=int, default=0, metavar="N", help="instead: before each N-th call of the saves of an iteration"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="dual_policy_drill_") as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["DUAL_POLICY_CACHE"] = str(folder / "cache")
        began = time.monotonic()
        if args.calls:
            found = drill_calls(folder, every=args.calls)
        else:
            found = drill(folder, kills=args.kills, seed=args.seed, sabotage=args.sabotage)
            if not args.sabotage:
                fresh = differences(folder / "peace" / RUN, run_fresh(folder / "fresh"))
                found.wrong += [f"a fresh process: {line}" for line in fresh]
        length_s = time.monotonic() - began
    for fault in found.all():
        print(f"fault: {fault}")
    kinds = ", ".join(f"{times} {kind}" for kind, times in found.inside().most_common())
    print(
        f"{len(found.places)} kills in {found.num_rounds} runs (seed {args.seed}), {found.inside().total()} inside a "
        f"save ({kinds}), {len(found.unreadable)} unreadable files, {len(found.wrong)} wrong, {length_s:.0f} s"
    )
    return int(bool(found.all()))


if __name__ == "__main__":
    sys.exit(main())
