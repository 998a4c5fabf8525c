// The points inside an outline: how many, which taxa, and their ids to take away

const LISTED = 8;

function csvCell(value) {
  const text = value === null || value === undefined || Number.isNaN(value) ? "" : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

// One line for each point: what the page knows of it
function asCsv(points) {
  const numbers = Object.entries(rows.numbers), evidence = queries ? Object.entries(queries.numbers) : [];
  const lines = [["sequence_id", "kind", ...data.ranks, ...numbers.map(([name]) => name), ...(queries ? ["nearest_id", "strand"] : []), ...evidence.map(([name]) => name)]];
  for (const point of points) {
    const query = point - rows.own, cells = [data.ids[point], isQuery(point) ? "query" : "table"];
    cells.push(...data.ranks.map((_, r) => nameOf(point, r)), ...numbers.map(([, values]) => values[point]));
    if (queries) cells.push(...(query < 0 ? ["", ""] : [data.queries.nearest_id[query], data.queries.strand[query]]), ...evidence.map(([, values]) => (query < 0 ? "" : values[query])));
    lines.push(cells);
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
  const ordered = [...counts].sort(([, a], [, b]) => b[0] + b[1] - a[0] - a[1]);
  const lines = ordered.slice(0, LISTED).map(([name, pair]) => [name, ...pair]), rest = ordered.slice(LISTED);
  if (rest.length) lines.push([`${number.format(rest.length)} more`, ...[0, 1].map((k) => rest.reduce((sum, [, pair]) => sum + pair[k], 0))]);
  const heads = [data.ranks[rank], "table", ...(queries ? ["queries"] : [])];
  const cell = (kind, value, k) => element(kind, { textContent: typeof value === "number" ? number.format(value) : value, className: k ? "number" : "" });
  return element("table", {}, element("thead", {}, element("tr", {}, ...heads.map((head, k) => cell("th", head, k)))),
    element("tbody", {}, ...lines.map((line) => element("tr", {}, ...line.slice(0, heads.length).map((value, k) => cell("td", value, k))))));
}

function showSelection(panel, map, mask) {
  const points = [], status = element("p", { className: "soft" });
  if (mask) for (let i = 0; i < mask.length; i++) if (mask[i]) points.push(i);
  status.setAttribute("role", "status");
  panel.hidden = !mask;
  if (!mask) return;
  const total = points.length, asked = points.filter(isQuery).length, whole = queries ? `${number.format(total - asked)} of the table, ${number.format(asked)} queries` : "";
  const rank = data.ranks.includes(map.field) ? map.field : document.querySelector("#embedding select option[selected]")?.value;
  const acts = total ? [
    ["Save as CSV", () => { download("selection.csv", asCsv(points)); status.textContent = "selection.csv saved"; }],
    ["Copy ids", async () => { status.textContent = (await copy(points.map((point) => data.ids[point]).join("\n"))) ? `${number.format(total)} ids copied` : "This browser does not allow it; save them as CSV"; }],
    ["Zoom to them", () => map.goTo(points)],
  ] : [];
  const buttons = element("div", { className: "buttons" });
  for (const [text, act] of [...acts, ["Clear", () => { map.keep(null); showSelection(panel, map, null); panel.dispatchEvent(new Event("cleared")); }]]) {
    const button = element("button", { type: "button", textContent: text });
    button.addEventListener("click", act);
    buttons.append(button);
  }
  const title = element("h3", { textContent: total === 1 ? "1 point selected" : `${number.format(total)} points selected` });
  const taxa = total && data.ranks.includes(rank) ? [takenTaxa(points, data.ranks.indexOf(rank))] : [];
  panel.replaceChildren(title, element("p", { className: "soft", textContent: total ? whole : "No point lies inside; pale points are not selected." }), ...taxa, buttons, status);
}
