// The points inside an outline: how many, which taxa, and their ids to take away

const LISTED = 8;

function csvCell(value) {
  const text = value === null || value === undefined || Number.isNaN(value) ? "" : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

// One line for each point: what the page knows of it
function asCsv(points) {
  const numbers = Object.keys(rows.numbers), texts = queries ? ["nearest_id", "strand"] : [];
  const evidence = queries ? Object.keys(queries.numbers) : [];
  const lines = [["sequence_id", "kind", ...data.ranks, ...numbers, ...texts, ...evidence]];
  for (const point of points) {
    const query = point - rows.own, ofQuery = (column) => (query < 0 ? "" : column[query]);
    lines.push([
      data.ids[point],
      isQuery(point) ? "query" : "table",
      ...data.ranks.map((_, r) => nameOf(point, r)),
      ...numbers.map((name) => rows.numbers[name][point]),
      ...texts.map((name) => ofQuery(data.queries[name])),
      ...evidence.map((name) => ofQuery(queries.numbers[name])),
    ]);
  }
  return lines.map((cells) => `${cells.map(csvCell).join(",")}\r\n`).join("");
}

function download(name, text) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type: "text/csv" })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // not allowed in this frame
    const area = element("textarea", { value: text });
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
  return true;
}

function takenTaxa(points, rank) {
  const counts = new Map();
  for (const point of points) {
    const name = nameOf(point, rank) ?? "unknown", pair = counts.get(name) ?? [0, 0];
    pair[isQuery(point) ? 1 : 0]++;
    counts.set(name, pair);
  }
  const ordered = [...counts].sort(([, a], [, b]) => b[0] + b[1] - a[0] - a[1]), rest = ordered.slice(LISTED);
  const sum = (kind) => rest.reduce((total, [, pair]) => total + pair[kind], 0);
  const lines = ordered.slice(0, LISTED).map(([name, pair]) => [name, ...pair]);
  if (rest.length) lines.push([`${number.format(rest.length)} more`, sum(0), sum(1)]);
  const heads = [data.ranks[rank], "table", ...(queries ? ["queries"] : [])];
  const row = (kind, cells) => element("tr", {}, ...cells.slice(0, heads.length).map((cell, k) => (
    k ? textElement(kind, typeof cell === "number" ? number.format(cell) : cell, "number") : textElement(kind, cell)
  )));
  const body = element("tbody", {}, ...lines.map((line) => row("td", line)));
  return element("table", {}, element("thead", {}, row("th", heads)), body);
}

function showSelection(panel, map, mask) {
  panel.hidden = !mask;
  if (!mask) return;
  const points = [], status = textElement("p", "", "soft");
  for (let i = 0; i < mask.length; i++) if (mask[i]) points.push(i);
  const total = points.length, asked = points.filter(isQuery).length, ids = points.map((point) => data.ids[point]);
  const save = () => { download("selection.csv", asCsv(points)); status.textContent = "selection.csv saved"; };
  const take = async () => {
    const done = await copy(ids.join("\n"));
    status.textContent = done ? `${number.format(total)} ids copied` : "This browser does not allow it; save them as CSV";
  };
  const clear = () => { map.keep(null); panel.hidden = true; panel.dispatchEvent(new Event("cleared")); };
  const acts = total ? [["Save as CSV", save], ["Copy ids", take], ["Zoom to them", () => map.goTo(points)]] : [];
  const kinds = queries ? `${number.format(total - asked)} of the table, ${number.format(asked)} queries` : "";
  const rank = data.ranks.indexOf(data.ranks.includes(map.field) ? map.field : data.main_rank);
  status.setAttribute("role", "status");
  panel.replaceChildren(
    textElement("h3", `${plural(total, "point")} selected`),
    textElement("p", total ? kinds : "No point lies inside; pale points are not selected.", "soft"),
    ...(total && data.names[rank].length ? [takenTaxa(points, rank)] : []),
    element("div", { className: "buttons" }, ...[...acts, ["Clear", clear]].map(([label, act]) => button(label, act))),
    status,
  );
}
