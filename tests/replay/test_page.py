"""The replay page in a real browser: what it draws and says is what was recorded, by mouse, by keys and by touch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from dual_policy_plugin.replay.frames import Frames
from dual_policy_plugin.replay.page import embed_json, page_data, write_page
from dual_policy_plugin.replay.record import Recording
from tests.browser import open_page, sideways_scroll, start_chromium
from tests.replay.games import HUNTER, arena_games

CALM = {"reduced_motion": "reduce"}
LEARNER_BLUE, NPC_ORANGE = [0, 114, 178], [230, 159, 0]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    yield from start_chromium()


@pytest.fixture(scope="module")
def games() -> Recording:
    return arena_games(policy=HUNTER, episodes=3)


@pytest.fixture(scope="module")
def path(games: Recording, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("replay") / "replay.html"
    path.write_bytes(write_page(games))
    return path


def state(page: Page) -> tuple[int, int, bool]:
    """(episode, step, playing) as the page says them to a test."""
    said = page.evaluate("({...document.body.dataset})")
    return int(said["episode"]), int(said["step"]), said["playing"] == "true"


def scores(page: Page) -> list[str | None]:
    return [page.locator(f"#score-{side}").text_content() for side in (0, 1)]


def recorded_scores(games: Recording, episode: int, t: int) -> list[str]:
    return [f"{mean:.2f}" for mean in games.episodes[episode - 1].means(t)]


def test_the_drawn_score_is_the_recorded_one_at_every_place_of_the_scrub_bar(
    chromium: Browser, path: Path, games: Recording
) -> None:
    with open_page(chromium, path, **CALM) as page:
        seen = set()
        for number, episode in enumerate(games.episodes, start=1):
            page.keyboard.press(str(number))
            for t in (0, 9, 20, 31, 40):
                page.locator("#scrub").fill(str(t))
                assert state(page) == (number, t, False)
                assert scores(page) == recorded_scores(games, number, t)
                seen.add(tuple(scores(page)))
            first, second = episode.means(40)
            winner = "draw" if first == second else "learner wins" if first > second else "NPC wins"
            expect(page.locator("#result")).to_have_text(f"{winner} {first:.2f} : {second:.2f}")
            chosen = page.locator("#episodes button[aria-pressed=true]")
            expect(chosen).to_contain_text(f"{number} · {first:.2f} : {second:.2f}")
        assert len(seen) >= 5


def test_it_plays_by_itself_and_stops_at_the_end(chromium: Browser, path: Path, games: Recording) -> None:
    with open_page(chromium, path) as page:
        expect(page.locator("body")).to_have_attribute("data-step", re.compile(r"[2-9]|\d\d"))
        page.keyboard.press("Space")
        paused = state(page)
        assert not paused[2]
        expect(page.locator("#play")).to_have_attribute("aria-label", "Play")
        page.wait_for_timeout(700)
        assert state(page) == paused
        for _ in range(3):
            page.keyboard.press("+")
        expect(page.locator("#speed")).to_have_text("32 steps/s")
        page.locator("#play").click()
        expect(page.locator("body")).to_have_attribute("data-playing", "false")
        assert state(page) == (1, 40, False)
        assert scores(page) == recorded_scores(games, 1, 40)
        page.locator("#play").click()  # once more from the start
        expect(page.locator("body")).to_have_attribute("data-playing", "true")
        assert state(page)[1] < 40


def test_who_wants_no_motion_is_shown_a_still_page_that_plays_when_told(chromium: Browser, path: Path) -> None:
    with open_page(chromium, path, **CALM) as page:
        page.wait_for_timeout(500)
        assert state(page) == (1, 0, False)
        page.keyboard.press("Space")
        expect(page.locator("body")).not_to_have_attribute("data-step", "0")


def test_keys(chromium: Browser, path: Path) -> None:
    with open_page(chromium, path, **CALM) as page:
        for key, expected in (
            ("ArrowRight", (1, 1)), ("Shift+ArrowRight", (1, 11)), ("ArrowLeft", (1, 10)), ("End", (1, 40)),
            ("ArrowRight", (1, 40)), ("Home", (1, 0)), ("ArrowLeft", (1, 0)), ("2", (2, 0)), ("ArrowDown", (3, 0)),
            ("ArrowDown", (3, 0)), ("ArrowUp", (2, 0)), ("9", (2, 0)), ("1", (1, 0)),
        ):  # fmt: skip
            page.keyboard.press(key)
            assert state(page) == (*expected, False), key
        for key, speed in (("+", 8), ("-", 4), ("-", 2), ("-", 1), ("-", 1), ("=", 2)):
            page.keyboard.press(key)
            expect(page.locator("#speed")).to_have_text(f"{speed} steps/s")
        page.keyboard.press("?")
        expect(page.locator("#keys")).to_be_visible()
        page.keyboard.press("ArrowRight")
        assert state(page)[1] == 0  # the dialog has the keys
        page.keyboard.press("Escape")
        expect(page.locator("#keys")).to_be_hidden()
        page.locator("#forward").focus()
        page.keyboard.press("Enter")  # a button does what it says, and no more
        assert state(page) == (1, 1, False)
        page.keyboard.press("Space")
        assert state(page) == (1, 2, False)


def middle_of(page: Page, frames: Frames, cell: int) -> tuple[float, float]:
    """The middle of a cell on the screen, worked out from the recording and the canvas alone."""
    row, column = divmod(cell, frames.width)
    box = page.locator("#board").bounding_box()
    assert box is not None
    side = box["width"] / (frames.width + 1)
    return box["x"] + (column + 1) * side, box["y"] + (row + 1) * side


def place_of(page: Page, games: Recording, episode: int, t: int, seat: int) -> tuple[float, float]:
    """The middle of an agent on the screen."""
    frames = games.episodes[episode - 1].frames
    return middle_of(page, frames, int(frames.cells[t, seat]))


def test_the_agent_under_the_pointer_shows_its_own_state(chromium: Browser, path: Path, games: Recording) -> None:
    frames = games.episodes[0].frames
    t = int(frames.state["frozen"].max(axis=1).argmax())  # when somebody is frozen
    assert frames.state["frozen"][t].max() > 1
    with open_page(chromium, path, **CALM) as page:
        page.locator("#scrub").fill(str(t))
        expect(page.locator("#agent")).to_be_hidden()
        for seat in range(4):
            page.mouse.move(*place_of(page, games, 1, t, seat))
            expect(page.locator("#agent b")).to_have_text(f"Agent {seat}, team {int(seat > 1)}")
            expect(page.locator("#agent span")).to_have_text("learner hunter" if seat < 2 else "NPC weak")
            for name in ("ore", "hearts"):
                expect(page.locator(f"[data-fact={name}]")).to_have_text(str(frames.state[name][t, seat]))
            frozen = int(frames.state["frozen"][t, seat])
            text = f"{frozen} step{'s' if frozen > 1 else ''}" if frozen else "no"
            expect(page.locator("[data-fact=frozen]")).to_have_text(text)
            expect(page.locator("[data-fact=return]")).to_have_text(f"{frames.returns[t, seat]:g}")
            expect(page.locator("[data-fact=acts]")).to_have_text(games.actions[frames.actions[t, seat]])
        free = next(cell for cell in range(frames.height * frames.width) if cell not in frames.cells[t])
        page.mouse.move(*middle_of(page, frames, free))
        expect(page.locator("#agent")).to_be_hidden()
        page.mouse.move(0, 0)
        page.keyboard.press("a")
        expect(page.locator("#agent")).to_have_attribute("data-seat", "0")
        page.keyboard.press("Escape")
        expect(page.locator("#agent")).to_be_hidden()


def color_at(page: Page, x: float, y: float) -> list[int]:
    return page.evaluate(  # type: ignore[no-any-return]
        """([x, y]) => {
            const canvas = document.getElementById('board'), box = canvas.getBoundingClientRect();
            const scale = canvas.width / box.width;
            const copy = Object.assign(document.createElement('canvas'), {width: canvas.width, height: canvas.height});
            const context = copy.getContext('2d');
            context.drawImage(canvas, 0, 0);
            return [...context.getImageData((x - box.x) * scale, (y - box.y) * scale, 1, 1).data].slice(0, 3);
        }""",
        [x, y],
    )


def test_each_side_has_its_color_and_its_shape_where_the_recording_has_it(
    chromium: Browser, path: Path, games: Recording
) -> None:
    frames, checked = games.episodes[1].frames, 0
    sides = games.episodes[1].policy_of_seat
    assert sides == (1, 1, 0, 0)  # the seats are swapped
    with open_page(chromium, path, **CALM) as page:
        page.keyboard.press("2")
        for t in (0, 12, 25, 40):
            page.locator("#scrub").fill(str(t))
            box = page.locator("#board").bounding_box()
            assert box is not None
            cell = box["width"] / (frames.width + 1)
            for seat, side in enumerate(sides):
                if frames.state["frozen"][t, seat]:
                    continue
                x, y = place_of(page, games, 2, t, seat)
                inside = color_at(page, x - 0.22 * cell, y - 0.16 * cell)
                assert inside == (LEARNER_BLUE, NPC_ORANGE)[side], (t, seat)
                corner = color_at(page, x - 0.27 * cell, y - 0.27 * cell)
                facing = frames.facings[t, seat]
                if facing not in (1, 3):  # no nose there
                    assert (corner == NPC_ORANGE) == (side == 1), "a square has corners, a circle has none"
                checked += 1
    assert checked >= 10


def test_the_grid_is_drawn_anew_at_every_step_and_alike_at_the_same(chromium: Browser, path: Path) -> None:
    with open_page(chromium, path, **CALM) as page:
        pictures = []
        for t in (3, 4, 5, 3):
            page.locator("#scrub").fill(str(t))
            pictures.append(page.evaluate("document.getElementById('board').toDataURL()"))
        assert len(set(pictures)) == 3
        assert pictures[0] == pictures[3]


@pytest.mark.parametrize("ratio", [1, 2, 1.5])
def test_the_canvas_has_a_pixel_for_every_pixel_of_the_screen(chromium: Browser, path: Path, ratio: float) -> None:
    with open_page(chromium, path, device_scale_factor=ratio, **CALM) as page:
        pixels, shown = page.evaluate("[board.width, board.getBoundingClientRect().width * devicePixelRatio]")
        assert pixels == pytest.approx(shown, abs=0.6)
        assert pixels % 10 == 0  # 9 cells and two halves of wall, whole pixels each


def test_a_phone_s_width_needs_no_sideways_scroll_and_a_tap_looks_at_an_agent(
    chromium: Browser, path: Path, games: Recording
) -> None:
    options = {"width": 390, "height": 844, "device_scale_factor": 3, "has_touch": True, "is_mobile": True, **CALM}
    with open_page(chromium, path, **options) as page:  # type: ignore[arg-type]
        assert sideways_scroll(page) == 0
        page.keyboard.press("a")
        assert sideways_scroll(page) == 0
        page.keyboard.press("Escape")
        page.touchscreen.tap(*place_of(page, games, 1, 0, 2))
        expect(page.locator("#agent")).to_have_attribute("data-seat", "2")
        page.locator("#episodes button").nth(1).tap()
        assert state(page)[0] == 2
        small = page.evaluate(
            "[...document.querySelectorAll('button')].filter((one) => one.offsetWidth && one.offsetHeight < 40).length"
        )
        assert small == 0


def test_the_table_says_who_acts_for_whom(chromium: Browser, path: Path, games: Recording) -> None:
    with open_page(chromium, path, **CALM) as page:
        expect(page.locator("h1")).to_have_text("hunter against weak")
        expect(page.locator("#seats-0")).to_have_text("learner, seats 0-1 of team 0")
        expect(page.locator("#seats-1")).to_have_text("NPC, seats 2-3 of team 1")
        page.keyboard.press("2")
        expect(page.locator("#seats-0")).to_have_text("learner, seats 2-3 of team 1")
        second = page.locator(".policy").nth(1)
        expect(second.locator("code")).to_have_text("builtin://arena/weak")
        expect(second).to_contain_text(f"sha256 {games.policies[1].sha256[:12]}")
        expect(page.locator(".policy").nth(0)).to_contain_text("a script")


def test_the_chart_has_both_lines_and_goes_where_it_is_clicked(chromium: Browser, path: Path, games: Recording) -> None:
    with open_page(chromium, path, **CALM) as page:
        for side in (0, 1):
            points = page.locator(f"#chart .line-{side}").get_attribute("points") or ""
            heights = [float(point.partition(",")[2]) for point in points.split()]
            means = [games.episodes[0].means(t)[side] for t in range(41)]
            assert len(heights) == 41
            rises = [t for t in range(40) if heights[t + 1] < heights[t]]
            assert rises == [t for t in range(40) if means[t + 1] > means[t]]
        box = page.locator("#chart").bounding_box()
        assert box is not None
        left, right = 34, box["width"] - 12
        page.mouse.click(box["x"] + (left + right) / 2, box["y"] + 50)
        assert state(page)[1] == 20
        cursor = page.locator("#cursor").get_attribute("x1")
        assert float(cursor or 0) == pytest.approx((left + right) / 2, abs=1)


def test_dark_where_the_reader_wants_dark_and_a_focus_that_can_be_seen(chromium: Browser, path: Path) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        with open_page(chromium, path, color_scheme=scheme, **CALM) as page:
            color = page.evaluate("getComputedStyle(document.body).backgroundColor")
            grounds.append(sum(map(int, re.findall(r"\d+", color)[:3])))
            x, y = 0.03, 0.3
            box = page.locator("#board").bounding_box()
            assert box is not None
            wall = color_at(page, box["x"] + x * box["width"], box["y"] + y * box["height"])
            assert wall == ([74, 82, 92] if scheme == "light" else [89, 99, 111])
            page.keyboard.press("Tab")
            outline = page.evaluate("getComputedStyle(document.activeElement).outline")
            assert "3px" in outline
            assert "solid" in outline
            assert page.evaluate("document.activeElement.id") == "first"
    assert grounds[0] > 700 > 120 > grounds[1]


def test_names_and_uris_are_text_whatever_they_hold(chromium: Browser, games: Recording, tmp_path: Path) -> None:
    evil = '</script><img src=x onerror="document.title=1">&amp;\u2028' + "long_" * 20
    policy = replace(games.policies[0], name=evil, uri=f"file:///tmp/{evil}")
    page_path = tmp_path / "evil.html"
    page_path.write_bytes(write_page(replace(games, policies=(policy, games.policies[1]))))
    shown = evil.replace("\u2028", "\\u2028")
    with open_page(chromium, page_path, **CALM) as page:
        assert page.locator("h1").text_content() == f"{shown} against weak"
        assert page.locator(".policy code").first.text_content() == f"file:///tmp/{shown}"
        assert page.title() == f"{shown} against weak: replay"
        page.keyboard.press("a")
        box = page.locator("#agent").evaluate("(box) => [box.scrollWidth, box.clientWidth]")
        assert box[0] == box[1]  # a long word is broken, not drawn over the edge
        assert page.locator("img").count() == 0


def test_json_in_the_page_ends_no_element_and_comes_back_as_it_was(games: Recording) -> None:
    assert embed_json({"a": "</script>&<!--"}) == '{"a":"\\u003c/script\\u003e\\u0026\\u003c!--"}'
    data = page_data(games)
    assert json.loads(embed_json(data)) == data
    with pytest.raises(ValueError, match="Out of range float"):
        embed_json(float("nan"))


def test_a_page_of_four_full_episodes_is_small_and_asks_for_nothing(path: Path) -> None:
    page = write_page(arena_games("env.num_agents=8", "env.episode_steps=128", episodes=4)).decode()
    assert len(page) < 150_000
    assert not re.search(r"(?:src|href)=\"(?!data:,\")", page)
    assert "default-src 'none'" in page
    assert "@@" not in page
