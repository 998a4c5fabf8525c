import gzip
import importlib
import os
import pickle
import re
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bioscan_jax.data.files import find_files
from bioscan_jax.errors import InputError


def write(directory: Path, *names: str, data: bytes = b"x") -> None:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@pytest.fixture
def memory():
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    yield filesystem
    filesystem.store.clear()


def error_of(path: str) -> str:
    with pytest.raises(InputError) as caught:
        find_files(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", ["fa", "fasta", "fna", "fas", "ffn", "fsa", "fastq", "fq"])
@pytest.mark.parametrize("packed", ["", ".gz", ".GZ"])
def test_fasta_suffixes_in_any_case(tmp_path, suffix, packed):
    write(tmp_path, f"a.{suffix}{packed}", f"B.{suffix.upper()}{packed}")
    assert find_files(str(tmp_path)).kind == "fasta"
    assert find_files(str(tmp_path)).names == (f"B.{suffix.upper()}{packed}", f"a.{suffix}{packed}")


def test_single_file_is_taken_by_its_name(tmp_path):
    write(tmp_path, "a.Parquet", ".hidden.parquet", "_x.parquet", data=b"")
    for name in ("a.Parquet", ".hidden.parquet", "_x.parquet"):
        found = find_files(str(tmp_path / name))
        assert (found.kind, found.paths, found.names) == ("parquet", (str(tmp_path / name),), (name,))
        assert found.filesystem is None


def test_directory_is_searched_through_and_sorted(tmp_path):
    write(
        tmp_path, "b.parquet", "a/z.parquet", "a/deep/er/y.parquet", "c.PARQUET", "_rows.parquet", "README.md", "x.crc"
    )
    write(tmp_path, "_SUCCESS", "_empty.parquet", data=b"")
    write(
        tmp_path, ".hidden.parquet", ".git/a.parquet", "_delta_log/1.parquet", "a/_temporary/0/b.parquet", "_metadata"
    )
    found = find_files(str(tmp_path))
    expected = ["_rows.parquet", "a/deep/er/y.parquet", "a/z.parquet", "b.parquet", "c.PARQUET"]
    assert list(found.names) == sorted(expected)
    assert found.paths == tuple(sorted(str(tmp_path / name) for name in expected))
    assert find_files(str(tmp_path) + "/") == found


def test_hidden_parents_of_the_root_do_not_matter(tmp_path):
    write(tmp_path, ".cache/_x/a.parquet", ".cache/_x/b.parquet")
    assert find_files(str(tmp_path / ".cache/_x")).names == ("a.parquet", "b.parquet")
    assert find_files(str(tmp_path / ".cache/_x/*.parquet")).names == ("a.parquet", "b.parquet")


def test_glob_takes_files_and_directories_once(tmp_path):
    write(tmp_path, "d/a.parquet", "d/s/b.parquet", "e/c.parquet", "d/.h/h.parquet", "d/.i.parquet")
    write(tmp_path, "d/_SUCCESS", data=b"")
    assert find_files(str(tmp_path / "d/*.parquet")).names == ("a.parquet",)
    assert find_files(str(tmp_path / "d/*")).names == ("a.parquet", "s/b.parquet")
    assert find_files(str(tmp_path / "d/**")).names == ("a.parquet", "s/b.parquet")
    assert find_files(str(tmp_path / "**/*.parquet")).names == ("d/a.parquet", "d/s/b.parquet", "e/c.parquet")
    assert find_files(str(tmp_path / "[de]/?.parquet")).names == ("d/a.parquet", "e/c.parquet")


def test_file_with_glob_letters_in_its_name(tmp_path):
    write(tmp_path, "a[1].parquet", "a1.parquet")
    assert find_files(str(tmp_path / "a[1].parquet")).names == ("a[1].parquet",)


def test_relative_home_and_file_url_are_local(tmp_path, monkeypatch):
    write(tmp_path, "a.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = find_files(str(tmp_path / "a.parquet"))
    for path in ("a.parquet", "./a.parquet", "~/a.parquet", f"file://{tmp_path}/a.parquet"):
        assert find_files(path) == expected
        assert find_files(path).filesystem is None


def test_unknown_suffix_is_recognised_by_its_first_bytes(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "data.pq")
    write(tmp_path, "reads.txt", data=b">a\nACGT\n")
    write(tmp_path, "reads.dat", data=b"@a\nACGT\n+\nIIII\n")
    write(tmp_path, "packed", data=gzip.compress(b">a\nACGT\n" * 1000, mtime=0))
    assert find_files(str(tmp_path / "data.pq")).kind == "parquet"
    assert find_files(str(tmp_path / "reads.*")).names == ("reads.dat", "reads.txt")
    assert find_files(str(tmp_path / "reads.*")).kind == "fasta"
    assert find_files(str(tmp_path / "packed")).kind == "fasta"


@pytest.mark.parametrize(
    "data", [b"", b"id,seq\n", b"\x1f\x8b", b"\x1f\x8bnot gzip", gzip.compress(b"id,seq", mtime=0), b"PAR"]
)
def test_unknown_content(tmp_path, data):
    write(tmp_path, "x.csv", data=data)
    message = error_of(str(tmp_path / "x.csv"))
    assert message.startswith(f"{tmp_path}/x.csv is neither Parquet nor FASTA")
    assert ".parquet" in message
    assert ".fasta" in message


def test_mixed_kinds_name_one_of_each(tmp_path):
    write(tmp_path, "a.fa", "b.parquet", "c.fa", "d.parquet")
    message = error_of(str(tmp_path))
    assert f"Parquet ({tmp_path}/b.parquet) and FASTA ({tmp_path}/a.fa)" in message
    assert "pass a glob" in message


@pytest.mark.parametrize("path", ["absent.parquet", "empty", "empty/*.parquet", "absent/*", "other"])
def test_nothing_found_says_where_and_what_would_match(tmp_path, monkeypatch, path):
    (tmp_path / "empty").mkdir()
    write(tmp_path, "other/notes.txt")
    monkeypatch.chdir(tmp_path)
    message = error_of(path)
    assert message.startswith(f"nothing found at {tmp_path}/{path}; expected Parquet (.parquet) or FASTA/FASTQ (.fa ")


def test_empty_path():
    assert error_of("").startswith("--data.path is empty")


def test_path_through_a_file(tmp_path):
    write(tmp_path, "a.parquet")
    assert "check the path and its permissions" in error_of(str(tmp_path / "a.parquet/b.parquet"))


def test_directory_that_may_not_be_listed_is_an_error(tmp_path, monkeypatch):
    write(tmp_path, "open/a.parquet", "closed/b.parquet")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert re.search(r"cannot read .*Permission denied.*closed", error_of(str(tmp_path)))


def test_links_are_followed_once(tmp_path):
    write(tmp_path, "in/a.parquet", "elsewhere/b.parquet")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/c.parquet").symlink_to(tmp_path / "elsewhere/b.parquet")
    assert find_files(str(tmp_path / "in")).names == ("a.parquet", "c.parquet", "more/b.parquet")
    assert find_files(str(tmp_path / "in/[cm]*")).names == ("c.parquet", "more/b.parquet")
    assert find_files(str(tmp_path / "in/more")).names == ("b.parquet",)
    (tmp_path / "in/broken.parquet").symlink_to(tmp_path / "absent")
    assert "broken.parquet" in error_of(str(tmp_path / "in"))


def test_remote_files(memory, tmp_path):
    for name in ("/in/b.parquet", "/in/s/a.parquet", "/in/.h.parquet", "/in/_log/x.parquet"):
        memory.pipe(name, b"0123456789")
    memory.pipe("/in/_SUCCESS", b"")
    found = find_files("memory://in")
    assert found.names == ("b.parquet", "s/a.parquet")
    assert found == find_files("memory://in/**")
    assert found.url(found.paths[0]) == "memory:///in/b.parquet"
    assert pickle.loads(pickle.dumps(found)) == found
    with found.open(found.paths[0]) as stream:
        assert stream.read() == b"0123456789"
    source = found.arrow_source(found.paths[0], 10)
    assert not isinstance(source, str)
    assert (source.size(), source.seek(3), source.read(4), source.tell(), source.read()) == (10, 3, b"3456", 7, b"789")
    assert error_of("memory://out").startswith("nothing found at memory://out;")


def test_remote_failure_is_one_line(memory, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("401\nno credentials")

    monkeypatch.setattr(type(memory), "info", refuse)
    message = error_of("memory://in/a.parquet")
    assert message.startswith("cannot read memory://in/a.parquet: RuntimeError 401 no credentials; check the URL")


@pytest.mark.parametrize(("protocol", "package"), [("gs", "gcsfs"), ("s3", "s3fs")])
def test_missing_driver_says_what_to_install(monkeypatch, protocol, package):
    import_module = importlib.import_module

    def without_driver(name: str, *args):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return import_module(name, *args)

    monkeypatch.setattr(importlib, "import_module", without_driver)
    message = error_of(f"{protocol}://bucket/x.parquet")
    assert message.startswith(f"cannot read {protocol}://bucket/x.parquet: no driver")
    assert message.endswith(f"pip install {package}")


def test_unknown_protocol():
    message = error_of("nope://bucket/x.parquet")
    assert "Protocol not known: nope" in message
    assert message.endswith("use gs://, s3:// or a local path")
