"""The bench compares like with like, counts what it says, and its floor is the sum that its docstring gives."""

from __future__ import annotations

import json
import math
import runpy
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_curriculum, bench_mixed, profile_iteration
from benchmarks.floor import Job, Rates, Stream, floor_s, products, row_step_flops, streams, table_reads
from benchmarks.measure import PARTS, CountError, bound_of, counted_iteration, iterate, measure_cell, wrapped
from benchmarks.memory_use import PeakMemory, tensors_of
from benchmarks.report_table import header, line
from benchmarks.schemes import SCHEMES, Cell, Scheme, make_masked_both, make_ours
from dual_policy_plugin.curriculum.state import ChosenPolicy, SweepState, write_state
from dual_policy_plugin.curriculum.state import Job as SweepJob
from dual_policy_plugin.errors import RunError
from dual_policy_plugin.hydra_app.composition import compose_config

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def cell(pct: float, num_npcs: int, *, num_envs: int = 8, horizon: int = 4) -> Cell:
    return Cell(
        pct=pct, num_npcs=num_npcs, num_envs=num_envs, horizon=horizon, device=CPU, hidden_size=16, precision="fp32"
    )


def job(device: torch.device, **changes: Any) -> Job:
    settings = {
        "num_learner_rows": 64, "num_npc_rows": 192, "horizon": 8, "num_minibatches": 4, "epochs": 2,
        "hidden_size": 128, "num_actions": 6, "num_cells": 121, "num_codes": 8, "num_own": 5, "obs_bytes": 128,
        "dtype": torch.bfloat16,
    }  # fmt: skip
    return Job(device=device, **(settings | changes))


def learner_rows(scheme: Scheme) -> list[int]:
    """Which rows of the scheme's experience are the learner's, in the order in which ours has them."""
    if scheme.experience.num_rows == scheme.mixed.num_envs * scheme.split.num_learner:
        return list(range(scheme.experience.num_rows))
    agents = scheme.split.num_agents
    return [env * agents + seat for env in range(scheme.mixed.num_envs) for seat in scheme.split.learner_seats]


@pytest.mark.parametrize(("pct", "num_npcs"), [(1.0, 0), (0.25, 1), (0.5, 3)])
def test_all_schemes_play_the_same_games_and_make_the_same_update(pct: float, num_npcs: int) -> None:
    schemes = {name: make(cell(pct, num_npcs, horizon=20)) for name, make in SCHEMES.items()}
    ours = schemes["ours"]
    start = ours.ppo.parameters.flat.detach().clone()
    for iteration in range(2):
        for scheme in schemes.values():
            scheme.play(iteration)
        for scheme in schemes.values():
            rows = learner_rows(scheme)
            for name in ("obs", "actions", "rewards", "dones"):
                got, wanted = getattr(scheme.experience, name)[:, rows], getattr(ours.experience, name)
                assert torch.equal(got, wanted), (scheme.name, name)
            torch.testing.assert_close(scheme.experience.values[:, rows], ours.experience.values, rtol=0, atol=1e-5)
        for scheme in schemes.values():
            scheme.ppo.update(scheme.experience, 1e-3)
    assert ours.experience.dones.any()
    moved = (ours.ppo.parameters.flat - start).abs().max()
    assert moved > 1e-3
    for scheme in schemes.values():
        torch.testing.assert_close(scheme.ppo.parameters.flat, ours.ppo.parameters.flat, rtol=0, atol=1e-5)
        if num_npcs > 1:
            pool = ours.mixed.pool
            assert torch.equal(scheme.metrics.pool.npc_of_env, pool.npc_of_env)
            assert not torch.equal(pool.npc_of_env, torch.arange(8) % num_npcs)  # some were drawn anew


def test_counted_rows_are_those_of_the_work() -> None:
    schemes = {name: make(cell(0.25, 3)) for name, make in SCHEMES.items()}
    counts = {name: counted_iteration(scheme) for name, scheme in schemes.items()}
    # 8 envs of 8 agents, 2 of which learn, 4 steps; the learner's forward once more for the last values
    lean = {"learner_forward_rows": 5 * 16, "npc_forward_rows": 4 * 48, "trained_rows": 4 * 16, "npc_filler_rows": 0}
    sorted_rows = schemes["ours"].mixed.pool._rows
    assert counts["ours"] == lean | {"npc_filler_rows": 4 * (len(sorted_rows.row_of_slot) - 48)}
    assert counts["policy-loop"] == lean
    all_rows = {"learner_forward_rows": 5 * 64, "npc_forward_rows": 4 * 64 * 3, "trained_rows": 4 * 64}
    assert counts["masked-both"] == all_rows | {"npc_filler_rows": 0}


def test_a_scheme_that_runs_other_rows_is_refused() -> None:
    scheme = make_ours(cell(0.5, 1))
    forward = scheme.learner.forward_step
    act = scheme.mixed.act

    def act_twice(obs: torch.Tensor, *args: torch.Tensor) -> Any:
        scheme.learner.forward_step(obs, scheme.mixed.learner_state)
        return act(obs, *args)

    scheme.mixed.act = act_twice
    with pytest.raises(CountError, match=r"ours at P=0.5: ran .*'learner_forward_rows': 288"):  # 5 * 32 + 4 * 32
        counted_iteration(scheme)
    assert scheme.learner.forward_step == forward  # nothing stays wrapped
    assert "forward_step" not in vars(scheme.learner)


def test_wrapping_gives_back_what_was_there() -> None:
    class Owner:
        def method(self) -> int:
            return 1

    owner = Owner()
    owner.own = lambda: 2  # type: ignore[attr-defined]

    def tenfold(call: Callable[[], int]) -> Callable[[], int]:
        return lambda: 10 * call()

    with wrapped(owner, "method", tenfold), wrapped(owner, "own", tenfold):
        assert (owner.method(), owner.own()) == (10, 20)  # type: ignore[attr-defined]
    assert (owner.method(), owner.own()) == (1, 2)  # type: ignore[attr-defined]
    assert "method" not in vars(owner)


def test_the_bound_is_the_ratio_of_the_counted_work() -> None:
    assert bound_of("masked-both", 0.5, 1) == 2.0
    assert bound_of("masked-both", 0.25, 1) == pytest.approx(20 / 7)
    assert bound_of("masked-both", 0.5, 16) == 8.0
    assert bound_of("masked-both", 1.0, 0) == 1.0
    assert bound_of("policy-loop", 0.25, 4) == bound_of("ours", 0.25, 4) == 1.0


def test_a_cell_gives_a_row_for_every_scheme_whose_parts_add_up() -> None:
    rates = Rates(CPU, torch.float32)
    rows = measure_cell(cell(0.75, 1), 1, rates)
    assert [row["scheme"] for row in rows] == ["ours", "masked-both", "policy-loop"]
    for row in rows:
        parts = sum(row[f"{part}_ns"] for part in PARTS)
        assert parts == pytest.approx(row["ns_per_env_agent_step"], rel=1e-9)
        assert all(row[f"{part}_ns"] > 0 for part in ("env", "learner_forward", "npc_forward", "advantage"))
        assert row["env_agent_steps_per_s"] == pytest.approx(1e9 / row["ns_per_env_agent_step"])
        assert row["learner_steps_per_s"] == pytest.approx(0.75 * row["env_agent_steps_per_s"])
        assert row["fraction_of_floor"] == pytest.approx(row["floor_ns"] / row["ns_per_env_agent_step"])
        assert row["share_of_bound"] == pytest.approx(row["ratio_env_free"] / row["bound"])
        assert line(row).count("|") == header().partition("\n")[0].count("|") == 24
    assert rows[0]["ratio"] == rows[0]["share_of_bound"] == 1.0
    assert rows[1]["ratio"] == pytest.approx(rows[1]["ns_per_env_agent_step"] / rows[0]["ns_per_env_agent_step"])
    assert rows[1]["bound"] == pytest.approx(5 / 3.25)
    assert rows[1]["held_bytes"] > rows[0]["held_bytes"] > 4 * 48 * 128  # the observations alone
    assert len({row["floor_ns"] for row in rows}) == 1


def test_the_bench_writes_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(bench_mixed, "CELLS", ((0.5, 4),))
    monkeypatch.setattr("benchmarks.floor._MEASURE_S", 1e-4)
    path = tmp_path / "folder" / "rows.json"
    arguments = f"--threads 1 --num-envs 4 --horizon 2 --hidden-size 16 --pairs 1 --json {path}".split()
    threads = torch.get_num_threads()
    bench_mixed.main(arguments)
    torch.set_num_threads(threads)
    written = json.loads(path.read_text())
    assert written["command"] == "python -m benchmarks.bench_mixed " + " ".join(arguments)
    assert "torch" in written["machine"]
    assert written["commit"]
    assert {"scheme", "pct", "num_npcs", "threads", "env_agent_steps_per_s", "peak_bytes", "trained_rows"} <= set(
        written["rows"][0]
    )
    assert [(row["scheme"], row["num_npcs"]) for row in written["rows"]] == [(name, 4) for name in SCHEMES]
    printed = capsys.readouterr().out.splitlines()
    assert [text.split("|")[1].strip() for text in printed[-3:]] == list(SCHEMES)


def test_the_cells_are_all_shares_with_one_npc_and_more_npcs_at_a_half() -> None:
    assert bench_mixed.CELLS == ((1.0, 0), (0.75, 1), (0.5, 1), (0.25, 1), (0.5, 4), (0.5, 16))
    every = {(pct, num_npcs) for pct in (0.75, 0.5, 0.25) for num_npcs in (1, 4, 16)} | {(1.0, 0)}
    assert Counter(bench_mixed.ALL_CELLS) == Counter(every)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("name", ["bench_mixed", "profile_iteration"])
def test_without_cuda_there_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--device", "cuda"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(Path(bench_mixed.__file__).parent / f"{name}.py"), run_name="__main__")
    assert caught.value.code == 2
    (text,) = capsys.readouterr().err.splitlines()
    assert text.startswith(f"benchmarks.{name}: device=cuda is not there")


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_the_products_come_to_the_counted_flops(device: torch.device) -> None:
    one = job(device)
    flops = row_step_flops(one)
    learner_steps, npc_steps = 64 * 8, 192 * 8
    expected = learner_steps * (flops["learner_rollout"] + flops["learner_update"]) + npc_steps * flops["npc_rollout"]
    assert sum(2 * m * k * n * count for (m, k, n), count in products(one).items()) == expected


def test_the_flops_of_a_row_step_by_hand() -> None:
    body = 2 * (256 * 512 + 128 * 7)  # 263,936
    assert row_step_flops(job(CPU, epochs=1)) == {
        "learner_rollout": body,
        "learner_update": 3 * body + 2 * 853 * 128,
        "npc_rollout": body,
    }
    dense = 2 * 896 * 128  # 121 * 7 codes, 5 bytes and a bias, up to a multiple of 64
    assert row_step_flops(job(CUDA, epochs=1)) == {
        "learner_rollout": body + dense,
        "learner_update": 3 * body + 2 * dense,
        "npc_rollout": body + dense,
    }


class FixedRates(Rates):
    """A machine of 1 GFLOP/s and 2 GB/s, and 8 GB/s below 1 MB."""

    def product_s(self, m: int, k: int, n: int) -> float:
        return 2 * m * k * n / 1e9

    def bandwidth(self, working_set: int) -> float:
        return 8e9 if working_set < 2**20 else 2e9


def test_the_floor_is_work_by_rate() -> None:
    one = job(CPU)
    floor = floor_s(one, FixedRates(CPU, torch.bfloat16))
    flops = row_step_flops(one)
    compute = 512 * (flops["learner_rollout"] + flops["learner_update"]) + 1536 * flops["npc_rollout"]
    assert floor["products"] == pytest.approx(compute / 1e9)
    experience = 512 * (149 + 128 + 2 * 149)  # written, its observations read by the rollout, all read by two epochs
    states = (512 + 1536) * 2 * 256 * 4
    assert streams(one)[0] == Stream(num_bytes=experience, working_set=512 * 149)
    assert floor["bytes"] == pytest.approx((experience + 1536 * 2 * 128 + states) / 8e9)
    lookups = 512 * 3 + 1536
    # pairs of cells: half the reads, from a table of 61 * 64 * 256 bytes, which is below 1 MB; triples are above it
    assert floor["table_reads"] == pytest.approx(lookups * 61 * 256 / 8e9)
    assert floor["total"] == pytest.approx(floor["products"] + floor["bytes"] + floor["table_reads"])
    assert table_reads(job(CUDA)) == []
    alone = job(CPU, num_npc_rows=0)
    assert floor_s(alone, FixedRates(CPU, torch.bfloat16))["total"] < floor["total"]


def test_rates_are_measured_once_and_are_plausible() -> None:
    rates = Rates(CPU, torch.float32)
    seconds = rates.product_s(256, 256, 256)
    assert rates.product_s(256, 256, 256) == seconds
    assert 1e9 < 2 * 256**3 / seconds < 1e14
    assert 1e8 < rates.bandwidth(2**20) < 1e13
    assert set(rates.as_dict()) == {"product_256x256x256_tflop_per_s", "copy_524288_gb_per_s"}


def test_held_tensors_are_counted_once_and_without_policies() -> None:
    scheme = make_masked_both(cell(0.5, 1))
    experience = scheme.experience
    by_hand = sum(
        getattr(experience, name).nbytes
        for name in ("obs", "actions", "log_probs", "values", "rewards", "dones", "initial_state", "last_values")
    )
    assert experience.weights is not None
    assert sum(tensors_of(experience).values()) == by_hand + experience.weights.nbytes
    assert tensors_of(experience, experience.obs[0], [experience.obs]) == tensors_of(experience)
    assert tensors_of(scheme.learner) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process's peak cannot be reset")
def test_the_peak_of_memory_is_that_since_it_was_asked() -> None:
    peak = PeakMemory(CPU)
    torch.ones(2**26, dtype=torch.uint8)
    assert 0.9 * 2**26 < peak.growth() < 1.5 * 2**26
    assert PeakMemory(CPU).growth() < 2**24  # what was freed is no part of the next one


def test_a_profile_lists_what_took_longest_first() -> None:
    rows, seconds = profile_iteration.profiled_rows(cell(0.5, 1), 1)
    times = [row["us"] for row in rows]
    assert times == sorted(times, reverse=True)
    assert any("addmm" in row["name"] for row in rows)
    assert sum(times) * 1e-6 < 2 * seconds + 1.0
    text = profile_iteration.table(rows, 3).splitlines()
    assert len(text) == 2 + 3 + 1
    assert text[-1].endswith(f"| {len(rows) - 3} others |")


def test_an_iteration_reads_its_numbers() -> None:
    seconds = iterate(make_ours(cell(0.5, 1)), 0)
    assert 0 < seconds["update"] < seconds["total"]


def finished_arm(arm: str, seed: int, win_rate: float) -> dict[str, Any]:
    rates = dict.fromkeys(bench_curriculum.OPPONENTS, win_rate)
    return {"arm": arm, "seed": seed, "stage_steps": 16_384, "episodes": 8, "win_rate": rates, "return": rates}


FINISHED = [
    *(finished_arm("strong alone", seed, rate) for seed, rate in ((3, 0.3), (1, 0.1), (2, 0.2), (4, 0.9))),
    *(finished_arm("curriculum", seed, rate) for seed, rate in ((1, 0.2), (2, 0.4), (3, 0.3))),  # seed 4 is under way
    *(finished_arm("weak alone", seed, 0.0) for seed in (1, 2, 3, 4)),
    *(finished_arm("weak in stages", seed, 0.5) for seed in (1, 2, 3, 4)),
]


def test_intervals_over_seeds_are_those_of_students_t() -> None:
    mean, half = bench_curriculum.mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert half == pytest.approx(2.776 * math.sqrt(2.5 / 5))
    for df, t in bench_curriculum.T_975.items():
        grid = torch.linspace(0, t, 100_001, dtype=torch.float64)
        scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
        half_mass = torch.trapezoid(scale * (1 + grid**2 / df) ** (-(df + 1) / 2), grid)
        assert float(half_mass) == pytest.approx(0.475, abs=2e-5)


def test_a_curriculums_differences_are_paired_by_seed() -> None:
    text = bench_curriculum.table(FINISHED, "win_rate", ["hunter"]).splitlines()
    # 0.2, 0.4, 0.3 beside 0.1, 0.2, 0.3: means 0.3 and 0.2, differences 0.1, 0.2, 0.0, their deviation 0.1
    half = 4.303 * 0.1 / math.sqrt(3)
    assert text[0].count("|") == text[1].count("|") == text[2].count("|") == 9
    assert text[2] == (
        f"| hunter | 0.300 ± {half:.3f} | 0.200 ± {half:.3f} | 0.000 ± 0.000 | 0.500 ± 0.000 | "
        f"+0.100 [{0.1 - half:+.3f}, {0.1 + half:+.3f}] | +0.300 [{0.3 - half:+.3f}, {0.3 + half:+.3f}] | "
        f"-0.200 [{-0.2 - half:+.3f}, {-0.2 + half:+.3f}] |"
    )


def test_all_arms_of_the_curriculum_bench_learn_for_equally_many_steps() -> None:
    for arm, npcs in bench_curriculum.ARMS.items():
        words = bench_curriculum.arm_command(arm, 7, Path("a b"), 32_768)[4:]
        sweep = [word for word in words if word.startswith("hydra.sweeper.")]
        if len(npcs) == 1:
            assert f"trainer.dual_policy.checkpoint_npc.uri=builtin://arena/{npcs[0]}" in words
            assert "-m" not in words
            assert not sweep
        else:
            ladder = ",".join(f"builtin://arena/{name}" for name in npcs)
            assert f"hydra.sweeper.ladder=[{ladder}]" in sweep
            assert "hydra.sweeper.max_attempts=1" in sweep
            words.append(f"trainer.dual_policy.checkpoint_npc.uri=builtin://arena/{npcs[0]}")  # as the sweep does
        config, _ = compose_config([word for word in words if word != "-m" and not word.startswith("hydra")])
        assert config.trainer.total_timesteps * len(npcs) == 3 * 32_768
        assert (config.seed, config.trainer.threads, config.train_dir) == (7, 1, Path("a b"))
        split = 0.5 * 8  # learners among the arena's agents
        assert config.env.num_envs * split * config.trainer.horizon == bench_curriculum.ITERATION


def test_the_curriculum_bench_reads_the_last_stages_policy(tmp_path: Path) -> None:
    jobs = [
        SweepJob(num=0, stage=1, attempt=1, overrides=[], agent_step=5),
        SweepJob(num=1, stage=2, attempt=1, overrides=[], agent_step=6),
    ]
    chosen = ChosenPolicy(path="1/checkpoints/x.safetensors", sha256="", job=1, stage=2)
    (tmp_path / "sweep").mkdir()
    write_state(tmp_path / "sweep", SweepState(request={}, jobs=jobs, policy=chosen, status="finished"))
    assert bench_curriculum.read_run(tmp_path / "sweep") == (tmp_path / "sweep/1/checkpoints/x.safetensors", 11, [])
    (tmp_path / "result.json").write_text('{"checkpoint": "checkpoints/y.safetensors", "agent_step": 11}')
    assert bench_curriculum.read_run(tmp_path) == (tmp_path / "checkpoints/y.safetensors", 11, [])


def test_the_curriculum_bench_runs_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    lines = [json.dumps(row) + "\n" for row in FINISHED]
    (tmp_path / "results.jsonl").write_text("".join(lines) + lines[0][:20])  # the last line was cut
    monkeypatch.setattr(
        bench_curriculum.ProcessPoolExecutor, "submit", lambda *args, **kwargs: pytest.fail("a run was started")
    )
    settings = f"--out {tmp_path} --seeds 3 --stage-steps 16384".split()
    bench_curriculum.main([*settings, "--episodes", "8"])
    assert (tmp_path / "results.jsonl").read_text() == "".join(lines)
    assert bench_curriculum.table(FINISHED, "win_rate", bench_curriculum.HELD_OUT) in capsys.readouterr().out
    with pytest.raises(RunError, match="has runs of --stage-steps 16384 --episodes 8; use these"):
        bench_curriculum.main([*settings, "--episodes", "1024"])
