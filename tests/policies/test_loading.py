"""Loading: from a URI to a frozen module that acts, and every policy that cannot act refused before the first step."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from dual_policy_plugin.checkpoint import PolicyFile, decode_policy, encode_policy
from dual_policy_plugin.errors import CheckpointError, ConfigError, DigestError, NpcNotFoundError, SpacesError
from dual_policy_plugin.npc.resolver import resolve
from dual_policy_plugin.policies.binding import BoundPolicy
from dual_policy_plugin.policies.build import build_policy
from dual_policy_plugin.policies.loading import (
    import_policy,
    load_policy,
    load_policy_from_checkpoint,
    read_description,
)
from dual_policy_plugin.types import ObservationSpace

ACTIONS = ("noop", "north", "south", "attack")
SPACE = ObservationSpace(
    kind="window",
    shape=(12,),
    features=("empty", "wall", "foe"),
    window=(3, 3),
    own=("ore", "time"),
    scales=(3.0, 255.0),
)
VECTOR = ObservationSpace(kind="vector", shape=(3,), features=("x", "y", "z"))
ARENA = ObservationSpace(
    kind="window",
    shape=(128,),
    features=("empty", "wall", "mine", "altar", "ally", "foe", "frozen_ally", "frozen_foe"),
    window=(11, 11),
    own=("ore", "hearts", "frozen", "cooldown", "time_left"),
    scales=(1.0, 8.0, 8.0, 8.0, 255.0),
)
ARENA_ACTIONS = ("noop", "north", "south", "west", "east", "attack")


def make_policy(agent: str = "fast", space: ObservationSpace = SPACE, hidden_size: int = 8) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return build_policy(agent, {"hidden_size": hidden_size}, space, ACTIONS).requires_grad_(False)


def make_file(agent: str = "fast", space: ObservationSpace = SPACE, **changes: Any) -> PolicyFile:
    file = PolicyFile(
        architecture=agent,
        args={"hidden_size": 8},
        observation_space=space,
        actions=ACTIONS,
        tensors=make_policy(agent, space).state_dict(),
        metadata={"step": 5, "epoch": 1},
    )
    return replace(file, **changes)


def write(path: Path, file: PolicyFile | bytes) -> str:
    path.write_bytes(file if isinstance(file, bytes) else encode_policy(file))
    return str(path)


def save(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def load(uri: str, space: ObservationSpace = SPACE, actions: tuple[str, ...] = ACTIONS, **options: Any) -> nn.Module:
    return load_policy(
        resolve(uri),
        observation_space=space,
        actions=actions,
        default_agent=options.pop("agent", "fast"),
        default_args=options.pop("args", {"hidden_size": 8}),
        device=torch.device("cpu"),
        **options,
    )


def observe(num_rows: int = 16) -> Tensor:
    return torch.randint(0, 3, (num_rows, 12), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


def act(policy: Any, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    answer: tuple[Tensor, Tensor, Tensor] = policy.forward_step(obs, torch.zeros(len(obs), policy.state_size))
    return answer


def assert_same_answers(policy: nn.Module, other: nn.Module, obs: Tensor) -> None:
    other.pack()  # type: ignore[operator]
    for mine, theirs in zip(act(policy, obs), act(other, obs), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("agent", ["fast", "mlp"])
def test_a_loaded_policy_acts_as_the_one_that_was_saved(tmp_path: Path, agent: str) -> None:
    policy = load(write(tmp_path / "m.safetensors", make_file(agent)))
    assert_same_answers(policy, make_policy(agent), observe())
    assert not policy.training
    assert not any(parameter.requires_grad for parameter in policy.parameters())
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}


def test_normalization_statistics_travel_with_the_policy(tmp_path: Path) -> None:
    saved = make_policy("mlp", VECTOR)
    saved.encoder.mean.copy_(torch.tensor([1.0, -2.0, 3.0]))  # type: ignore[union-attr, operator]
    saved.encoder.var.copy_(torch.tensor([4.0, 9.0, 0.5]))  # type: ignore[union-attr, operator]
    file = make_file("mlp", VECTOR, tensors=saved.state_dict())
    policy = load(write(tmp_path / "m.safetensors", file), VECTOR)
    assert policy.encoder.mean.tolist() == [1.0, -2.0, 3.0]  # type: ignore[union-attr]
    obs = torch.randn(16, 3, generator=torch.Generator().manual_seed(2))
    assert_same_answers(policy, saved, obs)


def test_the_public_function_needs_only_the_file(tmp_path: Path) -> None:
    uri = write(tmp_path / "model_0001.safetensors", make_file())
    for text in (uri, f"file://{uri}", str(tmp_path)):
        policy = load_policy_from_checkpoint(text, "cpu")
        assert isinstance(policy, nn.Module)
        assert not policy.training
        assert not any(parameter.requires_grad for parameter in policy.parameters())
        assert_same_answers(policy, make_policy(), observe())


def test_a_policy_is_bound_to_the_env_by_names(tmp_path: Path) -> None:
    uri = write(tmp_path / "m.safetensors", make_file())
    env_actions = ("attack", "noop", "south", "north")
    policy = load(uri, replace(SPACE, features=("empty", "foe", "wall")), env_actions)
    assert isinstance(policy, BoundPolicy)
    obs = observe()
    env_obs = obs.clone()
    env_obs[:, :9] = torch.tensor([0, 2, 1], dtype=torch.uint8)[obs[:, :9].long()]
    env_obs[:, 4] = obs[:, 4]
    assert torch.equal(act(policy, env_obs)[0][:, [1, 3, 2, 0]], act(load(uri), obs)[0])
    again = load_policy_from_checkpoint(uri, observation_space=SPACE, actions=env_actions)
    assert torch.equal(act(again, obs)[0][:, [1, 3, 2, 0]], act(load(uri), obs)[0])


@pytest.mark.parametrize(
    ("space", "actions", "reason"),
    [
        (replace(SPACE, features=("empty", "wall", "altar")), ACTIONS, "only the policy has the features foe"),
        (SPACE, ACTIONS[:3], "it has 4 actions, the env 3"),
        (VECTOR, ACTIONS, r"observations are window uint8 \(12,\), the env's vector float32 \(3,\)"),
    ],
)
def test_another_env_is_refused(tmp_path: Path, space: ObservationSpace, actions: tuple[str, ...], reason: str) -> None:
    uri = write(tmp_path / "m.safetensors", make_file())
    with pytest.raises(SpacesError, match=reason):
        load(uri, space, actions)


def test_loading_leaves_the_random_numbers_of_the_run_alone(tmp_path: Path) -> None:
    uri = write(tmp_path / "m.safetensors", make_file())
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load(uri)
    assert torch.equal(torch.rand(3), expected)
    pt = write(tmp_path / "m.pt", save(make_policy().state_dict()))
    torch.manual_seed(1)
    load(pt)
    assert torch.equal(torch.rand(3), expected)


def test_the_dtype_of_products_can_be_chosen(tmp_path: Path) -> None:
    uri = write(tmp_path / "m.safetensors", make_file())
    policy = load(uri, actions=("attack", "noop", "south", "north"), compute_dtype=torch.bfloat16)
    assert policy.policy.compute_dtype == torch.bfloat16  # type: ignore[union-attr]
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    reference = make_policy()
    reference.compute_dtype = torch.bfloat16  # type: ignore[assignment]
    reference.pack()  # type: ignore[operator]
    assert torch.equal(act(policy, observe())[1], act(reference, observe())[1])


def test_weights_stored_in_other_float_types_load_as_float32(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        tensors = {name: tensor.to(dtype) for name, tensor in make_policy().state_dict().items()}
        policy = load(write(tmp_path / "m.safetensors", make_file(tensors=tensors)))
        for name, parameter in policy.named_parameters():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, tensors[name].float())


def changed(name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    tensors = make_policy().state_dict()
    return {**tensors, name: change(tensors[name])}


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({n: t for n, t in make_policy().state_dict().items() if n != "bias"}, "lacks bias; its weights are not those"),
        ({**make_policy().state_dict(), "zz": torch.zeros(1)}, "has unexpected zz"),
        (make_policy("mlp").state_dict(), "lacks bias, weight_hh, weight_ih"),
        ({"w": torch.zeros(1)}, r"lacks bias, encoder.bias, encoder.own and 5 more"),
        (changed("bias", lambda t: t[:-1]), r"bias is float32\[31\], expected float32\[32\]"),
        (changed("bias", lambda t: t.reshape(1, -1)), r"bias is float32\[1, 32\], expected float32\[32\]"),
        (changed("bias", lambda t: t.to(torch.int32)), r"bias is int32\[32\], expected float32\[32\]"),
        (changed("bias", lambda t: t.double() + 1e300), "bias holds values that are not finite"),
    ],
)
def test_weights_that_are_not_the_architectures_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor], reason: str
) -> None:
    uri = write(tmp_path / "m.safetensors", make_file(tensors=tensors))
    with pytest.raises(CheckpointError, match=reason) as caught:
        load(uri)
    assert str(caught.value).startswith(f"file://{uri}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": "fasst"}, "its architecture cannot be built: agent=fasst is not known; did you mean 'fast'"),
        ({"architecture": "os.system"}, "agent=os.system is not known"),
        ({"architecture": "torch.nn:Linear"}, "agent=torch.nn:Linear is not known"),
        ({"architecture": "\n\x1b[31m"}, "cannot be built"),
        ({"args": {"hidden_sise": 8}}, "its architecture cannot be built"),
        ({"args": {"hidden_size": "8"}}, "its architecture cannot be built"),
        ({"args": {"hidden_size": -8}}, "its architecture cannot be built"),
        ({"args": {"hidden_size": 0}}, "its architecture cannot be built|other shapes"),
        ({"args": {"hidden_size": 16}}, "has other shapes than its architecture: bias is float32"),
        ({"args": {"hidden_size": 10**6}}, "hidden_size=1000000 is not possible"),  # 16 TB if it were allocated
        ({"args": {"hidden_size": 8192}}, "has other shapes than its architecture"),  # 2 GB if it were allocated
        ({"args": {"hidden_size": 10**15}}, "its architecture cannot be built|other shapes"),
    ],
)
def test_a_file_that_lies_about_its_architecture_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    uri = write(tmp_path / "m.safetensors", make_file(**changes))
    with pytest.raises(CheckpointError, match=reason) as caught:
        load(uri)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_forged_header_that_names_code_does_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    data = encode_policy(make_file())
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    code = f"__import__('os').system('touch {canary}')"
    for key in ("architecture", "args", "metadata", "import", "__reduce__"):
        description = json.loads(header["__metadata__"]["dual_policy"])
        description[key] = {"_target_": "os.system", "command": f"touch {canary}"} if key == "args" else code
        forged = {**header, "__metadata__": {"dual_policy": json.dumps(description), "_target_": "os.system"}}
        text = json.dumps(forged).encode()
        uri = write(tmp_path / "m.safetensors", struct.pack("<Q", len(text)) + text + data[8 + size :])
        with pytest.raises(CheckpointError):
            load(uri)
    assert not canary.exists()
    os.system(f"touch {canary}")  # the canary is a live one
    assert canary.exists()


def test_a_policy_whose_answer_is_not_finite_is_refused(tmp_path: Path) -> None:
    tensors = make_policy("mlp", VECTOR).state_dict()
    tensors["encoder.var"] = torch.tensor([1.0, -1.0, 1.0])  # a variance below zero: finite, but its root is not
    uri = write(tmp_path / "m.safetensors", make_file("mlp", VECTOR, tensors=tensors))
    with pytest.raises(CheckpointError, match="answer to an empty observation is not finite"):
        load(uri, VECTOR)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tensors = changed("bias", lambda t: t + torch.nan)
    path = tmp_path / "m.safetensors"
    data = bytearray(encode_policy(make_file()))
    data[-4:] = struct.pack("<f", float("nan"))
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="holds values that are not finite"):
        load(str(path))
    with pytest.raises(CheckpointError, match="tensor bias holds values that are not finite"):
        load(write(tmp_path / "m.pt", save(tensors)))


def test_bytes_that_changed_since_they_were_pinned_are_refused(tmp_path: Path) -> None:
    uri = write(tmp_path / "m.safetensors", make_file())
    pinned = resolve(uri)
    write(tmp_path / "m.safetensors", make_file(metadata={"step": 6}))
    with pytest.raises(DigestError):
        load_policy(
            pinned, observation_space=SPACE, actions=ACTIONS, default_agent="fast", default_args={},
            device=torch.device("cpu"),
        )  # fmt: skip


@pytest.mark.parametrize("layout", ["bare", "model", "policy", "state_dict", "module prefix"])
def test_a_state_dict_takes_its_architecture_from_the_caller(tmp_path: Path, layout: str) -> None:
    tensors = make_policy().state_dict()
    value: Any = tensors if layout == "bare" else {layout: tensors, "epoch": 3}
    if layout == "module prefix":
        value = {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()}
    uri = write(tmp_path / "model_0000.pt", save(value))
    assert_same_answers(load(uri), make_policy(), observe())
    again = load_policy_from_checkpoint(
        uri, observation_space=SPACE, actions=ACTIONS, agent="fast", agent_args={"hidden_size": 8}
    )
    assert_same_answers(again, make_policy(), observe())


def test_a_state_dict_of_another_architecture_is_refused(tmp_path: Path) -> None:
    uri = write(tmp_path / "model_0000.pt", save(make_policy("mlp").state_dict()))
    with pytest.raises(CheckpointError, match=r"\(as agent fast\) lacks bias, weight_hh, weight_ih;"):
        load(uri)
    with pytest.raises(CheckpointError, match=r"\(as agent fast\) has other shapes .*bias is float32\[32\]"):
        load(write(tmp_path / "model_0000.pt", save(make_policy().state_dict())), args={"hidden_size": 16})
    with pytest.raises(ConfigError, match="agent=fats is not known"):
        load(uri, agent="fats")


def test_a_pickled_module_is_refused_with_what_to_do(tmp_path: Path) -> None:
    for name in ("m.pt", "m"):
        uri = write(tmp_path / name, save(make_policy()))
        with pytest.raises(
            CheckpointError, match=r"^Checkpoint NPC policy must be a PyTorch module: .*names code .*Fast"
        ):
            load(uri)


def test_a_pickle_under_the_name_of_safetensors_is_refused(tmp_path: Path) -> None:
    uri = write(tmp_path / "m.safetensors", save(make_policy().state_dict()))
    with pytest.raises(CheckpointError, match=r"m.safetensors: it is no .safetensors file"):
        load(uri)


def test_a_policy_file_under_another_name_is_read(tmp_path: Path) -> None:
    assert_same_answers(load(write(tmp_path / "m.pt", make_file()), agent="mlp"), make_policy(), observe())


def test_what_a_file_does_not_say_must_be_passed(tmp_path: Path) -> None:
    uri = write(tmp_path / "m.pt", save(make_policy().state_dict()))
    with pytest.raises(ConfigError, match=r"does not say what it is made for; pass observation_space, actions, agent$"):
        load_policy_from_checkpoint(uri)
    with pytest.raises(ConfigError, match=r"pass agent$"):
        load_policy_from_checkpoint(uri, observation_space=SPACE, actions=ACTIONS)
    with pytest.raises(ConfigError, match=r"is a script and does not say .*; pass observation_space, actions$"):
        load_policy_from_checkpoint("builtin://arena/random")
    with pytest.raises(NpcNotFoundError, match=r"model_0000.pt: no such file"):
        load_policy_from_checkpoint(str(tmp_path / "model_0000.pt"))


def test_a_device_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    uri = write(tmp_path / "m.safetensors", make_file())
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ConfigError, match=f"device={device} is not there: "):
            load_policy_from_checkpoint(uri, device)


@pytest.mark.parametrize("name", ["random", "forager", "hunter"])
def test_a_scripted_builtin_acts_in_the_arena(name: str) -> None:
    uri = f"builtin://arena/{name}"
    policy = load_policy_from_checkpoint(uri, observation_space=ARENA, actions=ARENA_ACTIONS)
    assert act(policy, torch.zeros(3, 128, dtype=torch.uint8))[0].shape == (3, 6)
    with pytest.raises(SpacesError):
        load_policy_from_checkpoint(uri, observation_space=SPACE, actions=ACTIONS)


def test_a_policy_file_can_be_described_without_loading(tmp_path: Path) -> None:
    file = read_description(resolve(write(tmp_path / "m.safetensors", make_file())))
    assert file is not None
    assert (file.architecture, file.metadata, file.actions) == ("fast", {"step": 5, "epoch": 1}, ACTIONS)
    assert read_description(resolve("builtin://arena/random")) is None
    assert read_description(resolve(write(tmp_path / "m.pt", save(make_policy().state_dict())))) is None


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_an_import_writes_a_policy_file(tmp_path: Path, suffix: str) -> None:
    tensors = {f"module.{name}": tensor for name, tensor in make_policy().state_dict().items()}
    data = save({"model": tensors}) if suffix == "pt" else safetensors.torch.save(tensors)
    old, new = tmp_path / f"old.{suffix}", tmp_path / "new.safetensors"
    old.write_bytes(data)
    file = import_policy(old, new, agent="fast", args={"hidden_size": 8}, observation_space=SPACE, actions=ACTIONS)
    assert file.metadata["imported"] == {"name": old.name, "sha256": resolve(str(old)).sha256}
    assert decode_policy(new.read_bytes(), "x").metadata == file.metadata
    assert_same_answers(load_policy_from_checkpoint(str(new)), make_policy(), observe())
    with pytest.raises(CheckpointError, match="exists already"):
        import_policy(old, new, agent="fast", args={"hidden_size": 8}, observation_space=SPACE, actions=ACTIONS)


def test_an_import_that_cannot_work_writes_nothing(tmp_path: Path) -> None:
    old, new = tmp_path / "old.pt", tmp_path / "new.safetensors"
    options: dict[str, Any] = {"args": {"hidden_size": 8}, "observation_space": SPACE, "actions": ACTIONS}
    old.write_bytes(save(make_policy()))
    with pytest.raises(CheckpointError, match="must be a PyTorch module"):
        import_policy(old, new, agent="fast", **options)
    old.write_bytes(save(make_policy().state_dict()))
    with pytest.raises(CheckpointError, match="lacks"):
        import_policy(old, new, agent="mlp", **options)
    with pytest.raises(CheckpointError, match=r"write to .*new.safetensors"):
        import_policy(old, tmp_path / "new.pt", agent="fast", **options)
    with pytest.raises(CheckpointError, match="a policy file already"):
        import_policy(Path(write(tmp_path / "own.safetensors", make_file())), new, agent="fast", **options)
    assert not new.exists()


def test_a_policy_is_loaded_without_torchs_compiler() -> None:
    """Arithmetic on the meta device, where a net is built for its shapes, would import it: a second of every start."""
    code = """
import sys
import torch
from dual_policy_plugin import load_policy_from_checkpoint
from dual_policy_plugin.policies.build import build_policy
from dual_policy_plugin.types import ObservationSpace
before = set(sys.modules)
load_policy_from_checkpoint("builtin://arena/medium")
features = ("a", "b", "c", "d")
with torch.device("meta"):
    for space in (
        ObservationSpace(kind="tokens", shape=(20, 3), features=features, window=(5, 5), scales=(255.0,) * 4),
        ObservationSpace(kind="vector", shape=(4,), features=features),
    ):
        for name in ("fast", "mlp"):
            build_policy(name, {"hidden_size": 16}, space, ("stay", "go"))
print(sorted({"torch._dynamo", "sympy"} & (set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
