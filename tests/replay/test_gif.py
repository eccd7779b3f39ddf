"""The GIF: its frames, their times, and that colors stand where the recording has its agents."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from dual_policy_plugin.replay.gif import BAR, FRAME_MS, HOLD_MS, ICE, LEARNER, NPC, cell_pixels, write_gif
from dual_policy_plugin.replay.record import Recording
from tests.replay.games import HUNTER, arena_games


@pytest.fixture(scope="module")
def games() -> Recording:
    return arena_games(policy=HUNTER, episodes=2)


def near(pixel: tuple[int, ...], color: str) -> bool:
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return max(abs(one - other) for one, other in zip(pixel, wanted, strict=True)) <= 12


def test_every_step_is_a_frame_and_every_agent_stands_in_its_color(games: Recording) -> None:
    data = write_gif(games)
    assert len(data) < 600_000
    num_frozen = 0
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 2 * 41
        assert image.info["loop"] == 0
        for number, episode in enumerate(games.episodes):
            frames, unit = episode.frames, cell_pixels(episode.frames)
            assert unit == 24
            assert image.size == (10 * 24, 9 * 24 + BAR)
            for t in range(41):
                image.seek(number * 41 + t)
                assert image.info["duration"] == (HOLD_MS if t == 40 else FRAME_MS)
                pixels = image.convert("RGB")
                for seat, side in enumerate(episode.policy_of_seat):
                    row, column = divmod(int(frames.cells[t, seat]), frames.width)
                    is_frozen = bool(frames.state["frozen"][t, seat])
                    num_frozen += is_frozen
                    x, y = (column + 1) * unit - 5, BAR + (row + 1) * unit - 3
                    assert near(pixels.getpixel((x, y)), ICE if is_frozen else (LEARNER, NPC)[side])  # type: ignore[arg-type]
    assert num_frozen > 5


def test_a_long_recording_shows_every_nth_step_and_always_the_last(games: Recording) -> None:
    with Image.open(io.BytesIO(write_gif(games, max_frames=30))) as image:
        assert image.n_frames == 2 * 15  # 0, 3, ..., 39 and 40
        image.seek(14)
        assert image.info["duration"] == HOLD_MS


def test_a_large_map_has_small_cells() -> None:
    frames = arena_games("env.height=63", "env.width=40", "env.episode_steps=2", episodes=1).episodes[0].frames
    assert cell_pixels(frames) == 480 // 64
