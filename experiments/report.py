"""One page about a run, report.html: what it learned, how, and what it wrote. Two runs are overlaid.

    python experiments/report.py out/a [out/b]     writes out/a/report.html

It reads what the run wrote. The page needs no server, network or package.
"""

import ast
import json
import math
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).parent.parent
WINDOWS, LONG = 100, 20  # most points of a training curve; steps that a sign of trouble must last


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
    return records, [f"{path.name}: lines that cannot be read: {broken}."] if broken else []


def changed_knobs(config: dict) -> dict[str, list]:
    """Knob -> [value, the trainer's default] where they differ. A method's own knobs have no default here."""
    files = ROOT / "infra" / "training.py", ROOT / ("train_uft.py" if "algo" in config else "train_ift.py")
    parts = [part for file in files for part in ast.parse(file.read_text(encoding="utf-8")).body]
    classes = [part for part in parts if getattr(part, "name", "") in ("RunConfig", "Config")]
    knobs = [field for c in classes for field in c.body if isinstance(field, ast.AnnAssign)]
    defaults = {f.target.id: json.loads(json.dumps(ast.literal_eval(f.value))) for f in knobs}
    pairs = {key: [value, defaults.get(key)] for key, value in config.items() if key != "out_dir"}
    auto = {k for k, (_, d) in pairs.items() if "dtype" in k and d == "auto"}  # a run writes what it came to
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and key not in auto}


def curves(records: list[dict], window: int) -> dict[str, list]:
    """Metric -> its points [step, value]: validations, or means over windows named by their last step."""
    found = {}
    for r in records:
        for key, value in r.items():
            x = r["step"] if key.startswith("val/") else math.ceil(r["step"] / window) * window
            if isinstance(value, int | float) and (value or not key.startswith("actor/")):  # 0: not measured
                found.setdefault(key, {}).setdefault(min(x, records[-1]["step"]), []).append(value)
    return {key: [[x, round(sum(v) / len(v), 7)] for x, v in xs.items()] for key, xs in found.items()}


def facts(config: dict, records: list[dict]) -> dict[str, str]:
    """What the head of the page says, by name."""
    last, found = {key: value for r in records for key, value in r.items()}, {}
    tests = [r for r in records if {"val/accuracy", "val/low", "val/high"} <= r.keys()]
    for r in (*tests[-1:], *tests[:1]):
        interval = f"{r['val/low']:.1%} to {r['val/high']:.1%}"
        found[f"test accuracy, step {r['step']:,}"] = f"{r['val/accuracy']:.1%} ({interval})"
    found["training"] = f"{last.get('step', 0):,} steps, {last.get('train_s', 0):,.0f} s"
    trained = sum(r.get("tokens_per_s", 0) * r.get("timing_s/step", 0) for r in records)
    found["tokens"] = f"{trained:,.0f} trained" if trained else f"{last.get('sampled_tokens', 0):,} sampled"
    git, device = "test -e .git && git describe --always --dirty --exclude='*'", config.get("device", "auto")
    found["device"] = "CPU" if device == "auto" and "mfu" not in last else device.replace("auto", "CUDA")
    method = config.get("algo") or ", ".join(config.get("loss", []))
    found["method, task, seed"] = f"{method}, {config.get('task')}, {config.get('seed')}"
    commit = subprocess.run(git, shell=True, cwd=ROOT, capture_output=True, text=True).stdout
    return found | {"page written by commit": commit.strip() or "not known"}


def warnings(records: list[dict]) -> list[str]:
    """Signs of trouble, each with its reason and what to try."""
    rollouts, found = [r for r in records if {"dead_groups", "actor/entropy"} <= r.keys()], []
    if len(rollouts) < LONG:
        return []
    if (dead := sum(r["dead_groups"] == 1 for r in rollouts)) >= max(LONG, len(rollouts) / 5):
        found.append(f"All groups were dead in {dead} steps: equal rewards teach nothing. Show longer hints.")
    cut = fmean(r["response_length/clip_ratio"] for r in rollouts[-LONG:])
    if cut > 0.95:
        found.append(f"{cut:.0%} of the last completions were cut before their end. Raise max_new_tokens.")
    entropy = fmean(r["actor/entropy"] for r in rollouts[-LONG:])
    if entropy < 0.01:
        found.append(f"The entropy is gone ({entropy:.4f} nats): completions agree. Lower lr.")
    hinted = [r for r in rollouts if r.get("actor/hint_nll")]
    if n := len(hinted) // 5:
        nll, later = (fmean(r["actor/hint_nll"] for r in rs) for rs in (hinted[:n], hinted[-n:]))
        tokens, fewer = (fmean(r["response_length/mean"] for r in rs) for rs in (hinted[:n], hinted[-n:]))
        if later > 1.2 * nll and fewer < 0.8 * tokens:
            why = f"hint_nll {nll:.2f} -> {later:.2f} while completions shrank to {fewer:.0f} tokens"
            found.append(f"Solutions are forgotten: {why}. Raise hint_coef.")
    return found


def read_run(folder: Path) -> dict:
    """All that the page shows of a run."""
    (records, notes), (samples, more) = (read_jsonl(folder / f"{n}.jsonl") for n in ("metrics", "samples"))
    try:
        config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        config, more = {}, [*more, f"config.toml: {e}"]
    window = max(1, math.ceil(max((r["step"] for r in records), default=0) / WINDOWS))
    run = {"name": folder.resolve().name, "facts": facts(config, records), "changed": changed_knobs(config)}
    run |= {"window": window, "curves": curves(records, window), "warnings": warnings(records) + notes + more}
    return run | {f"{k}s": [s for s in samples if s.get("kind") == k] for k in ("group", "answer", "row")}


def write_report(*folders: Path) -> None:
    """Write report.html into the first run's folder, on rank 0. Errors are printed, not raised."""
    path = folders[0] / "report.html"
    try:
        if os.environ.get("RANK", "0") == "0":
            data = json.dumps([read_run(folder) for folder in folders]).replace("<", "\\u003c")
            path.write_text(PAGE.replace("DATA", data), encoding="utf-8")
    except Exception as e:
        print(f"{path}: not written ({type(e).__name__}: {e})", file=sys.stderr)


PAGE = r"""<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>
:root { color-scheme: light dark; --dim: light-dark(#5d6772, #9aa4b0); --card: light-dark(#f3f5f8, #1f2328);
  --low: light-dark(#e3ebf4, #33475c); --high: light-dark(#08519c, #63b3ff); --hot: light-dark(#e8590c, #fa4);
  --hint: light-dark(#c9e3ff, #1d4a77); --good: light-dark(#1a7f37, #4c6); --bad: light-dark(#cf222e, #f77) }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1060px; margin: auto; padding: 12px }
h2 { font-size: 17px; margin: 32px 0 0 } p, small, text { color: var(--dim); fill: var(--dim); margin: 4px 0 }
.cards { display: grid; gap: 8px; grid-template-columns: repeat(auto-fill, minmax(min(230px, 45%), 1fr)) }
article { background: var(--card); border-radius: 6px; padding: 8px; margin: 0; min-width: 0 }
small, text { font-size: 12px } .warning { border-left: 4px solid var(--hot); margin: 8px 0 }
pre, .cell { font: 13px/1.6 monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0 }
.good { color: var(--good) } .bad { color: var(--bad) } .given { background: var(--hint) }
.sampled { background: var(--unlikely) } .advantage .sampled { background: var(--advantage) }
.cell { display: inline-block; text-align: center; padding: 0 4px } article b, .cell * { display: block }
.list { max-height: 640px; overflow: auto; margin-top: 8px } details[open] { grid-column: 1 / -1 }
details { padding-left: 8px; border-left: 16px solid } polyline { filter: drop-shadow(0 0 2px Canvas) }
</style><main></main><script type="application/json" id="data">DATA</script><script>
const runs = JSON.parse(document.getElementById("data").textContent), colours = ["high", "hot"]
const maker = space => (tag, attrs, ...kids) => {  // of elements; a string among the kids becomes text
  const e = document.createElementNS("http://www.w3.org/" + space, tag)
  for (const k in attrs) typeof attrs[k] == "function" ? e[k] = attrs[k] : e.setAttribute(k, attrs[k])
  return e.append(...kids), e
}
const h = maker("1999/xhtml"), svg = maker("2000/svg"), main = document.querySelector("main")
const section = (title, about, ...kids) => main.append(h("h2", {}, title), h("p", {}, about), ...kids)
const cards = list => h("div", { class: "cards" }, ...list), visible = text => text.replaceAll("\n", "↵\n")
const mix = (name, share, b = "transparent") => `color-mix(in srgb, var(--${name}) ${100 * share}%, ${b})`
const ramp = share => mix("high", share, "var(--low)"), join = list => list.join(" and ")
const short = v => v && Math.abs(v) < 0.01 ? v.toExponential(1) : +(+v).toPrecision(3)
const last = Math.max(1, ...runs.flatMap(r => Object.values(r.curves).map(c => c.at(-1)[0])))
const label = (x, y, anchor, text) => svg("text", { x, y, "text-anchor": anchor }, text)
const line = (points, x, y, attrs) => svg("polyline", { fill: "none", "stroke-width": 2, ...attrs,
  points: points.map(p => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join(" ") })
document.title = join(runs.map(r => r.name))
runs.forEach((r, i) => main.append(h("h1", { style: `color: var(--${colours[i]})` }, r.name),
  ...(r.warnings.length ? r.warnings.map(w => h("article", { class: "warning" }, w)) : ["No warnings."]),
  cards(Object.entries(r.facts).map(([k, v]) => h("article", {}, h("small", {}, k), h("b", {}, v)))),
  h("p", {}, "Knobs that differ from their defaults: ", Object.entries(r.changed)
    .map(([k, [v, d]]) => `${k} = ${v} (${JSON.stringify(d)})`).join(", ") || "none")))
for (const r of runs) {  // success by hint length
  const n = k => +k.slice(12), keys = Object.keys(r.curves).filter(k => k.startsWith("solved/hint_"))
  const W = Math.min(1030, innerWidth - 30), row = Math.max(26, 140 / keys.length), H = row * keys.length
  const x = step => 60 + (W - 80) * step / last, y = v => H - v * H
  const cell = (step, v, i) => svg("rect", { x: x(Math.max(0, step - r.window)), y: i * row, height: row - 1,
    width: x(r.window) - 59.7, style: `fill: ${ramp(v)}` }, svg("title", {}, `step ${step}: ${short(v)}`))
  if (keys.length) section(`${r.name}: success by hint length`, "Blue: right rollouts, pale 0 to dark 1;"
    + " empty: none. It should spread from the top, where only the answer is left, down to the row without"
    + " hints. Right axis: share shown, dashed; reward, orange, falls while less is given.",
    svg("svg", { viewBox: `0 0 ${W} ${H + 18}` }, ...keys.sort((a, b) => n(b) - n(a)).flatMap((k, i) => [
      label(56, (i + 0.6) * row, "end", n(k) ? n(k) + " given" : "no hint"),
      ...r.curves[k].map(([step, v]) => cell(step, v, i))]),
      line(r.curves["hint/share"], x, y, { stroke: "CanvasText", "stroke-dasharray": "6 4" }),
      line(r.curves["critic/rewards/mean"], x, y, { stroke: "var(--hot)" }), label(W - 16, H, "start", 0),
      label(W - 16, 12, "start", 1), label(60, H + 15, "start", 0), label(W - 20, H + 15, "end", last)))
}
const hidden = /timing|solved.hint|val.(low|high|reward)|lr|mfu|tokens|train_s|step|actor.(loss|pg)/
const names = [...new Set(runs.flatMap(r => Object.keys(r.curves)))].filter(key => !hidden.test(key))
section("Curves", "Each with its last value and step; see docs/metrics.md.", cards(names.map(key => {
  const at = k => runs.map(r => r.curves[k] || []), lines = at(key), test = key == "val/accuracy"
  const bands = test ? at("val/low").map((l, i) => [...l, ...at("val/high")[i].toReversed()]) : []
  const values = [lines, bands].flat(2).map(p => p[1]), high = Math.max(...values), low = Math.min(...values)
  const x = step => 48 + 244 * step / last, y = v => 110 - 96 * (v - low) / (high - low || 1)
  const ends = join(lines.map(l => l.length ? `${short(l.at(-1)[1])} at ${l.at(-1)[0]}` : "none"))
  return h("article", {}, h("small", {}, `${key}: ${ends}`), svg("svg", { viewBox: "0 0 300 128" },
    label(44, 18, "end", short(high)), label(44, 112, "end", short(low)), label(292, 125, "end", last),
    line([[0, high], [0, low], [last, low]], x, y, { stroke: "var(--dim)", opacity: 0.4 }),
    ...bands.map((b, i) => line(b, x, y, { style: `fill: ${mix(colours[i], 0.2)}` })),
    ...lines.map((points, i) => line(points, x, y, { stroke: `var(--${colours[i]})` }))))
})))
const right = a => a.reward == 1, solved = g => g.trajectories.filter(right).length
const verdict = a => h("b", { class: right(a) ? "good" : "bad" }, a.verdict + (a.cut ? ", cut" : ""))
const fold = (title, share, fill) => h("details", { style: `border-color: ${ramp(share)}`,
  ontoggle: e => e.target.children[1] || e.target.append(...fill()) }, h("summary", {}, title))
const filtered = (filters, items, draw) => {  // a menu of filters, and what is left
  const view = h("div", { class: "list cards" }), menu = h("select", { onchange: () => {
    view.replaceChildren(...items.filter(filters[menu.value]).map(draw))
    if (view.firstChild) view.firstChild.open = true } },  // where it is a fold
    ...Object.keys(filters).map(k => h("option", { value: k }, `${k} (${items.filter(filters[k]).length})`)))
  menu.onchange()
  return [menu, view]
}
const changes = (now, was) => ({ "newly solved": a => was(a) && now(a) && !now(was(a)),
  "newly lost": a => was(a) && !now(a) && now(was(a)) })
for (const r of runs.filter(r => r.groups.length)) {
  const of = {}, size = g => Math.max(...g.trajectories.map(t => t.tokens.length))
  for (const g of r.groups) g.was = of[g.problem]?.at(-1), (of[g.problem] ??= []).push(g)
  const long = r.groups.map(size).sort((a, b) => b - a)[9] || 0
  const token = (t, i, a = t.advantage?.[i] ?? t.advantage) => h("span", {
    class: i < t.n_given ? "given" : "sampled", title: `log-prob ${t.logprobs[i]}, advantage ${a}`,
    style: `--unlikely: ${mix("hot", Math.min(1, -t.logprobs[i] / 4))}; --advantage: ${
    mix(a > 0 ? "good" : "bad", Math.min(1, Math.abs(a) / 2))}` }, visible(t.tokens[i]))
  const card = t => h("article", {}, verdict(t), h("small", {}, `reward ${t.reward}, advantage ${
    t.advantage?.at?.(-1) ?? t.advantage}`), h("pre", {}, ...t.tokens.map((_, i) => token(t, i))))
  const title = g => `step ${g.step}: ${solved(g)} of ${g.trajectories.length} right${g.dead ? ", dead" : ""}`
  const show = g => fold(title(g), solved(g) / g.trajectories.length, () => [h("pre", {}, g.prompt),
    ...of[g.problem].flatMap(o => [o == g ? "" : h("p", {}, title(o)), cards(o.trajectories.map(card))])])
  const colour = h("select", { onchange: () => main.className = colour.value },
    ...["unlikely", "advantage"].map(name => h("option", {}, name)))
  section(`${r.name}: groups`, "Of some steps, one with signal and one extreme. Dead: no signal. Blue: hint."
    + " The rest is coloured where unlikely, or by advantage.", colour, ...filtered({
    "all groups": () => true, dead: g => g.dead, longest: g => size(g) >= long,
    ...changes(solved, g => g.was) }, r.groups, show))
}
for (const r of runs.filter(r => r.rows.length)) {
  const cell = ([text, own, nll, weight]) => h("span", { class: "cell",
    style: `background: ${mix("hot", Math.min(1, weight / 4))}` }, visible(text), ...own == null ? [] : [
    h("b", { class: own == text ? "good" : "bad" }, visible(own)), h("small", {}, short(nll)), short(weight)])
  section(`${r.name}: rows`, "Below a target: the model's own prediction, nll, and weight (also the colour).",
    ...filtered({ all: row => true }, r.rows, row => fold(`step ${row.step}`, 1, () => row.tokens.map(cell))))
}
for (const r of runs.filter(r => r.answers.length)) {
  const end = r.answers.at(-1).step, other = runs.find(o => o != r), was = new Map((other || r).answers
    .filter(a => other || a.step < end).map(a => [a.prompt, a])), before = a => was.get(a.prompt)
  const note = a => before(a) ? `${other?.name || "step " + before(a).step}: ${before(a).verdict}` : ""
  section(`${r.name}: test answers at step ${end}`, `Newly: of ${was.size} of ${other?.name || "step 0"}.`,
    ...filtered({ "all answers": a => true, right, wrong: a => !right(a), cut: a => a.cut,
      ...changes(right, before) }, r.answers.filter(a => a.step == end), a => h("article", {}, verdict(a),
      h("pre", {}, a.prompt), h("pre", {}, a.response), h("small", {}, note(a)))))
}
</script>
"""


if __name__ == "__main__":
    folders = [Path(arg) for arg in sys.argv[1:]]
    if len(folders) not in (1, 2) or not all((f / "metrics.jsonl").exists() for f in folders):
        print(f"{__doc__}\nerror: name one or two folders with a metrics.jsonl", file=sys.stderr)
        sys.exit(2)
    write_report(*folders)
