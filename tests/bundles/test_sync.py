import json
import os
import shutil
import signal
from pathlib import Path

import fsspec
import lance
import numpy as np
import pyarrow as pa
import pytest
from support.commands import call
from support.killed import run_killed
from support.tables import make_table, read, same_bits
from sync_campaign import campaign

from bioscan_jax import location
from bioscan_jax.bundles import sync as sync_module
from bioscan_jax.bundles.manifest import sha256_of
from bioscan_jax.bundles.sync import SyncSummary
from bioscan_jax.bundles.sync import sync as run_sync
from bioscan_jax.bundles.tables import content_digest
from bioscan_jax.errors import InputError
from bioscan_jax.table.annotate import annotate

PARTS = 8000
TABLE = "sequences.lance"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("made") / "db"
    make_table(directory, 1600, index="ivf_sq")
    (directory / "adapter").mkdir()
    (directory / "adapter" / "weights.bin").write_bytes(os.urandom(5000))
    (directory / "report.html").write_text("<p>first</p>")
    sync(directory, directory.with_name("stick"))
    return directory


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A folder and its copy in `stick`."""
    for name in ("db", "stick"):
        shutil.copytree(made.with_name(name), tmp_path / name)
    return tmp_path / "db"


def sync(source: Path | str, target: Path | str, **given) -> SyncSummary:
    return run_sync(str(source), str(target), part_bytes=PARTS, progress=False, **given)


def refused(match: str, *places: Path | str, **given) -> None:
    with pytest.raises(InputError, match=match) as error:
        sync(*places, **given)
    assert "\n" not in str(error.value)


def append(folder: Path, prefix: str, rows: int = 300) -> pa.Table:
    """Appends rows to the table, as an import does."""
    found = read(folder).slice(0, rows)
    ids = pa.array([f"{prefix}{row}" for row in range(rows)])
    lance.write_dataset(found.set_column(0, found.schema.field(0), ids), folder / TABLE, mode="append")
    return read(folder)


def objects(copy: Path, pattern: str = "*") -> set[str]:
    return {p.relative_to(copy).as_posix() for p in copy.rglob(pattern) if p.is_file() and p.name[:5] != "sync-"}


def equal(one: Path, other: Path) -> bool:
    tables = all(same_bits(read(one, name), read(other, name)) for name in ("sequences", "sequences_rejects"))
    files = ("report.html", "adapter/weights.bin", "sequences.run.json")
    return tables and all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


def test_a_copy_and_what_is_made_from_it_are_equal(folder, tmp_path):
    copy = tmp_path / "stick"
    assert len(objects(copy, "vector-*")) == 2
    first = sync(copy, tmp_path / "laptop")
    assert first.changed == (
        "adapter/weights.bin",
        "report.html",
        TABLE,
        "sequences.run.json",
        "sequences_rejects.lance",
    )
    assert equal(folder, tmp_path / "laptop")
    indexes = lance.dataset(tmp_path / "laptop" / TABLE).describe_indices()
    assert {i.name: i.num_rows_indexed for i in indexes} == dict.fromkeys(("sequence_id_idx", "vector_idx"), 1371)
    for places in ((tmp_path / "laptop", copy), (copy, folder), (folder, copy)):
        done = sync(*places)
        assert (done.changed, done.same, done.sent) == ((), 5, 0)


def test_only_new_rows_and_changed_columns_travel(folder, tmp_path):
    copy, laptop = tmp_path / "stick", tmp_path / "laptop"
    sync(copy, laptop)
    before = objects(copy)
    append(folder, "new")
    done = sync(folder, copy)
    new = objects(copy) - before
    assert {int(name.split("-")[1]) for name in new if "vector" not in name} == {1371}
    assert done.sent == len(new)
    assert done.sent_bytes < 0.4 * done.spared_bytes
    files = {f.path for f in lance.dataset(laptop / TABLE).get_fragments()[0].metadata.files}
    assert sync(copy, laptop).sent == len(new)
    assert equal(folder, laptop)
    assert {f.path for f in lance.dataset(laptop / TABLE).get_fragments()[0].metadata.files} == files

    before = objects(copy)
    (tmp_path / "ships.csv").write_text("sequence_id,ship\ns0,Sonne\ns8,Polarstern\n")
    annotate(str(laptop), str(tmp_path / "ships.csv"))
    (laptop / "report.html").write_text("<p>second</p>")
    done = sync(laptop, copy)
    new = objects(copy) - before
    assert done.changed == ("report.html", TABLE)
    assert {Path(name).name.split("-")[0] for name in new if "columns" in name} == {"ship"}
    assert done.sent_bytes < 5000
    files = {f.path for f in lance.dataset(folder / TABLE).get_fragments()[0].metadata.files}
    assert sync(copy, folder).sent == len(new)
    assert equal(folder, laptop)
    assert files < {f.path for f in lance.dataset(folder / TABLE).get_fragments()[0].metadata.files}

    before = objects(copy)
    (tmp_path / "ships.csv").write_text("sequence_id,ship\nnew0,Meteor\n")
    annotate(str(folder), str(tmp_path / "ships.csv"))
    assert sync(folder, copy).sent == 1
    assert sync(copy, laptop).sent == 1
    assert equal(folder, laptop)


@pytest.mark.slow
def test_compaction_sends_nothing(folder, tmp_path):
    lance.dataset(folder / TABLE).optimize.compact_files()
    done = sync(folder, tmp_path / "stick")
    assert (done.same, done.sent) == (5, 0)


def test_changes_on_both_sides_need_a_winner(folder, tmp_path):
    copy, laptop = tmp_path / "stick", tmp_path / "laptop"
    sync(copy, laptop)
    theirs = append(laptop, "theirs", 200)
    sync(laptop, copy)
    refused(f"^{TABLE}: changed at the target since the last sync, and not at the source; swap", folder, copy)
    ours = append(folder, "ours", 100)
    before = objects(copy)
    refused(f"^{TABLE}: changed on both sides since the last sync; pass --prefer source", folder, copy)
    refused("changed on both sides", copy, folder)
    assert objects(copy) == before
    assert sync(folder, copy, prefer="target").skipped == (TABLE,)
    assert same_bits(read(folder), ours)
    sync(copy, folder, prefer="source")
    assert same_bits(read(folder), theirs)
    append(laptop, "more", 50)
    (laptop / "report.html").write_text("<p>theirs</p>")
    sync(laptop, copy)
    (folder / "report.html").write_text("<p>ours</p>")
    refused("^report.html: changed on both sides", folder, copy)
    done = sync(copy, folder, prefer="target")
    assert (done.skipped, done.changed) == (("report.html",), (TABLE,))
    shutil.rmtree(folder / ".sync")
    refused("report.html: differ, and no sync has seen both", folder, copy)


def test_nothing_is_deleted_without_the_flag(folder, tmp_path):
    copy, laptop = tmp_path / "stick", tmp_path / "laptop"
    sync(copy, laptop)
    (folder / "report.html").unlink()
    done = sync(folder, copy)
    assert (done.kept, done.deleted) == (("report.html",), 0)
    assert "only at the target and kept: report.html; --delete" in str(done)
    lance.dataset(folder / TABLE).delete("source_row < 100")
    before = objects(copy)
    refused(f"{TABLE}: 1,371 rows at the target, 1,285 at the source; pass --delete", folder, copy)
    lance.dataset(folder / TABLE).drop_columns(["station"])
    shutil.rmtree(folder / "sequences_rejects.lance")
    assert objects(copy) == before
    done = sync(folder, copy, delete=True)
    assert (done.deleted, done.superseded_bytes) == (2, 0)
    assert not objects(copy, "report*") | objects(copy, "station*") | objects(copy, "reason*")
    (laptop / "mine.txt").write_text("new here")
    done = sync(copy, laptop, delete=True)
    assert (done.deleted, done.kept) == (2, ("mine.txt",))
    assert same_bits(read(laptop), read(folder))
    assert not (laptop / "report.html").exists()
    assert not (laptop / "sequences_rejects.lance").exists()


def test_files_that_vanish_meanwhile_are_left_out(tmp_path, monkeypatch):
    """As the older checkpoints of a run that goes on."""
    folder, copy = tmp_path / "run", tmp_path / "stick"
    folder.mkdir()
    for name in ("1", "2", "3"):
        (folder / name).write_text(name)

    def hashing(file: Path) -> str:
        (folder / "3").unlink(missing_ok=True)
        return sha256_of(file)

    monkeypatch.setattr(sync_module, "sha256_of", hashing)
    assert sync(folder, copy).changed == ("1", "2")


@pytest.mark.slow
def test_damage_in_the_copy_is_noticed_and_repaired(folder, tmp_path):
    copy = tmp_path / "stick"
    first, second = sorted(objects(copy, "vector-*"))[:2]
    data = bytearray((copy / first).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / first).write_bytes(data)
    refused("vector-.* is damaged; remove it, then sync the copy from its source again", copy, tmp_path / "laptop")
    assert not (tmp_path / "laptop" / TABLE).exists()
    (copy / first).unlink()
    (copy / second).unlink()
    refused("vector-.* is missing or damaged; sync the copy", copy, tmp_path / "laptop")
    assert sync(folder, copy).sent == 2
    sync(copy, tmp_path / "laptop")
    assert equal(folder, tmp_path / "laptop")


@pytest.mark.slow
def test_a_manifest_that_was_cut_off_leaves_the_version_before_it(folder, tmp_path):
    copy = tmp_path / "stick"
    before = read(folder)
    append(folder, "new", 50)
    sync(folder, copy)
    newest = max(copy.glob("sync-*.json"))
    newest.write_bytes(newest.read_bytes()[:100])
    sync(copy, tmp_path / "laptop")
    assert same_bits(read(tmp_path / "laptop"), before)
    assert sync(folder, copy).sent == 0
    sync(copy, tmp_path / "laptop")
    assert equal(folder, tmp_path / "laptop")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"../up": "report.html"}, "leads out of the directory"),
        ({".ssh/keys": "report.html"}, "hidden files"),
        ({"others.lance/x": "report.html"}, "where tables or hidden files do"),
        ({"others.lance": "report.html"}, "as what it is not"),
    ],
)
def test_a_forged_manifest_cannot_write_elsewhere(folder, tmp_path, change, says):
    from bioscan_jax.bundles.manifest import sealed

    newest = max((tmp_path / "stick").glob("sync-*.json"))
    body = json.loads(newest.read_text())
    del body["sha256"]
    for path, like in change.items():
        body["files"][path] = body["files"][like]
    newest.write_text(sealed(body))
    refused(says, tmp_path / "stick", tmp_path / "laptop")
    assert not (tmp_path / "laptop" / TABLE).exists()


@pytest.mark.slow
def test_a_killed_sync_leaves_a_whole_version_and_continues(folder, tmp_path):
    copy = tmp_path / "stick"
    before = read(folder)
    append(folder, "new")
    jobs = []
    points = [("bioscan_jax.location:Directory.put", nth, False) for nth in (1, 5)]
    points += [("bioscan_jax.bundles.sync:write_copy", 1, after) for after in (False, True)]
    for number, point in enumerate([dict(zip(("at", "nth", "after"), one, strict=True)) for one in points]):
        shutil.copytree(copy, tmp_path / f"copy{number}")
        given = {
            "source": str(folder),
            "target": str(tmp_path / f"copy{number}"),
            "part_bytes": PARTS,
            "progress": False,
        }
        jobs.append({"call": "bioscan_jax.bundles.sync:sync", "args": given, **point})
    assert run_killed(jobs, tmp_path) == [signal.SIGKILL] * len(jobs)
    for number in range(len(jobs)):
        sync(tmp_path / f"copy{number}", tmp_path / f"laptop{number}")
        assert same_bits(read(tmp_path / f"laptop{number}"), before if number < len(jobs) - 1 else read(folder))
        sync(folder, tmp_path / f"copy{number}")
        sync(tmp_path / f"copy{number}", tmp_path / f"laptop{number}")
        assert equal(folder, tmp_path / f"laptop{number}")


@pytest.mark.slow
def test_kills_and_failing_requests_leave_whole_versions_in_s3(tmp_path):
    assert campaign("s3", tmp_path, 2, 3000, 0.05, 0, lambda line: None) == []


@pytest.mark.slow
def test_embed_continues_in_a_folder_made_from_the_copy_of_an_unfinished_one(tmp_path):
    given = {"rows": 500, "hidden": 16}
    made = make_table(tmp_path / "whole", **given)
    make_table(tmp_path / "db", **given, stop_after=3)
    sync(tmp_path / "db", tmp_path / "stick")
    sync(tmp_path / "stick", tmp_path / "laptop")
    assert len(read(tmp_path / "laptop")) < 300
    make_table(tmp_path / "laptop", **given)
    assert same_bits(read(tmp_path / "laptop"), made)
    sync(tmp_path / "laptop", tmp_path / "stick")
    sync(tmp_path / "stick", tmp_path / "db")
    assert same_bits(read(tmp_path / "db"), made)


class _Flaky:
    """Fails every third call of a method, as a server does that is too busy."""

    def __init__(self, method) -> None:
        self.method, self.calls = method, 0

    def __call__(self, *arguments, **keywords):
        self.calls += 1
        if self.calls % 3 == 1:
            raise ConnectionResetError("the connection was reset")
        return self.method(*arguments, **keywords)


@pytest.mark.slow
def test_a_bucket_whose_connection_breaks_off(folder, tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    monkeypatch.setattr(location, "_FIRST_PAUSE_SECONDS", 0)
    try:
        for name in ("put_file", "get_file", "find"):
            monkeypatch.setattr(type(memory), name, _Flaky(getattr(memory, name)))
        sync(folder, "memory://bucket/outputs")
        assert sync(folder, "memory://bucket/outputs").sent == 0
        sync("memory://bucket/outputs", tmp_path / "laptop")
        assert equal(folder, tmp_path / "laptop")
        monkeypatch.setattr(_Flaky, "__call__", lambda *_, **__: (_ for _ in ()).throw(ConnectionResetError("down")))
        refused("the storage failed .ConnectionResetError down.; fix it and run", folder, "memory://bucket/outputs")
    finally:
        memory.store.clear()


@pytest.mark.slow
def test_files_from_outside_the_folder(folder, tmp_path):
    (tmp_path / "coi-adapter").mkdir()
    (tmp_path / "coi-adapter" / "adapter_config.json").write_text("{}")
    sync(folder, tmp_path / "stick", beside=[str(tmp_path / "coi-adapter")])
    sync(tmp_path / "stick", tmp_path / "laptop")
    assert (tmp_path / "laptop/coi-adapter/adapter_config.json").read_text() == "{}"
    refused("--with: .* has 'report.html' too", folder, tmp_path / "stick", beside=[str(folder / "report.html")])


def test_what_is_neither_a_folder_nor_its_copy_is_refused(folder, tmp_path):
    copy = tmp_path / "stick"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.docx").write_text("mine")
    refused("holds other files .'thesis.docx'.; pass a new or empty place", folder, tmp_path / "full")
    refused("there is no such directory; is the disk mounted", tmp_path / "none", copy)
    refused("holds --source .*; pass a place outside it", folder, tmp_path)
    refused("lies in --source .*; pass a place outside it", folder, folder / "copy")
    refused("is --source .*; pass a place outside it", folder, folder)
    shutil.copytree(copy, tmp_path / "second")
    refused("are both copies", copy, tmp_path / "second")
    refused("--with adds files to a copy", copy, tmp_path / "laptop", beside=[str(folder / "report.html")])
    (tmp_path / "empty").mkdir()
    refused("nothing is there", tmp_path / "empty", copy)
    for manifest in copy.glob("sync-*.json"):
        manifest.write_text("")
    refused("its first sync is unfinished", copy, tmp_path / "laptop")


def test_the_command_syncs_and_reports(folder, tmp_path):
    (tmp_path / "note.txt").write_text("x")
    (folder / "report.html").write_text("<p>second</p>")
    flags = ["--progress", "false", "--with", tmp_path / "note.txt", "--skip", "*.html", "--skip", "adapter/*"]
    done = call("sync", "--source", folder, "--target", tmp_path / "stick", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 tables and files brought up to date, 3 were equal; 1 bytes in 1 files travelled" in done.stdout
    again = call("sync", "--source", tmp_path / "stick", "--target", tmp_path / "stick", "--progress", "false")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "--with PATH" in " ".join(call("sync", "--help").stdout.split())


def test_the_digest_of_values_does_not_depend_on_how_they_are_stored():
    struct = pa.struct([("at", pa.timestamp("s")), ("tags", pa.list_(pa.large_string()))])
    columns = [
        pa.array(["é", None, "", "long enough"] * 3),
        pa.array([b"\x00", None, b"", b"x"] * 3, pa.binary()),
        pa.array([True, None, False, True] * 3),
        pa.array([1.5, None, -0.0, np.nan] * 3),
        pa.array([b"\x00\xff", None, b"ab", b"cd"] * 3, pa.binary(2)),
        pa.array([{"at": 1, "tags": [None, "a"]}, None, {"at": None, "tags": []}, {"at": 2, "tags": None}] * 3, struct),
        pa.array([[1, 2], None, [3, 4], [None, 5]] * 3, pa.list_(pa.int16(), 2)),
        pa.array([[1], None, [], [None, 5]] * 3, pa.list_(pa.int64())),
        pa.array([None] * 12, pa.null()),
    ]
    for column in columns:
        digest = content_digest("c", column.slice(4, 4))
        rebuilt = pa.array(column.slice(4, 4).to_pylist(), column.type)
        assert digest == content_digest("c", rebuilt)
        assert digest != content_digest("d", rebuilt)
        assert digest != content_digest("c", column.slice(4, 3))
        if not pa.types.is_null(column.type):
            assert digest != content_digest("c", column.slice(5, 4))
    assert content_digest("c", pa.array([0.0])) != content_digest("c", pa.array([-0.0]))
    assert content_digest("c", pa.array(["ab", "c"])) != content_digest("c", pa.array(["a", "bc"]))
