"""What is pinned before a launch, what is carried to a node, and that the node plays those bytes and no others."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dual_policy_plugin.errors import ConfigError, DigestError, LaunchError, NpcError
from dual_policy_plugin.hydra_app.composition import compose_config
from dual_policy_plugin.launch import preflight
from dual_policy_plugin.launch.preflight import carry_entries, check_launch, npc_table, pin_config, store_lock
from dual_policy_plugin.npc.lock import locked_as, pin_locked, read_lock, write_lock
from dual_policy_plugin.npc.resolver import read_verified
from tests.launch.launching import AGAINST, MEDIUM, URI, only_this_machine
from tests.launch.node import ROOT
from tests.services.fixtures import s3_server  # noqa: F401
from tests.services.s3_server import S3Server

BUILTINS = ROOT / "dual_policy_plugin" / "builtin" / "arena"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_this_machine(tmp_path, monkeypatch)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def policy_file(name: str) -> Path:
    """A policy of the package as a file of the user's."""
    source = next(path for path in BUILTINS.iterdir() if path.stem == "medium" and path.suffix == ".safetensors")
    target = Path(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
    return target


def test_every_policy_is_pinned_in_its_role() -> None:
    policy_file("old/checkpoints/model_0007.safetensors")
    found = check_launch(
        [MEDIUM, "trainer.initial_policy.uri=old", "evals.opponents=[builtin://arena/strong,builtin://arena/hunter]",
         "evals.held_out=[builtin://arena/weak]", "trainer.dual_policy.pool=[builtin://arena/forager]"]
    )  # fmt: skip
    assert [(one.role, one.name, one.num_bytes > 0) for one in found.entries] == [
        ("npc", "medium", True), ("npc", "forager", False), ("initial", "old.model_0007", True),
        ("opponent", "strong", True), ("opponent", "hunter", False), ("held_out", "weak", True),
    ]  # fmt: skip
    initial = found.entries[2]
    path = Path("old/checkpoints/model_0007.safetensors").resolve()
    assert initial.uri == f"file://{path}"
    assert initial.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert initial.requested == "old"
    assert npc_table(found.entries).splitlines()[3].split() == [
        "initial", "old.model_0007", initial.sha256[:12], str(initial.num_bytes), "B", initial.uri,
    ]  # fmt: skip


def test_a_policy_may_not_be_npc_and_held_out() -> None:
    with pytest.raises(ConfigError, match=r"held_out=builtin://arena/medium is the NPC medium of this run"):
        check_launch([MEDIUM, "evals.held_out=[builtin://arena/medium]"])


def test_files_are_carried_by_their_digest_and_verified_there(tmp_path: Path) -> None:
    mine = policy_file("a b/my policy.safetensors")
    found = check_launch([*AGAINST, f'{URI}="{mine}"', "evals.opponents=[builtin://arena/weak]"])
    there, files = carry_entries(found.entries, str(tmp_path / "node"))
    digest = hashlib.sha256(mine.read_bytes()).hexdigest()
    place = tmp_path / "node" / f"{digest}.safetensors"
    assert files == {str(place): mine.resolve()}
    assert [one.uri for one in there] == [f"file://{place}", "builtin://arena/weak"]
    assert [replace(one, uri="") for one in there] == [replace(one, uri="") for one in found.entries]

    write_lock(tmp_path / "node.json", there)
    place.parent.mkdir()
    shutil.copy(mine, place)
    mine.unlink()  # a node has none of this machine's files
    (pinned,) = pin_locked(read_lock(tmp_path / "node.json"), str(mine))
    assert hashlib.sha256(read_verified(pinned)).hexdigest() == digest
    place.write_bytes(place.read_bytes()[:-1] + b"x")
    with pytest.raises(DigestError):
        pin_locked(read_lock(tmp_path / "node.json"), str(mine))


def test_a_node_finds_what_is_in_its_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = policy_file("mine.safetensors")
    there, files = carry_entries(check_launch([*AGAINST, f"{URI}=mine.safetensors"]).entries)
    place, lock = store_lock(there)
    (carried,) = files
    assert carried.startswith(f"{preflight.NODE_FOLDER}/")
    monkeypatch.setenv("HOME", str(tmp_path / "there"))
    monkeypatch.chdir(tmp_path)
    for path, source in {**files, place: lock}.items():
        Path(path).expanduser().parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, Path(path).expanduser())
    shutil.rmtree(tmp_path / "work")
    config, _ = compose_config([*AGAINST, f"{URI}=mine.safetensors", f'trainer.dual_policy.lock="{place}"'])
    (entry,) = pin_config(config)
    (pinned,) = pin_locked([entry], "mine.safetensors")
    assert pinned.path == tmp_path / "there" / ".dual-policy-launch" / Path(carried).name
    assert mine.name == "mine.safetensors"


def test_a_launch_has_one_lock(tmp_path: Path) -> None:
    entries = check_launch([MEDIUM]).entries
    place, path = store_lock(entries)
    assert store_lock([replace(one, when="another time") for one in entries]) == (place, path)
    assert place == f"{preflight.NODE_FOLDER}/{path.name}"
    assert path.parent == tmp_path / "cache" / "launches"
    assert [one.uri for one in read_lock(path)] == ["builtin://arena/medium"]
    other = check_launch([*AGAINST, f"{URI}=builtin://arena/weak"]).entries
    assert store_lock(other)[0] != place


def test_a_given_lock_is_kept() -> None:
    policy_file("runs/checkpoints/model_0001.safetensors")
    entries = check_launch([*AGAINST, f"{URI}=runs"]).entries
    write_lock(Path("npc.lock.json"), entries)
    policy_file("runs/checkpoints/model_0002.safetensors")
    words = [*AGAINST, f"{URI}=runs"]
    assert check_launch(words).entries[0].name == "runs.model_0002"
    locked = check_launch([*words, "trainer.dual_policy.lock=npc.lock.json"])
    assert [one.name for one in locked.entries] == ["runs.model_0001"]
    Path("runs/checkpoints/model_0001.safetensors").write_bytes(b"x")
    with pytest.raises(DigestError):
        check_launch([*words, "trainer.dual_policy.lock=npc.lock.json"])


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_run_that_has_begun_stays_with_its_own_lock(is_shared: bool) -> None:
    policy_file("runs/checkpoints/model_0001.safetensors")
    words = [*AGAINST, f"{URI}=runs", "run=mine"]
    Path("train_dir/mine").mkdir(parents=True)
    write_lock(Path("train_dir/mine/npc.lock.json"), check_launch(words).entries)
    policy_file("runs/checkpoints/model_0002.safetensors")
    assert check_launch(words, is_shared=is_shared).entries[0].name == "runs.model_0002"  # it has not begun
    policy_file("train_dir/mine/checkpoints/model_0000.safetensors")
    found = check_launch(words, is_shared=is_shared)
    assert found.entries[0].name == ("runs.model_0001" if is_shared else "runs.model_0002")


def test_a_mirrored_run_stays_with_what_was_fetched_for_it(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,  # noqa: F811
) -> None:  # fmt: skip
    data = policy_file("p.safetensors").read_bytes()
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    client = s3_server.client()
    client.create_bucket(Bucket="old")
    client.put_object(Bucket="old", Key="npc/model_0001.safetensors", Body=data)
    mirror = tmp_path / "mirror"
    words = [*AGAINST, f"{URI}=s3://old/npc/", "trainer.dual_policy.checkpoint_npc.type=latest",
             "run=mine", f"trainer.sync_uri={mirror}"]  # fmt: skip
    first = check_launch(words).entries
    (mirror / "mine/state").mkdir(parents=True)
    write_lock(mirror / "mine/npc.lock.json", first)
    client.put_object(Bucket="old", Key="npc/model_0002.safetensors", Body=data)
    assert check_launch(words).entries[0].name == "model_0002"  # a start that failed pins anew
    (mirror / "mine/state/checkpoints.json").write_text(json.dumps({"scores": {}, "pinned": {}}))
    assert check_launch(words).entries[0].uri == first[0].uri


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trainer.horizn=3"], "trainer.horizn is not a known key; did you mean trainer.horizon?"),
        (["env.num_agents=0"], "env.num_agents"),
        (["env.widht=9"], "env.widht"),
        ([f"{URI}=builtin://arena/nobody", *AGAINST[:1]], "builtin://arena/nobody"),
        ([f"{URI}=no/such/file", *AGAINST[:1]], "no/such/file"),
        (["seed=1,2"], "seed=1,2 has a comma"),
        (["+user=nobody"], "there is no user/nobody"),
    ],
)
def test_what_cannot_work_is_told_first(words: list[str], says: str) -> None:
    with pytest.raises((ConfigError, NpcError)) as caught:
        check_launch(words)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_masked_choice_is_told(tmp_path: Path) -> None:
    configs = tmp_path / "configs/user"
    configs.mkdir(parents=True)
    (configs / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - /agent/fast\n")
    with pytest.raises(ConfigError, match="agent=mlp is masked by `/agent/fast`"):
        check_launch([f"hydra.searchpath=[file://{tmp_path}/configs]", "agent=mlp", "+user=mine"])


def test_a_runs_name_stays_as_it_was_typed() -> None:
    assert check_launch(["run=2025_11_21"]).config.run == "2025_11_21"


def test_logins_that_the_node_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(*words: str) -> str:
        with pytest.raises(LaunchError) as caught:
            check_launch(words)
        return str(caught.value)

    assert refused("wandb=online") == (
        "wandb.mode=online needs a W&B login on the node, and none is here; set WANDB_API_KEY"
    )
    assert refused("trainer.sync_uri=s3://bucket/x/").startswith("trainer.sync_uri needs an AWS login on the node, ")
    assert refused("trainer.publish_uri=s3://bucket/x/").startswith("trainer.publish_uri needs an AWS login")
    check_launch(["wandb=offline"])
    with monkeypatch.context() as variables:
        variables.setenv("WANDB_MODE", "disabled")
        assert "W&B login" in refused("wandb=online")  # another machine does not see our variables
        assert check_launch(["wandb=online"], is_shared=True).config.wandb.mode == "online"
        variables.setenv("WANDB_MODE", "online")
        with pytest.raises(LaunchError, match="W&B login"):
            check_launch(["wandb=online"], is_shared=True)
    netrc = tmp_path / "home/.netrc"
    netrc.write_text("machine api.wandb.ai login user password 0123456789\n")
    netrc.chmod(0o600)
    check_launch(["wandb=online"])
    assert preflight.wandb_key() == "0123456789"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert "W&B login" in refused("wandb=online")  # another server's key is none
    monkeypatch.setenv("WANDB_API_KEY", "9876543210")
    check_launch(["wandb=online"])
    assert preflight.wandb_key() == "9876543210"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    assert "AWS login" in refused("trainer.publish_uri=s3://bucket/x/")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    check_launch(["trainer.publish_uri=s3://bucket/x/"])
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"]).write_text(
        "[default]\naws_access_key_id=a\naws_secret_access_key=b\naws_session_token=c\n"
    )
    assert preflight.aws_login() == {
        "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_SESSION_TOKEN": "c",
    }  # fmt: skip
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert preflight.aws_login() == {}


def test_an_optimizer_cannot_be_carried() -> None:
    policy_file("old/checkpoints/model_0007.safetensors")
    words = ["trainer.initial_policy.uri=old", "trainer.initial_policy.keep_optimizer=true"]
    found = check_launch(words)
    with pytest.raises(ConfigError, match="keep_optimizer=true needs the run of old, which stays on this machine"):
        preflight.check_carried(found.config, found.entries)
    assert locked_as(found.entries, "old", role="initial")
