"use strict";
// Draws every panel of the page from the JSON beside it. One selection (layer, head, position) is shared by all.

const data = JSON.parse(document.getElementById("data").textContent);
const { positions, layers, panels } = data;
const last = positions.length - 1;
const rising = layers.findIndex((layer) => layer.rises);
const state = { layer: Math.max(rising, 0), head: 0, at: last };
const charts = [];
const tip = document.getElementById("tip");

const mean = (numbers) => numbers.reduce((sum, value) => sum + value, 0) / numbers.length;
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const whole = (value) => value.toLocaleString("en-US");

/** With a true minus sign, and none before a zero. */
function shown(value, digits = 3) {
  if (value === null) return "–";
  return (Number(value.toFixed(digits)) + 0).toFixed(digits).replace("-", "−");
}

for (const panel of panels) {
  panel.means = panel.curves.map((heads) => positions.map((_, at) => mean(heads.map((curve) => curve[at]))));
}

// ---- drawing -------------------------------------------------------------------------------------------------------

function add(parent, tag, attributes = {}, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

function startSvg(figure, height, label) {
  figure.querySelector("svg")?.remove();
  const width = figure.clientWidth;
  return add(figure, "svg", {
    viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "application", "aria-roledescription": "chart",
    "aria-label": label,
  });
}

function coloured(node, layer) {
  node.style.setProperty("--light", layer.light);
  node.style.setProperty("--dark", layer.dark);
  return node;
}

/** Round steps, at most `count` of them, that cover [low, high]. */
function ticks(low, high, count) {
  const rough = (high - low || 1) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const found = [];
  for (let k = Math.ceil(low / step); k * step <= high + step / 1e6; k++) found.push(k * step);
  return { found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

/** Powers of two, thinned to `count`; the positions' own ends where they span less than a doubling. */
function positionTicks(low, high, count) {
  const powers = [];
  for (let n = 1; n <= high; n *= 2) if (n >= low) powers.push(n);
  if (powers.length < 2) return low === high ? [low] : [low, high];
  const stride = Math.ceil(powers.length / count);
  return powers.filter((_, i) => (powers.length - 1 - i) % stride === 0);
}

/** The range of a vertical axis: from 0 to the bound for entropies, from the least to the greatest for differences. */
function extent(curves, isEntropy) {
  const values = isEntropy ? layers.flatMap((layer) => layer.visible).map(Math.log) : curves.flat(Infinity);
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [0, 0.01]);
}

function drawAxes(svg, box, range, isEntropy, seen) {
  const { left, right, top, bottom } = box;
  const [low, high] = range;
  const first = Math.log(positions[0]);
  const span = Math.log(positions[last]) - first;
  const x = (n) => span ? left + (Math.log(n) - first) / span * (right - left) : (left + right) / 2;
  const y = (value) => bottom - (value - low) / (high - low) * (bottom - top);
  const vertical = ticks(low, high, 5);
  for (const value of vertical.found) {
    add(svg, "line", { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) });
    add(svg, "text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, shown(value, vertical.digits));
  }
  for (const n of positionTicks(positions[0], positions[last], (right - left) / 70)) {
    add(svg, "line", { class: "axis", x1: x(n), x2: x(n), y1: bottom, y2: bottom + 4 });
    add(svg, "text", { x: x(n), y: bottom + 18, "text-anchor": "middle" }, whole(n));
  }
  add(svg, "line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom });
  add(svg, "text", { x: right, y: bottom + 36, "text-anchor": "end" }, "position n of the query (tokens)");
  if (isEntropy) {
    const path = seen.map((n, at) => `${at ? "L" : "M"}${x(positions[at])},${y(Math.log(n))}`).join("");
    add(svg, "path", { class: "bound", d: path });
  } else {
    add(svg, "line", { class: "zero", x1: left, x2: right, y1: y(0), y2: y(0) });
  }
  if (positions[0] <= data.window && data.window <= positions[last]) {
    const at = x(data.window);
    const before = at > (left + right) / 2;
    add(svg, "line", { class: "window", x1: at, x2: at, y1: top, y2: bottom });
    add(svg, "text", {
      class: "window", x: at + (before ? -6 : 6), y: bottom - 8, "text-anchor": before ? "end" : "start",
    }, `window ${whole(data.window)}`);
  }
  return { x, y };
}

/** Layer colours, the bound, and the dashes that occur, in a row (two where it is narrow). */
function drawLegend(svg, box, isEntropy) {
  let at = box.left;
  let line = 12;
  const place = (width) => {
    if (at > box.left && at + width > box.right) [at, line] = [box.left, line + 18];
    at += width;
    return at - width;
  };
  const start = place(150);
  add(svg, "text", { x: start, y: line }, "layer 0");
  layers.forEach((layer, index) => coloured(add(svg, "rect", {
    class: "swatch", x: start + 46 + index * 64 / layers.length, y: line - 9, width: 64 / layers.length + 0.3, height: 9,
  }), layer));
  add(svg, "text", { x: start + 114, y: line }, layers.length - 1);
  const samples = [...new Set(layers.map((layer) => layer.kind))].filter((kind) => kind !== "full")
    .map((kind) => [`sample ${kind}`, data.kinds[kind]]);
  if (isEntropy) samples.push(["bound", "bound ln n"]);
  for (const [style, name] of samples) {
    const from = place(44 + name.length * 6.4);
    add(svg, "line", { class: style, x1: from, x2: from + 26, y1: line - 4, y2: line - 4 });
    add(svg, "text", { x: from + 32, y: line }, name);
  }
}

/**
 * Pointer and arrow keys on a chart. `point(x, y)` and `step(up, right)` change the selection (`point` says whether
 * something lies there), `text()` gives the rows of the tip, `marker()` the element that it stands beside.
 */
function listen(svg, { point, step, text, marker }) {
  const moves = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] };
  const tell = () => {
    const bounds = marker().getBoundingClientRect();
    showTip(text(), bounds.right, bounds.bottom);
  };
  const follow = (event) => {
    const bounds = svg.getBoundingClientRect();
    const zoom = svg.viewBox.baseVal.width / bounds.width;
    if (!point((event.clientX - bounds.left) * zoom, (event.clientY - bounds.top) * zoom)) return hideTip();
    markAll();
    showTip(text(), event.clientX, event.clientY);
  };
  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerdown", follow);
  svg.addEventListener("pointerleave", hideTip);
  svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) tell(); });
  svg.addEventListener("blur", hideTip);
  svg.addEventListener("keydown", (event) => {
    if (!(event.key in moves)) return;
    event.preventDefault();
    step(...moves[event.key]);
    markAll();
    tell();
  });
}

// ---- the three kinds of chart --------------------------------------------------------------------------------------

/**
 * Curves by position. `spec` gives: figure, panel, height, label(), lines() -> [{values, layer}], seen() -> visible
 * keys by position, range, active() -> the index of the chosen line, choose(index), lineText(index), stderr(index);
 * and where wanted legend, caption(), perLayer (the lines depend on the chosen layer).
 */
function lineChart(spec) {
  const { figure, panel, height } = spec;
  let scale, svg, lines, paths, dot, drawnLayer;

  function draw() {
    svg = startSvg(figure, height, spec.label());
    if (spec.caption) figure.querySelector("figcaption").textContent = spec.caption();
    const box = { left: 44, right: figure.clientWidth - 24, top: spec.legend ? 42 : 12, bottom: height - 46 };
    if (spec.legend) drawLegend(svg, box, panel.isEntropy);
    scale = drawAxes(svg, box, spec.range, panel.isEntropy, spec.seen());
    lines = spec.lines();
    paths = lines.map(({ values, layer }) => {
      const points = values.map((value, at) => `${scale.x(positions[at])},${scale.y(value)}`);
      // A path of no length has round ends, so that a single position is seen as a point.
      const path = points.length > 1 ? `M${points.join("L")}` : `M${points[0]}h0`;
      return coloured(add(svg, "path", { class: `line depth ${layer.kind}`, d: path }), layer);
    });
    dot = add(svg, "circle", { class: "dot", r: 4.5 });
    drawnLayer = state.layer;
    listen(svg, { point, step, text, marker: () => dot });
    mark();
  }

  function mark() {
    if (spec.perLayer && drawnLayer !== state.layer) return draw();
    const index = spec.active();
    paths.forEach((path, i) => path.classList.toggle("active", i === index));
    svg.insertBefore(paths[index], dot);
    dot.setAttribute("cx", scale.x(positions[state.at]));
    dot.setAttribute("cy", scale.y(lines[index].values[state.at]));
    svg.setAttribute("aria-label", spec.label());
  }

  function point(x, y) {
    state.at = nearest(positions, (n) => Math.abs(scale.x(n) - x));
    spec.choose(nearest(lines, ({ values }) => Math.abs(scale.y(values[state.at]) - y)));
    return true;
  }

  function step(up, right) {
    spec.choose(clamp(spec.active() + up, 0, lines.length - 1));
    state.at = clamp(state.at + right, 0, last);
  }

  function text() {
    const index = spec.active();
    const value = lines[index].values[state.at];
    const rows = [spec.lineText(index), `position ${whole(positions[state.at])}`];
    const stderr = spec.stderr(index);
    const uncertainty = stderr === null ? "" : ` ± ${shown(stderr)}`;
    rows.push(`${panel.isEntropy ? "entropy" : "difference"} ${shown(value)}${uncertainty} nats`);
    const bound = Math.log(lines[index].layer.visible[state.at]);
    if (panel.isEntropy && bound > 0) rows.push(`${Math.round(100 * value / bound)} % of its bound, ${shown(bound, 2)}`);
    return rows;
  }

  charts.push({ draw, mark });
}

function nearest(items, distance) {
  let best = 0;
  items.forEach((item, index) => { if (distance(item) < distance(items[best])) best = index; });
  return best;
}

/** A layer x head map, layer 0 at the bottom. */
function cellMap(figure, panel, height) {
  const { cells } = panel;
  const numHeads = cells[0].length;
  const limit = Math.max(...cells.flat().map((value) => Math.abs(value ?? 0))) || 1;
  let svg, cursor, box, cellWidth, cellHeight;

  function draw() {
    svg = startSvg(figure, height, label());
    box = { left: 40, right: figure.clientWidth - 4, top: 42, bottom: height - 46 };
    cellWidth = (box.right - box.left) / numHeads;
    cellHeight = (box.bottom - box.top) / layers.length;
    if (cells.flat().some((value) => value !== null)) drawScale();
    else add(svg, "text", { x: box.left, y: 12 }, "too few positions inside the window");
    cells.forEach((row, layer) => row.forEach((value, head) => {
      const kind = value === null ? "absent" : value < 0 ? "low" : "high";
      const cell = add(svg, "rect", {
        class: `cell ${kind}`, ...place(layer, head), width: cellWidth + 0.2, height: cellHeight + 0.2,
      });
      cell.style.setProperty("--share", `${Math.round(100 * Math.abs(value ?? 0) / limit)}%`);
    }));
    drawLabels();
    cursor = add(svg, "rect", { class: "cursor", width: cellWidth, height: cellHeight });
    listen(svg, { point, step, text, marker: () => cursor });
    mark();
  }

  const place = (layer, head) => ({ x: box.left + head * cellWidth, y: box.bottom - (layer + 1) * cellHeight });
  const label = () => `${panel.title}: ${panel.cellsTitle}, by layer and head. ${text().join(", ")}`;

  function drawScale() {
    const width = 120;
    const left = box.left + 44;
    for (let i = -10; i <= 10; i++) {
      const swatch = add(svg, "rect", {
        class: `cell scale ${i < 0 ? "low" : "high"}`, x: left + (i + 10) * width / 21, y: 3, width: width / 21 + 0.3, height: 9,
      });
      swatch.style.setProperty("--share", `${Math.abs(i) * 10}%`);
    }
    add(svg, "text", { x: left - 6, y: 12, "text-anchor": "end" }, shown(-limit, 2));
    add(svg, "text", { x: left + width / 2, y: 26, "text-anchor": "middle" }, "0");
    add(svg, "text", { x: left + width + 6, y: 12 }, shown(limit, 2));
  }

  function drawLabels() {
    const heads = ticks(0, numHeads - 1, Math.min(numHeads, 9)).found.filter(Number.isInteger);
    for (const head of heads) {
      add(svg, "text", { x: place(0, head).x + cellWidth / 2, y: box.bottom + 18, "text-anchor": "middle" }, head);
    }
    for (const layer of ticks(0, layers.length - 1, Math.min(layers.length, 9)).found.filter(Number.isInteger)) {
      add(svg, "text", { x: box.left - 10, y: place(layer, 0).y + cellHeight / 2 + 4, "text-anchor": "end" }, layer);
    }
    layers.forEach((layer, index) => {
      if (layer.kind === "full") return;
      add(svg, "circle", { class: "mark", cx: box.left - 4.5, cy: place(index, 0).y + cellHeight / 2, r: 2 });
    });
    const others = layers.some((layer) => layer.kind !== "full");
    add(svg, "text", { x: box.right, y: box.bottom + 36, "text-anchor": "end" },
      `${others ? "• sliding window or no RoPE\u2003" : ""}layer ↑\u2003head →`);
  }

  function mark() {
    for (const [name, value] of Object.entries(place(state.layer, state.head))) cursor.setAttribute(name, value);
    svg.setAttribute("aria-label", label());
  }

  function point(x, y) {
    const head = Math.floor((x - box.left) / cellWidth);
    const layer = Math.floor((box.bottom - y) / cellHeight);
    if (head < 0 || head >= numHeads || layer < 0 || layer >= layers.length) return false;
    Object.assign(state, { layer, head });
    return true;
  }

  function step(up, right) {
    state.layer = clamp(state.layer + up, 0, layers.length - 1);
    state.head = clamp(state.head + right, 0, numHeads - 1);
  }

  function text() {
    return [
      `${chosenLayer()}, head ${state.head}`,
      `${panel.isEntropy ? "slope" : "mean difference"} ${shown(cells[state.layer][state.head])}`,
    ];
  }

  charts.push({ draw, mark });
}

// ---- the page ------------------------------------------------------------------------------------------------------

const layerName = (layer) => `layer ${layer.index}${layer.kind === "full" ? "" : ` (${data.kinds[layer.kind]})`}`;
const chosenLayer = () => layerName(layers[state.layer]);

function showTip(rows, x, y) {
  tip.replaceChildren(...rows.map((row) => Object.assign(document.createElement("div"), { textContent: row })));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const { clientWidth, clientHeight } = document.documentElement;
  const right = x + 16 + width <= clientWidth - 8;
  tip.style.left = `${clamp(right ? x + 16 : x - 16 - width, 8, Math.max(8, clientWidth - width - 8))}px`;
  tip.style.top = `${clamp(y + 16 + height <= clientHeight ? y + 16 : y - 16 - height, 8, clientHeight)}px`;
}

function hideTip() { tip.hidden = true; }

const picker = document.getElementById("layer");

function markAll() {
  picker.value = state.layer;
  for (const chart of charts) chart.mark();
}

layers.forEach((layer, index) => picker.append(new Option(layerName(layer).replace("layer ", ""), index)));
picker.addEventListener("change", () => { state.layer = Number(picker.value); markAll(); });
picker.parentElement.hidden = false;

document.querySelectorAll(".panel").forEach((section, index) => {
  const panel = panels[index];
  lineChart({
    panel, figure: section.querySelector(".layers"), height: 400, legend: true,
    range: extent(panel.means, panel.isEntropy),
    label: () => `${panel.title}: ${panel.quantity} by position, a line per layer; chosen: ${chosenLayer()}`,
    lines: () => panel.means.map((values, layer) => ({ values, layer: layers[layer] })),
    seen: () => positions,
    active: () => state.layer,
    choose: (layer) => { state.layer = layer; },
    lineText: (layer) => `${layerName(layers[layer])}, mean over heads`,
    stderr: () => null,
  });
  cellMap(section.querySelector(".cells"), panel, 400);
  lineChart({
    panel, figure: section.querySelector(".heads"), height: 280, perLayer: true,
    range: extent(panel.curves, panel.isEntropy),
    label: () => `${panel.title}: ${panel.quantity} by position, a line per head of ${chosenLayer()}; `
      + `chosen: head ${state.head}`,
    caption: () => `Head by head: ${chosenLayer()}`,
    lines: () => panel.curves[state.layer].map((values) => ({ values, layer: layers[state.layer] })),
    seen: () => layers[state.layer].visible,
    active: () => state.head,
    choose: (head) => { state.head = head; },
    lineText: (head) => `${chosenLayer()}, head ${head}`,
    stderr: (head) => panel.stderr?.[state.layer][head][state.at] ?? null,
  });
});

let drawnWidth = 0;
new ResizeObserver(() => {
  const width = document.querySelector(".panel").clientWidth;
  if (width === drawnWidth) return;
  drawnWidth = width;
  hideTip();
  picker.value = state.layer;
  for (const chart of charts) chart.draw();
}).observe(document.querySelector(".panel"));
