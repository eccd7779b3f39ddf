"use strict";
// The page: what is shown now (`view`), and what keys, buttons and the pointer do to it. Names are other people's text
// and are only ever set as textContent.

const SPEEDS = [1, 2, 4, 8, 16, 32]; // steps a second
const $ = (id) => document.getElementById(id);
const data = readData($("data").textContent);
const view = {number: 0, time: 0, playing: false, speed: 2, selected: -1, hovered: -1, last: 0};
const calm = window.matchMedia("(prefers-reduced-motion: reduce)");
let colors = readColors();
let unit = 20;

const current = () => data.episodes[view.number];
const step = () => Math.floor(view.time + 1e-6);
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

function make(tag, properties, children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...(children || []));
  return element;
}

function token(name, size) {
  const canvas = make("canvas", {className: "token"});
  Object.assign(canvas.dataset, {token: name, size});
  canvas.setAttribute("aria-hidden", "true");
  return canvas;
}

// What stands on the page.

function result(episode) {
  const [first, second] = episode.means.map((means) => means[episode.steps]);
  const score = `${first.toFixed(2)} : ${second.toFixed(2)}`;
  const verdict = episode.share === 0.5 ? "draw" : `${episode.share === 1 ? "learner" : "NPC"} wins`;
  return {score, verdict, text: `${verdict} ${score}`};
}

function leader(episode, t) {
  const [first, second] = episode.means.map((means) => means[t]);
  if (first === second) return "level";
  return `${first > second ? "learner" : "NPC"} leads`;
}

function seatList(seats) {
  const runs = [];
  seats.forEach((seat) => {
    const run = runs.at(-1);
    if (run && run[1] === seat - 1) run[1] = seat; else runs.push([seat, seat]);
  });
  return runs.map(([from, to]) => (from === to ? `${from}` : `${from}-${to}`)).join(", ");
}

function seatsText(side) {
  const seats = current().seats.flatMap((policy, seat) => (policy === side ? [seat] : []));
  const teams = [...new Set(seats.map((seat) => data.teams[seat]))];
  const word = seats.length === 1 ? "seat" : "seats";
  if (!data.teams.length) return `${word} ${seatList(seats)}`;
  const parts = teams.map((team) => `${seatList(seats.filter((seat) => data.teams[seat] === team))} of team ${team}`);
  return `${word} ${parts.join("; ")}`;
}

function showPolicies() {
  $("policies").replaceChildren(...data.policies.map((policy, side) => make("div", {className: "policy"}, [
    token(`policy-${side}`, 26),
    make("b", {textContent: policy.name}),
    make("span", {id: `seats-${side}`, textContent: `${side === 0 ? "learner" : "NPC"}, ${seatsText(side)}`}),
    make("code", {textContent: policy.uri}),
    make("span", {className: "soft", textContent: policy.digest ? `sha256 ${policy.digest}` : "a script"}),
  ])));
  paintTokens();
}

function showLegend() {
  const signs = [["policy-0", "learner, facing east"], ["policy-1", "NPC"], ["ore", "carries ore"],
    ["frozen", "frozen"], ["mine", "mine: gives ore"], ["altar", "altar: turns ore into reward, so often still"],
    ["spent", "altar with nothing left"], ["gain", "reward in this step"]];
  const has = {frozen: "frozen" in data.episodes[0].state};
  $("legend").replaceChildren(...signs.filter(([name]) => has[name] !== false).map(([name, text]) =>
    make("li", {}, [token(name, 34), make("span", {textContent: text})])));
}

function showEpisodes() {
  $("episodes").replaceChildren(...data.episodes.map((episode, number) => {
    return make("button", {type: "button", onclick: () => chooseEpisode(number)}, [
      make("b", {textContent: `${number + 1} · ${result(episode).score}`}),
      make("small", {textContent: result(episode).verdict}),
      make("small", {textContent: `map ${episode.start + 1}, seats ${seatList(
        episode.seats.flatMap((policy, seat) => (policy === 0 ? [seat] : [])))}`}),
    ]);
  }));
}

function paintTokens() {
  document.querySelectorAll("canvas[data-token]").forEach((canvas) =>
    drawToken(canvas, colors, canvas.dataset.token, data.capacity));
}

// What changes with the step.

function show() {
  const episode = current();
  const t = step();
  drawBoard($("board"), unit, colors, data, episode, view.time, shownAgent());
  [0, 1].forEach((side) => {
    $(`score-${side}`).textContent = episode.means[side][t].toFixed(2);
    $(`total-${side}`).textContent = `${side === 0 ? "learner" : "NPC"}, ${+episode.totals[side][t].toFixed(2)} in all`;
  });
  $("step").textContent = `step ${t} of ${episode.steps}`;
  $("scrub").value = t;
  $("scrub").setAttribute("aria-valuetext", `step ${t} of ${episode.steps}`);
  $("result").textContent = t === episode.steps ? result(episode).text : leader(episode, t);
  document.body.dataset.step = t;
  document.body.dataset.episode = view.number + 1;
  document.body.dataset.playing = view.playing;
  moveCursor($("chart"), episode, t);
  showAgent();
}

function showAgent() {
  const seat = shownAgent();
  const box = $("agent");
  box.hidden = seat < 0;
  if (seat < 0) return;
  const episode = current();
  const t = step();
  const at = t * episode.agents + seat;
  const side = episode.seats[seat];
  const facts = [["return", +episode.returns[at].toFixed(2)]];
  Object.entries(episode.state).forEach(([name, values]) => {
    const isTime = name === "frozen" || name === "cooldown";
    facts.push([name, isTime ? (values[at] ? plural(values[at], "step") : "no") : values[at]]);
  });
  facts.push(["facing", ["", "north", "south", "west", "east"][episode.facings[at]] || "unknown"]);
  facts.push(["acts", t < episode.steps ? data.actions[episode.actions[at]] : "the end"]);
  const team = data.teams.length ? `, team ${data.teams[seat]}` : "";
  box.replaceChildren(
    make("b", {textContent: `Agent ${seat}${team}`}),
    make("span", {textContent: `${side === 0 ? "learner" : "NPC"} ${data.policies[side].name}`}),
    make("dl", {}, facts.flatMap(([name, value]) => {
      const shown = make("dd", {textContent: String(value)});
      shown.dataset.fact = name;
      return [make("dt", {textContent: name}), shown];
    })),
  );
  box.dataset.seat = seat;
  placeAgentBox(box, episode, seat);
}

/** Beside the agent, on the side where there is more room. */
function placeAgentBox(box, episode, seat) {
  const board = $("board");
  const pixels = unit / (window.devicePixelRatio || 1);
  const [column, row] = placeOf(episode, seat, view.time);
  const x = board.offsetLeft + (column + 0.5 + EDGE) * pixels;
  const y = board.offsetTop + (row + 0.5 + EDGE) * pixels;
  const outer = $("board-box");
  const left = column < episode.width / 2 ? x + pixels * 0.8 : x - pixels * 0.8 - box.offsetWidth;
  const clamp = (value, high) => Math.max(0, Math.min(value, high));
  box.style.left = clamp(left, outer.clientWidth - box.offsetWidth) + "px";
  box.style.top = clamp(y - box.offsetHeight / 2, outer.clientHeight - box.offsetHeight) + "px";
}

const shownAgent = () => (view.hovered >= 0 ? view.hovered : view.selected);

function layout() {
  const episode = current();
  const [columns, rows] = [episode.width + 2 * EDGE, episode.height + 2 * EDGE];
  const height = Math.max(240, window.innerHeight * 0.66); // the controls and the chart are to be seen too
  unit = fitCanvas($("board"), columns, rows, Math.min($("board-box").clientWidth, height * columns / rows));
  drawChart($("chart"), episode);
  paintTokens();
  show();
}

// What can be done.

function chooseEpisode(number) {
  if (number < 0 || number >= data.episodes.length) return;
  Object.assign(view, {number, time: 0, hovered: -1});
  if (view.selected >= current().agents) view.selected = -1;
  $("scrub").max = current().steps;
  [...$("episodes").children].forEach((button, i) => button.setAttribute("aria-pressed", i === number));
  showPolicies();
  layout();
}

function goTo(t) {
  view.time = Math.max(0, Math.min(current().steps, Math.round(t)));
  show();
}

function setPlaying(playing) {
  if (playing && step() === current().steps) view.time = 0;
  if (!playing) view.time = step();
  view.playing = playing;
  view.last = 0;
  $("play").setAttribute("aria-label", playing ? "Pause" : "Play");
  $("play-path").setAttribute("d", playing ? "M6 5h4v14H6zM14 5h4v14h-4z" : "M7 4v16l13-8z");
  if (playing) requestAnimationFrame(tick);
  show();
}

function tick(now) {
  if (!view.playing) return;
  const passed = view.last ? Math.min(now - view.last, 250) / 1000 : 0;
  view.last = now;
  const before = view.time;
  view.time = Math.min(current().steps, view.time + passed * SPEEDS[view.speed]);
  if (view.time >= current().steps) return setPlaying(false);
  if (calm.matches ? Math.floor(view.time) !== Math.floor(before) : true) showMoving();
  requestAnimationFrame(tick);
}

/** As `show`; whole steps only for those who want no motion. */
function showMoving() {
  const exact = view.time;
  if (calm.matches) view.time = step();
  show();
  view.time = exact;
}

function setSpeed(speed) {
  view.speed = Math.max(0, Math.min(SPEEDS.length - 1, speed));
  $("speed").textContent = `${SPEEDS[view.speed]} steps/s`;
}

function agentAt(event) {
  const box = $("board").getBoundingClientRect();
  const pixels = unit / (window.devicePixelRatio || 1);
  const x = (event.clientX - box.left) / pixels - EDGE - 0.5;
  const y = (event.clientY - box.top) / pixels - EDGE - 0.5;
  const reach = event.pointerType === "touch" ? 0.9 : 0.55;
  let best = -1;
  let least = reach;
  for (let seat = 0; seat < current().agents; seat++) {
    const [column, row] = placeOf(current(), seat, view.time);
    const distance = Math.max(Math.abs(column - x), Math.abs(row - y));
    if (distance < least) [best, least] = [seat, distance];
  }
  return best;
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  const onButton = event.target.closest("button") && (event.key === " " || event.key === "Enter");
  if (onButton) return; // the button does what it says
  const far = event.shiftKey ? 10 : 1;
  const actions = {
    " ": () => setPlaying(!view.playing),
    ArrowLeft: () => pauseAt(step() - far),
    ArrowRight: () => pauseAt(step() + far),
    Home: () => pauseAt(0),
    End: () => pauseAt(current().steps),
    ArrowUp: () => chooseEpisode(view.number - 1),
    ArrowDown: () => chooseEpisode(view.number + 1),
    "+": () => setSpeed(view.speed + 1),
    "=": () => setSpeed(view.speed + 1),
    "-": () => setSpeed(view.speed - 1),
    a: () => { view.selected = (view.selected + 1) % current().agents; show(); },
    Escape: () => { view.selected = -1; show(); },
    "?": () => $("keys").showModal(),
  };
  const act = /^[1-9]$/.test(event.key) ? () => chooseEpisode(Number(event.key) - 1) : actions[event.key];
  if (!act) return;
  event.preventDefault();
  act();
}

function pauseAt(t) {
  if (view.playing) setPlaying(false);
  goTo(t);
}

function listen() {
  $("play").onclick = () => setPlaying(!view.playing);
  $("first").onclick = () => pauseAt(0);
  $("back").onclick = () => pauseAt(step() - 1);
  $("forward").onclick = () => pauseAt(step() + 1);
  $("slower").onclick = () => setSpeed(view.speed - 1);
  $("faster").onclick = () => setSpeed(view.speed + 1);
  $("help").onclick = () => $("keys").showModal();
  $("scrub").oninput = (event) => pauseAt(Number(event.target.value));
  $("chart").onclick = (event) => {
    const x = event.clientX - $("chart").getBoundingClientRect().left;
    pauseAt(chartScale($("chart"), current()).step(x));
  };
  $("board").onpointermove = (event) => {
    if (event.pointerType === "touch") return;
    view.hovered = agentAt(event);
    show();
  };
  $("board").onpointerleave = () => { view.hovered = -1; show(); };
  $("board").onclick = (event) => {
    const seat = agentAt(event);
    view.selected = seat === view.selected ? -1 : seat;
    show();
  };
  document.addEventListener("keydown", onKey);
  window.addEventListener("resize", layout);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { colors = readColors(); layout(); });
}

function begin() {
  const [learner, npc] = data.policies.map((policy) => policy.name);
  $("title").textContent = `${learner} against ${npc}`;
  $("subtitle").textContent =
    `${data.env}, ${plural(data.episodes.length, "episode")}, seed ${data.seed}; return per agent decides who wins`;
  [learner, npc].forEach((name, side) => Object.assign($(`name-${side}`), {textContent: name, title: name}));
  setSpeed(view.speed);
  showLegend();
  showEpisodes();
  listen();
  chooseEpisode(0);
  if (!calm.matches) setPlaying(true);
}

begin();
