"""One page about a run, report.html: what it learned, how, and what it wrote. Two runs are overlaid.

    python experiments/report.py out/a             writes out/a/report.html
    python experiments/report.py out/a out/b       the same with out/b beside it

It reads config.toml, metrics.jsonl and samples.jsonl. The page needs no server, network or package. Curves
are means over windows of steps. Torch is not imported: that takes longer than all the rest.
"""

import ast
import json
import math
import os
import subprocess
import sys
import tomllib
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
    return records, [f"{path.name}: lines that cannot be read: {broken}."] if broken else []


def changed_knobs(config: dict) -> dict[str, list]:
    """Knob -> [value, the trainer's default] where they differ. A method's own knobs have no default here."""
    files = ROOT / "infra" / "training.py", ROOT / ("train_uft.py" if "algo" in config else "train_ift.py")
    parts = [part for file in files for part in ast.parse(file.read_text(encoding="utf-8")).body]
    classes = [part for part in parts if getattr(part, "name", "") in ("RunConfig", "Config")]
    knobs = [field for c in classes for field in c.body if isinstance(field, ast.AnnAssign)]
    defaults = {f.target.id: json.loads(json.dumps(ast.literal_eval(f.value))) for f in knobs}
    pairs = {key: [value, defaults.get(key)] for key, value in config.items() if key != "out_dir"}
    # A run writes down the dtypes that auto came to.
    return {k: [v, d] for k, (v, d) in pairs.items() if v != d and not ("dtype" in k and d == "auto")}


def curves(records: list[dict], window: int) -> dict[str, list]:
    """Metric -> its points [step, value]: validations, or means over windows named by their last step."""
    found = {}
    for r in records:
        for key, value in r.items():
            x = r["step"] if key.startswith("val/") else math.ceil(r["step"] / window) * window
            absent = value == 0 and (key in ("actor/hint_nll", "actor/kl_loss") or "solved" not in r)
            if isinstance(value, int | float) and not (absent and key.startswith("actor/")):
                found.setdefault(key, {}).setdefault(min(x, records[-1]["step"]), []).append(value)
    means = {key: {x: sum(v) / len(v) for x, v in points.items()} for key, points in found.items()}
    return {key: [[x, float(f"{y:.5g}")] for x, y in points.items()] for key, points in means.items()}


def facts(config: dict, records: list[dict]) -> dict[str, str]:
    """What the head of the page says, by name."""
    last, found = {key: value for r in records for key, value in r.items()}, {}
    tests = [r for r in records if {"val/accuracy", "val/low", "val/high"} <= r.keys()]
    for r in (*tests[-1:], *tests[:1]):
        interval = f"{r['val/low']:.1%} to {r['val/high']:.1%}"
        found[f"test accuracy, step {r['step']:,}"] = f"{r['val/accuracy']:.1%} ({interval})"
    found["training"] = f"{last.get('step', 0):,} steps, {last.get('train_s', 0):,.0f} s"
    trained = sum(r.get("tokens_per_s", 0) * r.get("timing_s/step", 0) for r in records)
    sampled = f"{last.get('sampled_tokens', 0):,} sampled"
    found["tokens"] = f"about {trained:,.0f} trained on" if trained else sampled
    device = config.get("device", "auto")
    found["device"] = "CPU" if device == "auto" and "mfu" not in last else device.replace("auto", "CUDA")
    found["method"] = config.get("algo") or ", ".join(config.get("loss", []))
    command = "git describe --always --dirty --exclude='*'"
    git = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    return found | {"commit of this page": git.stdout.strip() or "not known"}


def warnings(records: list[dict]) -> list[str]:
    """Signs of trouble, each with its reason and what to try."""
    rollouts = [r for r in records if "dead_groups" in r]
    hinted = [r for r in rollouts if r.get("actor/hint_nll")]
    n, recent = len(hinted) // 5, rollouts[-LONG:]

    def mean(key: str, rs: list[dict]) -> float:
        return sum(r.get(key) or 0 for r in rs) / max(1, len(rs))

    dead = max(map(len, "".join(" x"[r["dead_groups"] == 1] for r in rollouts).split()), default=0)
    nll, late_nll = (mean("actor/hint_nll", rs) for rs in (hinted[:n], hinted[-n:]))
    tokens, late = (mean("response_length/mean", rs) for rs in (hinted[:n], hinted[-n:]))
    cut, entropy = (mean(key, recent) for key in ("response_length/clip_ratio", "actor/entropy"))
    found, enough = [], len(recent) == LONG
    if dead >= LONG:
        found.append(f"All groups were dead in {dead} steps in a row: equal rewards teach nothing. Show more hints.")
    if n >= LONG // 5 and late_nll > 1.2 * nll and late < 0.8 * tokens:
        change = f"hint_nll rose from {nll:.2f} to {late_nll:.2f}, completions shrank from {tokens:.0f} to"
        found.append(f"Solutions are forgotten: {change} {late:.0f} tokens. Raise hint_coef.")
    if enough and cut > 0.95:
        found.append(f"{cut:.0%} of the last completions were cut before their end. Raise max_new_tokens.")
    if enough and entropy < 0.01:
        found.append(f"The entropy is gone ({entropy:.4f} nats): completions of a problem are equal. Lower lr.")
    return found


def read_run(folder: Path) -> dict:
    """All that the page shows of a run."""
    records, notes = read_jsonl(folder / "metrics.jsonl")
    samples, more = read_jsonl(folder / "samples.jsonl")
    try:
        config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        config, more = {}, [*more, f"config.toml: {e}"]
    window = max(1, math.ceil(max((r["step"] for r in records), default=0) / WINDOWS))
    run = {"name": folder.resolve().name, "facts": facts(config, records), "changed": changed_knobs(config)}
    run |= {"window": window, "curves": curves(records, window), "warnings": warnings(records) + notes + more}
    return run | {f"{k}s": [s for s in samples if s.get("kind") == k] for k in ("group", "answer", "row")}


def write_report(*folders: Path) -> None:
    """Write report.html into the first run's folder, on rank 0. An error is printed: the run has ended well."""
    path = folders[0] / "report.html"
    try:
        if os.environ.get("RANK", "0") == "0":
            data = json.dumps([read_run(folder) for folder in folders]).replace("<", "\\u003c")
            path.write_text(PAGE.replace("DATA", data), encoding="utf-8")
    except Exception as e:
        print(f"{path}: not written ({type(e).__name__}: {e})", file=sys.stderr)


PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><style>
:root { color-scheme: light dark; --dim: light-dark(#5d6772, #9aa4b0); --card: light-dark(#f3f5f8, #1f2328);
  --low: light-dark(#e3ebf4, #212c39); --high: light-dark(#08519c, #63b3ff); --hot: light-dark(#e8590c, #fa4);
  --hint: light-dark(#c9e3ff, #1d4a77); --good: light-dark(#1a7f37, #4c6); --bad: light-dark(#cf222e, #f77) }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1060px; margin: auto; padding: 12px }
h2 { font-size: 17px; margin: 32px 0 0 } p, small, text { color: var(--dim); fill: var(--dim); margin: 4px 0 }
.cards { display: grid; gap: 8px; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)) }
article, .warning { background: var(--card); border-radius: 6px; padding: 8px; min-width: 0 }
.warning { border-left: 4px solid var(--hot); margin: 8px 0 } small, text { font-size: 12px }
pre, .cell { font: 13px/1.6 monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0 }
.good { color: var(--good) } .bad { color: var(--bad) } .given { background: var(--hint) }
.sampled { background: var(--unlikely) } .advantage .sampled { background: var(--advantage) }
.list { max-height: 640px; overflow: auto; margin-top: 8px } details { padding-left: 8px; border-left: 16px solid }
.cell { display: inline-block; text-align: center; padding: 0 4px } article b, .cell * { display: block }
</style><main></main><script type="application/json" id="data">DATA</script><script>
const runs = JSON.parse(document.getElementById("data").textContent), colours = ["var(--high)", "var(--hot)"]
const maker = space => (tag, attrs, ...kids) => {  // of elements; a string among the kids becomes text
  const e = document.createElementNS("http://www.w3.org/" + space, tag)
  for (const k in attrs) typeof attrs[k] == "function" ? e[k] = attrs[k] : e.setAttribute(k, attrs[k])
  e.append(...kids)
  return e
}
const h = maker("1999/xhtml"), svg = maker("2000/svg"), main = document.querySelector("main")
const section = (title, about, ...kids) => main.append(h("h2", {}, title), h("p", {}, about), ...kids)
const cards = list => h("div", { class: "cards" }, ...list), visible = text => text.replaceAll("\n", "↵\n")
const mix = (a, share, b = "transparent") => `color-mix(in srgb, ${a} ${100 * Math.min(1, share)}%, ${b})`
const ramp = share => mix("var(--high)", share, "var(--low)"), short = v => +(+v).toPrecision(3)
const last = Math.max(1, ...runs.flatMap(r => Object.values(r.curves).map(c => c.at(-1)[0])))
const label = (x, y, anchor, text) => svg("text", { x, y, "text-anchor": anchor }, text)
const line = (points, x, y, attrs) => svg("polyline", { fill: "none", "stroke-width": 2, ...attrs,
  points: points.map(p => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join(" ") })

document.title = runs.map(r => r.name).join(" and ")
runs.forEach((r, i) => main.append(h("h1", { style: `color: ${colours[i]}` }, r.name),
  ...r.warnings.map(text => h("div", { class: "warning" }, text)),
  cards(Object.entries(r.facts).map(([k, v]) => h("article", {}, h("small", {}, k), h("b", {}, v)))),
  h("p", {}, "Knobs that differ from their defaults: ", Object.entries(r.changed)
    .map(([k, [v, d]]) => `${k} = ${v} (${JSON.stringify(d)})`).join(", ") || "none")))

for (const r of runs) {  // success by hint length
  const n = k => +k.slice(12), keys = Object.keys(r.curves).filter(k => k.startsWith("solved/hint_"))
  const W = Math.min(1030, innerWidth - 30), row = Math.max(26, 140 / keys.length), H = row * keys.length
  const x = step => 60 + (W - 80) * step / last, cell = (step, v, i) => svg("rect", { y: i * row,
    x: x(Math.max(0, step - r.window)), height: row - 1, width: x(r.window) - 59.7, style: `fill: ${ramp(v)}` },
    svg("title", {}, `step ${step}: ${short(v)}`))
  const curve = (key, attrs) => [{ stroke: "Canvas", "stroke-width": 5 }, attrs].map(a =>
    line(r.curves[key] || [], x, v => H - v * H, a))
  if (keys.length) section(`${r.name}: success by hint length`, "The bluer, the more rollouts are right; blank: "
    + "no such hint. Success should move from the top, where most is shown, to the row without hints, as in the "
    + "test. Orange: mean reward, which falls in a healthy run while hints shrink. Dashed: share shown.",
    svg("svg", { viewBox: `0 0 ${W} ${H + 18}` }, ...keys.sort((a, b) => n(b) - n(a)).flatMap((k, i) => [
      label(56, (i + 0.6) * row, "end", n(k) ? n(k) + " shown" : "no hint"),
      ...r.curves[k].map(([step, v]) => cell(step, v, i))]),
      ...curve("hint/share", { stroke: "CanvasText", "stroke-dasharray": "6 4" }),
      ...curve("critic/rewards/mean", { stroke: "var(--hot)" }), label(W - 16, 12, "start", 1),
      label(W - 16, H, "start", 0), label(60, H + 15, "start", "step 0"), label(W - 20, H + 15, "end", last)))
}

const hidden = /timing|solved.hint|val.(low|high|reward)|lr|mfu|tokens|train_s|step/
const names = [...new Set(runs.flatMap(r => Object.keys(r.curves)))].filter(key => !hidden.test(key))
section("Curves", "Each with its last value. docs/metrics.md explains the names.", cards(names.map(key => {
  const at = k => runs.map(r => r.curves[k] || []), lines = at(key), test = key == "val/accuracy"
  const bands = test ? at("val/low").map((l, i) => [...l, ...at("val/high")[i].toReversed()]) : []
  const values = [lines, bands].flat(2).map(p => p[1]), high = Math.max(...values), least = Math.min(...values)
  const low = least > high / 2 ? least : Math.min(0, least), ends = lines.map(l => short(l.at(-1)?.[1]))
  const x = step => 40 + 252 * step / last, y = v => 110 - 96 * (v - low) / (high - low || 1)
  return h("article", {}, h("small", {}, `${key}: ${ends.join(" and ")}`), svg("svg",
    { viewBox: "0 0 300 128" }, label(36, 18, "end", short(high)), label(36, 112, "end", short(low)),
    line([[0, high], [0, low], [last, low]], x, y, { stroke: "var(--dim)", opacity: 0.4 }),
    ...bands.map((b, i) => line(b, x, y, { style: `fill: ${mix(colours[i], 0.2)}` })),
    ...lines.map((l, i) => line(l, x, y, { stroke: colours[i] })), label(292, 125, "end", last)))
})))

const right = a => a.reward == 1, solved = g => g.trajectories.filter(right).length
const verdict = a => h("b", { class: right(a) ? "good" : "bad" }, a.verdict + (a.cut ? ", cut" : ""))
const fold = (title, share, fill) => h("details", { style: `border-color: ${ramp(share)}`,
  ontoggle: e => e.target.children[1] || e.target.append(...fill()) }, h("summary", {}, title))
const filtered = (filters, items, draw) => {  // a menu of filters, and what is left
  const view = h("div", { class: "list cards" }), menu = h("select", {
    onchange: () => view.replaceChildren(...items.filter(filters[menu.value]).map(draw)) },
    ...Object.keys(filters).map(k => h("option", { value: k }, `${k} (${items.filter(filters[k]).length})`)))
  menu.onchange()
  return [menu, view]
}
const changes = (now, was) => ({ "newly solved": a => was(a) && now(a) && !now(was(a)),
  "newly lost": a => was(a) && !now(a) && now(was(a)) })

for (const r of runs.filter(r => r.groups.length)) {
  const of = {}, size = g => Math.max(...g.trajectories.map(t => t.tokens.length))
  for (const g of r.groups) (of[g.problem] ??= []).push(g)
  const long = r.groups.map(size).sort((a, b) => b - a)[9] || 0
  const token = (t, i, a = t.advantage[i] ?? t.advantage) => h("span", {
    class: i < t.n_given ? "given" : "sampled", title: `log-prob ${t.logprobs[i]}, advantage ${a}`,
    style: `--unlikely: ${mix("var(--hot)", -t.logprobs[i] / 4)}; --advantage: `
      + mix(`var(--${a > 0 ? "good" : "bad"})`, Math.abs(a) / 2) }, visible(t.tokens[i]))
  const card = t => h("article", {}, verdict(t), h("small", {}, `reward ${t.reward}, advantage ${
    t.advantage.at?.(-1) ?? t.advantage}`), h("pre", {}, ...t.tokens.map((_, i) => token(t, i))))
  const title = g => `step ${g.step}: ${solved(g)} of ${g.trajectories.length} right${g.dead ? ", dead" : ""}`
  const show = g => fold(title(g), solved(g) / g.trajectories.length, () => [h("pre", {}, g.prompt),
    ...of[g.problem].flatMap(o => [h("p", {}, title(o)), cards(o.trajectories.map(card))])])
  const colour = h("select", { onchange: () => main.className = colour.value },
    ...["unlikely", "advantage"].map(value => h("option", { value }, `colour: ${value}`)))
  section(`${r.name}: groups`, "Open one to see its completions, at every step that has this problem. Text on "
    + "blue was given as a hint; the model wrote the rest.", colour, ...filtered({ "all groups": g => true,
      dead: g => g.dead, ...changes(solved, g => of[g.problem][of[g.problem].indexOf(g) - 1]),
      longest: g => size(g) >= long }, r.groups, show))
}
for (const r of runs.filter(r => r.rows.length)) {
  const cell = ([text, own, nll, weight]) => h("span", { class: "cell",
    style: `background: ${mix("var(--hot)", weight / 4)}` }, visible(text), ...own == null ? [] : [
    h("b", { class: own == text ? "good" : "bad" }, visible(own)), h("small", {}, short(nll)), short(weight)])
  section(`${r.name}: rows`, "Below a target: the model's own prediction, nll, and weight (also the colour).",
    ...filtered({ "all rows": row => true }, r.rows, row => fold(`step ${row.step}`, 1, () => row.tokens.map(cell))))
}
for (const r of runs.filter(r => r.answers.length)) {
  const end = r.answers.at(-1).step, other = runs.find(o => o != r), was = new Map((other || r).answers
    .filter(a => other || a.step < end).map(a => [a.prompt, a])), before = a => was.get(a.prompt)
  const card = a => h("article", {}, verdict(a), h("pre", {}, a.prompt), h("pre", {}, a.response), h("small", {},
    before(a) ? `${other ? other.name : "step " + before(a).step}: ${before(a).verdict}` : ""))
  section(`${r.name}: test answers at step ${end}`, `Newly: since ${other?.name || "the first validation"}.`,
    ...filtered({ "all answers": a => true, right, wrong: a => !right(a), cut: a => a.cut,
      ...changes(right, before) }, r.answers.filter(a => a.step == end), card))
}
</script>
"""


if __name__ == "__main__":
    folders = [Path(arg) for arg in sys.argv[1:]]
    if len(folders) not in (1, 2) or not all((f / "metrics.jsonl").exists() for f in folders):
        print(f"{__doc__}\nerror: name the folders, with a metrics.jsonl, of one or two runs", file=sys.stderr)
        sys.exit(2)
    write_report(*folders)
