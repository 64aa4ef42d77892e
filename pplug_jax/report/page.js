"use strict";
// Texts of the data reach the page through `textContent` and attributes' values only.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}
const make = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children.map((child) =>
    typeof child === "number" ? String(child) : child));

// Ten colours; a second and a third ten methods have other marks and dashes.
const rank = (method) => Math.max(0, data.methods.indexOf(method));
const colour = (method) => `var(--c${rank(method) % 10})`;
const dashes = (method) => ["none", "7 3", "2 3"][Math.floor(rank(method) / 10) % 3];
const metricChooser = byId("metric");
let metric = metricChooser?.value ?? data.metrics[0];
const direction = (name) => (data.lower.includes(name) ? `${name} (lower is better)` : name);
const number = (value, digits = 3) => (value == null ? "–" : value.toFixed(digits));
const items = (count) => `${count} ${count === 1 ? "item" : "items"}`;
const percent = (value) => `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)}%`;
const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(3);

// ---- Theme

const root = document.documentElement;
const themeButton = byId("theme");
const stored = (() => { try { return localStorage.getItem("theme"); } catch { return null; } })();
const isDark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
if (stored === "dark" || stored === "light") root.dataset.theme = stored;
const nameTheme = () => { themeButton.textContent = isDark() ? "Light" : "Dark"; };
themeButton.hidden = false;
themeButton.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("theme", root.dataset.theme); } catch { /* a page from disk may have no storage */ }
  nameTheme();
});
nameTheme();

// ---- Charts

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return found.map((value) => [value, value.toFixed(digits)]);
}

function extent(values, margin) {
  const known = values.filter((value) => value != null);
  let [low, high] = [Math.min(...known), Math.max(...known)];
  if (!known.length) [low, high] = [0, 1];
  const pad = (high - low || Math.abs(high) || 1) * margin;
  return [low - pad, high + pad];
}

const scale = ([low, high], from, to) => (value) => from + ((value - low) / (high - low)) * (to - from);
const line = (x1, y1, x2, y2, attributes) => draw("line", { x1, y1, x2, y2, ...attributes });

/** An empty chart as wide as its place: {svg, width}. */
function sheet(place, height, label) {
  const width = Math.max(260, place.clientWidth);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label });
  place.append(svg);
  return { svg, width };
}

/** A method's mark: a disc, a square, or a ring. */
function mark(method, x, y, r) {
  const kind = Math.floor(rank(method) / 10) % 3;
  if (kind === 1) return draw("rect", { x: x - r, y: y - r, width: 2 * r, height: 2 * r, fill: colour(method) });
  return draw("circle", { cx: x, cy: y, r, fill: kind ? "var(--paper)" : colour(method), stroke: kind ? colour(method) : null, "stroke-width": 2 });
}

function swatch(method) {
  const svg = draw("svg", { viewBox: "0 0 12 12", "aria-hidden": "true", class: "mark" });
  svg.append(mark(method, 6, 6, 5));
  return svg;
}

/** A method a row: a dot and its interval. */
function intervals(place, rows, label) {
  const left = Math.min(170, 16 + 7.2 * Math.max(...rows.map((row) => row.name.length)));
  const height = 26 * rows.length + 44;
  const values = rows.map((row) => `${row.name} ${number(row.value)}`).join(", ");
  const { svg, width } = sheet(place, height, `${label}: ${values}`);
  const bottom = height - 40;
  const domain = extent(rows.flatMap((row) => [row.value, row.low, row.high]), 0.06);
  const x = scale(domain, left, width - 52);
  for (const [value, text] of ticks(...domain, width < 500 ? 4 : 8)) {
    svg.append(line(x(value), 0, x(value), bottom, { class: "grid" }),
      draw("text", { x: x(value), y: bottom + 16, "text-anchor": "middle" }, text));
  }
  rows.forEach((row, i) => {
    const y = 26 * i + 14;
    svg.append(draw("text", { class: "name", x: 0, y: y + 4 }, row.name));
    if (row.value == null) return;
    const whisker = { class: "whisker", stroke: colour(row.name) };
    if (row.low != null && row.high != null)
      svg.append(line(x(row.low), y, x(row.high), y, whisker),
        ...[row.low, row.high].map((end) => line(x(end), y - 4, x(end), y + 4, whisker)));
    svg.append(mark(row.name, x(row.value), y, width < 500 ? 3 : 4.5),
      draw("text", { x: width, y: y + 4, "text-anchor": "end" }, number(row.value)));
  });
  svg.append(draw("text", { x: (left + width - 52) / 2, y: height - 6, "text-anchor": "middle" }, label));
}

/**
 * Lines over an x axis.
 * series: [{name, lines: [[[x, y, low, high], ...], ...]}]; names: the x axis' names where it has
 * places 0, 1, ... instead of numbers; levels: [{name, value}], values that do not depend on x.
 */
function lines(place, series, labels, options = {}) {
  const { names = null, xTicks = null, levels = [], hidden = new Set() } = options;
  const shown = series.filter(({ name }) => !hidden.has(name));
  const legend = make("div", { class: "legend", role: "group", "aria-label": "Methods shown" });
  for (const { name } of series) {
    legend.append(make("button", {
      type: "button", "aria-pressed": String(!hidden.has(name)),
      onclick: () => {
        if (!hidden.delete(name)) hidden.add(name);
        place.replaceChildren();
        lines(place, series, labels, { ...options, hidden });
        [...place.querySelectorAll(".legend button")].find((button) => button.textContent === name).focus();
      },
    }, swatch(name), name));
  }
  place.append(legend);
  const height = 350, top = 34, bottom = height - 44, left = 46;
  const { svg, width } = sheet(place, height, `${labels[1]} over ${labels[0]}, a line for each of ${series.map(({ name }) => name).join(", ")}`);
  const points = shown.flatMap((each) => each.lines.flat());
  const yDomain = extent([...points.flatMap((each) => each.slice(1)), ...levels.map(({ value }) => value)], 0.05);
  const y = scale(yDomain, bottom, top);
  const xDomain = names ? [-0.5, names.length - 0.5] : extent(series.flatMap((each) => each.lines.flat()).map(([at]) => at), xTicks ? 0.06 : 0.01);
  const x = scale(xDomain, left, width - 6);
  for (const [value, text] of ticks(...yDomain, 6)) {
    svg.append(line(left, y(value), width, y(value), { class: "grid" }),
      draw("text", { x: left - 7, y: y(value) + 4, "text-anchor": "end" }, text));
  }
  const marks = names ? names.map((text, i) => [i, text])
    : xTicks ? xTicks.map((value) => [value, String(value)])
      : ticks(...xDomain, width < 500 ? 4 : 8);
  for (const [value, text] of marks)
    svg.append(draw("text", { x: x(value), y: bottom + 18, "text-anchor": "middle" }, text));
  svg.append(draw("text", { x: (left + width) / 2, y: height - 6, "text-anchor": "middle" }, labels[0]),
    draw("text", { x: 0, y: 18 }, labels[1]));
  for (const { name, value } of levels) {
    svg.append(line(left, y(value), width, y(value), { class: "level", stroke: colour(name) }));
    legend.append(make("span", { class: "key" },
      make("span", { class: "dashes", style: { borderColor: colour(name) } }), name));
  }
  const spread = Math.min(9, (width - left) / marks.length / (shown.length + 2));
  shown.forEach(({ name, lines: curves }, i) => {
    const shift = names || xTicks ? spread * (i - (shown.length - 1) / 2) : 0;
    for (const curve of curves) {
      const known = curve.filter((point) => point[1] != null);
      const path = known.map(([at, value]) => `${(x(at) + shift).toFixed(1)},${y(value).toFixed(1)}`);
      const weight = names || xTicks ? "curve faint" : curves.length > 1 ? "curve thin" : "curve";
      svg.append(draw("polyline", { class: weight, points: path.join(" "), stroke: colour(name), "stroke-dasharray": dashes(name) }));
      for (const [at, value, low, high] of known) {
        if (low != null && high != null)
          svg.append(line(x(at) + shift, y(low), x(at) + shift, y(high), { class: "whisker", stroke: colour(name) }));
        if (names || xTicks)
          svg.append(mark(name, x(at) + shift, y(value), 4));
      }
    }
  });
}

const point = (at, score) => [at, score.value, score.low, score.high];
const CHARTS = {
  results(place) {
    const run = data.runs[place.dataset.run];
    const there = run.metrics.includes(metric) ? metric : run.metrics[0];
    const rows = Object.entries(run.methods).map(([name, entry]) => ({ name, ...entry[there] }));
    intervals(place, rows, `${direction(there)}, 95% interval`);
  },
  losses(place) {
    const series = Object.entries(data.losses).map(([name, curves]) => ({ name, lines: curves }));
    lines(place, series, ["step", "loss per target token"]);
  },
  lengths(place) {
    const there = metric in data.lengths ? metric : data.metrics[0]; // there is no style of a bin
    const series = Object.entries(data.lengths[there]).map(([name, scores]) =>
      ({ name, lines: [scores.map((score, i) => point(i, score))] }));
    lines(place, series, ["items of history", direction(there)], { names: data.bins });
  },
  top_k(place) {
    const series = Object.entries(data.top_k[metric]).map(([name, scores]) =>
      ({ name, lines: [Object.entries(scores).map(([k, score]) => point(Number(k), score))] }));
    const at = [...new Set(series.flatMap((each) => each.lines[0].map(([k]) => k)))].sort((a, b) => a - b);
    const levels = ["none", "pplug"].filter((name) => data.runs[0].methods[name]?.[metric] && !(name in data.top_k[metric]))
      .map((name) => ({ name, value: data.runs[0].methods[name][metric].value }));
    lines(place, series, ["retrieved items (top_k)", direction(metric)], { xTicks: at, levels });
  },
};

function drawCharts() {
  for (const place of document.querySelectorAll("[data-chart]")) {
    place.replaceChildren();
    CHARTS[place.dataset.chart](place);
  }
  drawMap();
}
metricChooser?.addEventListener("change", () => {
  metric = metricChooser.value;
  for (const part of document.querySelectorAll("[data-metric]")) {
    const others = part.closest("section").querySelectorAll(`[data-metric="${metric}"]`);
    part.hidden = part.dataset.metric !== (others.length ? metric : data.metrics[0]);
  }
  drawCharts();
});

function select(options, value, label, onchange) {
  return make("select", { "aria-label": label, onchange: (event) => onchange(event.target.value) },
    ...options.map(([key, text]) => make("option", { value: key, selected: key === value }, text)));
}

// ---- Users

const users = data.explorer?.examples ?? [];
const answering = users.length ? Object.keys(users[0].outputs) : [];
const weighing = users.length ? Object.keys(users[0].weights) : [];
const plug = weighing.includes("pplug") ? "pplug" : weighing[0];
const preferred = ["none", "bm25", plug, ...answering].filter((name) => answering.includes(name));
const state = {
  user: 0,
  methods: [...new Set(preferred)].slice(0, 3),
  weights: plug,
  compare: false,
  order: weighing.length ? "weight" : "newest",
};
const called = (user) => (user.user ? `${user.user}, example ${user.id}` : user.id);

function searchable(user) {
  user.all ??= [user.id, user.user, user.input, user.gold ?? "", ...Object.values(user.outputs),
    ...user.items.map((item) => item.text)].join("\n").toLowerCase();
  return user.all;
}

function find() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = users.flatMap((user, i) => (words.every((word) => searchable(user).includes(word)) ? [i] : []));
  byId("count").textContent = words.length ? `${found.length} of ${users.length} have it` : `${users.length} examples`;
  byId("found").replaceChildren(...found.map((i) => make("button", {
    type: "button", "data-user": i, "aria-current": i === state.user ? "true" : false, onclick: () => open(i),
  }, called(users[i]), make("span", {}, items(users[i].length)))));
}

/** The text, the words that the gold has too marked. */
function marked(text, gold) {
  const words = (of) => of.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];
  const wanted = new Set(words(gold ?? ""));
  return text.split(/([\p{L}\p{N}]+)/u).map((part, i) =>
    i % 2 && wanted.has(part.toLowerCase()) ? make("mark", {}, part) : document.createTextNode(part));
}

/** An item's text, what the user wrote of it that is like an output set apart. */
function item({ text, answer }) {
  if (!answer || text === answer) return [text];
  if (text.startsWith(answer)) return [make("b", {}, answer), text.slice(answer.length)];
  return text.endsWith(answer) ? [text.slice(0, -answer.length), make("b", {}, answer)] : [text];
}

function bar(weight, largest, even, kind) {
  return make("div", { class: `bar ${kind}` },
    make("div", { class: "track" },
      make("div", { class: "fill", style: { width: `${(100 * weight) / largest}%` } }),
      make("div", { class: "even", style: { left: `${Math.min(100, (100 * even) / largest)}%` } })),
    percent(weight));
}

/** In whose prompts, of the methods whose outputs are shown, an item stands in words. */
function prompted({ prompts }) {
  const names = [...new Set(state.methods)].filter((name) => prompts.includes(name));
  return names.length ? make("span", { class: "asked" }, `in the prompt of ${names.join(", ")}:`) : null;
}

function itemList(user) {
  const weights = user.weights[state.weights];
  const other = state.compare && weights ? weights.other : null;
  const largest = weights ? Math.max(1e-9, ...weights.own, ...(other ?? []), 1.3 / user.length) : 1;
  const order = user.items.map((_, i) => i).reverse();
  if (state.order === "weight" && weights) order.sort((a, b) => weights.own[b] - weights.own[a]);
  if (state.order === "change" && weights?.other)
    order.sort((a, b) => Math.abs(weights.own[b] - weights.other[b]) - Math.abs(weights.own[a] - weights.other[a]));
  return make("ol", { class: "items" }, ...order.map((i) => {
    const { place } = user.items[i];
    return make("li", { class: weights ? "" : "plain" },
      weights && make("div", {}, bar(weights.own[i], largest, 1 / user.length, "own"),
        other && bar(other[i], largest, 1 / user.length, "other")),
      make("div", { class: "words" }, make("span", { class: "place" }, `${place + 1}.`),
        other && place === weights.item ? make("span", { class: "asked" }, "the other input is about this item:") : null,
        prompted(user.items[i]), ...item(user.items[i])));
  }));
}

function output(user, column) {
  const name = state.methods[column];
  const scores = (user.scores[name] ?? []).map((value, i) => `${data.explorer.scored[i]} ${number(value)}`);
  return make("div", {},
    select(answering.map((each) => [each, each]), name, `Method ${column + 1}`, (chosen) => {
      state.methods[column] = chosen;
      show();
      byId("user").querySelector(`[aria-label="Method ${column + 1}"]`).focus();
    }),
    make("div", { class: "text long" }, ...marked(user.outputs[name], user.gold)),
    make("p", { class: "note" }, scores.join(", ")));
}

function show() {
  const user = users[state.user];
  const weights = user.weights[state.weights];
  const again = (focus) => { show(); byId("user").querySelector(focus)?.focus(); };
  const step = (by) => { open((state.user + by + users.length) % users.length); };
  const controls = make("p", { class: "chooser" });
  if (weighing.length > 1)
    controls.append(make("label", {}, "Weights of ", select(weighing.map((each) => [each, each]), state.weights, "Weights of",
      (value) => { state.weights = value; again("[aria-label='Weights of']"); })));
  if (weights) {
    const orders = [["weight", "weight"], ["newest", "time, newest first"]];
    if (weights.other) orders.push(["change", "change of weight"]);
    controls.append(make("label", {}, "Order by ", select(orders, state.order, "Order by",
      (value) => { state.order = value; again("[aria-label='Order by']"); })));
    if (weights.other)
      controls.append(make("label", {}, make("input", { type: "checkbox", id: "compare", checked: state.compare,
        onchange: (event) => { state.compare = event.target.checked; again("#compare"); } }),
      "beside the weights for another input of this user"));
  }
  const hidden = user.length - user.items.length;
  byId("user").replaceChildren(...[
    make("div", { class: "who" }, make("h3", {}, called(user)),
      make("button", { type: "button", onclick: () => step(-1) }, "Previous"),
      make("button", { type: "button", onclick: () => step(1) }, "Next")),
    make("h4", {}, "Input"), make("p", { class: "text long" }, user.input),
    make("h4", {}, "Gold"), make("p", { class: "text long" }, user.gold ?? "(withheld)"),
    make("h4", {}, user.gold == null ? "Outputs" : "Outputs, with the gold's words marked"),
    make("div", { class: "outputs" }, ...state.methods.map((_, column) => output(user, column))),
    make("h4", {}, `History: ${items(user.length)}${hidden ? `, ${user.items.length} of them shown` : ""}`),
    controls,
    state.compare && weights?.other ? make("p", { class: "legend" },
      make("span", { class: "key" }, make("span", { class: "swatch", style: { background: "var(--c3)" } }), "this input"),
      make("span", { class: "key" }, make("span", { class: "swatch", style: { background: "var(--c1)" } }),
        `an input made of item ${weights.item + 1}`)) : null,
    weights && user.length ? make("p", { class: "note" }, "A bar is an item's share of the attention; the thin line is where all would be alike.") : null,
    user.length ? itemList(user) : make("p", { class: "note" }, "This user has no history; a plug takes its null persona."),
  ].filter(Boolean));
  for (const button of byId("found").children)
    button.setAttribute("aria-current", String(Number(button.dataset.user) === state.user));
  for (const dot of byId("persona-map")?.querySelectorAll(".dot") ?? []) {
    dot.classList.toggle("chosen", Number(dot.dataset.user) === state.user);
    if (dot.matches(".chosen")) dot.parentNode.insertBefore(dot, dot.parentNode.querySelector(".ring")); // above the others
  }
}

function open(i) {
  state.user = i;
  show();
  const button = byId("found").querySelector(`[data-user="${i}"]`);
  const list = byId("found");
  if (button) list.scrollTop = Math.max(0, button.offsetTop - list.offsetTop - list.clientHeight / 2);
}

// ---- Map

const maps = data.explorer?.maps ?? {};
const map = { method: plug in maps ? plug : Object.keys(maps)[0], colours: null };

/** What a map's dots may be coloured by: {key: [name, colour of a dot, legend]}. */
function colourings(plane) {
  const found = {};
  const ramp = (low, colours, high) => [make("span", { class: "key" }, low,
    make("span", { class: "ramp", style: { background: `linear-gradient(to right, ${colours})` } }), high)];
  const key = (background, text) => make("span", { class: "key" }, make("span", { class: "swatch", style: { background } }), text);
  if (plane.gain) {
    const largest = Math.max(1e-9, ...plane.gain.map(Math.abs));
    found.gain = [`gain in ${data.explorer.scored[0]} over none`,
      (i) => `color-mix(in oklab, var(--${plane.gain[i] < 0 ? "worse" : "better"}) ${(100 * Math.abs(plane.gain[i])) / largest}%, var(--same))`,
      () => ramp(signed(-largest), "var(--worse), var(--same), var(--better)", signed(largest))];
  }
  const longest = Math.max(1, ...users.map((user) => user.length));
  found.length = ["items of history",
    (i) => `color-mix(in oklab, var(--many) ${(100 * users[i].length) / longest}%, var(--few))`,
    () => ramp("0", "var(--few), var(--many)", String(longest))];
  if (data.explorer.classes) {
    const counts = {};
    for (const user of users) counts[user.gold] = (counts[user.gold] ?? 0) + 1;
    const names = Object.keys(counts).sort((a, b) => counts[b] - counts[a]);
    const of = (name) => (names.indexOf(name) < 9 ? `var(--c${names.indexOf(name) + 1})` : "var(--same)");
    found.gold = ["gold class", (i) => of(users[i].gold),
      () => [...names.slice(0, 9).map((name) => key(of(name), name)), names.length > 9 ? key("var(--same)", "others") : null]];
  }
  return found;
}

function drawMap() {
  const place = byId("persona-map");
  if (!place) return;
  const plane = maps[map.method], kinds = colourings(plane);
  if (!(map.colours in kinds)) map.colours = Object.keys(kinds)[0];
  const [about, paint, legend] = kinds[map.colours];
  const chooser = (label, options, value, key) => make("label", {}, `${label} `,
    select(options, value, label, (chosen) => {
      map[key] = chosen;
      drawMap();
      byId("map-choosers").querySelector(`[aria-label="${label}"]`).focus();
    }));
  byId("map-choosers").replaceChildren(
    ...(Object.keys(maps).length > 1 ? [chooser("Personas of", Object.keys(maps).map((name) => [name, name]), map.method, "method")] : []),
    chooser("Colour", Object.entries(kinds).map(([key, [name]]) => [key, name]), map.colours, "colours"));
  place.replaceChildren(make("div", { class: "legend" }, make("span", {}, `${about}:`), ...legend().filter(Boolean)));
  const height = Math.max(320, Math.min(560, place.clientWidth * 0.75));
  const { svg, width } = sheet(place, height, `Map of ${users.length} personas of ${map.method}`);
  svg.setAttribute("role", "group");
  const [x, y] = [0, 1].map((axis) => extent(plane.points.map((at) => at[axis]), 0.04))
    .map((domain, axis) => (axis ? scale(domain, height - 26, 4) : scale(domain, 8, width - 8)));
  const tip = make("div", { class: "tip", hidden: true });
  const dots = plane.points.map((at, i) => draw("circle", {
    class: i === state.user ? "dot chosen" : "dot", cx: x(at[0]).toFixed(1), cy: y(at[1]).toFixed(1), r: 5,
    style: { fill: paint(i) }, tabindex: -1, role: "button", "data-user": i, "aria-label": describe(i).join(", "),
    onmouseenter: () => point(i), onfocus: () => point(i), onmouseleave: hide, onblur: hide, onclick: () => choose(i),
  }));
  const ring = draw("circle", { class: "ring", r: 8, visibility: "hidden" });
  function describe(i) {
    const facts = [called(users[i]), `${items(users[i].length)} of history`];
    if (plane.gain) facts.push(`gain ${signed(plane.gain[i])}`);
    if (data.explorer.classes) facts.push(`gold ${users[i].gold}`);
    return facts;
  }
  function point(i) {
    tip.replaceChildren(...describe(i).map((text) => make("div", {}, text)));
    tip.hidden = false;
    for (const place of ["cx", "cy"]) ring.setAttribute(place, dots[i].getAttribute(place));
    ring.setAttribute("visibility", "visible");
    const [left, top] = [dots[i].cx.baseVal.value, dots[i].cy.baseVal.value + svg.getBoundingClientRect().top - place.getBoundingClientRect().top];
    tip.style.left = `${Math.max(0, Math.min(left + 12, width - tip.offsetWidth))}px`;
    tip.style.top = `${top > tip.offsetHeight + 14 ? top - tip.offsetHeight - 10 : top + 12}px`;
  }
  function hide() { tip.hidden = true; ring.setAttribute("visibility", "hidden"); }
  function choose(i) {
    open(i);
    byId("users").scrollIntoView();
    byId("user").focus({ preventScroll: true });
  }
  // Arrows go to the next dot to the right, left, above or below.
  const orders = [0, 1].map((axis) => dots.map((_, i) => i).sort((a, b) => plane.points[a][axis] - plane.points[b][axis]));
  const steps = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowUp: [1, 1], ArrowDown: [1, -1] };
  svg.addEventListener("keydown", (event) => {
    const i = dots.indexOf(document.activeElement);
    if (i < 0) return;
    if (event.key === "Enter" || event.key === " ") choose(i);
    else if (event.key in steps) {
      const [axis, by] = steps[event.key];
      const next = orders[axis][orders[axis].indexOf(i) + by];
      if (next !== undefined) { dots[i].tabIndex = -1; dots[next].tabIndex = 0; dots[next].focus(); }
    } else return;
    event.preventDefault();
  });
  if (dots.length) dots[orders[0][0]].tabIndex = 0;
  svg.append(...dots, dots[state.user], ring, draw("text", { x: width / 2, y: height - 4, "text-anchor": "middle" },
    `across ${percent(plane.shares[0])}, upwards ${percent(plane.shares[1])} of the variance`));
  place.append(tip);
}

// ---- Start

if (users.length) {
  byId("explorer").hidden = false;
  byId("search").addEventListener("input", find);
  find();
  show();
}
drawCharts();
let drawnAt = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== drawnAt) { drawnAt = innerWidth; drawCharts(); }
});
