const inkColour = () => getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
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

// A map of points: `points` has x, y and radius of each; `of` is the point that shows a row, `diamond` tells queries
function pointMap(section, points) {
  const stage = section.querySelector(".stage"), tip = section.querySelector(".tip");
  const back = section.querySelector(".back"), front = section.querySelector(".front");
  const select = section.querySelector("select"), legend = section.querySelector(".legend");
  const n = points.x.length, smooth = n <= 20000, view = { x: 0, y: 0, scale: 1 };
  let width = 1, height = 1, ratio = 1, image = null, pixels = null, shown = null, codes = null;
  let only = -1, kind = -1, matches = null, selected = null, waiting = false, home = 1, moved = false;
  let mode = "", outline = null, marks = [], order = null, pale = 0, pick = () => {}, drawn = () => {};

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

  const onScreen = ([x, y]) => [(x - view.x) * view.scale + width / 2, height / 2 - (y - view.y) * view.scale];
  const toScreen = (i) => onScreen([points.x[i], points.y[i]]);
  const toWorld = (px, py) => [(px - width / 2) / view.scale + view.x, (height / 2 - py) / view.scale + view.y];

  const diamond = points.diamond || (() => false);
  // Points that the legend and the search leave, and of these the ones that are not drawn pale
  const isOpen = (i) => (only < 0 || codes[i] === only) && (!matches || matches[i]) && (kind < 0 || diamond(i) === (kind === 1));
  const isLit = (i) => isOpen(i) && (!selected || selected[i]);

  function nearest(px, py) {
    const [wx, wy] = toWorld(px, py), reach = (10 + (points.most || 0)) / view.scale;
    let best = -1, least = reach * reach;
    for (let r = line(wy - reach); r <= line(wy + reach); r++) {
      for (let at = starts[r * G + column(wx - reach)]; at < starts[r * G + column(wx + reach) + 1]; at++) {
        const i = inCells[at], d = (points.x[i] - wx) ** 2 + (points.y[i] - wy) ** 2;
        if (d < least && isOpen(i)) { best = i; least = d; }
      }
    }
    return best;
  }

  function fit() {
    home = Math.min(width / (bounds[2] - bounds[0] || 1), height / (bounds[3] - bounds[1] || 1)) * (points.bounds ? 1 : 0.94);
    view.x = (bounds[0] + bounds[2]) / 2; view.y = (bounds[1] + bounds[3]) / 2; view.scale = home;
  }

  // The pixels of a disc or diamond; for few points also those of its rim, with the fraction of each that is covered
  function stamp(radius, length = Math.hypot) {
    const offsets = [], rim = [], reach = Math.ceil(radius + 0.5);
    for (let dy = -reach; dy <= reach; dy++) {
      for (let dx = -reach; dx <= reach; dx++) {
        const cover = radius + 0.5 - length(dx, dy);
        if (smooth ? cover >= 1 : cover >= 0.5) offsets.push([dx, dy]);
        else if (smooth && cover > 0) rim.push([dx, dy, cover]);
      }
    }
    return { offsets, rim, reach, flat: Int32Array.from(offsets, ([dx, dy]) => dy * front.width + dx) };
  }

  // The order in which points are drawn: pale ones below, then those without a name of their own, and queries on top
  function arrange() {
    const layers = Array.from({ length: 7 }, () => []);
    for (let k = 0, i = 0; k < n; k++, i = (i + points.stride) % n) {
      const layer = !isLit(i) && !marks.includes(i) ? 0 : (codes[i] === UNKNOWN ? 1 : codes[i] === OTHER ? 2 : 3) + (diamond(i) ? 3 : 0);
      layers[layer].push(i);
    }
    pale = layers[0].length;
    return Uint32Array.from(layers.flat());
  }

  // Writes points straight into the pixels: 50,000 take a few milliseconds without a GPU
  function draw() {
    waiting = false;
    pixels.fill(0);
    const W = front.width, H = front.height, colour = colours(shown.scale).map(pixel);
    const grown = Math.min(2.2, Math.max(1, (view.scale / home) ** 0.25)) * ratio * (points.bounds ? Math.min(1, Math.max(0.6, width / 900)) : 1);
    const stamps = points.radii.map((radius) => stamp(radius * grown));
    const steps = (dx, dy) => Math.abs(dx) + Math.abs(dy), size = (points.radii[0] + 1.6) * grown;
    const inner = stamp(size, steps), outer = stamp(size + 1.5 * ratio, steps), edge = pixel(inkColour());
    const scale = view.scale * ratio, left = W / 2 - view.x * scale, top = H / 2 + view.y * scale;
    const put = ({ offsets, rim, reach, flat }, x, y, value) => {
      if (x < -reach || y < -reach || x >= W + reach || y >= H + reach) return;
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
    };
    order ??= arrange();
    for (let k = 0; k < n; k++) {
      const i = order[k], lit = k >= pale, value = colour[lit ? codes[i] : UNKNOWN];
      const x = Math.round(points.x[i] * scale + left), y = Math.round(top - points.y[i] * scale);
      if (!diamond(i)) put(stamps[points.size[i]], x, y, value);
      else { if (lit) put(outer, x, y, edge); put(inner, x, y, value); }
    }
    const context = front.getContext("2d");
    context.putImageData(image, 0, 0);
    drawOver(context);
    if (points.background) points.background(back, view, width, height, ratio);
  }

  // What lies over the points: the ring around marked ones, the outline of a selection, the middle for the keyboard
  function drawOver(context) {
    context.save();
    context.scale(ratio, ratio);
    context.strokeStyle = inkColour(); context.lineWidth = 2; context.lineJoin = "round";
    if (marks.length > 1) {
      context.beginPath();
      marks.forEach((i) => context.lineTo(...toScreen(i)));
      context.setLineDash([4, 4]); context.stroke(); context.setLineDash([]);
    }
    marks.forEach((i, k) => { context.beginPath(); context.arc(...toScreen(i), k ? 8 : 11, 0, 7); context.stroke(); });
    if (outline) {
      context.beginPath();
      for (const corner of outline) context.lineTo(...onScreen(corner));
      context.closePath(); context.setLineDash([6, 4]); context.stroke();
      context.globalAlpha = 0.06; context.fillStyle = inkColour(); context.fill("evenodd");
    } else if (front.matches(":focus-visible")) {
      context.beginPath();
      for (const [dx, dy] of [[9, 0], [0, 9]]) { context.moveTo(width / 2 - dx, height / 2 - dy); context.lineTo(width / 2 + dx, height / 2 + dy); }
      context.lineWidth = 1; context.stroke();
    }
    context.restore();
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

  function legendItem(dot, label, pressed, press) {
    const made = button("", press);
    made.append(dot, label);
    made.setAttribute("aria-pressed", String(pressed));
    return element("li", {}, made);
  }

  function paintLegend() {
    const colour = colours(shown.scale), counts = new Uint32Array(TOP + 2);
    const kinds = points.diamond ? [["table", rows.own], ["queries", rows.n - rows.own]] : [];
    for (let i = 0; i < rows.n; i++) if (points.holds(i)) counts[shown.codes[i]]++;
    const labels = [...shown.labels.map((label, k) => [k, label]), [OTHER, shown.other], [UNKNOWN, "unknown"]];
    const counted = (label, count) => `${label} (${number.format(count)})`;
    const ofKinds = kinds.map(([label, total], k) => {
      const dot = textElement("span", "", k ? "dot diamond" : "dot plain");
      return legendItem(dot, counted(label, total), kind === k, () => { kind = kind === k ? -1 : k; recolour(); });
    });
    const ofClasses = labels.filter(([k]) => counts[k]).map(([k, label]) => {
      const dot = textElement("span", "", "dot");
      dot.style.background = colour[k];
      return legendItem(dot, counted(label, counts[k]), only === k, () => { only = only === k ? -1 : k; recolour(); });
    });
    legend.replaceChildren(...ofKinds, ...ofClasses);
  }

  function recolour() {
    const focused = [...legend.querySelectorAll("button")].indexOf(document.activeElement);
    shown = classes(select.value); codes = points.codes(shown.codes, only); order = null; paintLegend(); redraw();
    if (focused >= 0) legend.querySelectorAll("button")[focused]?.focus();
  }

  // Selects the open points inside an outline, given in the coordinates of the points
  function enclose(path) {
    const inside = new Uint8Array(n), xs = path.map(([x]) => x), ys = path.map(([, y]) => y);
    const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    for (let i = 0; i < n; i++) {
      const x = points.x[i], y = points.y[i];
      if (x < left || x > right || y < low || y > high || !isOpen(i)) continue;
      for (let k = 0, j = path.length - 1; k < path.length; j = k++) {
        if (ys[k] > y !== ys[j] > y && x < ((xs[j] - xs[k]) * (y - ys[k])) / (ys[j] - ys[k]) + xs[k]) inside[i] ^= 1;
      }
    }
    outline = path; drawn(inside);
  }

  const corners = ([x, y], [u, v]) => [[x, y], [u, y], [u, v], [x, v]];
  const selectView = () => enclose(corners(toWorld(0, 0), toWorld(width, height)));
  function drawMode(wanted) {
    mode = wanted;
    if (mode || held.size) outline = null;
    front.classList.toggle("drawing", Boolean(mode));
    tip.hidden = true; redraw();
  }

  function goTo(list) {
    const range = (all) => list.reduce(([low, high], i) => [Math.min(low, all[i]), Math.max(high, all[i])], [Infinity, -Infinity]);
    const [x, u] = range(points.x), [y, v] = range(points.y);
    const room = 0.7 * Math.min(width / Math.max(u - x, 1e-9), height / Math.max(v - y, 1e-9));
    view.x = (x + u) / 2; view.y = (y + v) / 2; view.scale = Math.min(Math.max(view.scale, home * 6), room);
    moved = true; tip.hidden = true; redraw();
  }

  const at = (event) => { const r = front.getBoundingClientRect(); return [event.clientX - r.left, event.clientY - r.top]; };
  const held = new Map();
  let pressed = null;
  front.addEventListener("pointerdown", (event) => {
    pressed = at(event); held.set(event.pointerId, pressed);
    if (mode && held.size === 1) outline = [toWorld(...pressed)];
    if (mode || event.pointerType === "mouse") front.setPointerCapture(event.pointerId);
  });
  front.addEventListener("pointercancel", (event) => { held.delete(event.pointerId); if (mode) { outline = null; redraw(); } });
  front.addEventListener("pointerup", (event) => {
    const [x, y] = at(event), still = pressed && Math.hypot(x - pressed[0], y - pressed[1]) < 4;
    if (!held.delete(event.pointerId)) return;
    if (mode && !still && outline?.length > 2) { enclose(outline); return; }
    if (mode) outline = null;
    if (event.pointerType === "touch") hover(x, y);
    if (still) pick(nearest(x, y));
  });
  front.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") tip.hidden = true; });
  front.addEventListener("pointermove", (event) => {
    const [x, y] = at(event), before = held.get(event.pointerId);
    if (!before) { hover(x, y); return; }
    if (mode) {
      const [fromX, fromY] = onScreen(outline[outline.length - 1]);
      if (mode === "box") outline = corners(toWorld(...pressed), toWorld(x, y));
      else if (Math.hypot(x - fromX, y - fromY) > 3) outline.push(toWorld(x, y));
      redraw();
    } else if (event.pointerType === "mouse") pan(x - before[0], y - before[1]);
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
    else if (event.key === "Enter") pick(nearest(width / 2, height / 2));
    else if (event.key.toLowerCase() === "s" && points.diamond && !event.ctrlKey && !event.metaKey) selectView();
    else return;
    event.preventDefault();
    hover(width / 2, height / 2);
  });
  const buttons = { in: () => zoom(1.5), out: () => zoom(1 / 1.5), all: () => { moved = false; fit(); tip.hidden = true; redraw(); } };
  for (const [name, act] of Object.entries(buttons)) section.querySelector(`.${name}`).addEventListener("click", act);
  select.addEventListener("change", () => { only = -1; recolour(); });
  for (const focus of ["focus", "blur"]) front.addEventListener(focus, redraw);
  shown = classes(select.value); codes = points.codes(shown.codes, only); paintLegend();
  new ResizeObserver(resize).observe(stage);
  resize();
  return {
    draw, hover, pan, zoom, toScreen, recolour, redraw, nearest, drawMode, selectView, goTo,
    show(mask) { matches = mask; order = null; tip.hidden = true; redraw(); },
    mark(list) { marks = list; order = null; redraw(); },
    keep(mask) { selected = mask; order = null; if (!mask) outline = null; redraw(); },
    onPick(act) { pick = act; },
    onSelect(act) { drawn = act; },
    get field() { return select.value; },
    get size() { return n; },
  };
}
