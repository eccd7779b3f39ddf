"""Rows sorted by policy: the kernels against a stable argsort."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dual_policy_plugin.kernels.group_rows import allocate_row_groups, group_rows, group_rows_plain

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("num_npcs", "num_envs", "rows_per_env", "block"),
    [(1, 5, 2, 16), (2, 33, 1, 16), (3, 50, 4, 16), (16, 77, 3, 32), (5, 1, 7, 16)],
)
def test_the_kernels_agree_with_a_stable_argsort(num_npcs, num_envs, rows_per_env, block):
    generator = torch.Generator().manual_seed(num_envs)
    sizes = {"num_npcs": num_npcs, "rows_per_env": rows_per_env, "tile": 16}
    groups = allocate_row_groups(num_envs=num_envs, device=CPU, **sizes)
    for _ in range(2):  # the second time over what the first one left
        npc_of_env = torch.randint(num_npcs, (num_envs,), generator=generator)
        group_rows(npc_of_env, groups, block=block)
        row_of_slot, policy_of_tile = group_rows_plain(npc_of_env, **sizes)
        torch.testing.assert_close(groups.row_of_slot, row_of_slot, rtol=0, atol=0)
        torch.testing.assert_close(groups.policy_of_tile, policy_of_tile, rtol=0, atol=0)


def test_programs_that_walk_over_several_blocks(monkeypatch):
    monkeypatch.setattr("dual_policy_plugin.kernels.group_rows.MAX_PROGRAMS", 3)
    sizes = {"num_npcs": 7, "rows_per_env": 2, "tile": 4}
    npc_of_env = torch.randint(7, (61,), generator=torch.Generator().manual_seed(0))
    groups = allocate_row_groups(num_envs=61, device=CPU, **sizes)  # 8 blocks of 8 envs on 3 programs
    group_rows(npc_of_env, groups, block=8)
    row_of_slot, policy_of_tile = group_rows_plain(npc_of_env, **sizes)
    torch.testing.assert_close(groups.row_of_slot, row_of_slot, rtol=0, atol=0)
    torch.testing.assert_close(groups.policy_of_tile, policy_of_tile, rtol=0, atol=0)


def test_groups_by_hand():
    groups = allocate_row_groups(num_envs=5, num_npcs=3, rows_per_env=1, tile=2, device=CPU)
    group_rows(torch.tensor([2, 0, 2, 0, 2]), groups, block=4)
    assert groups.policy_of_tile.tolist() == [1, 3, 3, -1, -1, -1]  # NPC 1 plays nowhere
    assert groups.row_of_slot.tolist() == [1, 3, 0, 2, 4, -1] + [-1] * 6


def test_every_tile_is_needed_when_each_group_spills_into_one_more():
    # 3 groups of 3 rows each on tiles of 2: ceil(9 / 2) + 3 = 8 tiles are there, 6 are used
    groups = allocate_row_groups(num_envs=9, num_npcs=3, rows_per_env=1, tile=2, device=CPU)
    group_rows(torch.arange(9) % 3, groups, block=16)
    assert groups.policy_of_tile.tolist() == [1, 1, 2, 2, 3, 3, -1, -1]
    assert groups.row_of_slot.tolist()[:12] == [0, 3, 6, -1, 1, 4, 7, -1, 2, 5, 8, -1]
