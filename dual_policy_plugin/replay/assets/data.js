"use strict";
// The recorded games: typed arrays from base64, little-endian as they were written.

const ARRAYS = {u8: Uint8Array, u16: Uint16Array, f32: Float32Array};

function decode(packed) {
  const [[kind, text]] = Object.entries(packed);
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new ARRAYS[kind](bytes.buffer);
}

function readData(text) {
  const data = JSON.parse(text);
  data.episodes.forEach((episode) => {
    for (const name of ["cells", "facings", "actions", "returns", "stocks"]) episode[name] = decode(episode[name]);
    for (const name of Object.keys(episode.state)) episode.state[name] = decode(episode.state[name]);
    episode.agents = episode.seats.length;
    episode.steps = episode.actions.length / episode.agents;
    episode.totals = [0, 1].map((side) => totals(episode, side));
    episode.means = [0, 1].map((side) => {
      const count = episode.seats.filter((policy) => policy === side).length;
      return episode.totals[side].map((total) => total / count);
    });
    episode.range = episode.means.reduce(spread, [0, 0]);
  });
  return data;
}

/** The lowest and the highest of `values` and of `range`. */
function spread(range, values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], range);
}

/** The returns of a side's agents together, before each step and at the end. */
function totals(episode, side) {
  const sums = new Float64Array(episode.steps + 1);
  for (let t = 0; t <= episode.steps; t++) {
    episode.seats.forEach((policy, seat) => {
      if (policy === side) sums[t] += episode.returns[t * episode.agents + seat];
    });
  }
  return sums;
}
