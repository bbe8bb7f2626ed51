"""data/rows.py: the files a user brings, in both layouts, and the line that says what is wrong with one."""

import json
import sys

import pytest

from infra.config import UserError
from data.rows import read_records, read_rows

NEEDS = {"target": int, "numbers": list}
TRUTH = {"target": 6, "numbers": [1, 5]}
OWN = {"prompt": "1 5=6\n", "hint": ["1+5=6\n"], "answer": "<answer>6</answer>", "truth": TRUTH}
PUBLISHED = {
    "question": "1 5=6\n",
    "prompt": [{"role": "user", "content": "ignored beside a question"}],
    "hint": ["1+5=6\n"],
    "answer": "1+5=6\n<answer>6</answer>",
    "reward_model": {"style": "rule", "ground_truth": TRUTH},
}
WITHOUT_QUESTION = {k: v for k, v in PUBLISHED.items() if k != "question"}
WITHOUT_QUESTION["prompt"] = [{"role": "user", "content": "1 5=6\n"}]


def write(path, records):
    if path.suffix == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json"])
@pytest.mark.parametrize("layout", [OWN, PUBLISHED, WITHOUT_QUESTION], ids=["own", "published", "without question"])
def test_both_layouts_in_every_kind_of_file(layout, suffix, tmp_path):
    path = write(tmp_path / f"rows.{suffix}", [layout] * 3)
    assert read_rows(path, "train", NEEDS) == [OWN] * 3
    assert read_rows(str(path), "test", NEEDS) == [OWN] * 3


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json"])
def test_a_folder_has_a_file_for_each_split(suffix, tmp_path):
    for split, target in (("train", 6), ("test", 7)):
        write(tmp_path / f"{split}.{suffix}", [OWN | {"truth": TRUTH | {"target": target}}])
    assert [read_rows(tmp_path, s, NEEDS)[0]["truth"]["target"] for s in ("train", "test")] == [6, 7]
    (tmp_path / f"test.{suffix}").unlink()
    with pytest.raises(UserError, match=r"no test\.parquet or test\.jsonl"):
        read_rows(tmp_path, "test", NEEDS)


def test_empty_sentences_are_dropped_and_characters_kept(tmp_path):
    odd = "a\u2028b\x85c\r\n🙂"  # splitlines() would cut these
    path = write(tmp_path / "rows.jsonl", [OWN | {"prompt": odd, "hint": ["", "x", ""]}])
    (row,) = read_rows(path, "train", NEEDS)
    assert row["prompt"] == odd and row["hint"] == ["x"]


def test_blank_lines_and_a_missing_last_newline_are_fine(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n" + json.dumps(OWN) + "\n\n  \n" + json.dumps(OWN))
    assert len(read_rows(tmp_path / "rows.jsonl", "train", NEEDS)) == 2
    (tmp_path / "one.json").write_text(json.dumps(OWN))  # a single object is a file of one row
    assert len(read_rows(tmp_path / "one.json", "train", NEEDS)) == 1


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"prompt": None}, "field 'prompt' is missing or not a str"),
        ({"prompt": 7}, "field 'prompt'"),
        ({"hint": "1+5=6"}, "field 'hint' is missing or not a list"),
        ({"hint": [1]}, "field 'hint' should be a list of strings"),
        ({"answer": None}, "field 'answer'"),
        ({"truth": "6"}, "field 'truth' is missing or not a dict"),
        ({"truth": {"numbers": [1, 5]}}, "ground truth lacks a usable 'target'"),
        ({"truth": {"target": "6", "numbers": [1, 5]}}, "ground truth lacks a usable 'target'"),
    ],
)
def test_a_missing_field_is_named_with_file_and_row(change, wanted, tmp_path):
    path = write(tmp_path / "rows.jsonl", [OWN, OWN, {k: v for k, v in (OWN | change).items() if v is not None}])
    with pytest.raises(UserError, match=wanted) as e:
        read_rows(path, "train", NEEDS)
    assert f"{path} row 2: " in str(e.value)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"reward_model": {}}, "'truth'"),
        ({"reward_model": None}, "'truth'"),
        ({"question": None, "prompt": []}, "'prompt'"),
        ({"question": None, "prompt": [{"role": "user"}]}, "'prompt'"),
        ({"hint": None}, "'hint'"),
        ({"answer": None}, "'answer'"),
        ({"answer": "<answer>6</answer>"}, "'answer' should begin with the sentences of 'hint'"),
    ],
)
def test_a_missing_field_of_the_published_layout_is_named(change, wanted, tmp_path):
    with pytest.raises(UserError, match=wanted):
        read_rows(write(tmp_path / "rows.jsonl", [PUBLISHED | change]), "train", NEEDS)


def test_broken_lines_are_numbered(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(OWN) + '\n\n{"prompt": }\n')
    with pytest.raises(UserError, match=r"rows\.jsonl line 3: not JSON .*column 12"):
        read_records(path, "train")
    path.write_text(json.dumps(OWN) + "\n[1, 2]\n")
    with pytest.raises(UserError, match=r"rows\.jsonl row 1: an object with named fields is wanted, not list"):
        read_records(path, "train")


def test_a_broken_line_of_a_json_file_is_numbered(tmp_path):
    (tmp_path / "rows.json").write_text('[\n{"prompt": "x"},\n{"prompt": }\n]')
    with pytest.raises(UserError, match=r"rows\.json line 3: not JSON .*column 12"):
        read_records(tmp_path / "rows.json", "train")


def test_what_is_no_text_at_all(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl: not UTF-8 text .*byte 15"):
        read_records(path, "train")
    for content in ("", "\n \n"):
        path.write_text(content)
        with pytest.raises(UserError, match=r"rows\.jsonl: no rows"):
            read_records(path, "train")
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(UserError, match=r"rows\.json: no rows"):
        read_records(tmp_path / "rows.json", "train")
    (tmp_path / "rows.csv").write_text("a,b\n")
    with pytest.raises(UserError, match=r"rows\.csv: unknown kind of file; \.parquet, \.jsonl or \.json"):
        read_records(tmp_path / "rows.csv", "train")
    with pytest.raises(UserError, match="no such file or folder"):
        read_records(tmp_path / "nothing.jsonl", "train")


def test_parquet_files_that_are_none(tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "rows.parquet"
    for content in (b"", b"PAR1 not really PAR1"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"rows\.parquet: not a readable parquet file") as e:
            read_records(path, "train")
        assert "\n" not in str(e.value)
    write(path, [OWN, OWN])
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"rows\.parquet: not a readable parquet file"):
        read_records(path, "train")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.parquet", [OWN])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install -e '\.\[data\]'"):
        read_records(path, "train")
    assert len(read_records(write(tmp_path / "rows.jsonl", [OWN]), "train")) == 1
