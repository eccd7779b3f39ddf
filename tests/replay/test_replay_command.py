"""`dual-policy replay`: the files it writes, what it takes from a run, and one line for bad input."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dual_policy_plugin.cli import main
from tests.harness import logging_as_it_was
from tests.replay.games import MEDIUM, METTAGRID, SMALL, WEAK, config_of, random_policies

PLAY = ("replay", MEDIUM, "--npc", WEAK)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own as cwd; log handlers and level as they were."""
    monkeypatch.chdir(tmp_path)
    with logging_as_it_was():
        yield


def read_page(path: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])  # type: ignore[no-any-return]


def means_of(page: dict[str, Any]) -> list[list[float]]:
    """For each episode both sides' mean returns, as the page's own data has them."""
    means = []
    for episode in page["episodes"]:
        sides = np.array(episode["seats"])
        returns = np.frombuffer(base64.b64decode(episode["returns"]["f32"]), "<f4").reshape(-1, len(sides))[-1]
        means.append([float(returns[sides == side].mean()) for side in (0, 1)])
    return means


def test_it_writes_a_page_and_a_gif_and_says_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAY, "--episodes", "2", "--gif", "game.gif", *SMALL]) == 0
    said = capsys.readouterr()
    page, gif = Path("replay.html"), Path("game.gif")
    assert said.out == (
        f"replay.html ({page.stat().st_size / 1000:.0f} kB)\ngame.gif ({gif.stat().st_size / 1000:.0f} kB)\n"
    )
    data = read_page(page)
    assert [policy["uri"] for policy in data["policies"]] == [MEDIUM, WEAK]
    first, second = np.mean(means_of(data), axis=0)
    won = sum(episode["share"] for episode in data["episodes"])
    assert said.err == (
        f"medium against weak: {won:g} of 2 won (a draw is half), mean return {first:.2f} to {second:.2f} per agent\n"
    )
    assert gif.read_bytes()[:6] == b"GIF89a"


def test_the_seed_says_which_games_and_repeats_them() -> None:
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert main([*PLAY, "--episodes=1", "--seed", seed, "--out", f"{name}.html", *SMALL]) == 0
    pages = [read_page(Path(f"{name}.html")) for name in "abc"]
    assert pages[0] == pages[1]
    assert pages[0]["episodes"] != pages[2]["episodes"]
    assert main([*PLAY, "--episodes=1", "seed=3", "--out", "d.html", *SMALL]) == 0
    assert read_page(Path("d.html")) == pages[0]


def test_a_run_is_replayed_as_its_own_evaluation_played_it(capsys: pytest.CaptureFixture[str]) -> None:
    """The env, the share, the seed and the NPC come from the run; its games have the results of result.json."""
    assert main(
        ["train", "run=tiny", "+dual_policy=checkpoint", f"trainer.dual_policy.checkpoint_npc.uri={WEAK}", *SMALL,
         "trainer.dual_policy.training_agents_pct=0.25", "trainer.total_timesteps=256", "trainer.horizon=8",
         "evals.episodes=5", "env.num_envs=8", "agent.hidden_size=16", "seed=7"]
    ) == 0  # fmt: skip
    capsys.readouterr()
    assert main(["replay", "train_dir/tiny", "--episodes=5"]) == 0
    said = capsys.readouterr()
    run = Path("train_dir/tiny").resolve()
    assert said.out.startswith(f"{run}/replay.html (")
    assert f"from {run}/config.yaml: " in said.err
    assert " trainer.dual_policy.training_agents_pct=0.25 " in said.err
    assert f"against {WEAK}, the NPC of {run}\n" in said.err
    page = read_page(run / "replay.html")
    assert page["seed"] == 7
    assert [sum(side == 0 for side in episode["seats"]) for episode in page["episodes"]] == [1] * 5
    (told,) = json.loads((run / "result.json").read_text())["evals"]
    assert np.mean(means_of(page), axis=0).tolist() == pytest.approx([told["learner_return"], told["opponent_return"]])
    assert sum(episode["share"] for episode in page["episodes"]) == told["wins"]
    assert told["opponent_return"] > 0

    assert main(["replay", "train_dir/tiny", "--npc", MEDIUM, "--episodes=1", "env.episode_steps=8", "seed=1"]) == 0
    said = capsys.readouterr()
    page = read_page(run / "replay.html")
    assert (page["policies"][1]["uri"], page["seed"]) == (MEDIUM, 1)
    assert len(base64.b64decode(page["episodes"][0]["actions"]["u8"])) == 8 * 4  # our words win
    assert "episode_steps" not in said.err

    (run / "npc.lock.json").unlink()
    assert main(["replay", "train_dir/tiny"]) == 2
    mend = "has locked no NPC; name whom to play against with --npc, for example the policy itself, --npc"
    assert mend in capsys.readouterr().err
    (run / "config.yaml").write_text("env: [\n")
    assert main(["replay", "train_dir/tiny", "--npc", WEAK]) == 2
    assert re.fullmatch(r"error: \S+/config.yaml cannot be read \(\w+\); restore it\n", capsys.readouterr().err)


@pytest.mark.parametrize("where", ["checkpoint_npc", "pool"])
def test_a_greedy_npc_is_replayed_greedily(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its evaluation's games again; drawn actions would have ended otherwise."""
    dual = "trainer.dual_policy"
    npc = {
        "checkpoint_npc": [f"{dual}.checkpoint_npc.uri={MEDIUM}", f"{dual}.checkpoint_npc.act=greedy"],
        "pool": [f"{dual}.pool=[{{uri: {MEDIUM}, act: greedy}}]"],
    }
    assert main(
        ["train", "run=tiny", "+dual_policy=checkpoint", *npc[where], *SMALL, "trainer.total_timesteps=256",
         "trainer.horizon=8", "evals.episodes=6", "env.num_envs=8", "agent.hidden_size=16", "seed=7"]
    ) == 0  # fmt: skip
    capsys.readouterr()
    run = Path("train_dir/tiny").resolve()
    told = json.loads((run / "result.json").read_text())["evals"][0]
    ends = []
    for more in ([], ["--npc", MEDIUM]):
        assert main(["replay", "train_dir/tiny", "--episodes=6", *more]) == 0
        said = capsys.readouterr().err
        assert (f" of {run}, which acts greedily\n" in said) == (not more)
        ends.append(np.mean(means_of(read_page(run / "replay.html")), axis=0).tolist())
    assert ends[0] == pytest.approx([told["learner_return"], told["opponent_return"]])
    assert ends[1] != pytest.approx(ends[0])


@pytest.mark.slow
def test_mettagrid_by_the_command_and_a_policy_of_another_env(capsys: pytest.CaptureFixture[str]) -> None:
    policies = random_policies(config_of(*METTAGRID), Path())
    words = ["--episodes=1", "--out=m.html", "--gif=m.gif", *METTAGRID]
    assert main(["replay", policies[0], "--npc", policies[1], *words]) == 0
    page = read_page(Path("m.html"))
    assert (page["env"], page["teams"], sorted(page["episodes"][0]["state"])) == ("mettagrid", [], ["hearts", "ore"])
    capsys.readouterr()
    assert main(["replay", policies[0], "--npc", WEAK, *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {WEAK} does not fit the env: its observations are window uint8 (128,), the env's ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["replay"], "error: the following arguments are required: POLICY; see `dual-policy replay --help`"),
        (["replay", MEDIUM], "error: --npc is missing; name whom to play against, for example --npc builtin://arena/m"),
        (["replay", "nobody", "--npc", WEAK], "error: nobody: no such file; "),
        (
            ["replay", MEDIUM, "--npc", "builtin://arena/wek"],
            "error: builtin://arena/wek: no such builtin; did you mea",
        ),
        (
            ["replay", "env=arena", MEDIUM, "--npc", WEAK],
            "error: env=arena stands where POLICY belongs; write the poli",
        ),
        ([*PLAY, "--episodes=0"], "error: argument --episodes: '0' is not possible; use 1 to 64; see"),
        ([*PLAY, "--episodes=65"], "error: argument --episodes: '65' is not possible; use 1 to 64; see"),
        ([*PLAY, "--gif=x.png"], "error: argument --gif: 'x.png' does not end with .gif; use for example game.gif; "),
        ([*PLAY, "--out=x"], "error: argument --out: 'x' does not end with .html; use for example game.html; "),
        ([*PLAY, "--out=no/x.html"], "error: no/x.html cannot be written: there is no folder no; make it, or choose"),
        ([*PLAY, "--out=d.html"], "error: d.html is a folder; name a file in it"),
        ([*PLAY, "--seed=-1"], "error: argument --seed: '-1' is no seed; "),
        ([*PLAY, "--gfi=x.gif"], "error: unrecognized arguments: --gfi=x.gif; did you mean --gif? "),
        ([*PLAY, "env.num_agent=4"], "error: env.num_agent is not a known key; did you mean env.num_agents?"),
        ([*PLAY, "evals.episodes=8"], "error: evals.episodes=8 is not read here; use --episodes"),
        ([*PLAY, "env=pettingzoo", "env.id=simple_spread_v3"], "error: env.name=pettingzoo cannot be drawn, replay k"),
        ([*PLAY, "trainer.dual_policy.training_agents_pct=1.0"], "error: trainer.dual_policy.training_agents_pct=1.0"),
        ([*PLAY, "--episodes=64", "env.episode_steps=9999"], "error: --episodes=64 of 9999 steps and 8 agents are too"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_file(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "d.html").mkdir()
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(line)
    assert said.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["d.html"]
