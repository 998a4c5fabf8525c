"""Reference sequences as Parquet: tables of text, and FASTA whose headers hold lineages."""

import pyarrow.parquet as pq
import pytest
from support.commands import call

from bioscan_jax.config import SideTableConfig
from bioscan_jax.errors import InputError
from bioscan_jax.table.as_parquet import write_parquet


def test_a_table_of_text_becomes_parquet_that_is_understood(tmp_path):
    path, output = tmp_path / "BOLD_Public.tsv", tmp_path / "bold.parquet"
    path.write_text('processid\tspecies\tplate\tnuc\nA-1\tAedes "x\t007\tACGT\nA-2\t\t010\tTT-A\n')
    refused = call("describe", path)
    assert refused.returncode == 2
    assert f"bioscan data parquet {path} --output FILE.parquet" in refused.stderr
    done = call("data", "parquet", path, "--output", output)
    assert done.returncode == 0, done.stderr
    assert "2 rows\nread as text delimited by tab" in done.stdout
    assert "sequence = nuc, id = processid, species = species" in done.stdout
    assert pq.read_table(output).to_pylist() == [
        {"processid": "A-1", "species": 'Aedes "x', "plate": "007", "nuc": "ACGT"},
        {"processid": "A-2", "species": None, "plate": "010", "nuc": "TT-A"},
    ]
    printed = call("describe", output).stdout
    assert "id = processid" in printed


@pytest.mark.parametrize(
    ("header", "lineage"),
    [
        ("A.1.2 Bacteria;Firmicutes;Bacilli;O;F;G;G sp.", "Bacteria;Firmicutes;Bacilli;O;F;G;G sp."),
        ("Fu_sp|M1|SH1.10FU|refs|k__Fungi;p__Ascomycota;g__Epichloe;s__Epichloe_typhina", None),
        ("X1;tax=k:Fungi,p:Ascomycota,g:Epichloe,s:Epichloe_typhina;", None),
    ],
)
def test_lineages_of_headers_become_a_column(tmp_path, header, lineage):
    path, output = tmp_path / "x.fasta", tmp_path / "x.parquet"
    path.write_text(f">{header}\nACGT\n>{header[:2]}b nothing known\nACGA\n>{header.replace('1', '3')}\nACGG\n")
    notes = write_parquet(SideTableConfig(path=str(path)), str(output))
    assert "2 of 3 rows" in notes[1]
    assert "nothing known" in notes[2]
    known = lineage or "Fungi;Ascomycota;;;;Epichloe;Epichloe typhina"
    table = pq.read_table(output)
    assert table["taxonomy"].to_pylist() == [known, None, known]
    assert table["sequence_id"][0].as_py() == header.split(" ")[0]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.csv", "\tACGTACGT\tACGTTT\ns1\t1\t2\n", "turn a table around whose columns are named by sequences"),
        ("x.tsv", "processid\tnuc\tnuc\nA\tACGT\tAC\n", "has 2 columns named 'nuc'"),
        ("x.fasta", ">A-1|Aedes aegypti|COI-5P\nACGT\n", "most headers hold no lineage"),
        ("x.nex", "#NEXUS\nbegin data;\n", "its header has 1 column"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_leaves_no_file(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words):
        write_parquet(SideTableConfig(path=str(tmp_path / name)), str(tmp_path / "x.parquet"))
    assert [path.name for path in tmp_path.iterdir()] == [name]
