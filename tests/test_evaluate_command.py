"""`dual-policy evaluate`: the words it takes, the table, the files, and one line for every mistake."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from dual_policy_plugin.cli import main
from dual_policy_plugin.commands.evaluate import print_cross_play
from dual_policy_plugin.evaluation.cross_play import CrossPlay, summarise
from dual_policy_plugin.evaluation.matches import PairingRecord
from dual_policy_plugin.npc.resolver import PinnedPolicy
from tests.harness import logging_as_it_was

SMALL = [
    "env.num_agents=4", "env.height=8", "env.width=8", "env.episode_steps=16", "env.mines=2", "env.altars=2",
    "env.walls=0", "device=cpu", "trainer.threads=1",
]  # fmt: skip
TWO = "policies=[builtin://arena/random,builtin://arena/forager]"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder and a cache of its own; log handlers and level as they were."""
    for name in ("HYDRA_FULL_ERROR", "LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DUAL_POLICY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with logging_as_it_was():
        yield


def test_table_json_and_picture(capsys: pytest.CaptureFixture[str]) -> None:
    words = [TWO, "episodes=8", "out=table.json", "seed=4", "env=arena", *SMALL]
    assert main(["evaluate", *words]) == 0
    captured = capsys.readouterr()
    facts = json.loads(Path("table.json").read_text("utf-8"))
    assert [one["name"] for one in facts["policies"]] == ["random", "forager"]
    assert (facts["env"], facts["episodes"], facts["roles"]) == ("arena", 8, [])
    assert facts["win_rate"][0][0] == facts["win_rate"][1][1] == 0.5
    assert facts["win_rate"][0][1] == 1 - facts["win_rate"][1][0] < 0.5
    assert Path("table.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in Path().iterdir()) == ["table.json", "table.png"]
    rating = round(facts["ratings"][1]["rating"])
    assert ["1", "forager", str(rating)] in [line.split()[:3] for line in captured.out.splitlines()]
    assert "written: table.json" in captured.err
    assert "INFO" not in captured.err


def test_the_seed_decides() -> None:
    def table(seed: int) -> bytes:
        words = [
            "policies=[builtin://arena/random,builtin://arena/random]",
            "episodes=32",
            "out=x.json",
            f"seed={seed}",
        ]
        assert main(["evaluate", *words, *SMALL, "env.episode_steps=32"]) == 0
        return Path("x.json").read_bytes()

    assert table(4) == table(4)
    assert table(4) != table(5)


def test_one_policy_twice_and_a_picture_alone(capsys: pytest.CaptureFixture[str]) -> None:
    twice = "policies=['builtin://arena/random',builtin://arena/random]"
    assert main(["evaluate", twice, "episodes=2", "png='a picture.png'", *SMALL]) == 0
    assert [path.name for path in Path().iterdir()] == ["a picture.png"]
    assert "random-2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("episodes=4", "policies= is missing; name two or more, for example policies=["),
        (f"{TWO} episodes=1", "episodes=1 is not possible; use a whole number from 2"),
        (f"{TWO} episodes=many", "episodes=many is not possible"),
        (f"{TWO} episodes=true", "episodes=True is not possible"),
        ("policies=builtin://arena/weak", "policies=[builtin://arena/weak] has nobody to play; name another"),
        ("policies=[]", "policies=[] has nobody to play; name another, policies=[URI,URI]"),
        ("policies=[1,2]", "policies has 1, which is no URI; quote"),
        ("policies=a,b", "policies=a,b has a comma outside of brackets; write policies=[a,b]"),
        ("policies=[a,s3://b/k=1/x.pt]", "put a URI with special characters in quotes: 'policies=["),
        (f"{TWO} episods=4", "episods is not a known key; did you mean episodes?"),
        (f"{TWO} env.numenvs=4", "env.numenvs is not a known key; did you mean env.num_envs?"),
        (f"{TWO} evals.episodes=8", "evals.episodes=8 is not read here; write episodes="),
        (f"{TWO} evals.held_out=[a]", "evals.held_out=[a] is not read here; name all players in policies="),
        (f"{TWO} trainer.dual_policy.training_agents_pct=0.25", "_pct=0.25 is not read here; two policies have"),
        (f"{TWO} -x", "keys are written without dashes, for example out=FILE.json"),
        (f"{TWO} out=nowhere/x.json", "nowhere/x.json cannot be written: there is no folder nowhere; make it"),
        (f"{TWO} out=/proc/x.json", "/proc/x.json cannot be written: No such file or directory; choose another"),
        (f"{TWO} png=.", "a folder; name a file in it"),
        (f"{TWO} out=x.png", "out=x.png is for the JSON file; write out=x.json, or png=x.png"),
        (f"{TWO} out=[x]", "out=['x'] is no file; use for example out=cross_play.json"),
        ("policies=[builtin://arena/random,gone.safetensors]", "gone.safetensors: no such file"),
        ("policies=[builtin://arena/random,builtin://arena/sage]", "builtin://arena/sage"),
        (f"{TWO} device=tpu", "device=tpu is not known"),
    ],
)
def test_one_line_for_every_mistake(words: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *words.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert expected in line
    assert list(Path().iterdir()) == []


def test_a_folder_that_takes_no_file_is_found_before_anything_is_played(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def play(*args: object, **options: object) -> None:
        raise AssertionError("played")

    monkeypatch.setattr("dual_policy_plugin.evaluate.cross_play", play)
    assert main(["evaluate", TWO, "out=/proc/x.json"]) == 2
    with pytest.raises(AssertionError, match="played"):
        main(["evaluate", TWO, "out=x.json"])
    assert "cannot be written" in capsys.readouterr().err


def cross(num_policies: int, roles: tuple[str, ...] = (), name: str = "policy") -> CrossPlay:
    numbers = range(num_policies)
    records = [
        PairingRecord(
            first=i, second=j, wins=50.0 if i == j else 95.0 if (j - i) % num_policies == 1 else 40.0 + (i > j) * 20,
            draws=0, episodes=100, effective_episodes=100, first_return=0, second_return=0,
        )
        for i in numbers
        for j in numbers
        if roles or i <= j
    ]  # fmt: skip
    pinned = [PinnedPolicy(name=f"{name}_{k}", requested="", uri="", sha256="", num_bytes=0) for k in numbers]
    return summarise(records, pinned, env="desk", roles=roles)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("num_policies", [2, 4, 12, 30])
@pytest.mark.parametrize("roles", [(), ("hunter", "runner")])
def test_the_table_fits_and_holds_every_number(width: int, num_policies: int, roles: tuple[str, ...]) -> None:
    shown = io.StringIO()
    table = cross(num_policies, roles, "train_dir_of_the_night_before_last_monday")
    print_cross_play(table, Console(file=shown, width=width, highlight=False))
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    rates = sum(line.count("0.") + line.count("1.00") for line in lines)
    assert rates == num_policies**2 + len(table.worst_case)
    assert not any("…" in line for line in lines if " to " in line)  # names are whole where the ratings are
    squeezed = "".join("".join(line.split()) for line in lines)
    assert all(name.split("@")[0][-8:] in squeezed for name in table.ratings.names)


def test_cycles_are_flagged() -> None:
    def shown(table: CrossPlay) -> str:
        text = io.StringIO()
        print_cross_play(table, Console(file=text, width=200, highlight=False))
        return text.getvalue().splitlines()[-1]

    wins = {(0, 1): 95.0, (1, 2): 95.0, (0, 2): 5.0}

    def table(change: float) -> CrossPlay:
        records = [
            PairingRecord(
                first=i, second=j, wins=50 + (wins.get((i, j), 50) - 50) * change, draws=0, episodes=100,
                effective_episodes=100, first_return=0, second_return=0,
            )
            for i in range(3)
            for j in range(i, 3)
        ]  # fmt: skip
        pinned = [PinnedPolicy(name=f"p{k}", requested="", uri="", sha256="", num_bytes=0) for k in range(3)]
        return summarise(records, pinned, env="desk", roles=())

    assert shown(table(1.0)).startswith("cycles: 100% of the triples surely beat each other in a circle")
    assert shown(table(0.1)).endswith("in these games, none of them surely")
    assert shown(table(0.0)) == "cycles: none"


def test_names_of_other_people_move_no_cursor() -> None:
    shown = io.StringIO()
    print_cross_play(cross(2, ("\x1b[2J", "[red]b"), "x"), Console(file=shown, width=100, highlight=False))
    assert "\x1b" not in shown.getvalue()
    assert "[red]b" in shown.getvalue()
