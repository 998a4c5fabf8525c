"""The map of a report in a browser: search, selection and alignments, at two widths, light and dark."""

import csv
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.path import Path as Outline
from support.browser import Page, browsing

from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.matching.alignment import align_cigar, align_pair
from bioscan_jax.reports.run import map_html, report

pytestmark = pytest.mark.browser
ROWS, QUERIES = 90, 12
COMPLEMENT = str.maketrans("ACGT", "TGCA")


@dataclass(frozen=True)
class Shown:
    page: Path
    uri: str
    answers: str
    rows: list[dict]
    queries: list[dict]


def changed(rng: np.random.Generator, dna: str) -> str:
    """Substitutes three bases, inserts two, deletes one, blurs one, and cuts off the ends."""
    bases = list(dna)
    for place in rng.choice(np.arange(60, 240), 3, replace=False):
        bases[place] = "ACGT"["CGTA".index(bases[place]) - 1] if bases[place] in "ACGT" else "A"
    bases[100] += "CA"
    bases[150] = ""
    bases[200] = "N"
    return "".join(bases[20:280])


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> Shown:
    """A table of three genera with DNA, and queries that differ from known rows in known ways."""
    directory, rng = tmp_path_factory.mktemp("map"), np.random.default_rng(0)
    ancestors = ["".join(rng.choice(list("ACGT"), 300)) for _ in range(3)]
    rows, queries = [], []
    for i in range(ROWS):
        dna = list(ancestors[i % 3])
        for place in rng.choice(300, 12, replace=False):
            dna[place] = rng.choice(list("ACGT"))
        names = {rank: f"{rank[0].upper()}{0 if k < 2 else i % 3}" for k, rank in enumerate(RANKS)}
        vector = np.eye(8)[i % 3] * 3 + rng.normal(size=8) * 0.3
        rows.append({"sequence_id": f"ref{i}", "dna_sequence": "".join(dna), **names, "vector": vector.tolist()})
    for i in range(QUERIES):
        near = rows[7 * i]
        dna, vector = changed(rng, near["dna_sequence"]), np.array(near["vector"]) + rng.normal(size=8) * 0.1
        start, cigar = align_cigar(dna, near["dna_sequence"])
        matches, columns = align_pair(dna, near["dna_sequence"])
        queries.append(
            {"sequence_id": f"query {i}", **{rank: near[rank] for rank in RANKS}}
            | {f"{rank}_confidence": 0.9 for rank in RANKS}
            | {"nearest_id": near["sequence_id"], "similarity": 0.9, "identity": matches / columns, "overlap": columns}
            | {
                "coverage": 1.0,
                "strand": "-" if i % 2 else "+",
                "support": 3,
                "unnamed": None,
                "novelty": i * 5 % 12 / 12,
            }
            | {"novel": i == 3, "abstained_at": "genus" if i == 4 else None, "sequence": dna}
            | {"alignment_start": start, "alignment": cigar, "vector": vector.tolist()}
        )
    kind = pa.list_(pa.float32(), 8)
    table = pa.Table.from_pylist(rows)
    table = table.set_column(table.schema.get_field_index("vector"), "vector", table["vector"].cast(kind))
    lance.write_dataset(table, str(directory / "sequences.lance"))
    answers = pa.Table.from_pylist(queries)
    answers = answers.set_column(answers.schema.get_field_index("vector"), "vector", answers["vector"].cast(kind))
    pq.write_table(answers, directory / "names.parquet")
    names = str(directory / "names.parquet")
    report(str(directory), str(directory / "r.html"), identified=names, projection="pca")
    return Shown(directory / "r.html", str(directory), names, rows, queries)


def search(page: Page, text: str) -> list[str]:
    """Types into the search field; returns the results as text."""
    field = "document.querySelector('#embedding input')"
    page.run(f"(f => {{ f.value = {json.dumps(text)}; f.dispatchEvent(new Event('input')); }})({field})")
    page.run("new Promise(done => setTimeout(done, 350))")
    return page.run("[...document.querySelectorAll('.results li')].map(one => one.innerText)")


def text_of(page: Page, selector: str) -> str:
    return page.run(f"document.querySelector('#embedding {selector}').innerText")


def points_on_screen(page: Page) -> np.ndarray:
    return np.array(
        page.run("""(() => {
      const front = document.querySelector('#embedding .front');
      front.scrollIntoView({ block: 'center' });
      const box = front.getBoundingClientRect(), map = reportMaps.embedding;
      return [...Array(map.size).keys()].map(i => map.toScreen(i)).map(([x, y]) => [box.left + x, box.top + y]);
    })()""")
    )


@pytest.mark.parametrize("width", [1280, 390])
def test_search_selection_and_alignment(shown: Shown, tmp_path: Path, width: int):
    touch = width < 600
    with browsing(tmp_path) as page:
        page.save_downloads(tmp_path)
        for dark in (False, True):
            page.open(shown.page, width, 900, dark=dark, touch=touch)
            check_search(page, shown)
            check_alignment(page, shown)
            check_selection(page, shown, tmp_path / "selection.csv", touch=touch)
            assert page.run("document.documentElement.scrollWidth") <= width
        assert page.problems == []
        assert {url.split(":")[0] for url in page.requests} <= {"file", "blob"}


def check_search(page: Page, shown: Shown) -> None:
    page.click("document.querySelector('.by-novelty')")
    listed = page.run("[...document.querySelectorAll('.results li strong')].map(one => one.innerText)")
    novelty = {one["sequence_id"]: one["novelty"] for one in shown.queries}
    assert listed == sorted(novelty, key=lambda key: -novelty[key])
    page.click("document.querySelector('.results .buttons button')")
    assert len(search(page, "g1")) == 30 + 4  # a genus: rows and queries
    assert text_of(page, ".found") == "34 found"
    assert [one.split("\n")[0] for one in search(page, "REF89")] == ["ref89"]
    assert search(page, "no such name") == []
    assert text_of(page, ".results h3") == "Nothing found"
    dna = shown.rows[20]["dna_sequence"]
    part = dna[40:100]
    wanted = {row["sequence_id"] for row in shown.rows if part in row["dna_sequence"]}
    for bases in (part, part.lower(), part[::-1].translate(COMPLEMENT)):
        found = search(page, bases)
        assert {one.split("\n")[0] for one in found} >= wanted
        assert all("contains it" in one or "contains its reverse complement" in one for one in found)
    words = {dna[at : at + 6] for at in range(295)}
    blurred = dna[:35] + "TTT" + dna[38:150] + "CCC" + dna[153:]
    assert not any(blurred in row["dna_sequence"] for row in shown.rows)
    nearest = search(page, blurred)[0]
    assert nearest.split("\n")[0] == "ref20"
    share = float(re.search(r"([\d.]+) % of its 6-mers", nearest)[1])
    asked = {blurred[at : at + 6] for at in range(295)}
    assert share == pytest.approx(100 * len(words & asked) / len(asked), abs=0.06)


def check_alignment(page: Page, shown: Shown) -> None:
    for i in (0, 3, 4):
        query = shown.queries[i]
        search(page, query["sequence_id"])
        page.click("document.querySelector('.results button')")
        page.run("new Promise(done => setTimeout(done, 50))")
        card, near = text_of(page, ".card"), shown.rows[7 * i]
        assert near["sequence_id"] in card
        assert f"{100 * query['identity']:.1f} %" in card
        assert f"{query['overlap']} bases, 100.0 % of the query" in card
        assert "3 sequences with the lowest name" in card
        assert ("reverse complement" in card) == (i % 2 == 1)
        assert ("likely of a species not in the table" in card) == (i == 3)
        assert card.count("not answered") == (2 if i == 4 else 0)
        said, drawn = text_of(page, ".alignment p"), text_of(page, ".alignment pre")
        one, signs, other = ("".join(re.findall(pattern, drawn)) for pattern in (
            r"query +\d+ ([ACGTN-]+) \d+\n", r"\n +([|*+n-]+)\n", r"reference +\d+ ([ACGTN-]+) \d+\n",
        ))  # fmt: skip
        assert one.replace("-", "") in query["sequence"]
        assert other.replace("-", "") in near["dna_sequence"]
        kinds = {"|": 0, "*": 0, "+": 0, "-": 0, "n": 0}
        for a, b, sign in zip(one, other, signs, strict=True):
            kinds[sign] += 1
            assert sign == ("n" if "N" in a + b else "|" if a == b else "+" if b == "-" else "-" if a == "-" else "*")
        assert kinds["|"] / (sum(kinds.values()) - kinds["n"]) == pytest.approx(query["identity"])
        assert kinds["+"] == 2
        assert f"{kinds['*']} substitution" in said
        assert f"(identity {100 * query['identity']:.1f} %)" in said
    assert page.run(
        "document.querySelector('.alignment pre').scrollWidth <= document.querySelector('.alignment pre').clientWidth"
    )
    page.click("[...document.querySelectorAll('.card .link')][0]")
    assert text_of(page, ".card h3") == "ref28"
    assert "query 4" in text_of(page, ".card")
    assert page.run("document.querySelector('.alignment').hidden")
    search(page, "")


def check_selection(page: Page, shown: Shown, file: Path, *, touch: bool) -> None:
    page.run("document.querySelector('#embedding .all').click()")
    page.run("document.querySelector('#embedding .lasso').click()")
    at = points_on_screen(page)
    names = [one["genus"] for one in [*shown.rows, *shown.queries]]
    here = at[np.array(names) == "G0"]
    low, high = here.min(axis=0) - 3, here.max(axis=0) + 3
    path = [low, [high[0], low[1]], high, [(low[0] + high[0]) / 2, high[1]], [low[0], high[1]]]
    page.drag([[float(x), float(y)] for x, y in path], touch=touch)
    inside = Outline(np.array(path)).contains_points(at)
    assert text_of(page, ".picked h3") == f"{inside.sum()} points selected"
    rows, queries = int(inside[:ROWS].sum()), int(inside[ROWS:].sum())
    assert text_of(page, ".picked p") == f"{rows} of the table, {queries} queries"
    table = [line.split("\t") for line in text_of(page, ".picked tbody").split("\n")]
    assert sum(int(line[1]) for line in table) == rows
    file.unlink(missing_ok=True)
    page.click("document.querySelector('.picked .buttons button')")
    for _ in range(100):
        if file.exists() and file.read_bytes().endswith(b"\n"):
            break
        time.sleep(0.05)
    with file.open(newline="") as text:
        saved = list(csv.DictReader(text))
    ids = [one["sequence_id"] for one in [*shown.rows, *shown.queries]]
    assert [one["sequence_id"] for one in saved] == [key for key, is_in in zip(ids, inside, strict=True) if is_in]
    assert {one["kind"] for one in saved} == {"table", "query"}
    assert [one["genus"] for one in saved] == [name for name, is_in in zip(names, inside, strict=True) if is_in]
    page.click("[...document.querySelectorAll('.picked .buttons button')][1]")
    page.run("new Promise(done => setTimeout(done, 50))")
    assert text_of(page, ".picked [role=status]") == f"{inside.sum()} ids copied"
    page.run("[...document.querySelectorAll('.picked .buttons button')].at(-1).click()")
    page.run("document.querySelector('#embedding .front').focus()")
    page.press("s")  # the same without a pointer
    assert text_of(page, ".picked h3") == f"{ROWS + QUERIES} points selected"


def test_the_map_for_a_notebook_works_in_a_frame(shown: Shown, tmp_path: Path):
    frame = map_html(shown.uri, identified=shown.answers, projection="pca")
    (tmp_path / "notebook.html").write_text(f"<!doctype html><meta charset=utf-8><body>{frame}</body>")
    with browsing(tmp_path) as page:
        page.open(tmp_path / "notebook.html", 1280, 1000)
        frames = page.call("Page.getFrameTree")["frameTree"]["childFrames"]
        assert [one["frame"]["url"] for one in frames] == ["about:srcdoc"]
        page.run("new Promise(done => setTimeout(done, 300))")
        world = page.call("Page.createIsolatedWorld", frameId=frames[0]["frame"]["id"])["executionContextId"]
        asked = "[document.querySelectorAll('.legend li').length, document.querySelectorAll('section').length]"
        answer = page.call("Runtime.evaluate", expression=asked, contextId=world, returnByValue=True)
        assert answer["result"]["value"][0] > 2
        assert page.problems == []
