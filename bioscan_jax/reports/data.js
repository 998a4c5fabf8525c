"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const TOP = data.top, OTHER = TOP, UNKNOWN = TOP + 1;

function array(Kind, text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Kind(bytes.buffer);
}

// Arrays over all points: the rows of the table first, then the queries
const rows = {
  n: data.ids.length,
  own: data.rows,
  xy: array(Uint16Array, data.xy),
  lineage: array(Uint32Array, data.lineage),
  lineages: array(Int32Array, data.lineages),
  numbers: Object.fromEntries(Object.entries(data.numbers).map(([name, text]) => [name, array(Float32Array, text)])),
  marker: array(Int32Array, data.marker),
};
function element(kind, given = {}, ...inside) {
  const made = Object.assign(document.createElement(kind), given);
  made.append(...inside);
  return made;
}

const textElement = (kind, textContent, className = "") => element(kind, { textContent, className });

function button(label, act, className = "") {
  const made = element("button", { type: "button", textContent: label, className });
  made.addEventListener("click", act);
  return made;
}

const number = new Intl.NumberFormat("en");
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const short = (value) => Number(value.toPrecision(4)).toString();

const queries = data.queries && {
  nearest: array(Int32Array, data.queries.nearest),
  confidence: array(Float32Array, data.queries.confidence),
  answered: array(Uint8Array, data.queries.answered),
  novel: array(Uint8Array, data.queries.novel),
  start: array(Int32Array, data.queries.start),
  numbers: Object.fromEntries(Object.entries(data.queries.numbers).map(([name, text]) => [name, array(Float32Array, text)])),
};
const isQuery = (point) => point >= rows.own;

// The DNA in the page: one text with a line for each sequence, where each line starts, and the point it belongs to
const dna = (async () => {
  const of = array(Int32Array, data.dna_of);
  const stream = new Blob([array(Uint8Array, data.dna)]).stream().pipeThrough(new DecompressionStream("gzip"));
  const text = await new Response(stream).text(), starts = new Uint32Array(of.length + 1), line = new Map();
  for (let k = 0; k < of.length; k++) {
    line.set(of[k], k);
    starts[k + 1] = k + 1 < of.length ? text.indexOf("\n", starts[k]) + 1 : text.length + 1;
  }
  const sequence = (point) => (line.has(point) ? text.slice(starts[line.get(point)], starts[line.get(point) + 1] - 1) : "");
  return { text, starts, of, sequence };
})();

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
