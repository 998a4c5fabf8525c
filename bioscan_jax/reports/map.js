"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const TOP = data.top, OTHER = TOP, UNKNOWN = TOP + 1;

function array(Kind, text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Kind(bytes.buffer);
}

const rows = {
  n: data.ids.length,
  xy: array(Uint16Array, data.xy),
  lineage: array(Uint32Array, data.lineage),
  lineages: array(Int32Array, data.lineages),
  numbers: Object.fromEntries(Object.entries(data.numbers).map(([name, text]) => [name, array(Float32Array, text)])),
  marker: array(Int32Array, data.marker),
};
const number = new Intl.NumberFormat("en");
const short = (value) => Number(value.toPrecision(4)).toString();

function nameOf(row, rank) {
  const index = rows.lineages[rows.lineage[row] * data.ranks.length + rank];
  return index < 0 ? null : data.names[rank][index];
}

// Classes that rows are coloured by: the class of each row and the name of each class
function namedClasses(indexOf, names) {
  const codes = new Uint8Array(rows.n), counts = new Uint32Array(names.length);
  for (let i = 0; i < rows.n; i++) if (indexOf(i) >= 0) counts[indexOf(i)]++;
  const order = [...names.keys()].sort((a, b) => counts[b] - counts[a] || a - b);
  const place = new Uint32Array(names.length);
  order.forEach((index, position) => { place[index] = position; });
  for (let i = 0; i < rows.n; i++) {
    const index = indexOf(i);
    codes[i] = index < 0 ? UNKNOWN : Math.min(place[index], OTHER);
  }
  const others = Math.max(0, order.length - TOP);
  const labels = order.slice(0, TOP).map((index) => names[index]);
  return { codes, labels, other: others === 1 ? "1 other name" : `${number.format(others)} other names`, scale: false };
}

function scaleClasses(values, unit) {
  const known = values.filter((v) => !Number.isNaN(v)).sort();
  const bounds = [];
  for (let k = 1; k < TOP; k++) {
    const bound = known[Math.floor((known.length * k) / TOP)];
    if (bound > (bounds.length ? bounds[bounds.length - 1] : known[0])) bounds.push(bound);
  }
  // Few classes are spread over the whole colour scale too
  const color = (k) => Math.round((k * (TOP - 1)) / Math.max(1, bounds.length));
  const codes = new Uint8Array(rows.n);
  for (let i = 0; i < rows.n; i++) {
    let k = 0;
    while (k < bounds.length && values[i] >= bounds[k]) k++;
    codes[i] = Number.isNaN(values[i]) ? UNKNOWN : color(k);
  }
  const edges = [known[0], ...bounds, known[known.length - 1]], labels = Array(TOP).fill("");
  edges.slice(1).forEach((edge, k) => { labels[color(k)] = `${short(edges[k])} to ${k < bounds.length ? "below " : ""}${short(edge)}${unit}`; });
  return { codes, labels, other: "", scale: true };
}

function classes(field) {
  const rank = data.ranks.indexOf(field);
  if (rank >= 0) {
    const ranks = data.ranks.length;
    return namedClasses((i) => rows.lineages[rows.lineage[i] * ranks + rank], data.names[rank]);
  }
  return field === "marker_gene" ? namedClasses((i) => rows.marker[i], data.markers) : scaleClasses(rows.numbers[field], field === "depth" ? " m" : "");
}

function colours(scale) {
  const style = getComputedStyle(document.documentElement);
  const names = [...Array(TOP).keys()].map((k) => (scale ? `--scale-${k}` : `--taxon-${k}`));
  return [...names, "--other", "--unknown"].map((name) => style.getPropertyValue(name).trim());
}

const littleEndian = new Uint8Array(new Uint32Array([1]).buffer)[0] === 1;
function pixel(hex) {
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  return littleEndian ? ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0 : ((r << 24) | (g << 16) | (b << 8) | 255) >>> 0;
}

// Blends a colour that covers part of a pixel over the colour there, if any
function over(value, below, cover) {
  const alpha = littleEndian ? 24 : 0, there = ((below >>> alpha) & 255) / 255, whole = cover + there * (1 - cover);
  let mixed = 0;
  for (let at = 0; at < 32; at += 8) {
    const base = (below >>> at) & 255;
    mixed |= Math.round(at === alpha ? whole * 255 : base + ((((value >>> at) & 255) - base) * cover) / whole) << at;
  }
  return mixed >>> 0;
}

// A map of points: `points` has x, y and radius of each; members(i) lists the rows at point i
function pointMap(section, points) {
  const stage = section.querySelector(".stage"), tip = section.querySelector(".tip");
  const back = section.querySelector(".back"), front = section.querySelector(".front");
  const select = section.querySelector("select"), find = section.querySelector("input");
  const legend = section.querySelector(".legend"), found = section.querySelector(".found");
  const n = points.x.length, smooth = n <= 20000, view = { x: 0, y: 0, scale: 1 };
  let width = 1, height = 1, ratio = 1, image = null, pixels = null, shown = null, codes = null;
  let only = -1, text = "", matches = null, waiting = false, home = 1, moved = false;

  const box = [Infinity, Infinity, -Infinity, -Infinity];
  for (let i = 0; i < n; i++) {
    box[0] = Math.min(box[0], points.x[i]); box[2] = Math.max(box[2], points.x[i]);
    box[1] = Math.min(box[1], points.y[i]); box[3] = Math.max(box[3], points.y[i]);
  }
  const bounds = points.bounds || box;

  // Points sorted by the cells of a grid, so that hovering searches only a few cells
  const G = 256, cellWidth = (box[2] - box[0]) / G || 1, cellHeight = (box[3] - box[1]) / G || 1;
  const column = (x) => Math.min(G - 1, Math.max(0, Math.floor((x - box[0]) / cellWidth)));
  const line = (y) => Math.min(G - 1, Math.max(0, Math.floor((y - box[1]) / cellHeight)));
  const starts = new Uint32Array(G * G + 1), inCells = new Uint32Array(n);
  for (let i = 0; i < n; i++) starts[line(points.y[i]) * G + column(points.x[i]) + 1]++;
  for (let c = 0; c < G * G; c++) starts[c + 1] += starts[c];
  const next = starts.slice();
  for (let i = 0; i < n; i++) inCells[next[line(points.y[i]) * G + column(points.x[i])]++] = i;

  const toScreen = (i) => [(points.x[i] - view.x) * view.scale + width / 2, height / 2 - (points.y[i] - view.y) * view.scale];
  const toWorld = (px, py) => [(px - width / 2) / view.scale + view.x, (height / 2 - py) / view.scale + view.y];

  function nearest(px, py) {
    const [wx, wy] = toWorld(px, py), reach = (10 + (points.most || 0)) / view.scale;
    let best = -1, least = reach * reach;
    for (let r = line(wy - reach); r <= line(wy + reach); r++) {
      for (let at = starts[r * G + column(wx - reach)]; at < starts[r * G + column(wx + reach) + 1]; at++) {
        const i = inCells[at], d = (points.x[i] - wx) ** 2 + (points.y[i] - wy) ** 2;
        if (d < least && (!matches || matches[i])) { best = i; least = d; }
      }
    }
    return best;
  }

  function fit() {
    home = Math.min(width / (bounds[2] - bounds[0] || 1), height / (bounds[3] - bounds[1] || 1)) * (points.bounds ? 1 : 0.94);
    view.x = (bounds[0] + bounds[2]) / 2; view.y = (bounds[1] + bounds[3]) / 2; view.scale = home;
  }

  // The pixels of a disc; for few points also those of its rim, with the fraction of each that is covered
  function stamp(radius) {
    const offsets = [], rim = [], reach = Math.ceil(radius + 0.5);
    for (let dy = -reach; dy <= reach; dy++) {
      for (let dx = -reach; dx <= reach; dx++) {
        const cover = radius + 0.5 - Math.hypot(dx, dy);
        if (smooth ? cover >= 1 : cover >= 0.5) offsets.push([dx, dy]);
        else if (smooth && cover > 0) rim.push([dx, dy, cover]);
      }
    }
    return { offsets, rim, reach, flat: Int32Array.from(offsets, ([dx, dy]) => dy * front.width + dx) };
  }

  // Writes points straight into the pixels: 50,000 take a few milliseconds without a GPU
  function draw() {
    waiting = false;
    pixels.fill(0);
    const W = front.width, H = front.height, colour = colours(shown.scale).map(pixel);
    const grown = Math.min(2.2, Math.max(1, (view.scale / home) ** 0.25)) * ratio * (points.bounds ? Math.min(1, Math.max(0.6, width / 900)) : 1);
    const stamps = points.radii.map((radius) => stamp(radius * grown));
    const scale = view.scale * ratio, left = W / 2 - view.x * scale, top = H / 2 + view.y * scale;
    const faded = only >= 0 || matches;
    for (let pass = 0; pass < 3; pass++) {
      for (let k = 0, i = 0; k < n; k++, i = (i + points.stride) % n) {
        const code = codes[i], lit = (only < 0 || code === only) && (!matches || matches[i]);
        if ((faded ? (lit ? 2 : 0) : code === UNKNOWN ? 0 : code === OTHER ? 1 : 2) !== pass) continue;
        const x = Math.round(points.x[i] * scale + left), y = Math.round(top - points.y[i] * scale);
        const { offsets, rim, reach, flat } = stamps[points.size[i]], value = lit ? colour[code] : colour[UNKNOWN];
        if (x < -reach || y < -reach || x >= W + reach || y >= H + reach) continue;
        if (x >= reach && y >= reach && x < W - reach && y < H - reach) {
          for (let at = y * W + x, j = 0; j < flat.length; j++) pixels[at + flat[j]] = value;
        } else {
          for (const [dx, dy] of offsets) {
            if (x + dx >= 0 && x + dx < W && y + dy >= 0 && y + dy < H) pixels[(y + dy) * W + x + dx] = value;
          }
        }
        for (const [dx, dy, cover] of rim) {
          const at = (y + dy) * W + x + dx;
          if (x + dx >= 0 && x + dx < W && y + dy >= 0 && y + dy < H) pixels[at] = over(value, pixels[at], cover);
        }
      }
    }
    front.getContext("2d").putImageData(image, 0, 0);
    if (points.background) points.background(back, view, width, height, ratio);
  }

  function redraw() {
    if (!waiting && pixels) { waiting = true; requestAnimationFrame(draw); }
  }

  function resize() {
    const before = { width, height, scale: view.scale };
    width = stage.clientWidth; height = stage.clientHeight; ratio = Math.min(window.devicePixelRatio || 1, 2);
    if (!width || !height) return;
    for (const canvas of [front, back]) { canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio); }
    image = front.getContext("2d").createImageData(front.width, front.height);
    pixels = new Uint32Array(image.data.buffer);
    if (moved) view.scale = before.scale * (width / before.width); else fit();
    redraw();
  }

  function zoom(factor, px = width / 2, py = height / 2) {
    const [wx, wy] = toWorld(px, py);
    view.scale = Math.min(home * 4000, Math.max(home * 0.5, view.scale * factor));
    view.x = wx - (px - width / 2) / view.scale; view.y = wy - (height / 2 - py) / view.scale;
    moved = true; tip.hidden = true; redraw();
  }

  function pan(dx, dy) {
    view.x -= dx / view.scale; view.y += dy / view.scale;
    moved = true; tip.hidden = true; redraw();
  }

  function hover(px, py) {
    const i = nearest(px, py);
    tip.hidden = i < 0;
    if (i < 0) return;
    tip.replaceChildren(...points.describe(i).map(([kind, content]) => Object.assign(document.createElement(kind), { textContent: content })));
    tip.style.left = tip.style.top = "0";  // where it can take its full width
    const [x, y] = toScreen(i), [w, h] = [tip.offsetWidth, tip.offsetHeight];
    const inside = (at, size, room) => Math.max(2, Math.min(at > room / 2 ? at - 10 - size : at + 10, room - size - 4));
    tip.style.left = `${inside(x, w, width)}px`; tip.style.top = `${inside(y, h, height)}px`;
  }

  function paintLegend() {
    const colour = colours(shown.scale), counts = new Uint32Array(TOP + 2);
    for (let i = 0; i < rows.n; i++) if (points.holds(i)) counts[shown.codes[i]]++;
    const labels = [...shown.labels.map((label, k) => [k, label]), [OTHER, shown.other], [UNKNOWN, "unknown"]];
    legend.replaceChildren(...labels.filter(([k]) => counts[k]).map(([k, label]) => {
      const item = document.createElement("li"), button = document.createElement("button"), dot = document.createElement("span");
      dot.className = "dot"; dot.style.background = colour[k];
      button.type = "button"; button.append(dot, `${label} (${number.format(counts[k])})`);
      button.setAttribute("aria-pressed", String(only === k));
      button.addEventListener("click", () => { only = only === k ? -1 : k; recolour(); });
      item.append(button);
      return item;
    }));
  }

  function recolour() {
    const focused = [...legend.querySelectorAll("button")].indexOf(document.activeElement);
    shown = classes(select.value); codes = points.codes(shown.codes, only); paintLegend(); redraw();
    if (focused >= 0) legend.querySelectorAll("button")[focused]?.focus();
  }

  function search() {
    text = find.value.trim().toLowerCase();
    matches = null; found.textContent = "";
    if (text) {
      const hit = new Uint8Array(data.names.length ? rows.lineages.length / data.ranks.length : 0);
      for (let k = 0; k < hit.length; k++) {
        for (let r = 0; r < data.ranks.length && !hit[k]; r++) {
          const index = rows.lineages[k * data.ranks.length + r];
          if (index >= 0 && data.names[r][index].toLowerCase().includes(text)) hit[k] = 1;
        }
      }
      let count = 0;
      matches = new Uint8Array(n);
      for (let i = 0; i < rows.n; i++) {
        if (points.holds(i) && (hit[rows.lineage[i]] || data.ids[i].toLowerCase().includes(text))) { matches[points.of(i)] = 1; count++; }
      }
      found.textContent = `${number.format(count)} found`;
    }
    tip.hidden = true; redraw();
  }

  const at = (event) => { const r = front.getBoundingClientRect(); return [event.clientX - r.left, event.clientY - r.top]; };
  const held = new Map();
  front.addEventListener("pointerdown", (event) => { held.set(event.pointerId, at(event)); if (event.pointerType === "mouse") front.setPointerCapture(event.pointerId); });
  for (const kind of ["pointerup", "pointercancel"]) front.addEventListener(kind, (event) => { held.delete(event.pointerId); if (event.pointerType === "touch" && kind === "pointerup") hover(...at(event)); });
  front.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") tip.hidden = true; });
  front.addEventListener("pointermove", (event) => {
    const [x, y] = at(event), before = held.get(event.pointerId);
    if (!before) { hover(x, y); return; }
    if (event.pointerType === "mouse") pan(x - before[0], y - before[1]);
    held.set(event.pointerId, [x, y]);
  });
  let spread = 0;
  front.addEventListener("touchmove", (event) => {
    if (event.touches.length !== 2) return;
    event.preventDefault();
    const [a, b] = [at(event.touches[0]), at(event.touches[1])], now = Math.hypot(a[0] - b[0], a[1] - b[1]);
    if (spread) zoom(now / spread, (a[0] + b[0]) / 2, (a[1] + b[1]) / 2);
    spread = now;
  }, { passive: false });
  front.addEventListener("touchend", () => { spread = 0; });
  front.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && document.activeElement !== front) return;
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), ...at(event));
  }, { passive: false });
  front.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] }[event.key];
    if (step) pan(...step);
    else if (event.key === "+" || event.key === "=") zoom(1.4);
    else if (event.key === "-") zoom(1 / 1.4);
    else if (event.key === "0") { moved = false; fit(); redraw(); }
    else return;
    event.preventDefault();
    hover(width / 2, height / 2);
  });
  const buttons = { in: () => zoom(1.5), out: () => zoom(1 / 1.5), all: () => { moved = false; fit(); tip.hidden = true; redraw(); } };
  for (const [name, act] of Object.entries(buttons)) section.querySelector(`.${name}`).addEventListener("click", act);
  select.addEventListener("change", () => { only = -1; recolour(); });
  find.addEventListener("input", search);
  shown = classes(select.value); codes = points.codes(shown.codes, only); paintLegend();
  new ResizeObserver(resize).observe(stage);
  resize();
  return { draw, hover, pan, zoom, toScreen, recolour, redraw, nearest, get size() { return n; } };
}
