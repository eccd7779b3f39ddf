"""Writes a Recording as an animated GIF, by the drawing rules of the page (`assets/board.js`), at a modest size."""

from __future__ import annotations

import io
from functools import cache
from typing import TYPE_CHECKING

from dual_policy_plugin.replay.frames import Frames
from dual_policy_plugin.replay.record import Episode, Recording
from dual_policy_plugin.report.tables import printable
from dual_policy_plugin.waiting import waiting

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

MAX_SIDE = 480  # pixels of the board at most, and what its cells are chosen by
MAX_FRAMES = 1000
"""About 5 MB; of longer recordings every second, third, ... step is shown."""
FRAME_MS, HOLD_MS = 120, 1500
SCALE = 3
"""Drawn so much larger and brought down, for smooth edges."""
NUM_COLORS = 63
BAR = 30  # pixels of the line of text above the board
LEARNER, NPC = "#0072b2", "#e69f00"
FLOOR, FLOOR_LINE, WALL, WALL_TOP, OUTLINE = "#eef0ec", "#dfe3dc", "#4a525c", "#6a7480", "#16191d"
MINE, ALTAR, STONE, ICE, SOFT = "#009e73", "#cc79a7", "#8b94a0", "#cfe9fb", "#5a626d"
DIRECTIONS = ((0, 0), (0, -1), (0, 1), (-1, 0), (1, 0))
CRYSTALS = (
    ((-0.4, 0.34), (-0.34, 0.0), (-0.2, -0.12), (-0.06, 0.34)),
    ((0.08, 0.34), (0.2, -0.06), (0.34, 0.06), (0.4, 0.34)),
    ((-0.16, 0.36), (-0.16, -0.18), (0.0, -0.4), (0.16, -0.18), (0.16, 0.36)),
)
HEART = (
    (0.0, 0.06), (-0.27, -0.2), (-0.26, -0.33), (-0.14, -0.38), (0.0, -0.27), (0.14, -0.38), (0.26, -0.33),
    (0.27, -0.2),
)  # fmt: skip


def write_gif(recording: Recording, *, max_frames: int = MAX_FRAMES) -> bytes:
    """The episodes one after the other, each held at its end; every nth step where all would be too many."""
    total = sum(episode.frames.num_steps + 1 for episode in recording.episodes)
    stride = -(-total // max_frames)
    from PIL.Image import Dither

    images: list[Image] = []
    durations: list[int] = []
    with waiting("drawing the GIF", len(recording.episodes)) as advance:
        for number, episode in enumerate(recording.episodes):
            steps = [*range(0, episode.frames.num_steps, stride), episode.frames.num_steps]
            empty = _empty_board(episode.frames)
            drawn = [_draw(recording, number, episode, empty, t) for t in steps]
            palette = images[0] if images else _palette(drawn[0])
            images += [image.quantize(palette=palette, dither=Dither.NONE) for image in drawn]
            durations += [FRAME_MS] * (len(steps) - 1) + [HOLD_MS]
            advance(1)
    buffer = io.BytesIO()
    images[0].save(
        buffer, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=False
    )
    return buffer.getvalue()


def _palette(image: Image) -> Image:
    """An image of few colors: those of the first frame, and those that only later ones have."""
    sample = image.copy()
    for i, color in enumerate((LEARNER, NPC, OUTLINE, MINE, ALTAR, STONE, ICE, SOFT)):
        sample.paste(color, (i * 40, 0, i * 40 + 40, BAR))
    return sample.quantize(NUM_COLORS)


def cell_pixels(frames: Frames) -> int:
    """Pixels of a cell's side: 24, fewer where the board would be larger than MAX_SIDE."""
    return max(6, min(24, MAX_SIDE // (max(frames.height, frames.width) + 1)))


def _empty_board(frames: Frames) -> Image:
    """What stays as it is through an episode."""
    from PIL import Image, ImageDraw

    unit = cell_pixels(frames) * SCALE
    board = Image.new("RGB", ((frames.width + 1) * unit, (frames.height + 1) * unit), WALL)
    pen = _Pen(ImageDraw.Draw(board), unit, frames.width)
    _draw_floor(pen, frames)
    for cell in frames.walls:
        pen.at(cell).wall()
    for cell in frames.mines:
        pen.at(cell).mine()
    return board


def _draw(recording: Recording, number: int, episode: Episode, empty: Image, t: int) -> Image:
    """Frame t of an episode."""
    from PIL import Image, ImageDraw

    frames, board = episode.frames, empty.copy()
    pen = _Pen(ImageDraw.Draw(board), cell_pixels(frames) * SCALE, frames.width)
    for cell, stock in zip(frames.altars, frames.stocks[t].tolist(), strict=True):
        pen.at(cell).altar(stock)
    for seat, policy in enumerate(episode.policy_of_seat):
        state = {name: int(values[t, seat]) for name, values in frames.state.items()}
        pen.at(int(frames.cells[t, seat])).agent(
            policy, str(seat), int(frames.facings[t, seat]), state, recording.capacity
        )
        if t and frames.returns[t, seat] > frames.returns[t - 1, seat]:
            pen.gain()
    small = board.reduce(SCALE)
    image = Image.new("RGB", (small.width, small.height + BAR), "#ffffff")
    image.paste(small, (0, BAR))
    _draw_bar(ImageDraw.Draw(image), recording, number, episode, t, small.width)
    return image


def _draw_floor(pen: _Pen, frames: Frames) -> None:
    side, gap = pen.unit, max(1, pen.unit // 24)
    for y in range(frames.height):
        for x in range(frames.width):
            left, top = x * side + side // 2, y * side + side // 2
            pen.draw.rectangle((left, top, left + side, top + side), fill=FLOOR_LINE)
            pen.draw.rectangle((left + gap, top + gap, left + side, top + side), fill=FLOOR)


def _draw_bar(draw: ImageDraw, recording: Recording, number: int, episode: Episode, t: int, width: int) -> None:
    """Both names and scores, and which step this is."""
    first, second = episode.means(t)
    names = [printable(policy.name) for policy in recording.policies]
    middle = f"{number + 1} of {len(recording.episodes)}, step {t}"
    font, small = _font(13), _font(11)
    room = (width - draw.textlength(middle, small)) / 2 - 58

    def fit(name: str) -> str:  # two checkpoints of a run differ in their last letters
        shown, kept = name, len(name)
        while shown and draw.textlength(shown, small) > room:
            kept -= 1
            shown = f"{name[: kept // 2]}…{name[kept // 2 - kept :]}" if kept > 1 else ""
        return shown

    draw.ellipse((5, 9, 17, 21), fill=LEARNER)
    draw.text((22, 15), f"{first:.2f}", LEARNER, font, anchor="lm")
    draw.text((54, 15), fit(names[0]), OUTLINE, small, anchor="lm")
    draw.text((width / 2, 15), middle, SOFT, small, anchor="mm")
    draw.rectangle((width - 17, 9, width - 6, 20), fill=NPC)
    draw.text((width - 22, 15), f"{second:.2f}", OUTLINE, font, anchor="rm")
    draw.text((width - 54, 15), fit(names[1]), OUTLINE, small, anchor="rm")


@cache
def _font(size: int) -> FreeTypeFont | ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


class _Pen:
    """Draws into one cell; lengths in cells, (0, 0) the cell's middle."""

    def __init__(self, draw: ImageDraw, unit: int, columns: int) -> None:
        self.draw, self.unit, self._columns = draw, unit, columns
        self._x = self._y = 0.0

    def at(self, cell: int) -> _Pen:
        """Moves to a cell."""
        row, column = divmod(cell, self._columns)
        self._x, self._y = (column + 1) * self.unit, (row + 1) * self.unit
        return self

    def wall(self) -> None:
        self._box(-0.5, -0.5, 0.5, 0.5, WALL)
        for box in ((-0.42, -0.42, 0.42, -0.08), (-0.42, 0.04, -0.04, 0.42), (0.04, 0.04, 0.42, 0.42)):
            self._box(*box, WALL_TOP)

    def mine(self) -> None:
        for points in CRYSTALS:
            self._shape(points, MINE)

    def altar(self, stock: int) -> None:
        self._shape(((-0.42, 0.42), (-0.34, 0.06), (0.34, 0.06), (0.42, 0.42)), STONE)
        if stock:
            self._shape(HEART, ALTAR)
        self._text(str(stock), 0, 0.24, 0.36)

    def agent(self, policy: int, text: str, facing: int, state: dict[str, int], capacity: int) -> None:
        """A circle for the learner (policy 0), a square for the NPC."""
        fill, frozen, ore = (LEARNER, NPC)[policy], state.get("frozen", 0), state.get("ore", 0)
        dx, dy = DIRECTIONS[facing]
        if facing:
            sides = ((0.26 * dx - 0.26 * dy, 0.26 * dy + 0.26 * dx), (0.26 * dx + 0.26 * dy, 0.26 * dy - 0.26 * dx))
            self._shape(((0.52 * dx, 0.52 * dy), *sides), fill)
        body, edge, line = (ICE, fill, 0.11) if frozen else (fill, OUTLINE, 0.06)
        box = [self._x - 0.36 * self.unit, self._y - 0.36 * self.unit]
        box += [self._x + 0.36 * self.unit, self._y + 0.36 * self.unit]
        shape = self.draw.ellipse if policy == 0 else self.draw.rectangle
        shape(box, fill=body, outline=edge, width=max(1, round(line * self.unit)))
        if frozen:
            for x, y in ((0.2, 0.0), (0.1, 0.17), (-0.1, 0.17)):
                self._line(-x, -y, x, y)
        else:
            self._text(text, 0, -0.08 if ore else 0, 0.42, "#ffffff" if policy == 0 else OUTLINE)
        shown = min(ore, 1) if capacity > 5 else ore
        for i in range(shown):
            x = (i - (shown - 1) / 2) * 0.2
            self._shape(((x, 0.12), (x + 0.11, 0.25), (x, 0.4), (x - 0.11, 0.25)), MINE)

    def gain(self) -> None:
        """A reward in this step."""
        self._shape(tuple((0.3 + 0.7 * x, -0.28 + 0.7 * y) for x, y in HEART), ALTAR)

    def _box(self, left: float, top: float, right: float, bottom: float, fill: str) -> None:
        unit = self.unit
        self.draw.rectangle(
            (self._x + left * unit, self._y + top * unit, self._x + right * unit, self._y + bottom * unit), fill=fill
        )

    def _shape(self, points: tuple[tuple[float, float], ...], fill: str) -> None:
        placed = [(self._x + x * self.unit, self._y + y * self.unit) for x, y in points]
        self.draw.polygon(placed, fill=fill, outline=OUTLINE, width=max(1, round(0.05 * self.unit)))

    def _line(self, x0: float, y0: float, x1: float, y1: float) -> None:
        ends = (self._x + x0 * self.unit, self._y + y0 * self.unit, self._x + x1 * self.unit, self._y + y1 * self.unit)
        self.draw.line(ends, fill=OUTLINE, width=max(1, round(0.07 * self.unit)))

    def _text(self, text: str, x: float, y: float, size: float, fill: str = OUTLINE) -> None:
        place = (self._x + x * self.unit, self._y + y * self.unit)
        self.draw.text(place, text, fill, _font(max(6, round(size * self.unit))), anchor="mm")
