// What is known of one point, and the alignment of a query with its nearest reference

function lowestName(point) {
  for (let r = data.ranks.length - 1; r >= 0; r--) if (nameOf(point, r) !== null) return nameOf(point, r);
  return "no name";
}

function facts(pairs) {
  const known = pairs.filter(([, value]) => value !== null && value !== "");
  return element("dl", { className: "pairs" }, ...known.flatMap(([name, value]) => [element("dt", { textContent: name }), element("dd", {}, value)]));
}

function rankTable(point) {
  const query = point - rows.own, width = data.ranks.length;
  const lines = data.ranks.map((rank, r) => {
    const name = nameOf(point, r), cells = [element("th", { scope: "row", textContent: rank }), element("td", { textContent: name ?? "–" })];
    if (!isQuery(point)) return element("tr", {}, ...cells);
    const confidence = queries.confidence[query * width + r];
    const unsure = data.queries.calibrated && name !== null && !queries.answered[query * width + r];
    cells.push(element("td", { className: "number", textContent: Number.isNaN(confidence) || name === null ? "–" : confidence.toFixed(3) }));
    if (data.queries.calibrated) cells.push(element("td", { className: "soft", textContent: unsure ? "not answered" : "" }));
    return element("tr", {}, ...cells);
  });
  const heads = ["rank", "name", ...(isQuery(point) ? ["confidence"] : []), ...(isQuery(point) && data.queries.calibrated ? [""] : [])];
  const head = element("tr", {}, ...heads.map((text) => element("th", { scope: "col", textContent: text, className: text === "confidence" ? "number" : "" })));
  return element("table", { className: "ranks" }, element("thead", {}, head), element("tbody", {}, ...lines));
}

// Buttons that lead to other points
function links(points, choose) {
  const shown = points.slice(0, 10).map((point) => {
    const button = element("button", { type: "button", className: "link", textContent: data.ids[point] });
    button.addEventListener("click", () => choose(point, true));
    return button;
  });
  const more = points.length > shown.length ? [` and ${number.format(points.length - shown.length)} more`] : [];
  return element("span", { className: "links" }, ...shown, ...more);
}

function queryFacts(point, choose) {
  const query = point - rows.own, value = (name) => queries.numbers[name]?.[query] ?? NaN;
  const given = (name, format) => (Number.isNaN(value(name)) ? null : format(value(name)));
  const nearest = queries.nearest[query], id = data.queries.nearest_id[query], strand = data.queries.strand[query];
  const novelty = rows.numbers.novelty?.[point] ?? NaN;
  return [
    ["nearest reference", nearest >= 0 ? links([nearest], choose) : id ? `${id} (not on this map)` : "none"],
    ["similarity", given("similarity", (v) => v.toFixed(4))],
    ["identity", given("identity", percent)],
    ["overlap", given("overlap", (v) => `${number.format(v)} bases${Number.isNaN(value("coverage")) ? "" : `, ${percent(value("coverage"))} of the query`}`)],
    ["support", given("support", (v) => `${number.format(v)} ${v === 1 ? "sequence" : "sequences"} with the lowest name`)],
    ["strand", strand === "-" ? "− (reverse complement)" : strand],
    ["novelty", Number.isNaN(novelty) ? null : `${short(novelty)}${queries.novel[query] ? ", likely of a species not in the table" : ""}`],
    ["unnamed", data.queries.unnamed[query] ? `${data.queries.unnamed[query]} is below its floor` : null],
  ];
}

function rowFacts(row, choose) {
  const value = (name) => rows.numbers[name]?.[row] ?? NaN, near = [];
  if (queries) queries.nearest.forEach((at, query) => { if (at === row) near.push(rows.own + query); });
  return [
    ["marker", rows.marker[row] < 0 ? null : data.markers[rows.marker[row]]],
    ["place", Number.isNaN(value("latitude")) ? null : `${short(value("latitude"))}, ${short(value("longitude"))}`],
    ["depth", Number.isNaN(value("depth")) ? null : `${short(value("depth"))} m`],
    ["identified as", data.found[row] || null],
    ["novelty", Number.isNaN(value("novelty")) ? null : short(value("novelty"))],
    ["nearest to", near.length ? links(near, choose) : null],
  ];
}

function showCard(card, point, { choose, close, zoom }) {
  const buttons = element("div", { className: "buttons" });
  for (const [text, act] of [["Zoom to it", zoom], ["Close", close]]) {
    const button = element("button", { type: "button", textContent: text });
    button.addEventListener("click", act);
    buttons.append(button);
  }
  const known = isQuery(point) ? queryFacts(point, choose) : rowFacts(point, choose);
  const title = element("h3", { textContent: data.ids[point] }), kind = element("p", { className: "soft", textContent: isQuery(point) ? "query" : "row of the table" });
  card.replaceChildren(title, kind, rankTable(point), facts(known), buttons);
  card.hidden = false;
}

const KINDS = {
  "=": { className: "", sign: "|" },
  X: { className: "sub", sign: "*", name: "substitution" },
  I: { className: "ins", sign: "+", name: "insertion, only in the query" },
  D: { className: "del", sign: "-", name: "deletion, only in the reference" },
  N: { className: "unknown", sign: "n", name: "N, not compared" },
};

// The columns of an alignment: the base of the query, that of the reference, and the kind of each
function alignmentColumns(query, reference, start, cigar) {
  let here = 0, there = start, top = "", bottom = "", kinds = "", first = null, after = 0;
  for (const [, length, kind] of cigar.matchAll(/(\d+)([=XIDS])/g)) {
    for (let k = 0; k < Number(length); k++) {
      if (kind === "S") { if (first !== null) after++; here++; continue; }
      first ??= here;
      const one = kind === "D" ? "-" : query[here++], other = kind === "I" ? "-" : reference[there++];
      top += one; bottom += other; kinds += one === "N" || other === "N" ? "N" : kind;
    }
  }
  return { top, bottom, kinds, first: first ?? 0, after, start, beyond: reference.length - there };
}

const count = (kinds, kind) => kinds.split(kind).length - 1;

// Text of which each run of one kind is marked
function marked(text, kinds) {
  const made = [];
  for (let at = 0, end; at < text.length; at = end) {
    for (end = at + 1; end < text.length && kinds[end] === kinds[at]; end++);
    const part = text.slice(at, end);
    made.push(kinds[at] === "=" ? part : element("span", { className: KINDS[kinds[at]].className, textContent: part }));
  }
  return made;
}

async function showAlignment(figure, point) {
  const query = point - rows.own, cigar = isQuery(point) ? data.queries.cigar[query] : "", nearest = isQuery(point) ? queries.nearest[query] : -1;
  figure.hidden = !isQuery(point);
  if (!isQuery(point)) return;
  const title = element("h3", { textContent: `Alignment of ${data.ids[point]} with ${data.queries.nearest_id[query] ?? "nothing"}` });
  const held = await dna, own = held.sequence(point), other = nearest < 0 ? "" : held.sequence(nearest);
  figure.dataset.point = point;
  if (!cigar || !own || !other) {
    const why = nearest < 0 ? "The nearest reference is not on this map." : !other ? "The page does not hold the DNA of the nearest reference." : "The two sequences have no alignment, or the table has changed since.";
    figure.replaceChildren(title, element("p", { className: "note", textContent: why }));
    return;
  }
  const columns = alignmentColumns(own, other, queries.start[query], cigar), { top, bottom, kinds } = columns;
  const matches = count(kinds, "="), compared = kinds.length - count(kinds, "N"), plural = (n, word) => `${number.format(n)} ${word}${n === 1 ? "" : "s"}`;
  const differences = [plural(count(kinds, "X"), "substitution"), plural(count(kinds, "I"), "inserted base"), plural(count(kinds, "D"), "deleted base"), `${number.format(count(kinds, "N"))} with N`].join(", ");
  const outside = [[columns.first, "of the query before"], [columns.after, "of the query after"], [columns.start, "of the reference before"], [columns.beyond, "of the reference after"]].filter(([n]) => n);
  const text = `${number.format(matches)} of ${number.format(compared)} compared bases agree (identity ${percent(matches / Math.max(compared, 1))}): ${differences}.`;
  const rest = outside.length ? ` Not aligned: ${outside.map(([n, where]) => `${plural(n, "base")} ${where}`).join(", ")}.` : "";
  const strand = data.queries.strand[query] === "-" ? " The query is shown as its reverse complement, which was compared." : "";
  const legend = element("p", { className: "soft marks" }, ...Object.values(KINDS).filter(({ name }) => name).map(({ className, sign, name }) => element("span", {}, element("code", { className, textContent: sign }), ` ${name}`)));
  const pre = element("pre", { tabIndex: 0 });
  pre.setAttribute("role", "img"); pre.setAttribute("aria-label", text);
  figure.replaceChildren(title, element("p", { textContent: text + rest + strand }), legend, pre);
  pre.textContent = "0".repeat(100);
  const style = getComputedStyle(pre), probe = element("span", { textContent: "0".repeat(100) });
  pre.replaceChildren(probe);
  const wide = pre.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight), letter = probe.getBoundingClientRect().width / 100;
  const digits = String(Math.max(columns.first, columns.start) + kinds.length).length, names = ["query", "reference"].map((name) => name.padEnd(10));
  const room = Math.floor(wide / letter) - names[0].length - 2 * digits - 2, each = Math.max(10, Math.min(100, room - (room % 10)));
  const bases = (text) => text.length - count(text, "-"), lines = [];
  for (let at = 0, here = columns.first, there = columns.start; at < kinds.length; at += each) {
    const [one, other, part] = [top, bottom, kinds].map((text) => text.slice(at, at + each));
    const line = (name, text, from) => [name, String(from + 1).padStart(digits), " ", ...marked(text, part), ` ${from + bases(text)}\n`];
    const signs = [...part].map((kind) => KINDS[kind].sign).join("");
    lines.push(...line(names[0], one, here), " ".repeat(names[0].length + digits + 1), ...marked(signs, part), "\n", ...line(names[1], other, there), "\n");
    here += bases(one); there += bases(other);
  }
  pre.replaceChildren(...lines);
}
