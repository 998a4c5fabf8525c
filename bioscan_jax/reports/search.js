// Finds points by name, id or DNA

const FEWEST_BASES = 12, WORD = 6, SHOWN = 50;

// Which points have the text in their id or in a name of any rank
function byName(text) {
  const named = new Uint8Array(rows.lineages.length / data.ranks.length), hits = new Uint8Array(rows.n);
  for (let r = 0; r < data.ranks.length; r++) {
    const has = data.names[r].map((name) => name.toLowerCase().includes(text));
    for (let k = 0; k < named.length; k++) {
      const index = rows.lineages[k * data.ranks.length + r];
      if (index >= 0 && has[index]) named[k] = 1;
    }
  }
  for (let i = 0; i < rows.n; i++) hits[i] = named[rows.lineage[i]] || data.ids[i].toLowerCase().includes(text) ? 1 : 0;
  return hits;
}

// DNA that was typed or pasted, as the page writes it; null if the text is none
function asDna(text) {
  const bases = text.replace(/\s/g, "").toUpperCase().replaceAll("U", "T");
  const isDna = bases.length >= FEWEST_BASES && /^[ACGTNRYSWKMBDHV]+$/.test(bases) && /[ACGT]{8}/.test(bases);
  return isDna ? bases.replace(/[^ACGT]/g, "N") : null;
}

function otherStrand(bases) {
  const pairs = { A: "T", C: "G", G: "C", T: "A", N: "N" };
  return [...bases].reverse().map((base) => pairs[base]).join("");
}

// Lines that contain the bases: the point and the strand of each
function containing({ text, starts, of }, bases) {
  const found = new Map();
  for (const [strand, wanted] of [["+", bases], ["-", otherStrand(bases)]]) {
    for (let at = text.indexOf(wanted), line = 0; at >= 0; at = text.indexOf(wanted, starts[line + 1])) {
      for (let low = line, high = of.length; low + 1 < high;) {
        const middle = (low + high) >> 1;
        if (starts[middle] <= at) low = middle; else high = middle;
        line = low;
      }
      if (!found.has(of[line])) found.set(of[line], strand);
      if (line + 1 >= of.length) break;
    }
  }
  return found;
}

// The share of the words of some bases that each line has, on the strand where it has more
function sharedWords({ text, starts, of }, bases) {
  const code = new Int8Array(128).fill(-1), wanted = new Uint8Array(4 ** WORD), seen = new Int32Array(4 ** WORD).fill(-1);
  [..."ACGT"].forEach((base, k) => { code[base.charCodeAt(0)] = k; });
  const whole = wanted.length - 1, totals = [0, 0];
  const words = (string, start, end, visit) => {
    for (let at = start, word = 0, known = 0; at < end; at++) {
      const base = code[string.charCodeAt(at)];
      known = base < 0 ? 0 : known + 1;
      word = ((word << 2) | base) & whole;
      if (known >= WORD) visit(word);
    }
  };
  [bases, otherStrand(bases)].forEach((strand, k) => words(strand, 0, strand.length, (word) => {
    if (!(wanted[word] & (1 << k))) { wanted[word] |= 1 << k; totals[k]++; }
  }));
  const found = [];
  for (let line = 0; line < of.length; line++) {
    let plus = 0, minus = 0;
    words(text, starts[line], starts[line + 1] - 1, (word) => {
      if (!wanted[word] || seen[word] === line) return;
      seen[word] = line;
      plus += wanted[word] & 1; minus += wanted[word] >> 1;
    });
    const [share, strand] = plus * totals[1] >= minus * totals[0] ? [plus / totals[0], "+"] : [minus / totals[1], "-"];
    if (share) found.push({ point: of[line], share, strand });
  }
  return found.sort((a, b) => b.share - a.share).slice(0, SHOWN);
}

// What the text in a search field finds: points, best first, with a remark on each, and a line about all
async function findPoints(text) {
  const bases = asDna(text), all = [];
  if (!bases) {
    const hits = byName(text.trim().toLowerCase());
    for (const [first, end] of [[rows.own, rows.n], [0, rows.own]]) {  // queries first
      for (let i = first; i < end; i++) if (hits[i]) all.push({ point: i });
    }
    return { all, line: `${number.format(all.length)} found` };
  }
  const held = await dna, exact = containing(held, bases);
  if (!held.of.length) return { all, line: "the page holds no DNA to search in" };
  for (const [point, strand] of exact) {
    all.push({ point, note: `contains ${strand === "+" ? "it" : "its reverse complement"}` });
  }
  if (all.length) {
    return { all, line: `${number.format(all.length)} of ${number.format(held.of.length)} sequences contain it` };
  }
  for (const { point, share, strand } of sharedWords(held, bases)) {
    all.push({ point, note: `${percent(share)} of its 6-mers${strand === "-" ? ", reverse complement" : ""}` });
  }
  return { all, line: `none contains it; the nearest ${all.length} by shared 6-mers` };
}

// Joins a search field with its map, and with a list of results where there is room for one
function searchField(section, map, points, list, choose) {
  const field = section.querySelector("input[type=search]"), found = section.querySelector(".found");
  let last = 0, timer = 0;
  async function search() {
    const text = field.value.trim(), mine = ++last;
    const result = text ? await findPoints(text) : { all: [], line: "" };
    if (mine !== last) return;
    const there = result.all.filter(({ point }) => points.holds(point));
    let mask = null;
    if (text) { mask = new Uint8Array(points.x.length); for (const { point } of there) mask[points.of(point)] = 1; }
    map.show(mask);
    found.textContent = there.length === result.all.length ? result.line : `${number.format(there.length)} found`;
    if (list) showResults(list, text, result, choose, () => { field.value = ""; search(); });
  }
  section.querySelector(".by-novelty")?.addEventListener("click", () => {
    showResults(list, "queries", mostNovel(), choose, () => showResults(list, "", {}, choose));
  });
  field.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(search, asDna(field.value) ? 200 : 0); });
  field.addEventListener("paste", (event) => {  // a record of FASTA without its header
    const text = event.clipboardData.getData("text");
    if (!text.startsWith(">")) return;
    event.preventDefault();
    field.value = text.split(/\r?\n/).slice(1).join("").split(">")[0];
    search();
  });
}

// All queries, those likely to be of species that the table lacks first
function mostNovel() {
  const novelty = (point) => rows.numbers.novelty?.[point] ?? NaN, rank = (point) => (Number.isNaN(novelty(point)) ? -1 : novelty(point));
  const points = Array.from({ length: rows.n - rows.own }, (_, query) => rows.own + query);
  points.sort((a, b) => rank(b) - rank(a));
  const note = (point) => (rank(point) < 0 ? "" : `novelty ${short(novelty(point))}`);
  return { all: points.map((point) => ({ point, note: note(point) })), line: plural(points.length, "query", "queries") };
}

function showResults(list, text, { all, line }, choose, clear) {
  list.hidden = !text;
  if (!text) return;
  const items = all.slice(0, SHOWN).map(({ point, note }) => {
    const made = button("", () => choose(point, true));
    made.append(textElement("strong", data.ids[point]));
    made.append(textElement("span", `${isQuery(point) ? "query" : "row"} · ${lowestName(point)}`));
    if (note) made.append(textElement("span", note));
    return element("li", {}, made);
  });
  const more = all.length > SHOWN ? `; the first ${SHOWN} are listed` : "";
  const nothing = `No id and no name of any rank contains this text. At least ${FEWEST_BASES} bases are searched as DNA.`;
  list.replaceChildren(
    textElement("h3", all.length ? "Results" : "Nothing found"),
    textElement("p", all.length || asDna(text) ? `${line}${more}.` : nothing, "soft"),
    element("ol", {}, ...items),
    element("div", { className: "buttons" }, button("Clear", clear)),
  );
}
