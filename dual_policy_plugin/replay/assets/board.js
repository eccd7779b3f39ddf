"use strict";
// Draws the grid. Everything is in units of one cell until `unit` turns it into device pixels.

const DIRECTIONS = [[0, 0], [0, -1], [0, 1], [-1, 0], [1, 0]]; // by facing: none, north, south, west, east
const EDGE = 0.5; // width of the wall around the grid, in cells

function readColors() {
  const style = getComputedStyle(document.documentElement);
  const names = ["floor", "floor-line", "wall", "wall-top", "outline", "rim", "mine", "altar", "stone", "ice", "ink", "card",
    "learner", "npc", "on-learner", "on-npc", "focus"];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue("--" + name).trim()]));
}

/** Gives a canvas as many device pixels as it is shown with, `columns` x `rows` cells; returns pixels per cell. */
function fitCanvas(canvas, columns, rows, cssWidth) {
  const ratio = window.devicePixelRatio || 1;
  const unit = Math.max(4, 2 * Math.floor(cssWidth * ratio / columns / 2)); // even: half a cell is whole pixels too
  canvas.width = Math.round(unit * columns);
  canvas.height = Math.round(unit * rows);
  canvas.style.width = canvas.width / ratio + "px";
  canvas.style.height = canvas.height / ratio + "px";
  return unit;
}

/** Draws with (x, y) as the middle of a cell and one cell as the unit of length. */
function inCell(context, unit, x, y, draw) {
  context.save();
  context.translate(x, y);
  context.scale(unit, unit);
  context.lineJoin = "round";
  draw();
  context.restore();
}

function polygon(context, points) {
  context.beginPath();
  points.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
  context.closePath();
}

function heart(context, x, y, size) {
  context.beginPath();
  context.moveTo(x, y + size * 0.5);
  context.bezierCurveTo(x - size * 1.05, y - size * 0.15, x - size * 0.5, y - size * 0.85, x, y - size * 0.3);
  context.bezierCurveTo(x + size * 0.5, y - size * 0.85, x + size * 1.05, y - size * 0.15, x, y + size * 0.5);
  context.closePath();
}

function label(context, text, x, y, size, color, weight) {
  context.save(); // letters are drawn in pixels: fonts below one pixel are rounded
  context.translate(x, y);
  context.scale(size / 40, size / 40);
  context.font = (weight || 700) + " 40px system-ui, sans-serif";
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillStyle = color;
  context.fillText(text, 0, 2);
  context.restore();
}

function drawWall(context, colors) {
  context.fillStyle = colors.wall;
  context.fillRect(-0.5, -0.5, 1, 1);
  context.fillStyle = colors["wall-top"];
  context.fillRect(-0.42, -0.42, 0.84, 0.34);
  context.fillRect(-0.42, 0.04, 0.38, 0.38);
  context.fillRect(0.04, 0.04, 0.38, 0.38);
}

function drawMine(context, colors) {
  context.fillStyle = colors.mine;
  context.strokeStyle = colors.outline;
  context.lineWidth = 0.05;
  for (const points of [
    [[-0.4, 0.34], [-0.34, 0.0], [-0.2, -0.12], [-0.06, 0.34]],
    [[0.08, 0.34], [0.2, -0.06], [0.34, 0.06], [0.4, 0.34]],
    [[-0.16, 0.36], [-0.16, -0.18], [0.0, -0.4], [0.16, -0.18], [0.16, 0.36]],
  ]) {
    polygon(context, points);
    context.fill();
    context.stroke();
  }
}

function drawAltar(context, colors, stock) {
  const spent = stock === 0;
  context.strokeStyle = colors.outline;
  context.lineWidth = 0.05;
  context.fillStyle = colors.stone;
  polygon(context, [[-0.42, 0.42], [-0.34, 0.06], [0.34, 0.06], [0.42, 0.42]]);
  context.fill();
  context.stroke();
  if (!spent) {
    context.fillStyle = colors.altar;
    heart(context, 0, -0.14, 0.36);
    context.fill();
    context.stroke();
  }
  label(context, String(stock), 0, 0.25, 0.3, colors.outline);
}

/** An agent: a circle for the learner, a square for the NPC; `look` has policy, facing, ore, frozen, text, selected. */
function drawAgent(context, colors, look, capacity) {
  const fill = look.policy === 0 ? colors.learner : colors.npc;
  const [dx, dy] = DIRECTIONS[look.facing];
  if (look.facing) { // a nose towards the cell ahead
    polygon(context, [[dx * 0.52, dy * 0.52], [dx * 0.26 - dy * 0.26, dy * 0.26 + dx * 0.26],
      [dx * 0.26 + dy * 0.26, dy * 0.26 - dx * 0.26]]);
    context.fillStyle = fill;
    context.fill();
    context.strokeStyle = colors.rim;
    context.lineWidth = 0.05;
    context.stroke();
  }
  bodyPath(context, look.policy);
  context.fillStyle = look.frozen ? colors.ice : fill;
  context.fill();
  context.lineWidth = look.frozen ? 0.1 : 0.05;
  context.strokeStyle = look.frozen ? fill : colors.rim;
  context.stroke();
  if (look.frozen) {
    drawFlake(context, colors.outline);
  } else {
    label(context, look.text, 0, look.ore ? -0.08 : 0, 0.36, look.policy === 0 ? colors["on-learner"] : colors["on-npc"]);
  }
  drawOre(context, colors, look.ore, capacity);
}

function bodyPath(context, policy) {
  context.beginPath();
  if (policy === 0) {
    context.arc(0, 0, 0.35, 0, 2 * Math.PI);
  } else {
    context.roundRect(-0.33, -0.33, 0.66, 0.66, 0.08);
  }
}

function drawFlake(context, color) {
  context.strokeStyle = color;
  context.lineWidth = 0.06;
  context.lineCap = "round";
  for (let arm = 0; arm < 3; arm++) {
    const x = Math.cos(arm * Math.PI / 3) * 0.2;
    const y = Math.sin(arm * Math.PI / 3) * 0.2;
    context.beginPath();
    context.moveTo(-x, -y);
    context.lineTo(x, y);
    context.stroke();
  }
}

function drawOre(context, colors, ore, capacity) {
  if (!ore) return;
  context.strokeStyle = colors.outline;
  context.lineWidth = 0.04;
  const shown = capacity <= 5 ? ore : 1;
  for (let i = 0; i < shown; i++) {
    const x = (i - (shown - 1) / 2) * 0.19 - (capacity > 5 ? 0.12 : 0);
    polygon(context, [[x, 0.14], [x + 0.1, 0.25], [x, 0.38], [x - 0.1, 0.25]]);
    context.fillStyle = colors.mine;
    context.fill();
    context.stroke();
  }
  if (capacity > 5) label(context, String(ore), 0.1, 0.26, 0.26, colors.outline);
}

/** Where seat `seat` stands at `time`, a whole step or between two: [column, row]. */
function placeOf(episode, seat, time) {
  const t = Math.min(Math.floor(time), episode.steps);
  const here = episode.cells[t * episode.agents + seat];
  const next = t < episode.steps ? episode.cells[(t + 1) * episode.agents + seat] : here;
  const part = time - t;
  const eased = part * part * (3 - 2 * part);
  const column = (cell) => cell % episode.width;
  const row = (cell) => Math.floor(cell / episode.width);
  return [column(here) + (column(next) - column(here)) * eased, row(here) + (row(next) - row(here)) * eased];
}

function drawBoard(canvas, unit, colors, data, episode, time, selected) {
  const context = canvas.getContext("2d");
  const t = Math.min(Math.floor(time), episode.steps);
  const middle = (position) => (position + 0.5 + EDGE) * unit;
  const onCell = (cell, draw) =>
    inCell(context, unit, middle(cell % episode.width), middle(Math.floor(cell / episode.width)), draw);
  context.fillStyle = colors.wall;
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = colors["floor-line"];
  context.fillRect(EDGE * unit, EDGE * unit, episode.width * unit, episode.height * unit);
  context.fillStyle = colors.floor;
  for (let y = 0; y < episode.height; y++) {
    for (let x = 0; x < episode.width; x++) {
      context.fillRect(Math.round((x + EDGE) * unit) + 1, Math.round((y + EDGE) * unit) + 1, unit - 1, unit - 1);
    }
  }
  episode.walls.forEach((cell) => onCell(cell, () => drawWall(context, colors)));
  episode.mines.forEach((cell) => onCell(cell, () => drawMine(context, colors)));
  episode.altars.forEach((cell, i) =>
    onCell(cell, () => drawAltar(context, colors, episode.stocks[t * episode.altars.length + i])));
  for (let seat = 0; seat < episode.agents; seat++) {
    const [x, y] = placeOf(episode, seat, time);
    inCell(context, unit, middle(x), middle(y), () => {
      drawAgent(context, colors, lookOf(episode, seat, t), data.capacity);
      if (seat === selected) drawMark(context, colors.focus);
      if (t > 0 && gain(episode, seat, t) > 0) drawGain(context, colors, gain(episode, seat, t));
    });
  }
}

function lookOf(episode, seat, t) {
  const at = t * episode.agents + seat;
  const read = (name) => (name in episode.state ? episode.state[name][at] : 0);
  return {policy: episode.seats[seat], facing: episode.facings[at], ore: read("ore"), frozen: read("frozen"),
    text: String(seat)};
}

function gain(episode, seat, t) {
  const at = t * episode.agents + seat;
  return episode.returns[at] - episode.returns[at - episode.agents];
}

function drawMark(context, color) {
  context.strokeStyle = color;
  context.lineWidth = 0.07;
  context.beginPath();
  context.arc(0, 0, 0.58, 0, 2 * Math.PI);
  context.stroke();
}

function drawGain(context, colors, amount) {
  context.fillStyle = colors.altar;
  context.strokeStyle = colors.outline;
  context.lineWidth = 0.04;
  heart(context, 0.3, -0.34, 0.26);
  context.fill();
  context.stroke();
  if (amount !== 1) label(context, String(amount), 0.3, -0.34, 0.22, colors.outline);
}

/** Draws one sign of the legend into a small canvas of its own. */
function drawToken(canvas, colors, name, capacity) {
  const unit = fitCanvas(canvas, 1.08, 1.08, Number(canvas.dataset.size));
  const context = canvas.getContext("2d");
  const agent = {policy: 0, facing: 4, ore: 0, frozen: 0, text: ""};
  inCell(context, unit, canvas.width / 2, canvas.height / 2, () => {
    if (name === "policy-0" || name === "policy-1") drawAgent(context, colors, {...agent, policy: Number(name.at(-1))}, 3);
    if (name === "ore") drawAgent(context, colors, {...agent, ore: Math.min(2, capacity)}, Math.min(capacity, 5));
    if (name === "frozen") drawAgent(context, colors, {...agent, policy: 1, frozen: 1}, 3);
    if (name === "mine") drawMine(context, colors);
    if (name === "altar") drawAltar(context, colors, 9);
    if (name === "spent") drawAltar(context, colors, 0);
    if (name === "wall") drawWall(context, colors);
    if (name === "gain") {
      context.scale(1.6, 1.6);
      context.translate(-0.3, 0.34);
      drawGain(context, colors, 1);
    }
  });
}
