function lineage(row) {
  const names = data.ranks.map((rank, r) => nameOf(row, r));
  return data.names.length ? names.map((name) => name ?? "?").join(" › ") : "no lineage";
}

const embedding = {
  x: Float32Array.from({ length: rows.n }, (_, i) => rows.xy[2 * i]),
  y: Float32Array.from({ length: rows.n }, (_, i) => rows.xy[2 * i + 1]),
  radii: [rows.n > 20000 ? 1.3 : rows.n > 3000 ? 1.8 : 2.6],
  diamond: queries ? isQuery : null,
  size: new Uint8Array(rows.n),
  stride: coprime(rows.n),
  codes: (codes) => codes,
  holds: () => true,
  of: (row) => row,
  describe(row) {
    const lines = [["strong", isQuery(row) ? `query ${data.ids[row]}` : data.ids[row]], ["div", lineage(row)]];
    const place = ["latitude", "longitude"].map((name) => rows.numbers[name]?.[row] ?? NaN);
    const depth = rows.numbers.depth?.[row] ?? NaN, novelty = rows.numbers.novelty?.[row] ?? NaN;
    if (!isQuery(row)) lines.push(["div", `depth ${Number.isNaN(depth) ? "unknown" : `${short(depth)} m`}`]);
    if (!Number.isNaN(place[0])) lines.push(["div", `${short(place[0])}, ${short(place[1])}`]);
    if (rows.marker[row] >= 0) lines.push(["div", data.markers[rows.marker[row]]]);
    if (data.found[row]) lines.push(["div", `identified as ${data.found[row]}`]);
    if (!Number.isNaN(novelty)) lines.push(["div", `novelty ${short(novelty)}`]);
    return lines;
  },
};

// A stride that visits all points in mixed order, so that no taxon is always on top
function coprime(n) {
  const gcd = (a, b) => (b ? gcd(b, a % b) : a);
  let step = Math.max(1, Math.floor(n * 0.618));
  while (gcd(step, n) !== 1) step++;
  return step;
}

function placePoints() {
  const { latitude, longitude, depth } = rows.numbers, at = new Map(), of = new Int32Array(rows.n).fill(-1), members = [];
  for (let i = 0; i < rows.n; i++) {
    if (Number.isNaN(latitude[i])) continue;
    const key = `${latitude[i].toFixed(3)} ${longitude[i].toFixed(3)}`;
    if (!at.has(key)) { at.set(key, members.length); members.push([]); }
    members[at.get(key)].push(i);
  }
  members.sort((a, b) => b.length - a.length);  // small points are drawn over large ones
  members.forEach((list, place) => { for (const row of list) of[row] = place; });
  const most = members.reduce((m, list) => Math.max(m, list.length), 1);
  const radii = [2.5, 3.2, 4, 5, 6.2];
  return {
    x: Float32Array.from(members, (list) => longitude[list[0]]),
    y: Float32Array.from(members, (list) => latitude[list[0]]),
    bounds: [-180, -90, 180, 90],
    most: 5,
    radii,
    size: Uint8Array.from(members, (list) => Math.floor((Math.log(list.length) / Math.log(most + 1)) * radii.length)),
    stride: 1,
    // A class shown alone is visible at each of its places, not only where it is the most frequent
    codes: (codes, only) => Uint8Array.from(members, (list) => (list.some((row) => codes[row] === only) ? only : mode(list, codes))),
    holds: (row) => of[row] >= 0,
    of: (row) => of[row],
    background: drawLand,
    describe(i) {
      const list = members[i], deep = depth ? list.map((row) => depth[row]).filter((d) => !Number.isNaN(d)) : [];
      const lines = [["strong", `${latitude[list[0]].toFixed(3)}, ${longitude[list[0]].toFixed(3)}`]];
      lines.push(["div", `${number.format(list.length)} ${list.length === 1 ? "row" : "rows"}`]);
      if (deep.length) {
        const [low, high] = [deep.reduce((a, b) => Math.min(a, b)), deep.reduce((a, b) => Math.max(a, b))];
        lines.push(["div", low === high ? `depth ${short(low)} m` : `depth ${short(low)} to ${short(high)} m`]);
      }
      const counts = new Map();
      for (const row of list) counts.set(rows.lineage[row], (counts.get(rows.lineage[row]) || 0) + 1);
      const [top] = [...counts].sort((a, b) => b[1] - a[1]);
      const row = list.find((r) => rows.lineage[r] === top[0]);
      lines.push(["div", list.length === 1 ? `${data.ids[row]}: ${lineage(row)}` : `most often ${lineage(row)} (${number.format(top[1])})`]);
      return lines;
    },
  };
}

// The most frequent name of some rows; unknown only if all are
function mode(list, codes) {
  const counts = new Uint32Array(TOP + 2);
  for (const row of list) counts[codes[row]]++;
  let best = UNKNOWN;
  for (let k = 0; k < UNKNOWN; k++) if (counts[k] > (best === UNKNOWN ? 0 : counts[best])) best = k;
  return best;
}

function drawLand(canvas, view, width, height, ratio) {
  const context = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  const x = (degrees) => ((degrees - view.x) * view.scale + width / 2) * ratio;
  const y = (degrees) => (height / 2 - (degrees - view.y) * view.scale) * ratio;
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.beginPath();
  for (const ring of data.coast) {
    for (let k = 0; k < ring.length; k += 2) context[k ? "lineTo" : "moveTo"](x(ring[k] / 10), y(ring[k + 1] / 10));
    context.closePath();
  }
  context.fillStyle = style.getPropertyValue("--land"); context.fill("evenodd");
  context.strokeStyle = style.getPropertyValue("--soft"); context.lineWidth = 0.6 * ratio; context.stroke();
  context.beginPath();
  for (let d = -180; d <= 180; d += 30) { context.moveTo(x(d), y(-90)); context.lineTo(x(d), y(90)); }
  for (let d = -90; d <= 90; d += 30) { context.moveTo(x(-180), y(d)); context.lineTo(x(180), y(d)); }
  context.strokeStyle = style.getPropertyValue("--line"); context.lineWidth = ratio; context.stroke();
}

// The map of the vectors with its search, its selection and the details of a point
function explore(section) {
  const map = pointMap(section, embedding), part = (name) => section.querySelector(name);
  const [card, figure, panel, results] = [".card", ".alignment", ".picked", ".results"].map(part);
  const modes = [part(".lasso"), part(".box")];
  const tidy = () => { part(".hint").hidden = [card, panel, results].some((one) => !one.hidden); };
  const press = (button) => {
    const on = button && button.getAttribute("aria-pressed") !== "true";
    for (const one of modes) one.setAttribute("aria-pressed", String(on && one === button));
    map.drawMode(on ? button.className : "");
  };
  function choose(point, zoom = false) {
    const near = isQuery(point) ? queries.nearest[point - rows.own] : -1, both = near < 0 ? [point] : [point, near];
    map.mark(both);
    if (zoom) map.goTo([point]);
    showCard(card, point, { choose, zoom: () => map.goTo(both), close });
    showAlignment(figure, point);
    tidy();
  }
  function close() { card.hidden = figure.hidden = true; map.mark([]); tidy(); }
  map.onPick((point) => { if (point >= 0) choose(point); });
  map.onSelect((mask) => { press(null); map.keep(mask); showSelection(panel, map, mask); tidy(); });
  panel.addEventListener("cleared", tidy);
  for (const button of modes) button.addEventListener("click", () => press(button));
  part(".view").addEventListener("click", () => map.selectView());
  section.addEventListener("keydown", (event) => { if (event.key === "Escape") press(null); });
  searchField(section, map, embedding, results, choose);
  new MutationObserver(tidy).observe(results, { attributes: true });
  let wide = innerWidth;
  addEventListener("resize", () => {
    if (!figure.hidden && innerWidth !== wide) showAlignment(figure, Number(figure.dataset.point));
    wide = innerWidth;
  });
  return map;
}

const maps = { embedding: explore(document.getElementById("embedding")) };
const places = document.getElementById("places");
if (places && data.coast.length) {
  const points = placePoints();
  maps.places = pointMap(places, points);
  searchField(places, maps.places, points);
}
const recolourAll = () => Object.values(maps).forEach((map) => map.recolour());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolourAll);
// A canvas is printed as it is, so it is redrawn in the colours for paper first
addEventListener("beforeprint", () => { document.documentElement.classList.add("printing"); Object.values(maps).forEach((map) => { map.recolour(); map.draw(); }); });
addEventListener("afterprint", () => { document.documentElement.classList.remove("printing"); recolourAll(); });
window.reportMaps = maps;
