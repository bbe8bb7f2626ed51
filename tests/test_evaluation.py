"""Evaluation: statistics against hand-worked numbers, sources, resumed save files, comparisons."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from trajectories import read, write

import evaluate
from data import countdown, hendrycks_math, sources
from data.tokenizer import Tokenizer
from infra import answers, exports
from infra.config import UserError
from infra.stats import paired_shares, paired_t, welch
from model import Transformer
from sampler import generate

ROOT = Path(__file__).parent.parent
BASE = ROOT / "data/tiny/countdown"
SMALL = [f"--model={BASE}", "--rows=6", "--max_new_tokens=40", "--device=cpu", "--threads=1", "--show=0"]
OTHERS = Path(os.environ.get("NANOFT_UFT_DATA", "uft_data")) / "others"  # the published data


# ---- one row of the table ----


def made(reward, verdict, published=None, cut=False):
    own = {"response": "r", "reward": reward, "verdict": verdict, "tokens": 4, "cut": cut}
    return own | {"published": published or [reward, verdict]}


RIGHT, WRONG, NONE = made(1.0, "right"), made(0.1, "wrong"), made(0.0, "no answer", cut=True)


def test_summary_counts_verdicts_and_estimates_pass_at_k():
    strict, odd = made(1.0, "right", [0.1, "wrong"]), made(0.1, "odd")
    groups = [[RIGHT, RIGHT, WRONG, NONE], [WRONG, WRONG, WRONG, odd], [strict, RIGHT, RIGHT, RIGHT]]
    r = answers.summarise("x", groups, "ours")
    assert r["accuracy"]["mean"] == pytest.approx(1.5 / 3) and r["published"] == pytest.approx(5 / 12)
    assert r["verdicts"] == {"right": 6, "wrong": 4, "no answer": 1, "odd": 1}
    assert r["cut"] == 1 and r["problems"] == 3
    means = {k: e["mean"] for k, e in r["pass_at"].items()}
    assert means == pytest.approx({2: (5 / 6 + 0 + 1) / 3, 4: 2 / 3})
    assert answers.summarise("x", groups, "published")["verdicts"]["wrong"] == 5
    cells = dict(zip(*answers.table_rows([r], "ours"), strict=True))
    wanted = {"avg@4": "50.0%", "published": "41.7%", "odd": "1", "malformed": "0"}
    assert wanted.items() <= cells.items()
    assert "published" not in answers.table_rows([r], "published")[0]
    plain = [answers.summarise(name, [[RIGHT], [WRONG]], "ours") for name in "ab"]
    rows = answers.table_rows(plain, "ours")
    assert "published" not in rows[0] and rows[3][:3] == ["mean of 2 tasks", "4", "50.0%"]
    assert len({len(row) for row in rows}) == 1


# ---- sources ----


def published_row(data_source, truth, question="What?"):
    return {"data_source": data_source, "question": question, "reward_model": {"ground_truth": truth}}


def mixed(folder):
    """A file of four sources as published, where a Countdown target is text and unused keys are null."""
    truth = {"question": "1+1", "target": "2", "numbers": None}
    rows = [published_row("aime", truth, f"Problem {i}? Assistant:") for i in range(3)]
    rows.append(published_row("countdown", {"numbers": [3, 4], "target": "7", "question": None}, "3 4=7"))
    rows.append(published_row("openai/gsm8k", {"question": "2+2", "target": "4"}, "2+2?"))
    rows.append(published_row("math500", {"question": "3+3", "target": "6"}, "3+3?"))
    folder.mkdir()
    write(folder / "test.jsonl", rows)
    return str(folder)


def test_sources_of_a_mixed_file(tmp_path, capsys):
    path = mixed(tmp_path / "others")
    assert sources.names(("uft",), path, "test") == ["math500", "aime", "gsm8k", "countdown"]
    prompts = [r["prompt"] for r in sources.load("aime", path, "test")]
    assert prompts == [f"Problem {i}? Assistant:" for i in range(3)]
    assert [len(sources.load("aime", path, "test", n=n)) for n in (2, 50)] == [2, 3]
    assert sources.load("countdown", path, "test")[0]["truth"]["target"] == 7
    assert sources.load("gsm8k", path, "test")[0]["truth"]["target"] == "4"
    assert sources.judge("aime") is hendrycks_math and sources.judge("countdown") is countdown
    with pytest.raises(UserError, match=r"'minerva': .*no row .* only of math500, aime, gsm8k, countdown"):
        sources.load("minerva", path, "test")
    with pytest.raises(UserError, match="no such task in data/"):
        sources.names(("aime", "chess"), path, "test")
    capsys.readouterr()
    rows = sources.load("logic", path, "test", n=4)  # can be made
    assert len(rows) == 4 and "Assistant:" in rows[0]["prompt"]
    assert "4 problems were made" in capsys.readouterr().out


def test_sources_that_cannot_be_judged_are_refused(tmp_path):
    with pytest.raises(UserError, match="needs --data_path with a column data_source"):
        sources.names(("uft",), "", "test")
    write(tmp_path / "test.jsonl", [published_row("chess", {"target": "1"})])
    with pytest.raises(UserError, match="no task judges data_source 'chess'"):
        sources.names(("uft",), str(tmp_path), "test")
    unusable = published_row("countdown", {"numbers": None, "target": "7"})
    write(tmp_path / "train.jsonl", [published_row("aime", {"target": "2"}), unusable])
    with pytest.raises(UserError, match=r"train.jsonl row 1: the ground truth lacks a usable 'numbers'"):
        sources.load("countdown", str(tmp_path), "train")


def test_files_without_the_column_are_read_by_the_task(tmp_path):
    rows = countdown.load("train", n=3, style="short")
    write(tmp_path / "test.jsonl", rows)
    read = sources.load("countdown", str(tmp_path), "test")
    assert [r["prompt"] for r in read] == [r["prompt"] for r in rows]
    # sets of the Hub, which have neither layout
    file = tmp_path / "aime.jsonl"
    write(file, [{"problem": "What is 1+1?", "answer": [2], "solution": "It is 2."}])
    (row,) = sources.load("aime", str(file), "test")
    assert "User: What is 1+1? Show your work" in row["prompt"] and row["truth"]["target"] == "2"
    write(tmp_path / "bad.jsonl", [{"problem": "What?"}])
    with pytest.raises(UserError, match="bad.jsonl row 0: must have the fields problem"):
        sources.load("aime", str(tmp_path / "bad.jsonl"), "test")
    with pytest.raises(UserError, match="can only be read; give --data_path"):
        sources.load("amc", "", "test")


@pytest.mark.skipif(not OTHERS.exists(), reason="needs the published data")
def test_the_published_file_has_eight_sources():
    names = sources.names(("uft",), str(OTHERS), "test")
    counts = {name: len(sources.load(name, str(OTHERS), "test")) for name in names}
    wanted = {"math500": 500, "aime": 30, "amc": 83, "minerva": 272, "olympiad_bench": 675}
    assert counts == wanted | {"gsm8k": 1319, "hendrycks_math": 1024, "countdown": 1024}


# ---- answers ----


@pytest.mark.parametrize("fast", [True, False])
def test_on_finish_comes_once_a_prompt_with_all_its_completions(fast):
    model, tokenizer = Transformer.from_pretrained(BASE), Tokenizer.from_pretrained(BASE)
    prompts = [tokenizer.encode(r["prompt"]) for r in countdown.load("test", n=5, style="short")]
    told = []
    how = {"batch_size": 6, "fast": fast}
    how["on_finish"] = lambda i, completions: told.append((i, [list(c.tokens) for c in completions]))
    results = generate(model, prompts, 3, 30, 1.0, tokenizer.stop_ids, 0, **how)
    assert sorted(i for i, _ in told) == list(range(5))
    assert all(tokens == [c.tokens for c in results[i]] for i, tokens in told)


def run(*args):
    evaluate.main([*SMALL, *map(str, args)])


def test_saved_answers_and_tables(tmp_path, capsys):
    path, table = tmp_path / "a.jsonl", tmp_path / "a.md"
    run("--n=3", "--temperature=1", f"--save={path}", f"--table={table}", "--show=2")
    out = capsys.readouterr().out
    head, *records = read(path)
    assert head["evaluation"]["n"] == 3 and head["evaluation"]["max_new_tokens"] == 40
    rows = countdown.load("test", n=6, style="short")
    wanted = [("countdown", i, r["prompt"]) for i, r in enumerate(rows)]
    assert [(r["task"], r["index"], r["prompt"]) for r in records] == wanted
    for record in records:
        assert len(record["answers"]) == 3
        for a in record["answers"]:
            judged = list(countdown.score(a["response"], record["truth"]))
            assert [a["reward"], a["verdict"]] == judged == a["published"]
    mean = sum(a["reward"] == 1 for r in records for a in r["answers"]) / 18
    assert out.count("--- ") == 2 and f"{mean:.1%}" in out and "avg@3" in out and "pass@2" in out
    assert table.read_text().splitlines()[3].startswith(f"| countdown | 6 | {mean:.1%} |")
    other, other_table = tmp_path / "b.jsonl", tmp_path / "b.json"
    run("--n=3", "--temperature=1", "--batch_size=4", f"--save={other}", f"--table={other_table}")
    assert (tmp_path / "b.jsonl").read_text() == path.read_text()
    result = json.loads((tmp_path / "b.json").read_text())["results"][0]
    verdicts = Counter(a["verdict"] for r in records for a in r["answers"])
    assert result["verdicts"] == verdicts and result["accuracy"]["mean"] == pytest.approx(mean)
    run("--n=3", "--temperature=1", f"--save={path}", f"--table={table}")  # both may be written again
    assert "6 of 6 problems are answered already" in capsys.readouterr().out


def test_an_interrupted_evaluation_goes_on(tmp_path, capsys, monkeypatch):
    """Answers are in the file as they are made; a half-written line is made again, and nothing else is."""
    whole, path = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    run("--temperature=1", f"--save={whole}")
    scored, score = [], countdown.score

    def stopping(response, truth):
        scored.append(response)
        if len(scored) == 4:
            raise KeyboardInterrupt
        return score(response, truth)

    monkeypatch.setattr(countdown, "score", stopping)
    with pytest.raises(KeyboardInterrupt):
        run("--temperature=1", f"--save={path}")
    assert len(read(path)) == 1 + 3
    text = path.read_text()
    path.write_text(text[:-5])  # the third answer is half-written now
    scored.clear()
    monkeypatch.setattr(countdown, "score", lambda r, t: scored.append(r) or score(r, t))
    run("--temperature=1", f"--save={path}")
    assert path.read_text() == whole.read_text() and len(scored) == 4
    assert "2 of 6 problems are answered already" in capsys.readouterr().out
    path.write_text(whole.read_text()[:30])  # not even the first line is whole
    run("--temperature=1", f"--save={path}")
    assert path.read_text() == whole.read_text()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("--temperature=0.5", "temperature = 1.0, not 0.5"),
        ("--seed=1", "seed = 0, not 1"),
        ("--rows=5", "rows = 6, not 5"),
        ("--max_new_tokens=41", "max_new_tokens"),
        ("--n=2", "n = 1, not 2"),
        (f"--model={ROOT / 'data/tiny/logic'}", "weights"),
        ("--sizes=6", "sizes"),
        ("--task=logic", "task"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, change, name):
    path = tmp_path / "a.jsonl"
    run("--temperature=1", f"--save={path}")
    before = path.read_text()
    with pytest.raises(UserError, match=name):
        run("--temperature=1", f"--save={path}", change)
    assert path.read_text() == before


def test_files_of_others_are_never_overwritten(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"precious": 1}\n')
    (tmp_path / "mine.md").write_text("# precious\n")
    for args, message in (
        ([f"--save={tmp_path / 'mine.jsonl'}"], "save = .*holds something else"),
        ([f"--table={tmp_path / 'mine.md'}"], "table = .*holds something else"),
        ([f"--save={tmp_path}"], "is a folder"),
        ([f"--save={tmp_path / 'no/a.jsonl'}"], "cannot be written"),
        ([f"--table={tmp_path / 'a.txt'}"], "must end in .md or .json"),
        (["--export=tldr", "--data_path=x", f"--save={tmp_path / 'mine.jsonl'}"], "holds something else"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.main([*args, "--model=nowhere"])  # before the model is even looked for
    assert (tmp_path / "mine.jsonl").read_text() == '{"precious": 1}\n'
    assert (tmp_path / "mine.md").read_text() == "# precious\n"


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    run(f"--save={path}")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], "oops\n", *lines[3:]]))
    with pytest.raises(UserError, match="a.jsonl line 4: not a line"):
        run(f"--save={path}")
    for number, damaged in ((1, '{"evaluation": 3}\n'), (2, lines[1].replace('"response"', '"said"'))):
        path.write_text("".join([*lines[: number - 1], damaged, *lines[number:]]))
        with pytest.raises(UserError, match=f"a.jsonl line {number}: not a line"):
            run(f"--save={path}")


def test_prompts_and_answers_that_do_not_fit_the_window(tmp_path, capsys):
    """A prompt of the window's 512 positions is counted as too long; one of 500 leaves twelve tokens to its
    answer.
    """
    model, tokenizer = Transformer.from_pretrained(BASE), Tokenizer.from_pretrained(BASE)
    one = len(tokenizer.encode("9 "))
    rows = [{"prompt": "9 " * (k // one), "truth": {"numbers": [9], "target": 9}} for k in (512, 500, 40)]
    assert [len(tokenizer.encode(r["prompt"])) for r in rows] == [512, 500, 40]
    write(tmp_path / "test.jsonl", rows)
    save = tmp_path / "a.jsonl"
    run("--rows=0", "--max_new_tokens=0", f"--data_path={tmp_path}", "--temperature=1.5", f"--save={save}")
    out = capsys.readouterr().out
    assert "1 of 3 prompts fill the model's 512 positions" in out and "too long" in out
    head, *records = read(save)
    assert head["evaluation"]["max_new_tokens"] == 1024
    first, second, _ = (r["answers"][0] for r in records)
    assert (first["verdict"], first["reward"], first["tokens"]) == ("too long", 0.0, 0)
    prompt = tokenizer.encode(rows[1]["prompt"])
    ((alone,),) = generate(model, [prompt], 1, 12, 1.5, tokenizer.stop_ids, 0, keys=[1])
    assert second["tokens"] == len(alone.tokens) <= 12 and second["cut"] == (not alone.finished)
    assert second["response"] == tokenizer.decode(alone.tokens, skip_special=True)


def test_the_published_checker_beside_ours():
    row = {"prompt": "Assistant:", "truth": {"numbers": [3, 4], "target": 7}}
    a = {"response": "<answer> 3+4 </answer>\n", "tokens": 9, "reward": 1.0, "verdict": "right"}
    # Only the last line is searched there.
    assert evaluate.published_verdict(countdown, row, a) == [0.0, "no answer"]
    assert evaluate.published_verdict(object(), row, a) == [1.0, "right"]
    steps = row | {"truth": row["truth"] | {"steps": True}}
    assert evaluate.published_verdict(countdown, steps, a) == [1.0, "right"]


def test_processes_share_the_problems_and_any_number_continues(tmp_path):
    """Two processes write two parts, merged at the end; a single process takes over parts left behind."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    launcher = "-m torch.distributed.run --nproc-per-node=2 --rdzv-backend=c10d --rdzv-endpoint=localhost:0"
    two, one = tmp_path / "two.jsonl", tmp_path / "one.jsonl"
    args = [*SMALL, "--temperature=1", "--rows=7"]
    files = [f"--save={two}", f"--table={tmp_path / 'two.md'}"]
    command = [sys.executable, *launcher.split(), "evaluate.py", *args, *files]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    evaluate.main([*args, f"--save={one}"])
    assert two.read_text() == one.read_text() and not list(tmp_path.glob("*.part-*"))
    assert done.stdout.count("countdown ") == 1 and "| countdown | 7 |" in (tmp_path / "two.md").read_text()
    head, *lines = one.read_text().splitlines(keepends=True)
    for k in range(3):  # three processes were interrupted
        (tmp_path / f"new.jsonl.part-{k}").write_text(head + "".join(lines[k : k + 2]) + lines[6][:20])
    evaluate.main([*args, f"--save={tmp_path / 'new.jsonl'}"])
    assert (tmp_path / "new.jsonl").read_text() == one.read_text() and not list(tmp_path.glob("*.part-*"))


def test_several_tasks_of_a_file_in_one_table(tmp_path, capsys):
    path, save = mixed(tmp_path / "others"), tmp_path / "a.jsonl"
    run("--task=uft,logic", f"--data_path={path}", "--rows=3", "--max_new_tokens=8", f"--save={save}")
    table = [" ".join(line.split()[:2]) for line in capsys.readouterr().out.splitlines()]
    assert {"math500 1", "aime 3", "gsm8k 1", "countdown 1", "logic 3", "mean of"} <= set(table)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--temperature=0 --n=2", "n = 2: greedy answers are all the same; give a --temperature"),
        ("--top_p=0.9", "top_p = 0.9: greedy answers are all the same"),
        ("--top_p=0", "top_p = 0.0: must be above 0 and at most 1"),
        ("--export=vicuna", "export = 'vicuna' is not one of '', uft, alpaca_eval, mt_bench"),
        ("--export=tldr --save=x", "data_path = '': --export=tldr needs both files"),
        ("--export=tldr --data_path=x", "save = '': --export=tldr needs both files"),
        ("--chat --save=a.jsonl", "save = 'a.jsonl': is not written by --chat or --compare"),
        ("--compare a b --table=a.md", "table = 'a.md': is not written by --chat or --compare"),
        ("--export=tldr --save=x.jsonl --data_path=x --table=a.md", "table = 'a.md': tldr has no table"),
        ("--compare a.jsonl", "compare: name two files"),
        ("--compare=a.jsonl", "against = (): name both sides"),
        ("--task=", "task = (): must not be empty"),
        ("--task=chess", "task = 'chess': there is no such task"),
        ("--checker=mine", "checker = 'mine' is not one of"),
        ("--style=long", "style = 'long' is not one of"),
        ("--split=dev", "split = 'dev' is not one of"),
        ("--dtype=float16", "dtype = 'float16' is not one of"),
        ("--n=0", "n = 0: must be >= 1"),
        *((f"--{key}=-1", f"{key} = -1") for key in ("top_k", "rows", "max_new_tokens", "temperature")),
        ("--row=3", "unknown knob 'row'; the nearest is 'rows'"),
        ("--model=/nowhere", "model = '/nowhere': no such directory"),
        ("--data_path=/nowhere.jsonl", "/nowhere.jsonl"),
        ("--save=/nowhere/a.jsonl", "save = '/nowhere/a.jsonl': cannot be written"),
    ],
)
def test_refusals(args, message):
    with pytest.raises(UserError) as e:
        evaluate.main(args.split())
    assert str(e.value).startswith(message) and "\n" not in str(e.value)


# ---- comparisons ----


def write_answers(path, shares, task="t", n=1):
    """A saved file where problem i has shares[i] right answers of n; None: the problem is missing."""
    records = {}
    for i, right in enumerate(shares):
        if right is not None:
            record = {"task": task, "index": i, "prompt": f"p{i}", "truth": {"target": i}}
            records[task, i] = record | {"answers": [RIGHT] * right + [WRONG] * (n - right)}
    exports.merge_answers(str(path), {"n": n}, records)
    return str(path)


def test_comparison_of_greedy_answers(tmp_path, capsys):
    a = write_answers(tmp_path / "a.jsonl", [1, 1, 0, 0, 0, 0, 0, 1])
    b = write_answers(tmp_path / "b.jsonl", [1, 0, 1, 1, 1, 1, 1, None])
    evaluate.main(["--compare", a, b, "--show=2"])
    out = capsys.readouterr().out
    low, high = paired_shares(1, 5, 7)[1:]
    (row,) = [line.split() for line in out.splitlines() if line.startswith("t ")]
    assert row[:5] == ["t", "7", "28.6%", "85.7%", "+57.1%"] and row[-2:] == ["1", "5"]
    assert f"{low:+.1%} .. {high:+.1%}" in out and "0.2188  exact McNemar" in out
    assert "1 of A's 8 problems are left out" in out
    assert "B better: 5 of 7 problems, the first 2" in out and "A better: 1 of 7 problems" in out
    assert out.count("--- t: ") == 3 and "A 100% 'r': right" in out and "B 0% 'r': wrong" in out


def test_comparison_of_several_answers_and_seeds(tmp_path, capsys):
    a, b = (
        [write_answers(tmp_path / f"{name}{i}.jsonl", seed, n=2) for i, seed in enumerate(seeds)]
        for name, seeds in (("a", [[0, 1, 2, 0], [0, 1, 0, 0]]), ("b", [[2, 1, 2, 0], [1, 1, 1, 2]]))
    )
    evaluate.main(["--compare", ",".join(a), ",".join(b)])
    out = capsys.readouterr().out
    (mean, low, high), p = paired_t([3 / 4, 0, 1 / 4, 2 / 4])
    assert f"{mean:+.1%}  {low:+.1%} .. {min(1, high):+.1%}  {p:.4f}  paired t over problems" in out
    low, high = welch([3 / 8, 1 / 8], [5 / 8, 5 / 8])[1:]
    means = "A 37.5% 12.5%, B 62.5% 62.5%: B - A +37.5%"
    assert f"{means}, 95 % interval {low:+.1%} .. {high:+.1%} (Welch's t)" in out
    evaluate.main(["--compare", a[0], ",".join(b)])
    assert "no interval over seeds" in capsys.readouterr().out


def test_comparison_tells_equal_problems_apart_and_tasks(tmp_path, capsys):
    """Twice the same prompt and truth are two problems; over several tasks there is a row of all."""

    def file(name, answers):
        records = {}
        for i, (task, right) in enumerate(answers):
            record = {"task": task, "index": i, "prompt": "p", "truth": 1}
            records[task, i] = record | {"answers": [RIGHT if right else WRONG]}
        exports.merge_answers(str(tmp_path / name), {}, records)
        return str(tmp_path / name)

    a, b = file("a", [("x", 1), ("x", 0), ("y", 0)]), file("b", [("x", 1), ("x", 1), ("y", 1)])
    evaluate.main(["--compare", a, b])
    rows = [line.split()[:5] for line in capsys.readouterr().out.splitlines()]
    for row in (["x", "2", "50.0%", "100.0%", "+50.0%"], ["all", "3", "33.3%", "100.0%", "+66.7%"]):
        assert row in rows


def test_comparison_refuses(tmp_path):
    a, b = write_answers(tmp_path / "a.jsonl", [1, 0]), write_answers(tmp_path / "b.jsonl", [1, 0], task="u")
    c, empty = write_answers(tmp_path / "c.jsonl", [1]), write_answers(tmp_path / "e.jsonl", [])
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    for sides, message in (
        ((a, b), "no problem in common"),
        ((f"{a},{c}", a), "c.jsonl: has other problems"),
        ((a, empty), "holds no answers"),
        ((a, str(tmp_path / "x.jsonl")), "not a file of answers"),
        ((a, str(tmp_path / "none.jsonl")), "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.main(["--compare", *sides])
