"""Env workers: the same results however many, errors with their traceback, and no process left behind."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import psutil
import pytest
import torch
from toy_envs import make_late_puffer, make_script, make_trouble, make_uneven, make_walker, make_wide, play

from dual_policy_plugin.config import EnvConfig
from dual_policy_plugin.envs.build import make_env
from dual_policy_plugin.envs.crew import split_envs
from dual_policy_plugin.envs.host import episode_seed, first_cut
from dual_policy_plugin.envs.worker_process import STEP
from dual_policy_plugin.errors import ConfigError, EnvError
from tests.harness import children

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _others():
    """Processes that other tests of this session keep."""
    others.clear()
    others.update(children())


others = set()


def our_children():
    return list(children() - others)


@pytest.fixture
def build():
    """Makes toy envs, closes them, and then finds no worker, descriptor or shared memory left."""
    process, before, shared = psutil.Process(), psutil.Process().num_fds(), set(os.listdir("/dev/shm"))
    envs, env = [], None

    def make(make_host, *, num_envs=4, num_workers=2, first_env=0, env_numbers=None, **args):
        config = EnvConfig(name="toy", num_envs=num_envs, args=args)
        env = make_env(
            config, device="cpu", num_workers=num_workers, first_env=first_env, env_numbers=env_numbers,
            make_host=make_host,
        )  # fmt: skip
        envs.append(env)
        return env

    yield make
    for env in envs:
        env.close()
        env.close()
    envs.clear()
    del env
    gc.collect()  # the mapping holds a descriptor as long as a tensor of it lives
    assert our_children() == []
    assert process.num_fds() <= before
    assert set(os.listdir("/dev/shm")) <= shared


def gone(pids, within_s=5.0):
    """Whether all these processes end within some seconds."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
            return True
        time.sleep(0.02)
    return False


def record(env, steps, *, seed=3, stagger=False):
    """Everything that `steps` steps with fixed actions give."""
    spec = env.spec
    env.reset(seed, stagger=stagger)
    seats = torch.arange(spec.num_agents)
    out = torch.zeros(spec.num_envs * spec.num_agents, *spec.observation_space.shape)
    final = torch.full_like(out, -7)
    numbers = torch.arange(spec.num_agents) % len(spec.actions)
    seen = []
    for _ in range(steps):
        result = env.step(numbers.expand(spec.num_envs, -1))
        env.observe(seats, out)
        env.observe_final(seats, final)
        seen.append(
            [out.clone(), final.clone(), result.rewards.clone(), result.dones.clone(), result.truncated.clone()]
        )
    return seen


def test_results_do_not_depend_on_the_number_of_workers(build):
    one = record(build(make_walker, num_workers=1, max_episode_steps=5), 12, stagger=True)
    three = record(build(make_walker, num_workers=3, max_episode_steps=5), 12, stagger=True)
    for ours, theirs in zip(one, three, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    noise = torch.stack([step[0] for step in one])[:, :, 2]
    assert noise.unique().numel() == 12 * 4  # every env and episode has its own


@pytest.fixture
def _cores(monkeypatch):
    """Cores enough for halves to pay."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def test_there_are_halves_where_the_trainer_has_a_core_of_its_own(build, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 5}, raising=False)
    assert build(make_walker, num_workers=3).halves() is None
    first, second = build(make_walker, num_workers=2).halves()
    assert first.halves() is second.halves() is None
    assert build(make_walker, num_workers=1, num_envs=1).halves() is None
    assert build(make_walker, num_workers=1, num_envs=2).halves() is not None


@pytest.mark.usefixtures("_cores")
def test_halves_are_views_that_step_by_themselves(build):
    """Whichever half is received first: what stands in the whole's rows is what a step of the whole gives."""
    env, twin = build(make_walker, num_envs=5, num_workers=3), build(make_walker, num_envs=5, num_workers=2)
    first, second = env.halves()
    assert [half.spec.num_envs for half in (env, first, second)] == [5, 2, 3]
    assert first.spec.actions == env.spec.actions
    env.reset(3, stagger=True)
    twin.reset(3, stagger=True)
    seats = torch.tensor([1, 0])
    for time_step in range(20):
        actions = torch.arange(10).view(5, 2).add(time_step).remainder(3)
        first.send(actions[:2])
        second.send(actions[2:])
        late = first if time_step % 2 else second
        results = {half: half.receive() for half in (first, second) if half is not late} | {late: late.receive()}
        expected = twin.step(actions)
        assert torch.equal(torch.cat([results[first].rewards, results[second].rewards]), expected.rewards)
        assert torch.equal(torch.cat([results[first].truncated, results[second].truncated]), expected.truncated)
        assert torch.equal(
            torch.cat([results[first].episode_ends, results[second].episode_ends]), expected.episode_ends
        )
        for name in ("observe", "observe_final"):
            whole, parts, other = (torch.full((10, 3), -7.0) for _ in range(3))
            getattr(env, name)(seats, whole)
            getattr(first, name)(seats, parts[:4])
            getattr(second, name)(seats, parts[4:])
            getattr(twin, name)(seats, other)
            assert torch.equal(whole, parts)
            assert torch.equal(whole, other)
    assert expected.rewards.abs().sum() > 0


@pytest.mark.usefixtures("_cores")
def test_an_interrupted_rollout_leaves_nothing_under_way_after_a_reset(build):
    env, twin = build(make_walker), build(make_walker)
    env.reset(3)
    first, second = env.halves()
    first.send(torch.ones(2, 2, dtype=torch.int64))
    second.send(torch.ones(2, 2, dtype=torch.int64))
    second.receive()
    for ours, theirs in zip(record(env, 3), record(twin, 3), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for half in (first, second):
        half.send(torch.ones(2, 2, dtype=torch.int64))
    rewards = [half.receive().rewards for half in (first, second)]
    assert torch.equal(torch.cat(rewards), twin.step(torch.ones(4, 2, dtype=torch.int64)).rewards)


def test_an_order_may_follow_something_that_the_caller_does_not_wait_for(build):
    """As on a GPU, where the actions are still on their way; what goes wrong there is raised by whoever waits."""
    env, gate, command = build(make_walker), threading.Event(), STEP[(0, 1)]
    env.reset(1)
    env._shared["actions"].zero_()
    env._crew.order(env._workers, command, after=gate.wait)
    time.sleep(0.1)
    env._shared["actions"].fill_(1)
    gate.set()
    env._crew.wait(env._workers, command)
    assert env._result.rewards.tolist() == [[1, 1]] * 4
    assert env.step(torch.full((4, 2), 2)).rewards.tolist() == [[0, 0]] * 4

    def fail():
        raise RuntimeError("the device is lost")

    env._crew.order(env._workers, command, after=fail)
    with pytest.raises(RuntimeError, match="the device is lost"):
        env._crew.wait(env._workers, command)
    assert our_children() == []


def test_every_worker_has_its_share_of_both_halves():
    assert split_envs(8, 2) == [((0, 2), (4, 6)), ((2, 4), (6, 8))]
    assert split_envs(2, 1) == [((0, 1), (1, 2))]
    assert split_envs(1, 1) == [((0, 0), (0, 1))]
    for num_envs in range(1, 40):
        for num_workers in range(1, num_envs + 1):
            shares = split_envs(num_envs, num_workers)
            for half, all_envs in ((0, range(num_envs // 2)), (1, range(num_envs // 2, num_envs))):
                counts = [end - start for start, end in (share[half] for share in shares)]
                assert [env for share in shares for env in range(*share[half])] == list(all_envs)
                assert max(counts) - min(counts) <= 1
            totals = [sum(end - start for start, end in share) for share in shares]
            assert min(totals) >= 1
            assert max(totals) - min(totals) <= 1


def test_an_envs_episodes_depend_on_its_number_alone(build):
    whole = record(build(make_walker, num_envs=4, max_episode_steps=5), 7)
    rest = record(build(make_walker, num_envs=2, first_env=2, max_episode_steps=5), 7)
    for ours, theirs in zip(whole, rest, strict=True):
        assert torch.equal(ours[0][4:], theirs[0])  # two rows an env
    assert len({episode_seed(1, env, episode) for env in range(50) for episode in range(50)}) == 2500
    assert all(0 <= episode_seed(2**31 - 1, env, 3) < 2**31 for env in range(50))


def test_envs_of_one_number_play_one_episode_and_have_different_indices(build):
    whole = record(build(make_walker, num_envs=6, max_episode_steps=5), 7)
    repeated = build(make_walker, num_envs=5, env_numbers=[4, 2, 4, 2, 5], max_episode_steps=5)
    for ours, theirs in zip(whole, record(repeated, 7), strict=True):
        rows = ours[0].view(6, 2, -1)
        assert torch.equal(rows[[4, 2, 4, 2, 5]], theirs[0].view(5, 2, -1))
    troubled = build(make_trouble, num_envs=4, env_numbers=[2, 2, 2, 2], where=4)  # the third counts from 2
    with pytest.raises(EnvError, match=r"(?s)the toy broke"):
        record(troubled, 7)
    untroubled = build(make_trouble, num_envs=2, env_numbers=[2, 2], where=4)
    assert len(record(untroubled, 7)) == 7


def test_a_reset_starts_all_over(build):
    env = build(make_walker, max_episode_steps=5)
    first, again, other = record(env, 3), record(env, 3), record(env, 3, seed=4)
    assert torch.equal(first[2][0], again[2][0])
    assert not torch.equal(first[2][0], other[2][0])


def test_staggered_episodes_are_truncated_at_spread_phases_with_their_final_observation(build):
    env = build(make_walker, max_episode_steps=8)
    assert env.spec.has_truncation
    env.reset(1, stagger=True)
    ends = torch.zeros(4, 16, dtype=torch.bool)
    for time_step in range(16):
        result = env.step(torch.tensor([[1, 2]] * 4))
        ends[:, time_step] = result.episode_ends
        assert torch.equal(result.dones, result.episode_ends[:, None].expand(4, 2))
        assert torch.equal(result.truncated, result.dones)
        if time_step == 3:  # env 1 ends its first episode, env 0 is in its second
            final = torch.full((8, 3), -7.0)
            env.observe_final(torch.tensor([0, 1]), final)
            assert final[2:4, :2].tolist() == [[4, 4], [-4, 4]]
            assert (final[[0, 1, 4, 5, 6, 7]] == -7).all()
            now = torch.zeros(8, 3)
            env.observe(torch.tensor([0, 1]), now)
            assert now[:, 1].tolist() == [2, 2, 0, 0, 4, 4, 4, 4]
    assert [[int(at) + 1 for at in row.nonzero()] for row in ends] == [[2, 10], [4, 12], [6, 14], [8, 16]]
    assert [first_cut(index, 4, 3) for index in range(4)] == [1, 1, 2, 3]


def test_a_termination_is_no_truncation(build):
    env = build(make_walker, length=3)
    env.reset(1)
    for time_step in (1, 2, 3):
        result = env.step(torch.ones(4, 2, dtype=torch.int64))
        assert result.rewards.tolist() == [[time_step] * 2] * 4
    assert result.dones.all()
    assert not result.truncated.any()
    final = torch.full((8, 3), -7.0)
    env.observe_final(torch.tensor([0, 1]), final)
    assert (final == -7).all()


def test_observations_are_env_major_in_the_order_of_the_seats(build):
    env = build(make_script, num_envs=3)
    env.reset(1)
    assert env.spec.has_weights
    result = env.step(torch.tensor([[1, 2, 0], [2, 1, 0], [3, 3, 0]]))
    out = torch.full((6, 3), -7.0)
    env.observe(torch.tensor([1, 0]), out)
    assert out.tolist() == [[1, 1, 2], [0, 1, 1], [1, 1, 1], [0, 1, 2], [1, 1, 3], [0, 1, 3]]
    assert result.rewards.tolist() == [[11, 12, 0], [12, 11, 0], [13, 13, 0]]
    assert result.weights.tolist() == [[1, 1, 0]] * 3
    assert result.dones.tolist() == [[False, False, True]] * 3
    assert result.counters is None


@pytest.mark.parametrize("seats", [[0], [2], [0, 1], [1, 2], [0, 1, 2], [0, 2], [2, 1]])
def test_a_range_of_seats_and_a_list_are_observed_alike(build, seats):
    """Ranges are copied as slices; every choice is compared with the whole, now and at an episode's final step."""
    env = build(make_script, num_envs=3)
    env.reset(1)
    everybody, chosen = torch.arange(3), torch.tensor(seats)
    seen_final = 0
    for time_step in range(1, 7):
        env.step(torch.tensor([[1, 2, 3], [2, 1, 0], [3, 3, 2]]))
        whole, part = torch.zeros(9, 3), torch.zeros(3 * len(seats), 3)
        env.observe(everybody, whole)
        env.observe(chosen, part)
        assert torch.equal(part.view(3, len(seats), 3), whole.view(3, 3, 3)[:, seats])
        whole, part = torch.full((9, 3), -7.0), torch.full((3 * len(seats), 3), -7.0)
        env.observe_final(everybody, whole)
        env.observe_final(chosen, part)
        assert torch.equal(part.view(3, len(seats), 3), whole.view(3, 3, 3)[:, seats])
        seen_final += int((whole[:, 0] >= 0).sum())
        assert (whole.view(3, 3, 3)[0, :, 1] == time_step).tolist() == [time_step == 4, False, time_step == 6]
    assert seen_final == 6  # a in step 4, c in step 6, in three envs


def test_a_fixed_action_of_the_npc_seat_is_seen_in_a_puffer_env(build):
    env = build(make_late_puffer, num_envs=2)
    env.reset(1)
    out = torch.zeros(2, 3)
    for time_step in (1, 2, 0, 1, 2, 0, 1):
        result = env.step(torch.tensor([[0, 4], [0, 3]]))
        env.observe(torch.tensor([1]), out)
        assert result.rewards[:, 1].tolist() == [5, 4]
        assert out[:, 1].tolist() == [time_step] * 2
        if time_step:
            assert out[:, 2].tolist() == [4, 3]


def test_a_worker_that_raises_ends_the_run_with_its_traceback(build):
    env = build(make_trouble, where=3)
    env.reset(1)
    actions = torch.zeros(4, 2, dtype=torch.int64)
    env.step(actions)
    env.step(actions)
    with pytest.raises(EnvError) as caught:
        env.step(actions)
    assert str(caught.value).startswith("env worker 1 (envs 1, 3) raised:\nTraceback (most recent call last):\n")
    assert str(caught.value).endswith("ValueError: the toy broke")
    assert "toy_envs.py" in str(caught.value)
    assert our_children() == []
    with pytest.raises(EnvError, match="is closed"):
        env.step(actions)


@pytest.mark.parametrize(("kind", "message"), [("kill", "SIGKILL"), ("segfault", "SIGSEGV:\nFatal Python error: Segm")])
def test_a_worker_that_dies_ends_the_run_within_seconds(build, kind, message):
    env = build(make_trouble, where=1, kind=kind)
    env.reset(1)
    actions = torch.zeros(4, 2, dtype=torch.int64)
    env.step(actions)
    env.step(actions)
    start = time.monotonic()
    with pytest.raises(EnvError) as caught:
        env.step(actions)
    assert time.monotonic() - start < 5
    assert str(caught.value).startswith(f"env worker 1 (envs 1, 3) was killed by {message}")
    assert our_children() == []


def test_a_worker_that_hangs_does_not_outlive_close(build):
    env = build(make_trouble, where=0, kind="hang", num_workers=1)
    env.reset(1)
    worker = env._crew._workers[0]
    for _ in range(3):
        worker.connection.sendall(b"s")  # the third step hangs
    start = time.monotonic()
    env.close()
    assert time.monotonic() - start < 5
    assert worker.process.poll() is not None


def test_idle_workers_use_no_core(build):
    env = build(make_walker)
    env.reset(1)
    workers = our_children()
    assert len(workers) == 2
    before = [sum(worker.cpu_times()[:2]) for worker in workers]
    time.sleep(0.5)
    after = [sum(worker.cpu_times()[:2]) for worker in workers]
    assert max(b - a for a, b in zip(before, after, strict=True)) <= 0.05
    assert all(worker.environ()["OMP_NUM_THREADS"] == "1" for worker in workers)


def interruptible():
    """Takes SIGINT again, which a shell's background job is told to ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("mode", "number", "code"),
    [("hang", signal.SIGKILL, -9), ("step", signal.SIGINT, -2), ("raise", 0, 1)],
)
def test_no_worker_outlives_its_parent(mode, number, code):
    path = os.pathsep.join(entry for entry in sys.path if entry)
    parent = subprocess.Popen(
        [sys.executable, str(HERE / "worker_parent.py"), mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        start_new_session=True,
        preexec_fn=interruptible,
    )
    with parent, contextlib.ExitStack() as stack:
        stack.callback(parent.kill)  # a failed assertion must not wait for a parent that steps for ever
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        if number:
            time.sleep(0.2)
            os.killpg(parent.pid, number)  # as Ctrl-C does: the whole foreground group
        _, errors = parent.communicate(timeout=20)
    assert parent.returncode == code
    assert gone(workers)
    if mode == "raise":
        assert errors.rstrip().endswith("RuntimeError: the training broke")
    if number == signal.SIGINT:
        assert errors.rstrip().endswith("KeyboardInterrupt")
        assert errors.count("Traceback") == 1  # the workers say nothing


def test_an_error_while_building_ends_all_workers(build):
    with pytest.raises(EnvError, match=r"env.name=toy: env 2 differs from env 0|envs differ"):
        build(make_uneven)
    with pytest.raises(ConfigError, match=r"env.args=.* cannot be sent to a worker"):
        build(make_walker, length=object())


def test_a_function_that_a_worker_cannot_import_is_refused(build):
    with pytest.raises(ConfigError, match=r"is not a function at the top of a module"):
        build(lambda index: None)
    with pytest.raises(ConfigError, match=r"env.lenght is no setting of env.name=toy; did you mean length?"):
        build(make_walker, lenght=3)
    with pytest.raises(ConfigError, match=r"env.width is missing; env.name=toy has no default for it"):
        build(make_wide)
    with pytest.raises(ConfigError, match=r"the first parameter of play must be `index`"):
        build(play)


def test_an_unknown_env_names_the_nearest():
    with pytest.raises(ConfigError, match=r"env.name=metagrid is not known; did you mean mettagrid?"):
        make_env(EnvConfig(name="metagrid"), device="cpu", num_workers=1)
    with pytest.raises(ConfigError, match=r"use one of arena, mettagrid, pettingzoo"):
        make_env(EnvConfig(name="os:system"), device="cpu", num_workers=1)


def test_an_installed_entry_point_is_an_env(tmp_path, monkeypatch):
    """A distribution as pip would leave it, with one entry point, found by the real importlib.metadata."""
    info = tmp_path / "corridor-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: corridor\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dual_policy.envs]\ncorridor = toy_envs:make_walker\nlost = toy_envs:no\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = EnvConfig(name="corridor", num_envs=2, args={"max_episode_steps": 4, "length": None})
    env = make_env(config, device="cpu", num_workers=8)
    try:
        assert (env.spec.name, env.spec.num_envs, env.spec.num_agents) == ("corridor", 2, 2)
        assert env.spec.actions == ("stay", "north", "south")
        assert env.spec.max_episode_steps == 4
        assert len(our_children()) == 2  # no more workers than envs
    finally:
        env.close()
    with pytest.raises(ConfigError, match=r"env.name=lost stands for toy_envs:no, which cannot be loaded"):
        make_env(EnvConfig(name="lost"), device="cpu", num_workers=1)
    with pytest.raises(ConfigError, match=r"did you mean corridor"):
        make_env(EnvConfig(name="coridor"), device="cpu", num_workers=1)


def test_the_worked_example_is_an_env(tmp_path, monkeypatch):
    """The example as pip would install it: its own entry point, found and played."""
    example = HERE.parents[1] / "examples" / "own_env"
    points = tomllib.loads((example / "pyproject.toml").read_text())["project"]["entry-points"]["dual_policy.envs"]
    info = tmp_path / "berry_race-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: berry-race\nVersion: 0.1.0\n")
    lines = [f"{name} = {target}" for name, target in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[dual_policy.envs]", *lines]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(example)
    config = EnvConfig(name="berry_race", num_envs=2, args={"num_agents": 3, "steps": 20})
    env = make_env(config, device="cpu", num_workers=1)
    try:
        assert env.spec.observation_space.features == ("berry_ahead", "berry_distance", "rival_distance")
        env.reset(1)
        out, total = torch.zeros(6, 3), torch.zeros(2, 3)
        for _ in range(20):
            env.observe(torch.arange(3), out)
            seeks = torch.where(out[:, 0] > 0, 2, 1) * (out[:, 0] != 0)  # towards the berry
            actions = seeks.view(2, 3).clone()
            actions[:, 2] = 0  # the last seat stays where it is
            result = env.step(actions)
            total += result.rewards
        assert result.truncated.all()
        assert (total[:, :2].sum(1) >= 2).all()  # at most 10 steps to a berry
        assert (total[:, 2] < total[:, :2].sum(1)).all()
    finally:
        env.close()
