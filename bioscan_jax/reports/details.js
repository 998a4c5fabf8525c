// What is known of one point, and the alignment of a query with its nearest reference

function lowestName(point) {
  for (let r = data.ranks.length - 1; r >= 0; r--) if (nameOf(point, r) !== null) return nameOf(point, r);
  return "no name";
}

function facts(pairs) {
  const known = pairs.filter(([, value]) => value !== null && value !== "");
  return element("dl", { className: "pairs" }, ...known.flatMap(([name, value]) => [
    textElement("dt", name),
    element("dd", {}, value),
  ]));
}

function rankTable(point) {
  const query = point - rows.own, answers = isQuery(point) && data.queries.calibrated;
  const heads = [["rank"], ["name"], ...(isQuery(point) ? [["confidence", "number"]] : []), ...(answers ? [[""]] : [])];
  const lines = data.ranks.map((rank, r) => {
    const name = nameOf(point, r), cells = [textElement("th", rank), textElement("td", name ?? "–")];
    if (isQuery(point)) {
      const at = query * data.ranks.length + r, confidence = queries.confidence[at];
      const shown = Number.isNaN(confidence) || name === null ? "–" : confidence.toFixed(3);
      cells.push(textElement("td", shown, "number"));
      if (answers) cells.push(textElement("td", name !== null && !queries.answered[at] ? "not answered" : "", "soft"));
    }
    cells[0].scope = "row";
    return element("tr", {}, ...cells);
  });
  const head = element("tr", {}, ...heads.map(([text, kind]) => textElement("th", text, kind)));
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...lines));
}

// Buttons that lead to other points
function links(points, choose) {
  const shown = points.slice(0, 10).map((point) => button(data.ids[point], () => choose(point, true), "link"));
  const more = points.length > shown.length ? [` and ${number.format(points.length - shown.length)} more`] : [];
  return element("span", { className: "links" }, ...shown, ...more);
}

function queryFacts(point, choose) {
  const query = point - rows.own, id = data.queries.nearest_id[query], nearest = queries.nearest[query];
  const value = (name) => queries.numbers[name]?.[query] ?? NaN;
  const given = (name, format) => (Number.isNaN(value(name)) ? null : format(value(name)));
  const strand = data.queries.strand[query], unnamed = data.queries.unnamed[query];
  const novelty = rows.numbers.novelty?.[point] ?? NaN, coverage = given("coverage", (v) => `, ${percent(v)} of the query`);
  const novel = queries.novel[query] ? ", likely of a species not in the table" : "";
  return [
    ["nearest reference", nearest >= 0 ? links([nearest], choose) : id ? `${id} (not on this map)` : "none"],
    ["similarity", given("similarity", (v) => v.toFixed(4))],
    ["identity", given("identity", percent)],
    ["overlap", given("overlap", (v) => `${number.format(v)} bases${coverage ?? ""}`)],
    ["support", given("support", (v) => `${plural(v, "sequence")} with the lowest name`)],
    ["strand", strand === "-" ? "− (reverse complement)" : strand],
    ["novelty", Number.isNaN(novelty) ? null : short(novelty) + novel],
    ["unnamed", unnamed ? `${unnamed} is below its floor` : null],
  ];
}

function rowFacts(row, choose) {
  const value = (name) => rows.numbers[name]?.[row] ?? NaN, near = [];
  const given = (name, format) => (Number.isNaN(value(name)) ? null : format(value(name)));
  if (queries) queries.nearest.forEach((at, query) => { if (at === row) near.push(rows.own + query); });
  return [
    ["marker", rows.marker[row] < 0 ? null : data.markers[rows.marker[row]]],
    ["place", given("latitude", (degrees) => `${short(degrees)}, ${short(value("longitude"))}`)],
    ["depth", given("depth", (metres) => `${short(metres)} m`)],
    ["identified as", data.found[row] || null],
    ["novelty", given("novelty", short)],
    ["nearest to", near.length ? links(near, choose) : null],
  ];
}

function showCard(card, point, { choose, close, zoom }) {
  card.replaceChildren(
    textElement("h3", data.ids[point]),
    textElement("p", isQuery(point) ? "query" : "row of the table", "soft"),
    rankTable(point),
    facts(isQuery(point) ? queryFacts(point, choose) : rowFacts(point, choose)),
    element("div", { className: "buttons" }, button("Zoom to it", zoom), button("Close", close)),
  );
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

const plural = (n, one, more = `${one}s`) => `${number.format(n)} ${n === 1 ? one : more}`;
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

// The alignment in words
function described(columns, strand) {
  const { kinds, first, after, start, beyond } = columns, matches = count(kinds, "="), unknown = count(kinds, "N");
  const compared = kinds.length - unknown, identity = percent(matches / Math.max(compared, 1));
  const differences = [["X", "substitution"], ["I", "inserted base"], ["D", "deleted base"]];
  const named = differences.map(([kind, what]) => plural(count(kinds, kind), what));
  const listed = [...named, `${number.format(unknown)} with N`].join(", ");
  const ends = [
    [first, "of the query before"],
    [after, "of the query after"],
    [start, "of the reference before"],
    [beyond, "of the reference after"],
  ];
  const outside = ends.filter(([n]) => n).map(([n, where]) => `${plural(n, "base")} ${where}`).join(", ");
  const counts = `${number.format(matches)} of ${number.format(compared)} compared bases agree (identity ${identity}): ${listed}.`;
  const turned = strand === "-" ? " The query is shown as its reverse complement, which was compared." : "";
  return `${counts}${outside && ` Not aligned: ${outside}.`}${turned}`;
}

// Lines of query, signs and reference, as long as the element is wide
function drawColumns(pre, { top, bottom, kinds, first, start }) {
  const probe = textElement("span", "0".repeat(100)), style = getComputedStyle(pre);
  pre.replaceChildren(probe);
  const wide = pre.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
  const room = Math.floor(wide / (probe.getBoundingClientRect().width / 100));
  const digits = String(Math.max(first, start) + kinds.length).length, names = ["query     ", "reference "];
  const left = names[0].length + digits + 1, space = room - left - digits - 1;
  const each = Math.max(10, Math.min(100, space - (space % 10)));
  const bases = (text) => text.length - count(text, "-"), lines = [];
  for (let at = 0, here = first, there = start; at < kinds.length; at += each) {
    const [one, other, part] = [top, bottom, kinds].map((text) => text.slice(at, at + each));
    const line = (name, text, from) => {
      lines.push(name, String(from + 1).padStart(digits), " ", ...marked(text, part), ` ${from + bases(text)}\n`);
    };
    line(names[0], one, here);
    lines.push(" ".repeat(left), ...marked([...part].map((kind) => KINDS[kind].sign).join(""), part), "\n");
    line(names[1], other, there);
    if (at + each < kinds.length) lines.push("\n");
    here += bases(one); there += bases(other);
  }
  pre.replaceChildren(...lines);
}

async function showAlignment(figure, point) {
  figure.hidden = !isQuery(point);
  figure.dataset.point = point;
  if (!isQuery(point)) return;
  const query = point - rows.own, cigar = data.queries.cigar[query], nearest = queries.nearest[query];
  const title = textElement("h3", `Alignment of ${data.ids[point]} with ${data.queries.nearest_id[query] ?? "nothing"}`);
  const held = await dna, own = held.sequence(point), other = nearest < 0 ? "" : held.sequence(nearest);
  if (Number(figure.dataset.point) !== point) return;  // another one was chosen meanwhile
  if (!cigar || !own || !other) {
    const why = nearest < 0 ? "The nearest reference is not on this map."
      : !own || !other ? "The page does not hold the DNA of both."
      : "The two sequences have no alignment, or the table has changed since.";
    figure.replaceChildren(title, textElement("p", why, "note"));
    return;
  }
  const columns = alignmentColumns(own, other, queries.start[query], cigar);
  const text = described(columns, data.queries.strand[query]), pre = element("pre", { tabIndex: 0 });
  const signs = Object.values(KINDS).filter(({ name }) => name).map(({ className, sign, name }) => (
    element("span", {}, textElement("code", sign, className), ` ${name}`)
  ));
  pre.setAttribute("role", "img"); pre.setAttribute("aria-label", text);
  figure.replaceChildren(title, textElement("p", text), element("p", { className: "soft marks" }, ...signs), pre);
  drawColumns(pre, columns);
}
