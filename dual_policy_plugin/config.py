"""The config of a run as frozen dataclasses: each field with its meaning and unit, each range checked where it stands.

`load_config` (in `hydra_app/loading.py`) turns a composed Hydra config into a `Config`, once; below it there is no
DictConfig. Fields that are null in the `dual_policy` node have their defaults filled in there.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dual_policy_plugin.config_checks import check, check_range
from dual_policy_plugin.pool_config import MatchmakingConfig, SelfPlayConfig, ShareSchedule, check_weight

SELECTOR_TYPES = ("specific", "latest", "top", "rand", "all")
MAX_POOL = 1024
"""NPCs of one run."""
_SYNC_URI = re.compile(r"s3://[a-z0-9.-]{3,63}(/[^@?\\]*)?|(file://)?/(?!.*://)[^\0]*")


@dataclass(kw_only=True, slots=True, frozen=True)
class PolicySource:
    """Where a policy comes from: `trainer.dual_policy.checkpoint_npc` and `trainer.initial_policy` share this."""

    uri: str
    """Path, file://, wandb://, s3:// or builtin:// as the user wrote it (see npc/uri.py)."""
    type: str = "specific"
    """specific | latest | top | rand | all: which of what the URI may mean."""
    range: int = 1
    """How many of them; latest, top and rand only. More than one makes a pool."""
    metric: str = "epoch"
    """What `top` orders by, larger is better."""
    filters: dict[str, Any] | None = None
    """Metadata name -> the value it must have."""
    name: str | None = None
    """The policy's name in logs and metrics; None: made from where it was found."""
    agent: str | None = None
    """Architecture of a bare state dict (.pt); None: the learner's."""
    act: str = "sample"
    """sample | greedy: how a frozen policy picks its action. Not used by trainer.initial_policy."""
    weight: float | None = None
    """Of this NPC in a pool, for matchmaking=weights; None: 1. Of several that a selector finds, each has it."""
    keep_optimizer: bool = False
    """trainer.initial_policy only: take the optimizer's moments along, where the checkpoint's run still has them."""

    def __post_init__(self) -> None:
        check_weight("weight", self.weight)
        check_selector("", type=self.type, range=self.range, metric=self.metric, filters=self.filters, name=self.name)


def check_selector(
    prefix: str, *, type: str, range: int, metric: str, filters: dict[str, Any] | None, name: str | None
) -> None:
    """Raises a ConfigError unless the parts of a selector go together; `prefix` stands before the keys it names."""
    check(
        type in SELECTOR_TYPES, f"{prefix}type", type, f"use {', '.join(SELECTOR_TYPES[:-1])} or {SELECTOR_TYPES[-1]}"
    )
    check_range(f"{prefix}range", range, 1, MAX_POOL)
    is_counted = type in ("latest", "top", "rand")
    check(is_counted or range == 1, f"{prefix}range", range, f"type={type} takes no range; use latest, top or rand")
    is_known = type == "top" or metric == "epoch"
    check(is_known, f"{prefix}metric", metric, f"type={type} orders by no metric; use type=top, or leave metric away")
    for key, value in (filters or {}).items():
        is_plain = isinstance(key, str) and isinstance(value, str | int | float | bool)
        check(is_plain, f"{prefix}filters.{key}", value, "a filter is a metadata name and the value it must have")
    is_name = name is None or re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name) is not None
    check(is_name, f"{prefix}name", ascii(name), "use up to 64 letters, digits, _ . -")


@dataclass(kw_only=True, slots=True, frozen=True)
class DualPolicyConfig:
    """Who plays against the learner, and on which seats."""

    enabled: bool = False
    """Whether an NPC plays. null: no, and an error where anything else of the node is set."""
    training_agents_pct: float = 0.5
    """Fraction of each env's agents that act with the learner, in (0, 1]."""
    assignment: str | list[int] = "first"
    """first | last | interleaved | explicit list of the learner's seats."""
    npc: PolicySource | None = None
    """The frozen policy; None where no NPC is needed (enabled=false or training_agents_pct=1) or others are named."""
    pool: list[PolicySource] = field(default_factory=list)
    """Further NPCs."""
    matchmaking: MatchmakingConfig = field(default_factory=MatchmakingConfig)
    """Which of them plays next."""
    self_play: SelfPlayConfig | None = None
    """Snapshots of the learner as further NPCs; None: none."""
    pct_schedule: ShareSchedule | None = None
    """How training_agents_pct changes during the run; None: not at all."""
    lock: Path | dict[str, Any] | None = None
    """An npc.lock.json (or its content, as a run's config.yaml has it) whose pins are taken instead of resolving;
    None: the run makes its own."""

    def __post_init__(self) -> None:
        key, pct = "trainer.dual_policy.training_agents_pct", self.training_agents_pct
        check(pct != 0, key, pct, "nothing would learn; use a fraction above 0, for example 0.5")
        check(math.isfinite(pct) and 0 < pct <= 1, key, pct, "use a fraction above 0 and up to 1, for example 0.5")
        schedule = self.pct_schedule
        if schedule is None:
            return
        if schedule.type == "adaptive":
            low, high = schedule.low, schedule.high
            right = f"an adaptive schedule begins between low={low:g} and high={high:g}, with NPCs; use such a share"
            check(low <= pct <= high and pct < 1, key, pct, right)
        right = "a schedule changes the number of seats; use first, last or interleaved"
        check(isinstance(self.assignment, str), "trainer.dual_policy.assignment", self.assignment, right)

    @property
    def sources(self) -> list[PolicySource]:
        """All NPCs of the config: checkpoint_npc, then the pool."""
        return [*([self.npc] if self.npc is not None else []), *self.pool]


@dataclass(kw_only=True, slots=True, frozen=True)
class TrainerConfig:
    """PPO's hyperparameters (the field's names) and the run's length, pace and safety."""

    total_timesteps: int = 2_000_000
    """Learner steps to train for (D11)."""
    horizon: int = 32
    """Steps per segment."""
    epochs: int = 1
    """Passes over a rollout."""
    num_minibatches: int = 8
    """Minibatches per pass; a minibatch is a range of whole segments."""
    learning_rate: float = 3e-3
    """Adam's, at the start."""
    anneal_lr: bool = True
    """Learning rate falls linearly to 0 over total_timesteps."""
    gamma: float = 0.99
    """Discount of rewards per step."""
    gae_lambda: float = 0.95
    """Lambda of the generalized advantage estimates."""
    clip_coef: float = 0.2
    """How far the ratio of new to old probabilities may leave 1 before it counts no more."""
    clip_vloss: bool = True
    """Whether the value loss is clipped too."""
    vf_clip_coef: float = 0.2
    """How far a new value may leave the old one where the value loss is clipped."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    ent_coef: float = 0.005
    """Weight of the entropy bonus."""
    max_grad_norm: float = 0.5
    """Norm that a larger gradient is scaled down to."""
    norm_adv: bool = True
    """Whether advantages are normalized to mean 0 and standard deviation 1."""
    target_kl: float | None = None
    """Skip the rest of an iteration's updates once approx_kl exceeds this; None: never."""
    adam_beta1: float = 0.9
    """Decay of Adam's mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of Adam's mean of squared gradients."""
    adam_eps: float = 1e-5
    """Added to the root in Adam's denominator."""
    num_workers: int = 2
    """Worker processes of a foreign env; not used by the arena."""
    threads: int | None = None
    """CPU threads of torch; None: the cores that env workers leave."""
    precision: str = "auto"
    """auto | fp32 | bf16: of matrix products; auto takes bf16 where the hardware multiplies it."""
    fused: bool = True
    """On a GPU: fused kernels and captured CUDA graphs; false: plain torch, to compare with. No effect on a CPU."""
    checkpoint_interval: int = 50
    """Iterations between checkpoints."""
    state_interval_s: float = 60.0
    """Seconds after which the state is saved between two checkpoints too: what a killed run has to do again."""
    keep_checkpoints: int = 5
    """How many of the newest checkpoints stay."""
    grace_s: float = 30.0
    """Seconds that a stop (SIGTERM, SIGINT, SIGUSR1, SIGUSR2) may take: the rest of the iteration and the save. A stop
    that took longer says so."""
    evaluate_interval: int | None = None
    """Iterations between evaluations; None: at the end only."""
    best_metric: str = "dual_policy/win_rate"
    """Which metric makes a checkpoint `best` (larger is better)."""
    publish_uri: str | None = None
    """s3://bucket/prefix/ that gets every checkpoint as <run>/model_<epoch>.safetensors, once; None: nowhere."""
    sync_uri: str | None = None
    """s3://bucket/prefix/ or a folder, under which the run directory is mirrored as <run>/, so that the run (and a
    curriculum with its jobs) can go on on another machine; None: nowhere."""
    initial_policy: PolicySource | None = None
    """Start the learner from this checkpoint; not a resume."""
    dual_policy: DualPolicyConfig = field(default_factory=DualPolicyConfig)

    def __post_init__(self) -> None:
        for name, low, high in (
            ("total_timesteps", 1, 10**15), ("horizon", 1, 4096), ("epochs", 1, 1000), ("num_minibatches", 1, 65536),
            ("learning_rate", 0, 10), ("gamma", 0, 1), ("gae_lambda", 0, 1), ("clip_coef", 0, 10), ("vf_coef", 0, 100),
            ("vf_clip_coef", 0, 1e9), ("ent_coef", 0, 100), ("max_grad_norm", 1e-9, 1e9), ("adam_beta1", 0, 0.999999),
            ("adam_beta2", 0, 0.99999999), ("adam_eps", 1e-12, 1), ("num_workers", 1, 1024),
            ("checkpoint_interval", 1, 10**9), ("keep_checkpoints", 1, 10**6), ("grace_s", 0.0, 86400.0),
            ("state_interval_s", 0.0, 86400.0),
        ):  # fmt: skip
            check_range(f"trainer.{name}", getattr(self, name), low, high)
        for name in ("target_kl", "threads", "evaluate_interval"):
            value = getattr(self, name)
            check(value is None or value > 0, f"trainer.{name}", value, "use a value above 0, or null")
        check(
            self.threads is None or self.threads <= 1024, "trainer.threads", self.threads, "use 1024 at most, or null"
        )
        is_s3 = self.publish_uri is None or re.fullmatch(r"s3://[a-z0-9.-]{3,63}(/[^@?\\]*)?", self.publish_uri)
        check(bool(is_s3), "trainer.publish_uri", ascii(self.publish_uri)[1:-1], "use s3://bucket/prefix/, or null")
        is_place = self.sync_uri is None or _SYNC_URI.fullmatch(self.sync_uri)
        shown = re.sub(r"^(\w*://)?.*@", r"\1...@", self.sync_uri or "").partition("?")[0]  # it may hold a password
        right = "use s3://bucket/prefix/ or the absolute path of a folder, without a login; or null"
        check(bool(is_place), "trainer.sync_uri", ascii(shown)[1:-1], right)
        check(self.precision in ("auto", "fp32", "bf16"), "trainer.precision", self.precision, "use auto, fp32 or bf16")


@dataclass(kw_only=True, slots=True, frozen=True)
class AgentConfig:
    """The learner's net."""

    name: str = "fast"
    """fast | mlp | the name of an installed entry point of the group dual_policy.policies."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the architecture, for example hidden_size."""


@dataclass(kw_only=True, slots=True, frozen=True)
class EnvConfig:
    """The env, by name; `args` are checked by the env itself."""

    name: str = "arena"
    """arena | mettagrid | pettingzoo | the name of an installed entry point of the group dual_policy.envs."""
    num_envs: int = 128
    """Copies of the env that are stepped together, on each rank."""
    args: dict[str, Any] = field(default_factory=dict)
    """The env's own settings (the arena's are ArenaConfig)."""

    def __post_init__(self) -> None:
        check_range("env.num_envs", self.num_envs, 1, 65536)


@dataclass(kw_only=True, slots=True, frozen=True)
class EvalsConfig:
    """Match-ups that are played at the end of a run and every trainer.evaluate_interval iterations."""

    opponents: list[str] = field(default_factory=list)
    """URIs; empty: the run's own NPCs."""
    held_out: list[str] = field(default_factory=list)
    """URIs of policies that are played against too and may not be NPCs of the run: their bytes are compared."""
    episodes: int = 1024
    """Episodes per opponent, half of them with the seats swapped; 0: no evaluation."""

    def __post_init__(self) -> None:
        check_range("evals.episodes", self.episodes, 0, 10**7)


@dataclass(kw_only=True, slots=True, frozen=True)
class WandbConfig:
    """Weights & Biases."""

    mode: str = "off"
    """off | offline | online."""
    project: str | None = None
    """None: WANDB_PROJECT, else W&B's settings, else dual-policy."""
    entity: str | None = None
    """A user or team; None: WANDB_ENTITY, else the one that is logged in."""
    group: str | None = None
    """None: WANDB_RUN_GROUP, else none."""
    tags: list[str] = field(default_factory=list)
    """Empty: WANDB_TAGS (a,b), else none."""

    def __post_init__(self) -> None:
        check(self.mode in ("off", "offline", "online"), "wandb.mode", self.mode, "use off, offline or online")


@dataclass(kw_only=True, slots=True, frozen=True)
class Config:
    """One run."""

    run: str = "default"
    """Name of the run: its directory under train_dir."""
    seed: int = 1
    """Of weights, envs and sampling; the same seed gives the same run."""
    device: str = "auto"
    """auto | cpu | cuda | cuda:N. auto takes CUDA where there is one."""
    train_dir: Path = Path("train_dir")
    """The folder that holds all runs; a relative one begins where the program is started."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    evals: EvalsConfig = field(default_factory=EvalsConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False
    """Every figure in event files under <run>/tensorboard/ too, for `tensorboard --logdir train_dir`."""
    report: bool = True
    """Write report.html into the run's directory at its end."""
    hourly_cost: float | None = None
    """Dollars per hour of this machine (METTA_HOURLY_COST); None: no cost metrics."""

    def __post_init__(self) -> None:
        check_range("seed", self.seed, 0, 2**31 - 1)
        is_inside = bool(Path(self.run).parts) and not Path(self.run).is_absolute() and ".." not in Path(self.run).parts
        check(is_inside, "run", self.run, "use the name of a folder inside train_dir, for example my_experiment")

    @property
    def policies(self) -> list[tuple[str, PolicySource]]:
        """Every policy that the run names, with its role in the lock (see npc/lock.py)."""
        initial = self.trainer.initial_policy
        return [
            *(("npc", source) for source in self.trainer.dual_policy.sources),
            *([("initial", initial)] if initial is not None else []),
            *(("opponent", PolicySource(uri=uri)) for uri in self.evals.opponents),
            *(("held_out", PolicySource(uri=uri)) for uri in self.evals.held_out),
        ]
