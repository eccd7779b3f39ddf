"""`dual-policy npc`: what the words name, as text and as JSON; one line for every mistake; locks that train."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dual_policy_plugin
from dual_policy_plugin.checkpoint import PolicyFile, encode_policy
from dual_policy_plugin.cli import main
from dual_policy_plugin.npc.cache import Cache
from dual_policy_plugin.npc.candidates import Candidate
from dual_policy_plugin.npc.sources import SOURCES
from dual_policy_plugin.npc.uri import NpcUri
from dual_policy_plugin.types import ObservationSpace
from tests.harness import logging_as_it_was
from tests.services.fixtures import s3_server, wandb_server  # noqa: F401
from tests.services.s3_server import S3Server
from tests.services.wandb_server import WandbServer

ROOT = Path(dual_policy_plugin.__file__).parent.parent
BUILTINS = ROOT / "dual_policy_plugin" / "builtin" / "arena"
URI = "trainer.dual_policy.checkpoint_npc.uri"
WEAK = ["+dual_policy=checkpoint", f"{URI}=builtin://arena/weak"]
SMALL = [
    "env.num_envs=4", "env.episode_steps=16", "trainer.horizon=8", "trainer.num_minibatches=2", "trainer.threads=1",
    "trainer.precision=fp32", "agent.hidden_size=16", "evals.episodes=0", "device=cpu", "trainer.total_timesteps=128",
    "report=false",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder and a cache of its own; log handlers and level as they were."""
    for name in ("HYDRA_FULL_ERROR", "LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DUAL_POLICY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with logging_as_it_was():
        yield


def policy(number: int = 0, **metadata: Any) -> bytes:
    """The bytes of a policy file with 12 + 3 parameters, all of them `number`."""
    file = PolicyFile(
        architecture="mlp",
        args={"hidden_size": 4},
        observation_space=ObservationSpace(kind="vector", shape=(3,), features=("x", "y", "z")),
        actions=("left", "right"),
        tensors={"a.weight": torch.full((4, 3), float(number)), "b": torch.full((3,), number, dtype=torch.int64)},
        metadata=metadata,
    )
    return encode_policy(file)


@pytest.fixture
def old() -> Path:
    """A folder of four checkpoints, written in an order that says nothing."""
    folder = Path("old")
    folder.mkdir()
    for epoch, rate, run in ((9, 0.25, "a"), (10, 0.75, "b"), (2, 0.5, "a"), (3, 0.125, "b")):
        data = policy(epoch, epoch=epoch, step=epoch * 1000, run=run, metrics={"dual_policy/win_rate": rate})
        (folder / f"model_{epoch:04d}.safetensors").write_bytes(data)
    return folder


def answer(capsys: pytest.CaptureFixture[str], *words: str, notes: str = "") -> str:
    """Standard output of `dual-policy npc <words>`, which must succeed with just these notes on standard error."""
    code = main(["npc", *words])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, notes)
    return captured.out


def found(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    return json.loads(answer(capsys, "resolve", *words, "--json"))  # type: ignore[no-any-return]


def error_line(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["npc", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


# resolve


def test_the_table_says_what_was_found(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["resolve", "old", "--type", "top", "--range", "2", "--metric", "dual_policy/win_rate"]
    lines = answer(capsys, *words).splitlines()
    digests = [fact["sha256"][:12] for fact in found(capsys, *words[1:])]
    size = (old / "model_0010.safetensors").stat().st_size
    head = ["Name", "Version", "Step", "dual_policy/win_rate", "Parameters", "Architecture", "Spaces", "SHA-256"]
    assert lines[0].split() == [*head, "Size", "URI"]
    for line, epoch, rate, digest in zip(lines[1:], (10, 2), ("0.75", "0.5"), digests, strict=True):
        cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
        uri = f"file://{old.resolve()}/model_{epoch:04d}.safetensors"
        shown = [f"model_{epoch:04d}", str(epoch), str(epoch * 1000), rate, "15", "mlp", "vector 3, 2 actions", digest]
        assert cells == [*shown, f"{size} B", uri]


def test_json_holds_all_that_is_known(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (fact,) = found(capsys, "old")
    path = (old / "model_0010.safetensors").resolve()
    assert fact == {
        "name": "model_0010",
        "version": "10",
        "requested": "old",
        "uri": f"file://{path}",
        "sha256": Cache(Path("unused")).put(path.read_bytes()),
        "bytes": path.stat().st_size,
        "script": None,
        "architecture": "mlp",
        "parameters": 15,
        "observations": "vector 3",
        "actions": 2,
        "metadata": {"epoch": 10, "step": 10000, "run": "b", "dual_policy/win_rate": 0.75},
    }


@pytest.mark.parametrize(
    ("words", "epochs"),
    [
        ([], [10]),
        (["--type", "latest"], [10]),
        (["--type=latest", "--range=3"], [10, 9, 3]),
        (["--type", "top"], [10]),
        (["--type", "top", "--range", "4", "--metric", "dual_policy/win_rate"], [10, 2, 9, 3]),
        (["--type", "all"], [2, 3, 9, 10]),
        (["--type", "top", "--metric", "parameters", "--filter", "epoch=3"], [3]),
        (["--type", "all", "--filter", "run=a"], [2, 9]),
        (["--type", "latest", "--filter", "run=a", "--filter", "epoch=2"], [2]),
        (["--type", "top", "--filter", "dual_policy/win_rate=0.125"], [3]),
    ],
)
def test_selectors(words: list[str], epochs: list[int], old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [fact["metadata"]["epoch"] for fact in found(capsys, "old", *words)] == epochs


def test_the_metric_has_a_column_with_every_selector(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for metric, value in (("parameters", "15"), ("run", "b"), ("dual_policy/win_rate", "0.75"), ("nope", "-")):
        lines = answer(capsys, "resolve", "old", "--metric", metric).splitlines()
        assert lines[0].split()[3] == metric
        assert lines[1].split()[3] == value


def test_rand_is_drawn_with_the_seed(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draws = []
    for seed in range(12):
        words = ["old", "--type", "rand", "--range", "2", "--seed", str(seed)]
        draws.append(tuple(fact["metadata"]["epoch"] for fact in found(capsys, *words)))
        assert draws[-1] == tuple(fact["metadata"]["epoch"] for fact in found(capsys, *words))
    assert len(set(draws)) > 3


def test_every_printed_uri_resolves_when_pasted_back(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for fact in [*found(capsys, "old", "--type", "all"), *found(capsys, "builtin://arena/hunter")]:
        (again,) = found(capsys, fact["uri"])
        assert (again["uri"], again["sha256"], again["name"]) == (fact["uri"], fact["sha256"], fact["name"])


def test_a_script_and_a_pt_file_say_what_they_can(capsys: pytest.CaptureFixture[str]) -> None:
    line = answer(capsys, "resolve", "builtin://arena/hunter").splitlines()[1]
    assert line.split()[:7] == ["hunter", "-", "-", "-", "-", "hunter", "-"]
    assert line.split()[8:] == ["-", "builtin://arena/hunter"]
    torch.save({"a": torch.ones(3)}, "x.pt")
    (fact,) = found(capsys, "x.pt")
    assert (fact["architecture"], fact["parameters"], fact["version"]) == (None, None, None)
    assert fact["bytes"] == Path("x.pt").stat().st_size


def test_a_damaged_file_is_noted_and_standard_output_stays_json(capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.safetensors").write_bytes(policy()[:100])
    assert main(["npc", "resolve", "x.safetensors", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)[0]["bytes"] == 100
    assert captured.err.startswith(f"note: file://{Path.cwd()}/x.safetensors: it is cut short")
    assert captured.err.count("\n") == 1


def test_no_letter_of_a_policy_reaches_the_terminal_as_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.safetensors").write_bytes(policy(epoch=1, npcs=[{"name": "\x1b[2Jred\nline"}], run="\x1b[2Jred"))
    text = answer(capsys, "inspect", "x.safetensors")
    assert r"trained against  name=\x1b[2Jred\nline" in text
    assert "\x1b" not in text + answer(capsys, "resolve", "x.safetensors", "--metric", "run")


def test_what_a_client_prints_is_no_answer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    builtin = SOURCES["builtin"]

    def find(uri: NpcUri, base: Path | None) -> Candidate:
        print("a new version of the client is there!")
        return builtin.find(uri, base)

    monkeypatch.setitem(SOURCES, "builtin", replace(builtin, find=find))
    for words in (["resolve", "builtin://arena/weak", "--json"], ["inspect", "builtin://arena/weak", "--json"]):
        text = answer(capsys, *words, notes="a new version of the client is there!\n")
        assert "builtin://arena/weak" in json.dumps(json.loads(text))
    assert main(["npc", "lock", *WEAK]) == 0
    assert capsys.readouterr().out == "npc.lock.json\n"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["resolve"], "required: URI"),
        (["resolve", "old", "--type", "lates"], "--type=lates is not possible; use specific, latest, top, rand or all"),
        (["resolve", "old", "--type", "latest", "--range", "0"], "--range=0 is not possible"),
        (["resolve", "old", "--type", "latest", "--range", "x"], "'x' is no whole number"),
        (["resolve", "old", "--type", "latest", "--range", "5"], "asks for more than the 4 that there are"),
        (["resolve", "old", "--range", "2"], "--range=2 is not possible; type=specific takes no range"),
        (["resolve", "old", "--filter", "run"], "'run' is no KEY=VALUE, for example run=my_experiment"),
        (["resolve", "old", "--filter", "=a"], "'=a' is no KEY=VALUE"),
        (["resolve", "old", "--type", "all", "--filter", "run=c"], "none of 4 policies has run=c; run is a, b"),
        (["resolve", "old", "--type", "top", "--metric", "win_rate"], "4 of 4 policies have no win_rate (model_0002, "),
        (["resolve", "old", "--typ"], "--typ"),
        (["resolve", "odl"], "did you mean old?"),
        (["resolve", "builtin://arena/weka"], "did you mean builtin://arena/weak?"),
        (["resolve", "gopher://x/y"], "unknown scheme gopher://"),
        (["resolve", "s3://AKIA:sesame@bucket/key"], "a URI holds a user name or password"),
        (["inspect", "nothing.pt"], "nothing.pt: no such file"),
        (["inspct", "x"], "did you mean `dual-policy npc inspect`? there are resolve, inspect, lock, cache"),
        (["cache"], "required: ACTION"),
        (["cache", "list"], "'ls', 'prune', 'verify'"),
        (["cache", "prune", "--gb", "-1"], "'-1' is no number of gigabytes"),
        (["cache", "ls", "--gb", "1"], "--gb goes with prune only"),
        (["lock"], "required: CONFIG"),
        (["lock", "seed=1"], "seed=1: no NPC in this config; add +dual_policy=checkpoint"),
        (["lock", "nothing.yaml"], "nothing.yaml cannot be read: No such file"),
        (["lock", *WEAK, "trainer.horizn=3"], "did you mean trainer.horizon?"),
        (["lock", *WEAK, "-o", "old"], "old is a folder; name the file, for example old/npc.lock.json"),
        (["lock", *WEAK, "-o", "no/where/x.json"], "no/where/x.json could not be written"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], part: str, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(capsys, *words)
    assert part in line
    assert "sesame" not in line
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["old"]


def test_a_candidate_without_the_metric_is_counted_and_named(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (old / "model_0011.safetensors").write_bytes(policy(11, epoch=11, run="b"))
    words = ["resolve", "old", "--type", "top", "--metric", "dual_policy/win_rate"]
    assert "1 of 5 policies have no dual_policy/win_rate (model_0011)" in error_line(capsys, *words)
    (best,) = found(capsys, *words[1:], "--filter", "run=a")
    assert best["metadata"]["epoch"] == 2


def test_help_is_for_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"]):
        assert answer(capsys, *words).startswith("usage: dual-policy npc COMMAND [...]")
    for command in ("resolve", "inspect", "lock", "cache"):
        assert main(["npc", command, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: dual-policy npc {command}")


# inspect


def lines_of(text: str) -> dict[str, str]:
    return {key.strip(): value.strip() for key, _, value in (line.partition("  ") for line in text.splitlines())}


def test_inspect_says_what_a_policy_file_holds(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    npcs = [{"name": "weak", "uri": "builtin://arena/weak", "sha256": "0" * 64}]
    Path("x.safetensors").write_bytes(policy(epoch=7, step=70, npcs=npcs, metrics={"charts/agent_step": 70.5}))
    said = lines_of(answer(capsys, "inspect", "x.safetensors", "--tensors"))
    size = Path("x.safetensors").stat().st_size
    assert {key: said[key] for key in said if key not in ("uri", "sha256")} == {
        "kind": "policy file",
        "size": f"{size} B ({size} bytes)",
        "architecture": "mlp",
        "args": '{"hidden_size": 4}',
        "parameters": "15",
        "tensors": "2",
        "observations": "vector 3, 3 features: x, y, z",
        "actions": "2: left, right",
        "epoch": "7",
        "step": "70",
        "charts/agent_step": "70.5",
        "trained against": f"name=weak sha256={'0' * 64} uri=builtin://arena/weak",
        "a.weight": "float32 (4, 3)",
        "b": "int64 (3,)",
    }
    fact = json.loads(answer(capsys, "inspect", "x.safetensors", "--json"))
    assert fact["uri"] == said["uri"]
    assert fact["sha256"] == said["sha256"]
    assert fact["npcs"] == npcs
    assert fact["observation_space"]["features"] == ["x", "y", "z"]
    assert fact["action_names"] == ["left", "right"]
    assert fact["tensors"][0] == {"name": "a.weight", "dtype": "float32", "shape": [4, 3]}


def test_inspect_of_other_files(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"net.w": torch.ones(2, 5)}}, "x.pt")
    said = lines_of(answer(capsys, "inspect", "x.pt", "--tensors"))
    assert said["kind"] == "state dict (.pt); checkpoint_npc.agent names its net"
    assert said["net.w"] == "float32 (2, 5)"
    assert said["architecture"] == "-"
    from safetensors.torch import save

    Path("y.safetensors").write_bytes(save({"w": torch.ones(2)}))
    said = lines_of(answer(capsys, "inspect", "y.safetensors"))
    assert said["kind"].startswith("weights without a description; convert them with `dual-policy import`")
    assert said["parameters"] == "2"
    assert lines_of(answer(capsys, "inspect", "builtin://arena/hunter"))["kind"] == "script of this package"


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (policy()[:-1], "it is cut short"),
        (policy() + b"x", "1 bytes follow its last tensor"),
        (policy()[:-20] + b"\xff" * 20, "x.safetensors: "),
        (b"not a policy at all", "it is no .safetensors file"),
        (b"", "0 bytes are too few"),
    ],
)
def test_inspect_refuses_what_loading_would_refuse(data: bytes, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    nan = policy()
    start = 8 + int.from_bytes(nan[:8], "little")
    Path("x.safetensors").write_bytes(data if b"\xff" * 20 not in data else nan[:start] + b"\xff" * (len(nan) - start))
    line = error_line(capsys, "inspect", "x.safetensors")
    assert part in line
    assert ("not finite" in line) == (b"\xff" * 20 in data)


# lock


def lock_of(path: Path | str = "npc.lock.json") -> list[dict[str, Any]]:
    return json.loads(Path(path).read_text("utf-8"))["npcs"]  # type: ignore[no-any-return]


def write(path: str, text: str) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, "utf-8")
    return path


def test_a_lock_is_made_without_training(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (fact,) = found(capsys, "old")
    note = f"npc model_0010: {fact['uri']} sha256 {fact['sha256'][:12]}"
    words = ["lock", "+dual_policy=checkpoint", f"{URI}=old"]
    assert answer(capsys, *words, notes=f"{note}\n") == "npc.lock.json\n"
    (entry,) = lock_of()
    assert {key: entry[key] for key in ("requested", "uri", "sha256", "bytes", "name")} == {
        key: fact[key] for key in ("requested", "uri", "sha256", "bytes", "name")
    }
    assert not Path("train_dir").exists()
    assert answer(capsys, *words, notes=f"{note}\n") == "npc.lock.json\n"  # nothing changed
    (old / "model_0010.safetensors").write_bytes(policy(11))
    (other,) = found(capsys, "old")
    note = f"npc model_0010: {fact['uri']} sha256 {other['sha256'][:12]} (changed)"
    assert answer(capsys, *words, notes=f"{note}\n") == "npc.lock.json\n"
    assert lock_of()[0]["sha256"] == other["sha256"]


USER = f"# @package _global_\ntrainer:\n  dual_policy:\n    enabled: true\n    checkpoint_npc:\n      uri: {'{uri}'}\n"


def test_a_lock_of_files(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    user = write("mine of 2025/user/foo.yaml", USER.format(uri="builtin://arena/weak"))
    primary = write(
        "mine of 2025/job.yaml",
        "defaults:\n  - train\n  - dual_policy: checkpoint\n  - _self_\n"
        "trainer:\n  dual_policy:\n    checkpoint_npc:\n      uri: ${npc:old}\n",
    )
    whole = write(
        "whole.yml", "trainer:\n  dual_policy:\n    enabled: true\n    checkpoint_npc: {uri: builtin://arena/hunter}\n"
    )
    wanted = {user: "builtin://arena/weak", primary: "old", whole: "builtin://arena/hunter"}
    for path, requested in wanted.items():
        assert main(["npc", "lock", path, "-o", "one.json"]) == 0
        assert [entry["requested"] for entry in lock_of("one.json")] == [requested]
    assert main(["npc", "lock", *wanted, *wanted, "--output", "all.json"]) == 0
    assert capsys.readouterr().out == "one.json\none.json\none.json\nall.json\n"
    assert [entry["requested"] for entry in lock_of("all.json")] == list(wanted.values())
    assert main(["npc", "lock", "seed=3", user, f"{URI}=builtin://arena/strong", "-o", "one.json"]) == 0
    assert [entry["uri"] for entry in lock_of("one.json")] == ["builtin://arena/strong"]
    capsys.readouterr()
    assert f"seed=3 cannot be added to {whole}, which is a whole config" in error_line(capsys, "lock", whole, "seed=3")


def test_a_lock_of_configs_that_mean_different_policies(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(old, "other")

    def config(name: str, uri: str, seed: int) -> str:
        npc = f"{{uri: {uri}, type: rand}}"
        return write(name, f"seed: {seed}\ntrainer:\n  dual_policy: {{enabled: true, checkpoint_npc: {npc}}}\n")

    config("a.yaml", "old", 1)
    config("b.yaml", "other", 1)
    assert main(["npc", "lock", "a.yaml", "b.yaml"]) == 0
    drawn = lock_of()
    assert [entry["requested"] for entry in drawn] == ["old type=rand range=1", "other type=rand range=1"]
    assert len({entry["name"] for entry in drawn}) == 2
    for seed in range(2, 40):
        assert main(["npc", "lock", config("c.yaml", "old", seed), "-o", "c.json"]) == 0
        if lock_of("c.json")[0]["uri"] != drawn[0]["uri"]:
            break
    capsys.readouterr()
    assert "means other policies in another of the configs" in error_line(capsys, "lock", "a.yaml", "c.yaml")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [", "x.yaml is no valid YAML"),
        ("- a\n", "x.yaml is no config; a config has keys such as trainer"),
        ("trainr: {}\n", "trainr is not a known key; did you mean trainer?"),
        ("a: ${npc:\n", "x.yaml is no valid YAML"),
        ("defaults:\n  - nope\n", "there is no nope"),
    ],
)
def test_files_that_are_no_config(text: str, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("x.yaml", text)
    assert part in error_line(capsys, "lock", "x.yaml")
    assert not Path("npc.lock.json").exists()


def test_a_run_trains_from_a_lock_and_stops_at_other_bytes(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(old)
    old.mkdir()
    shutil.copy(BUILTINS / "weak.safetensors", old / "model_0001.safetensors")
    words = ["+dual_policy=checkpoint", f"{URI}=old"]
    assert main(["npc", "lock", *words]) == 0
    shutil.copy(BUILTINS / "medium.safetensors", old / "model_0002.safetensors")
    locked = "trainer.dual_policy.lock=npc.lock.json"
    assert main(["train", *SMALL, *words, locked, "run=x"]) == 0, capsys.readouterr().err
    assert [npc["uri"] for npc in json.loads(Path("train_dir/x/result.json").read_bytes())["npcs"]] == [
        f"file://{old.resolve()}/model_0001.safetensors"
    ]
    assert lock_of("train_dir/x/npc.lock.json")[0]["sha256"] == lock_of()[0]["sha256"]
    shutil.copy(BUILTINS / "strong.safetensors", old / "model_0001.safetensors")
    capsys.readouterr()
    assert main(["train", *SMALL, *words, locked, "run=y"]) == 2
    assert f"pins model_0001 as sha256 {lock_of()[0]['sha256'][:12]}" in capsys.readouterr().err


def test_a_lock_holds_all_that_a_run_pins(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "trainer.initial_policy.uri=old/model_0002.safetensors",
        "evals.opponents=['${npc:old}',builtin://arena/weak,other]",
    ]
    shutil.copytree(old, "other")
    npcs = ["trainer.dual_policy.checkpoint_npc.type=latest", "trainer.dual_policy.checkpoint_npc.range=2"]
    assert main(["npc", "lock", "+dual_policy=checkpoint", f"{URI}=old", *npcs, *words]) == 0
    assert [(entry["role"], entry["requested"], entry["name"]) for entry in lock_of()] == [
        ("npc", "old type=latest range=2", "model_0010"),
        ("npc", "old type=latest range=2", "model_0009"),
        ("initial", "old/model_0002.safetensors", "model_0002"),
        ("opponent", "old", "model_0010"),
        ("opponent", "builtin://arena/weak", "weak"),
        ("opponent", "other", "model_0010-2"),
    ]
    assert capsys.readouterr().err.splitlines()[2].startswith("initial model_0002: file:///")


def test_a_request_that_a_given_lock_does_not_know(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["npc", "lock", "+dual_policy=checkpoint", f"{URI}=old"]) == 0
    capsys.readouterr()
    given = "trainer.dual_policy.lock=npc.lock.json"
    line = error_line(capsys, "lock", *WEAK, given, "-o", "other.json")
    assert "builtin://arena/weak: not in npc.lock.json, which has old" in line
    assert not Path("other.json").exists()


def test_another_file_is_not_replaced_by_a_lock(capsys: pytest.CaptureFixture[str]) -> None:
    write("notes.json", "mine")
    assert "notes.json: not valid JSON" in error_line(capsys, "lock", *WEAK, "-o", "notes.json")
    assert Path("notes.json").read_text("utf-8") == "mine"


def test_the_config_of_a_run_gives_the_runs_own_lock(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind = "trainer.dual_policy.checkpoint_npc.type=latest"
    shutil.rmtree(old)
    old.mkdir()
    shutil.copy(BUILTINS / "weak.safetensors", old / "model_0001.safetensors")
    assert main(["train", *SMALL, "+dual_policy=checkpoint", f"{URI}=old", kind, "run=x"]) == 0, capsys.readouterr().err
    shutil.copy(BUILTINS / "medium.safetensors", old / "model_0002.safetensors")
    assert main(["npc", "lock", "train_dir/x/config.yaml"]) == 0, capsys.readouterr().err
    assert lock_of() == lock_of("train_dir/x/npc.lock.json")
    assert lock_of()[0]["uri"] == f"file://{old.resolve()}/model_0001.safetensors"
    shutil.copy(BUILTINS / "strong.safetensors", old / "model_0001.safetensors")
    capsys.readouterr()
    assert "pins model_0001 as sha256" in error_line(capsys, "lock", "train_dir/x/config.yaml")


def test_the_lock_of_a_run_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    write("train_dir/x/checkpoints/model_0000.safetensors", "")
    line = error_line(capsys, "lock", *WEAK, "-o", "train_dir/x/npc.lock.json")
    assert "train_dir/x/npc.lock.json is the lock of a run that has begun; choose another --output" in line
    assert not Path("train_dir/x/npc.lock.json").exists()


# cache


def test_the_cache_is_listed_pruned_and_verified(capsys: pytest.CaptureFixture[str]) -> None:
    cache, now = Cache(), 1_700_000_000
    root = cache.root
    assert answer(capsys, "cache", "ls", notes=f"0 policies (0 B) in {root}, of 20 GB at most\n") == ""
    digests = [cache.put(bytes([i]) * 1000, f"s3://bucket/{i}") for i in range(4)]
    for i, digest in enumerate(digests):
        os.utime(cache.path(digest), (now + i, now + i))
    with cache.hold([digests[0]]):
        note = f"4 policies (4 kB) in {root}, of 20 GB at most\n"
        lines = answer(capsys, "cache", "ls", notes=note).splitlines()
        assert lines[0].split() == ["SHA-256", "Size", "Last", "used", "In", "use", "URIs"]
        assert lines[1].split() == [digests[3][:12], "1", "kB", "2023-11-14T22:13:23+00:00", "no", "s3://bucket/3"]
        assert [line.split()[4] for line in lines[1:]] == ["no", "no", "no", "yes"]
        listed = json.loads(answer(capsys, "cache", "ls", "--json"))
        assert listed[3] == {
            "sha256": digests[0],
            "bytes": 1000,
            "last_used": "2023-11-14T22:13:20+00:00",
            "is_held": True,
            "uris": ["s3://bucket/0"],
        }
        note = f"2 removed, 2 policies (2 kB) left in {root}\n"
        assert answer(capsys, "cache", "prune", "--gb", "0.0000025", notes=note).split() == digests[1:3]
    assert [entry["sha256"] for entry in json.loads(answer(capsys, "cache", "ls", "--json"))] == [
        digests[3],
        digests[0],
    ]
    answer(capsys, "cache", "verify", notes=f"2 whole, 0 damaged and removed, in {root}\n")
    cache.path(digests[0]).write_bytes(b"\0" * 999 + b"\1")
    assert main(["npc", "cache", "verify"]) == 1
    captured = capsys.readouterr()
    assert captured.out == f"{digests[0]}\n"
    assert captured.err == f"1 whole, 1 damaged and removed, in {root}\n"


def test_a_bad_cache_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUAL_POLICY_CACHE_GB", "much")
    assert "DUAL_POLICY_CACHE_GB=much is not possible" in error_line(capsys, "cache", "ls")


# Services, each over the wire from a fresh cache


def metadata(epoch: int) -> Mapping[str, Any]:
    return {"epoch": epoch, "step": epoch * 10, "metrics": {"dual_policy/win_rate": 1 / epoch}}


def test_policies_on_s3(s3_server: S3Server, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    client = s3_server.client()
    client.create_bucket(Bucket="policies")
    for epoch in (1, 12, 3):
        client.put_object(
            Bucket="policies", Key=f"run/model_{epoch:04d}.safetensors", Body=policy(epoch, **metadata(epoch))
        )
    capsys.readouterr()
    words = ["s3://policies/run/", "--type", "top", "--range", "2", "--metric", "dual_policy/win_rate"]
    best = found(capsys, *words)
    assert [fact["metadata"]["epoch"] for fact in best] == [1, 3]
    assert [fact["version"] for fact in best] == ["1", "3"]
    (again,) = found(capsys, best[0]["uri"])
    assert again["sha256"] == best[0]["sha256"]
    assert len(json.loads(answer(capsys, "cache", "ls", "--json"))) == 2
    line = error_line(capsys, "resolve", "s3://policies/run/model_0002.safetensors")
    assert "s3://policies/run/model_0002.safetensors" in line


def test_policies_on_wandb(wandb_server: WandbServer, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    for epoch in (5, 1, 7):
        wandb_server.add_artifact(
            "team",
            "arena",
            "old.run",
            files={"model.safetensors": policy(epoch, **metadata(epoch))},
            metadata=metadata(epoch),
        )
    with wandb_server.client():
        capsys.readouterr()
        assert main(["npc", "resolve", "wandb://team/arena/model/old.run", "--json"]) == 0
        captured = capsys.readouterr()
        (latest,) = json.loads(captured.out)
        assert (latest["version"], latest["uri"]) == ("v2", "wandb://team/arena/model/old.run:v2")
        assert (latest["parameters"], latest["architecture"], latest["metadata"]["epoch"]) == (15, "mlp", 7)
        words = ["wandb://team/arena/old.run", "--type", "top", "--metric", "dual_policy/win_rate", "--json"]
        assert main(["npc", "resolve", *words]) == 0
        (best,) = json.loads(capsys.readouterr().out)
        assert best["uri"] == "wandb://team/arena/model/old.run:v1"
        assert main(["npc", "resolve", "wandb://team/arena/model/nothing:latest"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: Could not load NPC policy from WandB artifact")
        assert "dual-policy runs" in line


def test_finding_and_locking_need_no_torch(old: Path) -> None:
    probe = (
        "import sys\n"
        "from dual_policy_plugin.cli import main\n"
        "for words in (['resolve', 'old', '--type', 'all'], ['cache', 'ls'],\n"
        f"              ['lock', '+dual_policy=checkpoint', '{URI}=old']):\n"
        "    assert main(['npc', *words]) == 0\n"
        "print([name for name in ('torch', 'wandb', 'boto3') if name in sys.modules])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", probe]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
