"""experiments/report.py: what the page says of a run, as data and in a browser."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
from trajectories import write

import train_ift
import train_uft
from experiments import report
from experiments.report import LONG, changed_knobs, curves, facts, read_run, warnings, write_report
from infra.config import write_toml

ROOT = Path(__file__).parent.parent
UFT = (
    "--steps=4 --problems=4 --mini_batch=2 --train_rows=20 --test_rows=6 --hint_steps=2 --eval_every=2"
    " --sample_every=2 --device=cpu --threads=1 --show=2"
)
IFT = "--epochs=0.5 --batch=4 --train_rows=16 --test_rows=6 --eval_every=1 --device=cpu --threads=1 --show=0"
EVIL = "<script>alert(1)</script><!--\u2028&amp;\"'`${1}\\u003c"


def page_data(folder):
    """The data in a page, as a browser reads it."""
    (text,) = re.findall(r'type="application/json" id="data">(.*?)</script>', page(folder), re.S)
    return json.loads(text)


def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def trajectory(tokens, n_given, reward):
    verdict, advantage = ("right", 0.5) if reward == 1 else ("wrong", -0.5)
    return {"tokens": tokens, "n_given": n_given, "logprobs": [-0.5] * len(tokens), "advantage": advantage,
            "shown": 1, "reward": reward, "verdict": verdict, "cut": False}  # fmt: skip


def group(step, problem, rewards, dead=False):
    made = [trajectory(["hint ", "rest\n", EVIL], 1, r) for r in rewards]
    return {"step": step, "kind": "group", "problem": problem, "prompt": f"prompt {problem}", "dead": dead,
            "trajectories": made}  # fmt: skip


def answer(step, prompt, reward):
    verdict = "right" if reward == 1 else "wrong"
    return {"step": step, "kind": "answer", "prompt": prompt, "response": EVIL, "tokens": 3, "cut": False,
            "reward": reward, "verdict": verdict}  # fmt: skip


def rollout(step, **more):
    """A step's metrics, of a run without trouble."""
    metrics = {"critic/rewards/mean": 0.5, "solved": 0.5, "solved/hint_0": 0.25, "solved/hint_10": 1.0,
               "solved/hint_2": 0.5, "hint/share": 0.5, "response_length/mean": 20.0, "dead_groups": 0.5,
               "response_length/clip_ratio": 0.0, "actor/entropy": 0.5, "actor/hint_nll": 1.0}  # fmt: skip
    return {"step": step} | metrics | more


def validation(step, accuracy):
    ends = {"val/low": accuracy - 0.1, "val/high": accuracy + 0.1}
    return {"step": step, "val/accuracy": accuracy, **ends, "train_s": 2.0 * step}


TARGETS = [["ask", None, None, None], ["4", "5", 1.25, 2.0], [EVIL, EVIL, 0.0, 0.5]]
SAMPLES = [
    answer(0, "one", 0.1), answer(0, "two", 1.0), answer(0, "three", 1.0),
    group(1, 7, [0.1, 0.1], dead=True), group(1, 8, [1.0, 0.1]),
    group(21, 7, [1.0, 0.1]), group(21, 8, [0.1, 0.0]),
    {"step": 1, "kind": "row", "tokens": TARGETS},
    answer(40, "one", 1.0), answer(40, "three", 1.0), answer(40, EVIL, 0.1), answer(40, "two", 0.1),
]  # fmt: skip


def made_run(folder, accuracy=0.75, **knobs):
    """A run's folder with every kind of record."""
    folder.mkdir()
    config = train_uft.Config(out_dir=str(folder), dtype="float32", **knobs)
    write_toml(config, folder / "config.toml")
    metrics = [validation(0, 0.25), *map(rollout, range(1, 41)), validation(40, accuracy)]
    write(folder / "metrics.jsonl", metrics)
    write(folder / "samples.jsonl", SAMPLES)
    return folder


# ---- runs of both trainers ---------------------------------------------------------------------------------


def test_a_run_of_uft_ends_with_its_page(tmp_path):
    train_uft.main([*UFT.split(), f"--out_dir={tmp_path / 'a'}"])
    (run,) = page_data(tmp_path / "a")
    records = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    for key in ("val/accuracy", "dead_groups"):
        written = [[r["step"], pytest.approx(r[key], abs=1e-6)] for r in records if key in r]
        assert run["curves"][key] == written
    assert run["changed"]["steps"] == [4, 1000] and run["changed"]["hint_steps"] == [2, 600]
    assert not {"out_dir", "dtype", "rollout_dtype", "algo"} & run["changed"].keys()
    assert [g["step"] for g in run["groups"]] == [1, 1, 3, 3] and run["rows"] == []
    assert [a["step"] for a in run["answers"]] == [0, 0] + [4] * 6
    named = run["facts"]
    assert named["method, task, seed"].startswith("uft, countdown") and named["device"] == "cpu" and "4 steps" in named["training"]
    assert "test accuracy, step 4" in named and "test accuracy, step 0" in named
    sampled = records[-2]["sampled_tokens"]
    assert named["tokens"] == f"{sampled:,} sampled" and sampled > 0


def test_a_run_of_ift_ends_with_a_page_for_each_loss(tmp_path):
    train_ift.main([*IFT.split(), f"--out_dir={tmp_path / 'b'}"])
    for name in ("sft", "ift"):
        (run,) = page_data(tmp_path / "b" / name)
        assert run["name"] == name and run["facts"]["method, task, seed"].startswith("sft, ift, ") and run["groups"] == []
        targets = [t for row in run["rows"] for t in row["tokens"] if t[1] is not None]
        assert targets and all(len(t) == 4 and t[3] >= 0 for t in targets)
        assert {"loss", "val/loss", "val/accuracy"} <= run["curves"].keys() and len(run["answers"]) == 6
        assert re.fullmatch(r"[\d,]+ trained", run["facts"]["tokens"]) and "loss" not in run["changed"]
    weights = {t[3] for t in targets}
    assert len(weights) > 5  # of the last one, ift


def test_the_defaults_are_those_of_the_trainers(tmp_path):
    for trainer in (train_uft, train_ift):
        config = json.loads(json.dumps(asdict(trainer.Config())))
        assert changed_knobs(config | {"out_dir": "x", "dtype": "bfloat16"}) == {}
        keys = [k for k in config if k not in ("algo", "loss", "out_dir") and "dtype" not in k]
        other = {k: ["other"] if isinstance(config[k], list) else "other" for k in keys}
        assert changed_knobs(config | other) == {k: [other[k], config[k]] for k in keys}
    assert changed_knobs(config | {"algo": "mine", "my_knob": 3})["my_knob"] == [3, None]


# ---- made runs ---------------------------------------------------------------------------------------------


def test_two_runs_are_on_one_page(tmp_path):
    a, b = made_run(tmp_path / "a"), made_run(tmp_path / "b", 0.5, lr=0.1)
    write_report(a, b)
    first, second = page_data(a)
    assert (first["name"], second["name"]) == ("a", "b") and not (b / "report.html").exists()
    assert first["changed"] == {} and second["changed"] == {"lr": [0.1, 0.0002]}
    assert first["facts"]["test accuracy, step 40"] == "75.0% (65.0% to 85.0%)"
    assert second["facts"]["test accuracy, step 40"] == "50.0% (40.0% to 60.0%)"
    assert first["facts"]["training"] == "40 steps, 80 s"


def test_curves_are_means_over_windows_and_validations_are_not(tmp_path):
    records = [{"step": s, "solved": s, "val/accuracy": s / 10, "actor/hint_nll": 0.0} for s in range(1, 8)]
    found = curves(records, 3)
    assert found["solved"] == [[3, 2], [6, 5], [7, 7]] and len(found["val/accuracy"]) == 7
    assert "actor/hint_nll" not in found and curves([], 1) == {}  # there were no hints
    folder = made_run(tmp_path / "a")
    write(folder / "metrics.jsonl", map(rollout, range(1, 10_001)))
    run = read_run(folder)
    assert run["window"] == 100 and {len(c) for c in run["curves"].values()} == {100}


def test_text_cannot_leave_the_data(tmp_path):
    folder = made_run(tmp_path / "a")
    write_report(folder)
    assert "<script>alert" not in page(folder) and page(folder).count("</script>") == 2
    assert page(folder).count("<") == report.PAGE.count("<")
    (run,) = page_data(folder)
    assert run["groups"][0]["trajectories"][0]["tokens"][2] == EVIL and run["answers"][0]["response"] == EVIL
    assert set(re.findall(r"https?://[\w.]+", report.PAGE)) == {"http://www.w3.org"}  # names of namespaces
    assert not re.search(r"\bsrc=|\bhref=|@import|url\(|fetch\(", report.PAGE)


@pytest.mark.parametrize("missing", ["samples.jsonl", "config.toml", "metrics.jsonl", "all"])
def test_a_missing_file_leaves_its_part_out(tmp_path, missing, capsys):
    folder = made_run(tmp_path / "a")
    for path in folder.iterdir():
        if missing in (path.name, "all"):
            path.unlink()
    write_report(folder)
    (run,) = page_data(folder)
    assert bool(run["groups"]) == (missing not in ("samples.jsonl", "all"))
    assert bool(run["curves"]) == (missing not in ("metrics.jsonl", "all"))
    assert any("config.toml: " in w for w in run["warnings"]) == (missing in ("config.toml", "all"))
    assert capsys.readouterr().err == ""


def test_a_broken_line_is_reported_and_a_value_that_json_lacks_is_left_out(tmp_path):
    folder = made_run(tmp_path / "a")
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write('null\n[1]\n\n{"step": 41, "loss": NaN, "solved": 1}\n{"step": 42, "cut in the mid')
    run = read_run(folder)
    assert run["warnings"] == ["metrics.jsonl: lines that cannot be read: 3."]
    assert "loss" not in run["curves"] and run["curves"]["solved"][-1] == [41, 1]


def test_an_error_is_printed_and_other_ranks_write_nothing(tmp_path, capsys, monkeypatch):
    write_report(tmp_path / "nowhere")
    assert "report.html: not written (FileNotFoundError" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    write_report(made_run(tmp_path / "a"))
    assert not (tmp_path / "a/report.html").exists() and capsys.readouterr().err == ""


def test_the_script_needs_neither_torch_nor_matplotlib(tmp_path):
    folder = made_run(tmp_path / "a")
    code = (
        "import runpy, sys; sys.modules |= dict.fromkeys(['torch', 'matplotlib', 'numpy']);"
        "sys.argv = ['report.py', *sys.argv[1:]];"
        "runpy.run_path('experiments/report.py', run_name='__main__')"
    )

    def script(*args):
        return subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True)

    assert script(folder).returncode == 0 and page_data(folder)[0]["name"] == "a"
    for args in ([], [tmp_path], ["--help"], [folder] * 3):
        done = script(*args)
        assert done.returncode == 2 and "error: name one or two folders with a metrics" in done.stderr, args


# ---- warnings ----------------------------------------------------------------------------------------------


def forgetting(step):
    return {"actor/hint_nll": 1 + step / 40, "response_length/mean": 40.0 - step / 2}


@pytest.mark.parametrize(
    "sign, words",
    [
        (lambda s: {"dead_groups": float(s % 3 > 0)}, "All groups were dead in 27 steps"),
        (lambda s: {"response_length/clip_ratio": 1.0}, "100% of the last completions were cut"),
        (lambda s: {"actor/entropy": 0.001}, r"The entropy is gone \(0.0010 nats\)"),
        (forgetting, r"hint_nll 1.11 -> 1.91 while completions shrank to 22 tokens\. Raise hint_coef"),
    ],
)
def test_trouble_is_named_with_its_reason(sign, words):
    assert warnings([*map(rollout, range(1, 41)), validation(40, 0.5)]) == []
    (found,) = warnings([rollout(s, **sign(s)) for s in range(1, 41)])
    assert re.search(words, found)
    assert warnings([rollout(s, **sign(s)) for s in range(1, LONG)]) == []  # too early to say


def test_hints_that_shrink_are_no_trouble():
    shrinking = {"hint/share": 0.1, "critic/rewards/mean": 0.1}
    assert warnings([rollout(s, **shrinking | {"actor/hint_nll": 1 + s / 40}) for s in range(1, 41)]) == []
    assert warnings([rollout(s, **{"actor/hint_nll": 0.0}) for s in range(1, 41)]) == []
    # A step without hints or without samples has no means of them.
    unhinted = [{k: v for k, v in rollout(s).items() if k != "actor/hint_nll"} for s in range(1, 41)]
    assert warnings(unhinted) == [] == warnings([{"step": s, "dead_groups": 0.0} for s in range(1, 41)])
    assert warnings([]) == [] and facts({}, [])["tokens"] == "0 sampled"


# ---- in a browser ------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --remote-debugging-pipe"
)


class Browser:
    """A page in a headless Chromium, driven by the DevTools protocol over its pipe."""

    def __init__(self, url, profile):
        command = f'exec "$0" {FLAGS} --user-data-dir="$1" about:blank 3<&0 4>&1 0</dev/null >/dev/null 2>&1'
        self.litter = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # a short path: it has a socket
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        environment = os.environ | {"TMPDIR": self.litter.name}
        started = ["sh", "-c", command, CHROMIUM, str(profile)]
        self.process = subprocess.Popen(started, env=environment, **pipes)
        self.limit = threading.Timer(120, self.process.kill)
        self.limit.start()
        self.sent, self.session, self.events, self.rest = 0, None, [], b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.resize(1000, 900, False)
        self.call("Page.navigate", url=url)
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self.events.append(self.read())

    def resize(self, width, height, mobile):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def read(self):
        while b"\0" not in self.rest:
            part = os.read(self.process.stdout.fileno(), 1 << 16)
            assert part, "the browser has ended"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def call(self, method, **params):
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        while (answer := self.read()).get("id") != self.sent:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def js(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def click(self, element):
        """Click with the mouse in the middle of an element, given as JavaScript."""
        self.js(f"({element}).scrollIntoView({{ block: 'center' }})")
        box = self.js(f"(r => [r.x + r.width / 2, r.y + r.height / 2])(({element}).getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            at = {"x": box[0], "y": box[1], "button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, **at)
        self.js("new Promise(done => setTimeout(done, 50))")  # toggle events come later

    def choose(self, select, value):
        self.js(f"s = {select}, s.value = {json.dumps(value)}, s.dispatchEvent(new Event('change'))")
        self.js("new Promise(done => setTimeout(done, 50))")

    def faults(self):
        """Exceptions, dialogs, and entries of the browser's log, such as failed requests."""
        names = ("Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening")
        return [e for e in self.events if e["method"] in names]

    def close(self):
        self.limit.cancel()
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.litter.cleanup()


@pytest.fixture
def opened(tmp_path):
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    browsers = []

    def start(folder):
        browsers.append(Browser((folder / "report.html").as_uri(), tmp_path / f"profile{len(browsers)}"))
        return browsers[-1]

    yield start
    for browser in browsers:
        browser.close()


SECTION = "[...document.querySelectorAll('h2')].find(e => e.textContent.startsWith('{}'))"
AFTER = "(e => {{ while (!e.matches('{}')) e = e.nextElementSibling; return e }})({})"


def part(title, selector):
    """JavaScript of the first element that matches after a heading."""
    return AFTER.format(selector, SECTION.format(title))


def test_a_reader_opens_a_group_and_filters(tmp_path, opened):
    folder = made_run(tmp_path / "a")
    write_report(folder)
    browser = opened(folder)
    text = browser.js("document.body.innerText")
    assert "75.0% (65.0% to 85.0%)" in text and "alert(1)" in text
    assert browser.js("document.title") == "a"
    # The heat map: a row for each hint length, the longest at the top.
    labels = browser.js(f"[...{part('a: success', 'svg')}.querySelectorAll('text')].map(e => e.textContent)")
    assert labels[:3] == ["10 given", "2 given", "no hint"]
    assert browser.js(f"{part('a: success', 'svg')}.querySelectorAll('rect').length") == 3 * 40
    # Groups: click on one that is closed, and see the same problem at its other step.
    groups = part("a: groups", ".list")
    assert browser.js(f"{groups}.children.length") == 4
    assert browser.js(f"{groups}.querySelectorAll('details[open]').length") == 1
    assert "the model" not in browser.js(f"{groups}.children[2].innerText")
    browser.click(f"{groups}.children[2].querySelector('summary')")
    shown = browser.js(f"{groups}.children[2].innerText")
    assert "prompt 7" in shown and "step 1: 0 of 2 right, dead" in shown and "step 21: 1 of 2 right" in shown
    assert EVIL.partition("\u2028")[0] in shown
    tokens = f"[...{groups}.children[2].querySelector('article pre').children]"
    assert browser.js(f"{tokens}.map(e => e.className)") == ["given", "sampled", "sampled"]
    # The switch of the colour, which is another one.
    token = f"{groups}.children[2].querySelector('.sampled')"
    before = browser.js(f"getComputedStyle({token}).backgroundColor")
    browser.choose(part("a: groups", "select"), "advantage")
    assert browser.js(f"getComputedStyle({token}).backgroundColor") != before
    # Filters of groups and of answers.
    menu = f"{part('a: groups', 'select')}.nextElementSibling"
    for name, steps in {"dead": ["step 1"], "newly solved": ["step 21"], "newly lost": ["step 21"]}.items():
        browser.choose(menu, name)
        titles = browser.js(f"[...{groups}.children].map(e => e.firstChild.textContent.split(':')[0])")
        assert titles == steps, name
    answers, menu = part("a: test answers", ".list"), part("a: test answers", "select")
    counts = {"all answers": 4, "right": 2, "wrong": 2, "cut": 0, "newly solved": 1, "newly lost": 1}
    for name, count in counts.items():
        browser.choose(menu, name)
        assert browser.js(f"{answers}.children.length") == count, name
    lost = browser.js(f"{answers}.innerText")
    assert "two" in lost and "step 0: right" in lost
    # Rows: a target with the model's own prediction, nll and weight.
    cells = f"[...{part('a: rows', '.list')}.querySelectorAll('.cell')].map(e => e.innerText.split(/\\s+/))"
    assert browser.js(cells)[:2] == [["ask"], ["4", "5", "1.25", "2"]]
    # What was written by the model stays text.
    assert browser.js("document.querySelectorAll('script').length") == 2 and browser.faults() == []


def test_two_runs_a_run_without_samples_and_one_without_anything_draw_in_a_browser(tmp_path, opened):
    a, b = made_run(tmp_path / "a"), made_run(tmp_path / "b", 0.5)
    write(b / "samples.jsonl", [answer(40, "one", 0.1), answer(40, "two", 0.1)])
    write_report(a, b)
    browser = opened(a)
    headings = browser.js("[...document.querySelectorAll('h1, h2')].map(e => e.textContent)")
    assert headings[:2] == ["a", "b"] and "b: groups" not in headings
    assert "b: success by hint length" in headings
    articles = "[...document.querySelectorAll('article')]"
    accuracy = f"{articles}.find(e => e.textContent.startsWith('val/accuracy'))"
    lines_drawn = browser.js(f"{accuracy}.querySelectorAll('polyline').length")
    assert lines_drawn == 1 + 2 + 2  # the axes, two bands, two curves
    assert "val/accuracy: 0.75 at 40 and 0.5 at " in browser.js("document.body.innerText")
    browser.choose(part("a: test answers", "select"), "newly solved")
    assert "b: wrong" in browser.js(f"{part('a: test answers', '.list')}.innerText")
    assert browser.faults() == []
    for name in ("samples.jsonl", "metrics.jsonl", "config.toml"):
        (b / name).unlink()
        write_report(b)
        browser = opened(b)
        assert browser.js("document.querySelector('h1').textContent") == "b" and browser.faults() == [], name
        browser.close()


def test_a_phone_and_a_dark_theme(tmp_path, opened):
    folder = made_run(tmp_path / "a")
    write_report(folder)
    browser = opened(folder)
    light = browser.js("getComputedStyle(document.querySelector('article')).backgroundColor")
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    browser.call("Emulation.setEmulatedMedia", features=[dark])
    assert browser.js("getComputedStyle(document.querySelector('article')).backgroundColor") != light
    browser.resize(360, 700, True)
    browser.call("Page.reload")
    browser.js("new Promise(done => setTimeout(done, 300))")
    assert browser.js("[document.documentElement.scrollWidth, innerWidth]") == [360, 360]
