"use strict";
// The returns of both sides over an episode's steps, as SVG, with a cursor at the step that is shown.

const CHART = {left: 34, right: 12, top: 10, bottom: 20, height: 120};

function svg(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  Object.entries(attributes).forEach(([key, value]) => element.setAttribute(key, value));
  if (text !== undefined) element.textContent = text;
  return element;
}

function chartScale(chart, episode) {
  const width = Math.max(160, chart.getBoundingClientRect().width);
  const low = episode.range[0];
  const high = Math.max(episode.range[1], low + 1);
  const inner = CHART.height - CHART.top - CHART.bottom;
  return {
    width, low, high,
    x: (t) => CHART.left + (width - CHART.left - CHART.right) * t / episode.steps,
    y: (value) => CHART.top + inner * (high - value) / (high - low),
    step: (x) => Math.round((x - CHART.left) / (width - CHART.left - CHART.right) * episode.steps),
  };
}

function drawChart(chart, episode) {
  const scale = chartScale(chart, episode);
  chart.setAttribute("viewBox", `0 0 ${scale.width} ${CHART.height}`);
  const parts = [];
  for (const value of [scale.low, scale.high]) {
    const y = scale.y(value);
    parts.push(svg("line", {class: "axis", x1: CHART.left, x2: scale.width - CHART.right, y1: y, y2: y}));
    parts.push(svg("text", {x: CHART.left - 6, y: y + 4, "text-anchor": "end"}, String(Math.round(value * 10) / 10)));
  }
  for (const t of [0, Math.round(episode.steps / 2), episode.steps]) {
    const anchor = t === 0 ? "start" : t === episode.steps ? "end" : "middle";
    parts.push(svg("text", {x: scale.x(t), y: CHART.height - 4, "text-anchor": anchor}, String(t)));
  }
  [1, 0].forEach((side) => {
    const points = [...episode.means[side]].map((value, t) => `${scale.x(t).toFixed(1)},${scale.y(value).toFixed(1)}`);
    parts.push(svg("polyline", {class: `line-${side}`, points: points.join(" ")}));
  });
  parts.push(svg("line", {class: "cursor", id: "cursor", y1: CHART.top - 4, y2: CHART.height - CHART.bottom + 4}));
  [1, 0].forEach((side) => parts.push(side === 0 ? svg("circle", {class: "dot-0", id: "dot-0", r: 4})
    : svg("rect", {class: "dot-1", id: "dot-1", width: 8, height: 8})));
  chart.replaceChildren(...parts);
}

function moveCursor(chart, episode, t) {
  const scale = chartScale(chart, episode);
  const set = (id, attributes) => {
    const element = chart.querySelector("#" + id);
    Object.entries(attributes).forEach(([key, value]) => element.setAttribute(key, value));
  };
  const x = scale.x(t);
  set("cursor", {x1: x, x2: x});
  set("dot-0", {cx: x, cy: scale.y(episode.means[0][t])});
  set("dot-1", {x: x - 4, y: scale.y(episode.means[1][t]) - 4});
}
