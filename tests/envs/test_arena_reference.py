"""The batched arena against the rule book played slowly: plain Python, one env, one agent after the other."""

import torch

from dual_policy_plugin.envs.arena import Arena
from dual_policy_plugin.envs.arena_config import ACTIONS, ArenaConfig, team_of_seat
from dual_policy_plugin.envs.arena_maps import MARGIN
from dual_policy_plugin.rng import distinct_keys, extend

STEP = {"north": (-1, 0), "south": (1, 0), "west": (0, -1), "east": (0, 1)}
FACINGS = ("north", "south", "west", "east")


class Reference:
    """One env, read off an arena at an episode's begin."""

    def __init__(self, arena, env):
        self.config, self.env = arena.config, env
        self.teams = team_of_seat(self.config.teams, self.config.num_agents)
        stride = arena.drawer.stride
        codes = arena.views[env, 0].view(-1, stride).tolist()
        self.cells = {}
        for y in range(self.config.height):
            for x in range(self.config.width):
                code = codes[y + MARGIN][x + MARGIN]
                self.cells[y, x] = ("empty", "wall", "mine", "altar")[code] if code < 4 else "empty"
        self.stock = {cell: self.config.altar_stock for cell, what in self.cells.items() if what == "altar"}
        self.agents = []
        for seat in range(self.config.num_agents):
            y, x = divmod(arena.positions[env, seat].item() - env * arena.drawer.num_cells, stride)
            facing = FACINGS[arena.facings[env, seat] - 1]
            self.agents.append(
                {"at": (y - MARGIN, x - MARGIN), "facing": facing, "ore": 0, "frozen": 0, "cooldown": 0}
                | {"hearts": 0, "mined": 0, "attacks": 0, "hit": 0}
            )
        self.left = self.config.episode_steps

    def step(self, actions, priorities):
        """Returns the rewards; priorities are one number per seat."""
        agents, before = self.agents, {agent["at"]: seat for seat, agent in enumerate(self.agents)}
        awake = [agent["frozen"] == 0 for agent in agents]
        ready = [agent["cooldown"] == 0 for agent in agents]
        ore = [agent["ore"] for agent in agents]
        ahead, going, offering, mining, attackers = [], {}, {}, [], {}
        for seat, agent in enumerate(agents):
            action = ACTIONS[actions[seat]] if awake[seat] else "noop"
            agent["facing"] = action if action in STEP else agent["facing"]
            dy, dx = STEP[agent["facing"]]
            cell = (agent["at"][0] + dy, agent["at"][1] + dx)
            ahead.append(cell)
            what = self.cells.get(cell, "wall")
            if action in STEP and cell not in before:
                if what == "empty":
                    going.setdefault(cell, []).append(seat)
                elif what == "mine" and ore[seat] < self.config.ore_capacity:
                    mining.append(seat)
                elif what == "altar" and ore[seat]:
                    offering.setdefault(cell, []).append(seat)
            if action == "attack" and cell in before and ready[seat]:
                foe = before[cell]
                if self.teams[foe] != self.teams[seat] and awake[foe]:
                    attackers.setdefault(foe, []).append(seat)
        rewards = [0.0] * len(agents)
        for agent in agents:
            agent["frozen"] = max(0, agent["frozen"] - 1)
            agent["cooldown"] = max(0, agent["cooldown"] - 1)
        for foe in attackers:
            agents[foe].update(frozen=self.config.freeze_steps, ore=0, hit=agents[foe]["hit"] + 1)
        for foe, those in attackers.items():
            for seat in those:
                agents[seat]["cooldown"] = self.config.attack_cooldown
                agents[seat]["attacks"] += 1
            robber = agents[max(those, key=priorities.__getitem__)]
            robber["ore"] = min(self.config.ore_capacity, robber["ore"] + ore[foe])
        for cell, those in going.items():
            seat = max(those, key=priorities.__getitem__)
            if seat not in attackers:
                agents[seat]["at"] = cell
        for seat in mining:
            if seat not in attackers:
                agents[seat]["ore"] += 1
                agents[seat]["mined"] += 1
        for cell, those in offering.items():
            seat = max(those, key=priorities.__getitem__)
            if seat not in attackers:
                agents[seat]["ore"] -= 1
                agents[seat]["hearts"] += 1
                rewards[seat] = 1.0
                self.stock[cell] -= 1
                self.cells[cell] = "altar" if self.stock[cell] else "wall"
        self.left -= 1
        return rewards

    def observe(self, seat):
        """The 128 bytes of one seat."""
        me, standing = self.agents[seat], {agent["at"]: other for other, agent in enumerate(self.agents)}
        row = []
        for dy in range(-5, 6):
            for dx in range(-5, 6):
                cell = (me["at"][0] + dy, me["at"][1] + dx)
                code = ("empty", "wall", "mine", "altar").index(self.cells.get(cell, "wall"))
                if cell in standing:
                    other = standing[cell]
                    code = 4 + (self.teams[other] != self.teams[seat]) + 2 * (self.agents[other]["frozen"] > 0)
                if cell == me["at"]:
                    code = 1 + FACINGS.index(me["facing"])
                row.append(code)
        time = -(-255 * self.left // self.config.episode_steps)
        return [*row, me["ore"], min(255, me["hearts"]), me["frozen"], me["cooldown"], time, 0, 0]


def busy_actions(codes_ahead, facings, generator):
    """Random actions in which an agent that has something ahead mostly uses it, so that every rule is at work."""
    random = torch.randint(0, 6, facings.shape, generator=generator)
    insist = torch.rand(facings.shape, generator=generator) < 0.7
    foe = codes_ahead == 5
    useful = (codes_ahead == 2) | (codes_ahead == 3)
    return torch.where(insist & foe, 5, torch.where(insist & useful, facings, random))


def test_the_arena_is_the_rule_book():
    config = ArenaConfig(
        num_agents=7, height=7, width=6, mines=2, altars=3, walls=2, altar_stock=2, ore_capacity=2, freeze_steps=3,
        attack_cooldown=2, episode_steps=40, teams=[0, 1, 1, 0, 1, 0, 0],
    )  # fmt: skip
    num_envs, seats = 6, torch.arange(7)
    arena = Arena(config, num_envs)
    arena.reset(11)
    generator = torch.Generator().manual_seed(5)
    seen = torch.zeros(num_envs * 7, 128, dtype=torch.uint8)
    totals = torch.zeros(4)
    for _ in range(3):
        references = [Reference(arena, env) for env in range(num_envs)]
        for step in range(config.episode_steps):
            arena.observe(seats, seen)
            slow = [reference.observe(seat) for reference in references for seat in range(7)]
            assert seen.tolist() == slow, f"step {step}"
            ahead = arena.positions + arena.offsets[arena.facings]
            codes = arena.views.view(-1)[ahead + arena.to_views[0]]
            actions = busy_actions(codes, arena.facings, generator)
            keys = extend(arena.priority_keys, arena.steps_left)
            priorities = distinct_keys(keys[:, None], arena.seat_keys).tolist()
            rewards = [
                reference.step(actions[env].tolist(), priorities[env]) for env, reference in enumerate(references)
            ]
            result = arena.step(actions)
            assert result.rewards.tolist() == rewards, f"step {step}"
        names = ("hearts", "mined", "attacks", "hit")
        slow = [[[agent[name] for name in names] for agent in reference.agents] for reference in references]
        assert result.counters.tolist() == slow
        totals += result.counters.sum(dim=(0, 1))
    # every rule was at work
    assert totals[0] > 25
    assert (totals[1:] > 100).all()
