"""One page about a run, report.html: what it learned, how, and what it wrote. Two runs are overlaid.

    python experiments/report.py out/a             writes out/a/report.html
    python experiments/report.py out/a out/b       the same with out/b beside it

It reads config.toml, metrics.jsonl and samples.jsonl. The page needs no server, network or package; it holds
its data as JSON, and text from it is shown as text only. Curves are means over windows of steps. Torch is not
imported: that takes longer than all the rest.
"""

import ast
import json
import math
import subprocess
import sys
import tomllib
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
WINDOWS = 100  # most points of a training curve, and columns of the heat map
LONG = 20  # steps that a sign of trouble must last


def read_jsonl(path: Path) -> tuple[list[dict], list[str]]:
    """The records of a file, none if it is missing, and a note if lines cannot be read."""
    records, broken = [], 0
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in filter(str.strip, text.split("\n")):
        try:
            record = json.loads(line, parse_constant=lambda name: None)  # JSON has no NaN
            records.append(record | {"step": int(record["step"])})
        except (ValueError, TypeError, KeyError):
            broken += 1
    return records, [f"{path.name}: {broken} lines cannot be read."] if broken else []


def changed_knobs(config: dict) -> dict[str, list]:
    """Knob -> [value, default] where they differ. The defaults are read from the trainer's source."""
    names = [config["algo"]] if "algo" in config else config.get("loss", [])
    variants = [Path(n) if n.endswith(".py") else ROOT / "variants" / f"{n}.py" for n in names]
    trainer, defaults = "train_uft.py" if "algo" in config else "train_ift.py", {}
    for path in (ROOT / "infra" / "training.py", ROOT / trainer, *filter(Path.is_file, variants)):
        for part in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(part, ast.ClassDef) and part.name in ("RunConfig", "Config"):
                for field in filter(lambda node: isinstance(node, ast.AnnAssign), part.body):
                    with suppress(ValueError):  # not a literal
                        defaults[field.target.id] = ast.literal_eval(field.value)
    found = {}
    for key, value in config.items():
        default = defaults.get(key, value)
        default = list(default) if isinstance(default, tuple) else default
        if default != value and key != "out_dir" and not (default == "auto" and "dtype" in key):
            found[key] = [value, default]
    return found


def curves(records: list[dict], window: int) -> dict[str, list]:
    """Metric -> its points [step, value]: validations, or means over windows named by their last step."""
    last, found = max((r["step"] for r in records), default=0), defaultdict(lambda: defaultdict(list))
    for r in records:
        for key, value in r.items():
            size = 1 if key.startswith("val/") else window
            absent = value == 0 and (key in ("actor/hint_nll", "actor/kl_loss") or "solved" not in r)
            if isinstance(value, int | float) and not (absent and key.startswith("actor/")):
                found[key][min(last, math.ceil(r["step"] / size) * size)].append(value)
    means = {key: {x: sum(v) / len(v) for x, v in points.items()} for key, points in found.items()}
    return {k: [[x, float(f"{y:.5g}")] for x, y in sorted(points.items())] for k, points in means.items()}


def facts(config: dict, records: list[dict]) -> dict[str, str]:
    """What the head of the page says, by name."""
    last = {k: v for r in records for k, v in r.items()}
    found, tests = {}, [r for r in records if "val/accuracy" in r]
    if tests:
        interval = f"95 %: {tests[-1].get('val/low', 0):.1%} to {tests[-1].get('val/high', 1):.1%}"
        found[f"test accuracy at step {tests[-1]['step']}"] = f"{tests[-1]['val/accuracy']:.1%} ({interval})"
        found[f"at step {tests[0]['step']}"] = f"{tests[0]['val/accuracy']:.1%}" if tests[1:] else ""
    found["test nll"] = f"{last['val/loss']:.4f} nats a token" if "val/loss" in last else ""
    found["training"] = f"{last.get('step', 0):,} steps, {last.get('train_s', 0):,.0f} s"
    trained = sum(r.get("tokens_per_s", 0) * r.get("timing_s/step", 0) for r in records)
    sampled = last.get("sampled_tokens")
    found["tokens"] = f"{sampled:,} sampled" if sampled else f"about {trained:,.0f} trained on"
    device = config.get("device", "auto")
    device = device if device != "auto" else "CUDA" if "mfu" in last else "CPU"
    found["device"] = f"{device}, {config.get('dtype', '')}"
    found["method"] = config.get("algo") or ", ".join(config.get("loss", []))
    found["model"] = config.get("model") or "the task's tiny base"
    found["task"] = config.get("task") or config.get("data_path", "")
    if (ROOT / ".git").exists():
        with suppress(OSError, subprocess.SubprocessError):
            command = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude=*"]
            output = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)
            found["commit of this page"] = output.strip()
    return {name: text for name, text in found.items() if text}


def warnings(records: list[dict]) -> list[str]:
    """Signs of trouble, each with its reason and what to try."""
    rollouts = [r for r in records if "dead_groups" in r]
    found, stretch, worst, recent = [], 0, (0, 0), rollouts[-LONG:]

    def mean(rs: list[dict], key: str) -> float:
        return sum(r.get(key) or 0 for r in rs) / max(1, len(rs))

    for r in rollouts:
        stretch = stretch + 1 if r["dead_groups"] == 1 else 0
        worst = max(worst, (stretch, r["step"]))
    if worst[0] >= LONG:
        found.append(f"All groups were dead in {worst[0]} steps in a row, up to step {worst[1]}: equal rewards"
                     " have no advantage and teach nothing. Show hints for longer, or raise rollouts.")
    hinted = [r for r in rollouts if r.get("actor/hint_nll")]
    n = len(hinted) // 5
    nll, tokens = ([mean(rs, key) for rs in (hinted[:n], hinted[len(hinted) - n :])]
                   for key in ("actor/hint_nll", "response_length/mean"))
    if n >= 4 and nll[1] > 1.2 * nll[0] and tokens[1] < 0.8 * tokens[0]:
        found.append(f"hint_nll rose from {nll[0]:.2f} to {nll[1]:.2f} while completions shortened from"
                     f" {tokens[0]:.0f} to {tokens[1]:.0f} tokens: hints are forgotten. Raise hint_coef.")
    if len(recent) == LONG and mean(recent, "response_length/clip_ratio") > 0.95:
        found.append(f"Nearly all completions of the last {LONG} steps were cut before they ended, so few have"
                     " an answer. Raise max_new_tokens, or check that the model writes its end token.")
    if len(recent) == LONG and mean(recent, "actor/entropy") < 0.01:
        found.append(f"The entropy of the last {LONG} steps is {mean(recent, 'actor/entropy'):.4f} nats: a"
                     " problem's completions are all the same. Raise entropy_coef, or lower lr.")
    return found


def read_run(folder: Path) -> dict:
    """All that the page shows of a run. ValueError for a damaged config.toml."""
    path = folder / "config.toml"
    config = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    (records, notes), (samples, more) = map(read_jsonl, (folder / "metrics.jsonl", folder / "samples.jsonl"))
    window = max(1, math.ceil(max((r["step"] for r in records), default=0) / WINDOWS))
    run = {"name": folder.resolve().name, "facts": facts(config, records), "changed": changed_knobs(config)}
    run |= {"window": window, "curves": curves(records, window), "warnings": warnings(records) + notes + more}
    return run | {f"{k}s": [s for s in samples if s.get("kind") == k] for k in ("group", "answer", "row")}


def make_report(folders: list[Path]) -> Path:
    """Write report.html into the first run's folder; returns its path."""
    path = folders[0] / "report.html"
    data = json.dumps([read_run(folder) for folder in folders], separators=(",", ":"))
    path.write_text(PAGE.replace("DATA", data.replace("<", "\\u003c")), encoding="utf-8")
    return path


def write_report(out: Path) -> None:
    """Write out_dir/report.html of a run that has ended, on rank 0."""
    from infra.parallel import rank  # imports torch

    try:
        if rank() == 0:
            make_report([out])
    except Exception as e:  # whatever it is, the run has ended well
        print(f"{out / 'report.html'}: not written ({type(e).__name__}: {e})", file=sys.stderr)


PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"><style>
:root { color-scheme: light dark; --bg: #fff; --fg: #1c2127; --dim: #66707c; --line: #d8dde3; --card: #f6f7f9;
  --a: #1667b7; --b: #c2410c; --low: #e3ebf4; --high: #08519c; --good: #1a7f37; --bad: #cf222e;
  --hint: #cfe6ff; --hot: #e8590c }
@media (prefers-color-scheme: dark) { :root { --bg: #14171b; --fg: #e4e8ec; --dim: #98a2ae; --line: #353c45;
  --card: #1d2228; --a: #6cb2ff; --b: #ff9a62; --low: #212c39; --high: #63b3ff; --good: #4cc26a;
  --bad: #ff7b72; --hint: #1b436b; --hot: #ffa94d } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1060px; margin: auto; padding: 16px;
  background: var(--bg); color: var(--fg) }
h1 { font-size: 22px; margin: 12px 0 } h2 { font-size: 17px; margin: 32px 0 4px } p { color: var(--dim); margin: 4px 0 }
dl, .cards { display: grid; gap: 8px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 230px), 1fr)); margin: 8px 0 }
dl div, article, figure { background: var(--card); border-radius: 6px; padding: 8px 10px; margin: 0; min-width: 0 }
dt, figcaption, article header, text { font-size: 12px; color: var(--dim); fill: var(--dim) } dd { margin: 0; font-weight: 600 }
code, pre { font: 13px/1.6 ui-monospace, monospace } pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0 }
.warning { border-left: 4px solid var(--hot); padding: 6px 10px; margin: 8px 0; background: var(--card) }
.good { color: var(--good) } .bad { color: var(--bad) } svg { display: block; width: 100% }
.hint { background: var(--hint) } .strip button { width: 20px; height: 22px; margin: 1px; padding: 0; border: 0; border-radius: 3px }
.strip .open { outline: 3px solid var(--hot) } .strip .dead { border: 2px dashed var(--dim) }
select { font: inherit; max-width: 100% } .scroll { max-height: 80vh; overflow: auto }
.cell { display: inline-block; text-align: center; margin: 1px; padding: 1px 5px; border-radius: 3px; font: 12px/1.4 ui-monospace, monospace }
.cell * { display: block }
</style><body><noscript>This page draws itself with JavaScript.</noscript><main id="main"></main>
<script type="application/json" id="data">DATA</script><script>
const runs = JSON.parse(document.getElementById("data").textContent), COLOURS = ["var(--a)", "var(--b)"]
const h = (tag, props, ...kids) => {  // an element; strings among kids become text
  const e = Object.assign(document.createElement(tag), props); e.append(...kids); return e }
const svg = (tag, attrs, ...kids) => {
  const e = document.createElementNS("http://www.w3.org/2000/svg", tag)
  for (const k in attrs) e.setAttribute(k, attrs[k])
  e.append(...kids); return e }
const mix = (colour, share) => `color-mix(in srgb, ${colour} ${Math.round(100 * Math.min(1, share))}%, transparent)`
const ramp = share => `color-mix(in srgb, var(--high) ${Math.round(100 * share)}%, var(--low))`
const short = v => String(Math.abs(v) >= 1000 ? Math.round(v) : +(+v).toPrecision(3))
const last = Math.max(1, ...runs.flatMap(r => Object.values(r.curves).map(c => c.at(-1)[0])))
const steps = (W, left, right) => step => left + (W - left - right) * step / last
const line = (points, x, y, attrs) => svg("polyline", { fill: "none", "stroke-width": 2,
  points: points.map(p => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join(" "), ...attrs })
const label = (x, y, anchor, text) => svg("text", { x, y, "text-anchor": anchor }, text)
const section = (title, about, ...kids) => main.append(h("section", {}, h("h2", {}, title), h("p", {}, about), ...kids))

// The head: facts, knobs, warnings.
document.title = runs.map(r => r.name).join(" and ")
runs.forEach((r, i) => main.append(h("h1", { style: `color: ${COLOURS[i]}` }, r.name),
  ...r.warnings.map(text => h("div", { className: "warning" }, text)),
  h("dl", {}, ...Object.entries(r.facts).map(([k, v]) => h("div", {}, h("dt", {}, k), h("dd", {}, v)))),
  h("p", {}, "Knobs not at their defaults: ", h("code", {}, Object.entries(r.changed)
    .map(([k, [v, d]]) => `${k} = ${v} (${d === "" ? "empty" : d})`).join(", ") || "none"))))

// Success by hint length, with the reward and the share shown.
function heat(r) {
  const ks = Object.keys(r.curves).filter(k => k.startsWith("solved/hint_")).map(k => +k.slice(12)).sort((a, b) => b - a)
  const W = Math.min(1028, innerWidth - 32), row = Math.max(26, 140 / ks.length), H = row * ks.length, x = steps(W, 64, 24)
  const cell = (k, i, [step, v]) => svg("rect", { x: x(Math.max(0, step - r.window)), y: i * row, height: row - 1,
    width: x(Math.min(step, r.window)) - x(0) + 0.3, style: `fill: ${ramp(v)}` },
    svg("title", {}, `step ${step}, ${k} segments shown: ${short(100 * v)} % solved`))
  const curve = (key, attrs) => [{ stroke: "var(--bg)", "stroke-width": 5 }, attrs].map(a => line(r.curves[key] || [], x, v => H - v * H, a))
  return svg("svg", { viewBox: `0 0 ${W} ${H + 20}` }, ...ks.flatMap((k, i) => [
    label(58, (i + 0.6) * row, "end", k ? `${k} shown` : "no hint"),
    ...r.curves["solved/hint_" + k].map(p => cell(k, i, p))]),
    ...curve("hint/share", { stroke: "var(--fg)", "stroke-dasharray": "6 4" }), ...curve("critic/rewards/mean", { stroke: "var(--hot)" }),
    label(W - 18, 12, "start", "1"), label(W - 18, H, "start", "0"), label(64, H + 16, "start", "step 0"), label(W - 24, H + 16, "end", last))
}
const hinted = runs.filter(r => Object.keys(r.curves).some(k => k.startsWith("solved/hint_"))), maps = h("div", {})
const drawMaps = () => maps.replaceChildren(...hinted.flatMap(r => [h("p", {}, r.name), heat(r)]))
if (hinted.length) section("Success by hint length", "The darker (in a dark theme brighter), the more rollouts are right. "
  + "Success comes first where much of the solution is shown (top) and should reach the row without hints, which is the test. "
  + "Orange: mean reward. Dashed: share of the solution shown. Reward may fall while hints shrink, since problems get harder: "
  + "that is not a failure.", maps)
addEventListener("resize", drawMaps); drawMaps()

// Curves.
function chart([key, title]) {
  const lines = runs.map(r => r.curves[key] || []), ends = ["val/low", "val/high"].map(k => runs.map(r => r.curves[k] || []))
  if (!lines.flat().length) return ""
  const banded = key == "val/accuracy", vs = [lines, ...banded ? ends : []].flat(2).map(p => p[1])
  const high = Math.max(...vs), low = Math.min(...vs) > high / 2 ? Math.min(...vs) : Math.min(0, ...vs)
  const x = steps(300, 38, 8), y = v => 110 - 96 * (v - low) / (high - low || 1), value = h("span", {}, "")
  const picture = svg("svg", { viewBox: "0 0 300 128" }, svg("path", { d: "M38 14V110H292", fill: "none", stroke: "var(--line)" }),
    label(34, 18, "end", short(high)), label(34, 112, "end", short(low)), label(38, 125, "start", "0"), label(292, 125, "end", last),
    ...lines.flatMap((points, i) => [banded ? line([...ends[0][i], ...ends[1][i].toReversed()], x, y, { style: `fill: ${mix(COLOURS[i], 0.2)}` }) : "",
      line(points, x, y, { stroke: COLOURS[i] })]))
  picture.onpointermove = e => {
    const step = (e.offsetX / picture.clientWidth * 300 - 38) / 254 * last
    const near = lines.filter(l => l.length).map(l => l.reduce((p, q) => Math.abs(q[0] - step) < Math.abs(p[0] - step) ? q : p))
    value.textContent = `, step ${near[0][0]}: ${near.map(p => short(p[1])).join(" and ")}` }
  return h("figure", {}, h("figcaption", {}, title, value), picture)
}
section("Curves", runs.length > 1 ? `Blue: ${runs[0].name}. Orange: ${runs[1].name}.` : "Point at a curve to read it.", h("div", { className: "cards" }, ...[
  ["val/accuracy", "test accuracy, with its 95 % interval"], ["val/other_start", "test accuracy from another first step"], ["val/loss", "test nll, nats a token"],
  ["critic/rewards/mean", "reward of rollouts"], ["solved", "share of rollouts solved"], ["dead_groups", "share of dead groups"], ["response_length/mean", "tokens of a completion"],
  ["response_length/clip_ratio", "share of completions cut"], ["actor/entropy", "entropy, nats"], ["actor/hint_nll", "nll of a given token"],
  ["actor/kl_loss", "KL to the reference"], ["loss", "training loss"], ["nll", "training nll"], ["grad_norm", "gradient norm"],
  ["actor/grad_norm", "gradient norm"], ["lr", "learning rate"], ["tokens_per_s", "tokens trained on per second"]].map(chart)))
</script>
"""


if __name__ == "__main__":
    folders = [Path(arg) for arg in sys.argv[1:]]
    if not 1 <= len(folders) <= 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        for folder in folders:
            (folder / "metrics.jsonl").open().close()
        print(f"report in {make_report(folders)}")
    except (OSError, ValueError) as e:  # no such run, a full disk, a damaged config.toml
        print(f"error: {' and '.join(map(str, folders))}: {e}", file=sys.stderr)
        sys.exit(2)
