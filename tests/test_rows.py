"""data/rows.py: files in both layouts and the line that reports a mistake in one, tasks, splits and answer
blocks."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from trajectories import write

from data import countdown, gsm8k, hendrycks_math, sources
from data import rows as rows_module
from data.rows import (
    answer_block,
    first,
    load_rows,
    load_task,
    read_records,
    read_rows,
    split_note,
    split_rows,
)
from infra.config import UserError

ROOT = Path(__file__).parent.parent
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


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json"])
@pytest.mark.parametrize(
    "layout", [OWN, PUBLISHED, WITHOUT_QUESTION], ids=["own", "published", "without question"]
)
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
        ({"hint": [1]}, "field 'hint' must be a list of str"),
        ({"answer": 6}, "field 'answer' is missing or not a str"),
        ({"truth": {"target": True, "numbers": [1, 5]}}, "ground truth lacks a usable 'target'"),
        ({"truth": "6"}, "field 'truth' is missing or not a dict"),
        ({"truth": {"numbers": [1, 5]}}, "ground truth lacks a usable 'target'"),
        ({"truth": {"target": "6", "numbers": [1, 5]}}, "ground truth lacks a usable 'target'"),
    ],
)
def test_a_missing_field_is_named_with_file_and_row(change, wanted, tmp_path):
    path = write(
        tmp_path / "rows.jsonl", [OWN, OWN, {k: v for k, v in (OWN | change).items() if v is not None}]
    )
    with pytest.raises(UserError, match=wanted) as e:
        read_rows(path, "train", NEEDS)
    assert f"{path} row 2: " in str(e.value)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"reward_model": {}}, "'reward_model.ground_truth' is missing"),
        ({"reward_model": None}, "'reward_model.ground_truth' is missing"),
        ({"reward_model": {"ground_truth": "6"}}, "'reward_model.ground_truth' is missing or not a dict"),
        ({"question": None, "prompt": []}, "'prompt'"),
        ({"question": None, "prompt": [{"role": "user"}]}, "'prompt'"),
        ({"hint": 3}, "'hint'"),
        ({"answer": "<answer>6</answer>"}, "'answer' must begin with the sentences of 'hint'"),
    ],
)
def test_a_missing_field_of_the_published_layout_is_named(change, wanted, tmp_path):
    with pytest.raises(UserError, match=wanted):
        read_rows(write(tmp_path / "rows.jsonl", [PUBLISHED | change]), "train", NEEDS)


LINE = json.dumps(OWN).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("x.jsonl", LINE + b'\n{"prompt": }\n', r"x\.jsonl line 3: not JSON .*column 12"),
        ("x.jsonl", LINE + b"[1, 2]\n", r"x\.jsonl row 1: must be an object with named fields, not list"),
        ("x.json", b'[\n{"prompt": "x"},\n{"prompt": }\n]', r"x\.json line 3: not JSON .*column 12"),
        ("x.json", LINE + b"{]\n", r"x\.json line 2: not JSON"),
        ("x.jsonl", b'{"prompt": "caf\xe9"}\n', r"x\.jsonl: not UTF-8 text .*byte 15"),
        ("x.jsonl", b"", r"x\.jsonl: no rows"),
        ("x.jsonl", b"\n \n", r"x\.jsonl: no rows"),
        ("x.json", b"[]", r"x\.json: no rows"),
        ("x.csv", b"a,b\n", r"x\.csv: unknown kind of file; must be \.parquet, \.jsonl, \.json"),
        ("x.jsonl", LINE + b'{"prompt": ' + b"9" * 5000 + b"}", "line 2: not readable JSON .*4300 digits"),
        ("x.jsonl", LINE + b"[" * 100_000, "line 2: not readable JSON .*recursion"),
    ],
)
def test_files_that_cannot_be_read_are_one_line(name, content, wanted, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=wanted) as e:
        read_records(tmp_path / name, "train")
    assert "\n" not in str(e.value)
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


def test_rows_without_a_solution_are_read(tmp_path):
    bare = [
        {"prompt": "1 5=6\n", "truth": TRUTH},
        {"prompt": [{"content": "1 5=6\n"}], "reward_model": {"ground_truth": TRUTH}},
    ]
    for name, record in zip(("own", "published"), bare, strict=True):
        (row,) = read_rows(write(tmp_path / f"{name}.jsonl", [record]), "train", NEEDS)
        assert row == {"prompt": "1 5=6\n", "hint": [], "answer": "", "truth": TRUTH}


# ---- unusual files -------------------------------------------------------------------------------


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    for name in ("rows.jsonl", "rows.json"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + json.dumps(OWN).encode())
        assert read_rows(tmp_path / name, "train", NEEDS) == [OWN]


def test_json_lines_in_a_file_named_json(tmp_path):
    (tmp_path / "rows.json").write_bytes(LINE + b"\n" + LINE)
    assert read_rows(tmp_path / "rows.json", "train", NEEDS) == [OWN] * 2


def test_half_a_surrogate_pair_is_replaced_and_said_so(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a\\ud83d\\ud83d\\ude00", "truth": {"x\\udc00": ["\\ud83d"]}}\n')
    ((_, record),) = read_records(path, "train")
    assert record == {"prompt": "a\ufffd\U0001f600", "truth": {"x\ufffd": ["\ufffd"]}}
    assert f"{path}: half surrogate pairs were replaced" in capsys.readouterr().err
    path.write_text('{"prompt": "\\ud83d\\ude00"}')
    read_records(path, "train")
    assert capsys.readouterr().err == ""


# ---- tasks ---------------------------------------------------------------------------------------


def task(load, name="data.mine"):
    return SimpleNamespace(__name__=name, load=load, score=None)


def minimal(split, path=None):
    return [{"prompt": f"{split} {i}", "truth": {"target": i}} for i in range(5)]


def test_a_task_is_any_file_with_load_and_score():
    assert load_task("countdown").__name__ == "data.countdown"
    for name in ("rows", "tokenizer", "published", "algebra", "chess", "../model"):
        with pytest.raises(
            UserError, match=f"task = '{name}'.*tasks are countdown, gsm8k, hendrycks_math, logic$"
        ):
            load_task(name)


def test_a_task_with_nothing_but_split_and_path():
    rows = load_rows(task(minimal), "train", style="short", sizes=())
    assert (
        rows[1] == {"prompt": "train 1", "truth": {"target": 1}, "hint": [], "answer": ""} and len(rows) == 5
    )
    assert load_rows(task(minimal), "test", n=2, seed=0) == load_rows(task(minimal), "test")[:2]
    with pytest.raises(UserError, match="train_rows .* = 6: task mine has 5 rows of split train"):
        load_rows(task(minimal), "train", n=6)
    with pytest.raises(UserError, match=r"sizes = \(3,\): task mine takes no sizes"):
        load_rows(task(minimal), "train", sizes=(3,))
    with pytest.raises(UserError, match="data_path = 'x': task mine takes no data_path"):
        load_rows(task(lambda split: minimal(split)), "train", "x")


def test_a_task_is_given_what_it_takes():
    seen = []

    def load(split, path=None, *, n=None, sizes=None, seed=0):
        seen.append((split, path, n, sizes, seed))
        return minimal(split)

    load_rows(task(load), "train", "", n=3, style="short", sizes=[4], seed=7)
    load_rows(task(load), "test", "rows.jsonl", sizes=None)
    assert seen == [("train", None, 3, (4,), 7), ("test", "rows.jsonl", None, None, 0)]


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([], "task mine: the train set is empty"),
        ([{"prompt": "x", "truth": 1}, "x"], "train row 1: must be a dict"),
        ([{"prompt": 3, "truth": 1}], "train row 0: field 'prompt' is missing or not a str"),
        ([{"prompt": "x"}], "train row 0: field 'truth' is missing"),
        ([{"prompt": "x", "truth": 1, "hint": "y"}], "row 0: field 'hint' is missing or not a list"),
        ([{"prompt": "x", "truth": 1, "hint": [1]}], "row 0: field 'hint' must be a list of str"),
        ([{"prompt": "x", "truth": 1, "answer": 6}], "row 0: field 'answer'"),
        ([{"prompt": "x", "truth": {"seed": np.int64(7)}}], "row 0: must be plain JSON .*int64"),
        ([{"prompt": "x", "truth": 1, "id": np.int64(7)}], "row 0: must be plain JSON .*int64"),
        ([{"prompt": "\ud83d", "truth": 1}], "row 0: must be plain JSON .*surrogates"),
        ([{"prompt": "x", "truth": {1: 2, "a": 3}}], "row 0: must be plain JSON"),
    ],
)
def test_rows_of_a_task_are_checked(rows, wanted):
    with pytest.raises(UserError, match=wanted):
        load_rows(task(lambda split, path=None: rows), "train")


def test_one_file_is_split_into_training_and_test_rows(tmp_path):
    path = write(tmp_path / "rows.jsonl", [OWN | {"truth": TRUTH | {"target": i}} for i in range(25)])
    mine = task(lambda split, path, n=None: first(read_rows(path, split, NEEDS), n, path, split))

    def targets(*a, **k):
        return [row["truth"]["target"] for row in load_rows(mine, *a, **k)]

    assert targets("test", path, one_file="split") == [9, 19]
    assert targets("train", path, one_file="split") == [i for i in range(25) if i not in (9, 19)]
    assert targets("train", path, n=10, one_file="split") == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10]
    assert targets("test", path) == list(range(25))
    with pytest.raises(UserError, match="test_rows .* = 3: .* has 2 rows of split test"):
        targets("test", path, n=3, one_file="split")
    assert str(path) in split_note(path) and "10th" in split_note(path)
    # a folder has its own split, made rows theirs
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "test.jsonl", [OWN] * 3)
    assert len(load_rows(mine, "test", tmp_path / "folder", one_file="split")) == 3
    assert split_note(tmp_path) == split_note("") == split_note(None) == ""


def test_few_rows_keep_one_for_testing():
    assert split_rows([0, 1, 2], "test") == [2] and split_rows([0, 1, 2], "train") == [0, 1]
    assert split_rows([0, 1, 2], "dev") == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("a<answer>b</answer>c", ("a", "b")),
        ("<answer>a</answer><answer>b</answer>", ("<answer>a</answer>", "b")),
        ("<answer>a<answer>b</answer></answer>", ("<answer>a", "b")),
        ("<answer>a</answer><answer>b", ("", "a")),
        ("<answer>\n</answer>", ("", "\n")), ("a", None), ("</answer><answer>", None), ("", None),
    ],
)  # fmt: skip
def test_the_last_and_innermost_block(text, block):
    assert answer_block(text) == block


# ---- files and layouts of others -----------------------------------------------------------------


def verl(i, truth, **other):
    prompt = [{"role": "user", "content": f"What is {i} + 2?"}]
    return {"data_source": "openai/gsm8k", "prompt": prompt, "reward_model": {"ground_truth": truth}, **other}


def test_ground_truth_of_verl_and_dapo(tmp_path):
    write(tmp_path / "test.jsonl", [verl(i, str(i + 2), extra_info={"index": i}) for i in range(4)])
    rows = gsm8k.load("test", tmp_path)
    assert rows[3] == {"prompt": "What is 3 + 2?", "hint": [], "answer": "", "truth": rows[3]["truth"]}
    assert rows[3]["truth"] == {"question": "What is 3 + 2?", "target": "5"}
    dapo = [
        verl(i, r"\frac12") | {"data_source": "math_dapo"} for i in range(2)
    ]  # a source that is none of ours
    assert (
        hendrycks_math.load("test", write(tmp_path / "dapo.jsonl", dapo))[1]["truth"]["target"] == r"\frac12"
    )
    assert len(sources.load("aime", str(tmp_path / "dapo.jsonl"), "test")) == 2
    with pytest.raises(UserError, match="row 0: the target 'two' is not a number"):
        gsm8k.load("test", write(tmp_path / "bad.jsonl", [verl(0, "two")]))
    with pytest.raises(
        UserError, match="row 0: field 'reward_model.ground_truth' .*dict with numbers, target"
    ):
        countdown.load("test", write(tmp_path / "bad.jsonl", [verl(0, "5") | {"data_source": "countdown"}]))


def test_a_prompt_of_messages_is_whole_or_refused(tmp_path):
    def prompt(*messages):
        record = {
            "prompt": [{"role": r, "content": c} for r, c in messages],
            "reward_model": {"ground_truth": TRUTH},
        }
        return read_rows(write(tmp_path / "rows.jsonl", [record]), "train", NEEDS)[0]["prompt"]

    assert prompt(("system", "Count."), ("user", "1 5=6")) == "Count.\n\n1 5=6"
    for messages in (
        [("user", "1 2=3"), ("assistant", "3"), ("user", "1 5=6")],
        [("system", "Count.")],
        [("user", [{"type": "text", "text": "1 5=6"}])],
    ):
        with pytest.raises(UserError, match="row 0: field 'prompt' must be a user message"):
            prompt(*messages)


def test_stray_files_are_no_rows(tmp_path):
    for split in ("train", "test"):
        for name in (
            "part.jsonl",
            ".ipynb_checkpoints/part-checkpoint.jsonl",
            "._part.jsonl",
            ".part.jsonl.lock",
        ):
            path = tmp_path / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, [OWN]) if name[0] != "." or "/" in name else path.write_bytes(b"\0\5\26\7")
    (tmp_path / ".cache" / "test").mkdir(parents=True)
    write(tmp_path / ".cache" / "test" / "x.json", [OWN] * 7)
    assert len(read_rows(tmp_path, "test", NEEDS)) == 1


def test_two_files_of_a_split_and_a_folder_of_arrow(tmp_path, capsys):
    write(tmp_path / "test.parquet", [OWN])
    write(tmp_path / "test.jsonl", [OWN] * 2)
    assert len(read_rows(tmp_path, "test", NEEDS)) == 1
    assert "reading test.parquet, not test.jsonl" in capsys.readouterr().out
    (tmp_path / "train").mkdir()
    (tmp_path / "train/data-00000-of-00001.arrow").touch()
    write(tmp_path / "train/state.json", [OWN])
    with pytest.raises(UserError, match=r"\.arrow: Arrow files are not read; write the rows with to_parquet"):
        read_rows(tmp_path, "train", NEEDS)


def test_shards_of_a_hub_folder_are_read_in_order(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(2):
        name = tmp_path / "data" / f"train-0000{i}-of-00002.parquet"
        write(name, [{"ID": i, "Problem": f"What is 1+{i}?", "Answer": i + 1}])
    rows = sources.load("aime", str(tmp_path), "train")
    assert [r["truth"]["target"] for r in rows] == ["1", "2"] and "What is 1+1?" in rows[1]["prompt"]
    with pytest.raises(UserError, match="no test.parquet or test.jsonl"):
        sources.load("aime", str(tmp_path), "test")


def test_olympiad_bench_as_published(tmp_path):
    row = {
        "question": "Solve.",
        "solution": ["So.", "It is 2 or 3."],
        "final_answer": ["2", "$3$"],
        "unit": None,
    }
    (got,) = sources.load("olympiad_bench", str(write(tmp_path / "o.jsonl", [row])), "test")
    assert got["truth"]["target"] == "2, $3$" and "".join(got["hint"]) == "So.\nIt is 2 or 3."
    assert hendrycks_math.score("<answer>3, 2</answer>", got["truth"])[1] == "right"
    for missing in (None, [], [None]):
        with pytest.raises(UserError, match="row 0: must have the fields problem .or question. and answer"):
            sources.load(
                "olympiad_bench", str(write(tmp_path / "bad.jsonl", [row | {"final_answer": missing}])), "x"
            )


def test_columns_that_nothing_needs_do_not_matter(tmp_path, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    beyond = pa.array([2**62] * 3, pa.timestamp("us"))  # a time that Python does not have
    columns = {k: [v] * 3 for k, v in OWN.items()} | {"created": beyond}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "rows.parquet", "train", NEEDS) == [OWN] * 3
    read = [
        record for _, record in read_records(tmp_path / "rows.parquet", "train")
    ]  # all that Python can hold
    assert [r["prompt"] for r in read] == [OWN["prompt"]] * 3 and "created" not in read[0]
    monkeypatch.setattr(pq, "read_table", lambda path, columns: pytest.fail(f"reads {columns}"))
    with pytest.raises(pytest.fail.Exception, match=r"reads \['prompt', 'hint', 'answer', 'truth'\]"):
        read_rows(tmp_path / "rows.parquet", "train", NEEDS)


MINE = """
from data.countdown import score
from beside import N

def load(split, path=None):
    return [{"prompt": "1 5=6", "truth": {"numbers": [1, 5], "target": 6}}] * N
"""


def test_a_task_may_be_a_path_and_import_its_functions(tmp_path):
    (tmp_path / "beside.py").write_text("N = 3\n")
    (tmp_path / "mine.py").write_text(MINE)
    mine = load_task(str(tmp_path / "mine.py"))
    assert mine is load_task(f"{tmp_path}/./mine.py") and len(load_rows(mine, "test")) == 3
    assert mine.score("<answer>1+5</answer>", {"numbers": [1, 5], "target": 6}) == (1.0, "right")
    for i, (text, wanted) in enumerate((
        ("def load(split): ...\n", r"0.py has no `def score\(response, truth\) -> \(reward, verdict\)`"),
        ("score = 3\n", r"1.py has no `def load\(split, path=None\) -> rows`"),
        ("import no_such_package\n", r"2.py': cannot be imported \(ModuleNotFoundError: .*no_such_package"),
        ("def load(:\n", r"3.py': cannot be imported \(SyntaxError"),
    )):  # fmt: skip
        (tmp_path / f"{i}.py").write_text(text)
        with pytest.raises(UserError, match=wanted) as e:
            load_task(str(tmp_path / f"{i}.py"))
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="nothing.py': there is no such file; tasks are countdown"):
        load_task(str(tmp_path / "nothing.py"))


def test_two_rows_of_a_task_are_shown(tmp_path):
    write(tmp_path / "rows.jsonl", [{"question": "1+1?", "answer": "It is 2.\n#### 2"}] * 3)
    for name, arguments in (("gsm8k", [tmp_path / "rows.jsonl"]), ("logic", [])):
        command = [sys.executable, "-m", "data.rows", name, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0 and done.stdout.count("score   (1.0, 'right')") == 2, done.stderr
    done = subprocess.run([*command[:3], "gsm8k"], capture_output=True, text=True, cwd=ROOT)
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: data_path: GSM8K")
        and "\n" not in done.stderr[:-1]
    )


def test_stray_files_are_no_tasks(monkeypatch, tmp_path):
    for name, content in (
        ("._countdown.py", b"\0\5\26\7\xb0\xff"),
        ("notes-old.py", b"def load(\ndef score(\n"),
    ):
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(rows_module, "__file__", str(tmp_path / "rows.py"))
    with pytest.raises(UserError, match="there is no such task"):
        load_task("._countdown")


def test_what_an_own_load_raises_is_one_line_and_its_functions_can_be_pickled(tmp_path):
    file = tmp_path / "mine.py"
    body = "    return open('/none') if path else None"
    file.write_text(f"def load(split, path=None):\n{body}\n\n\nscore = load\n")
    task = load_task(str(file))
    assert pickle.loads(pickle.dumps(task.load)) is task.load
    with pytest.raises(UserError, match=r"task mine: load\('train'\) raised TypeError: 'NoneType'"):
        load_rows(task, "train")
    with pytest.raises(UserError, match=r"task mine: load\('test'\) raised FileNotFoundError: .*none"):
        load_rows(task, "test", "there")
