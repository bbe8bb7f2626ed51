"""One page about a run, report.html: what it learned, how, and what it wrote. Two runs are overlaid.

    python experiments/report.py out/a             writes out/a/report.html
    python experiments/report.py out/a out/b       the same with out/b beside it

It reads config.toml, metrics.jsonl and samples.jsonl. The page needs no server, network or package. Curves
are means over windows of steps. Torch is not imported: that takes longer than all the rest.
"""

import ast
import json
import math
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
    """Knob -> [value, default] where they differ. The defaults are read from the trainer's source."""
    names = [config["algo"]] if "algo" in config else config.get("loss", [])
    files = ["infra/training.py", "train_uft.py" if "algo" in config else "train_ift.py"]
    files += [name if name.endswith(".py") else f"variants/{name}.py" for name in names]
    sources = [(ROOT / file).read_text(encoding="utf-8") for file in files if (ROOT / file).is_file()]
    classes = [c for source in sources for c in ast.parse(source).body if isinstance(c, ast.ClassDef)]
    knobs = [f for c in classes if c.name in ("RunConfig", "Config") for f in c.body if isinstance(f, ast.AnnAssign)]
    defaults = {f.target.id: json.loads(json.dumps(ast.literal_eval(f.value))) for f in knobs}
    pairs = {key: [value, defaults.get(key, value)] for key, value in config.items() if key != "out_dir"}
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
    last = {key: value for r in records for key, value in r.items()}
    tests = [r for r in records if {"val/accuracy", "val/low", "val/high"} <= r.keys()]
    trained = sum(r.get("tokens_per_s", 0) * r.get("timing_s/step", 0) for r in records)
    device, command = config.get("device", "auto"), "git describe --always --dirty --exclude='*'"
    git = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    return {
        f"test accuracy, step {r['step']:,}": f"{r['val/accuracy']:.1%} ({r['val/low']:.1%} to {r['val/high']:.1%})"
        for r in (*tests[-1:], *tests[:1])
    } | {
        "training": f"{last.get('step', 0):,} steps, {last.get('train_s', 0):,.0f} s",
        "tokens": f"{trained:,.0f} trained on" if trained else f"{last.get('sampled_tokens', 0):,} sampled",
        "device": "CPU" if device == "auto" and "mfu" not in last else device.replace("auto", "CUDA"),
        "method": config.get("algo") or ", ".join(config.get("loss", [])),
        "task": config.get("task") or config.get("data_path", ""),
        "model": config.get("model") or "the task's tiny base",
        "commit of this page": git.stdout.strip() or "not known",
    }


def warnings(records: list[dict]) -> list[str]:
    """Signs of trouble, each with its reason and what to try."""

    def mean(key: str, rs: list[dict]) -> float:
        return sum(r.get(key) or 0 for r in rs) / max(1, len(rs))

    rollouts, found = [r for r in records if "dead_groups" in r], []
    recent = rollouts[-LONG:] if len(rollouts) >= LONG else []
    dead = max(map(len, "".join(" x"[r["dead_groups"] == 1] for r in rollouts).split()), default=0)
    if dead >= LONG:
        found.append(f"All groups were dead in {dead} steps in a row: equal rewards have no advantage and teach"
                     " nothing. Show hints for longer, or raise rollouts or temperature.")
    hinted = [r for r in rollouts if r.get("actor/hint_nll")]
    fifths = hinted[: len(hinted) // 5], hinted[-(len(hinted) // 5) :]
    (nll, later_nll), (length, later_length) = (
        [mean(key, rs) for rs in fifths] for key in ("actor/hint_nll", "response_length/mean"))
    if len(hinted) >= LONG and later_nll > 1.2 * nll and later_length < 0.8 * length:
        found.append(f"hint_nll rose from {nll:.2f} to {later_nll:.2f} while completions shortened from"
                     f" {length:.0f} to {later_length:.0f} tokens: solutions are forgotten. Raise hint_coef.")
    if mean("response_length/clip_ratio", recent) > 0.95:
        found.append(f"Nearly all completions of the last {LONG} steps were cut, so few reach an answer. Raise"
                     " max_new_tokens, or see whether the model ever writes its end token.")
    if recent and mean("actor/entropy", recent) < 0.01:
        found.append(f"The entropy of the last {LONG} steps is {mean('actor/entropy', recent):.4f} nats: a"
                     " problem's completions are all the same. Raise entropy_coef, or lower lr.")
    return found


def read_run(folder: Path) -> dict:
    """All that the page shows of a run."""
    (records, notes), (samples, more) = (read_jsonl(folder / f"{name}.jsonl") for name in ("metrics", "samples"))
    try:
        config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        config, more = {}, [*more, f"config.toml: {e}"]
    window = max(1, math.ceil(max((r["step"] for r in records), default=0) / WINDOWS))
    run = {"name": folder.resolve().name, "facts": facts(config, records), "changed": changed_knobs(config)}
    run |= {"window": window, "curves": curves(records, window), "warnings": warnings(records) + notes + more}
    return run | {f"{k}s": [s for s in samples if s.get("kind") == k] for k in ("group", "answer", "row")}


def make_report(folders: list[Path]) -> Path:
    """Write report.html into the first run's folder; returns its path."""
    path, data = folders[0] / "report.html", json.dumps([read_run(folder) for folder in folders])
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


PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><style>
:root { color-scheme: light dark; --dim: light-dark(#5d6772, #9aa4b0); --card: light-dark(#f3f5f8, #1f2328);
  --low: light-dark(#e3ebf4, #212c39); --high: light-dark(#08519c, #63b3ff); --hot: light-dark(#e8590c, #ffa94d);
  --hint: light-dark(#c9e3ff, #1d4a77); --good: light-dark(#1a7f37, #4cc26a); --bad: light-dark(#cf222e, #ff7b72) }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1060px; margin: auto; padding: 12px }
h1 { font-size: 22px } h2 { font-size: 17px; margin: 32px 0 0 } p, small, text { color: var(--dim); margin: 4px 0 }
.cards { display: grid; gap: 8px; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)) }
article, .warning { background: var(--card); border-radius: 6px; padding: 8px; min-width: 0 }
small, text { font-size: 12px; fill: var(--dim) } article b, .cell * { display: block }
pre, .cell { font: 13px/1.6 monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0 }
.warning { border-left: 4px solid var(--hot); margin: 8px 0 } .scroll { max-height: 600px; overflow: auto }
.good { color: var(--good) } .bad { color: var(--bad) } .given { background: var(--hint) }
.sampled { background: var(--unlikely) } .advantage .sampled { background: var(--advantage) }
.strip button { width: 20px; height: 22px; margin: 1px; border: 0 } .open { outline: 3px solid var(--hot) }
.cell { display: inline-block; text-align: center; margin: 1px; padding: 0 4px; vertical-align: top }
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
const mix = (a, share, b = "transparent") => `color-mix(in srgb, ${a} ${100 * Math.min(1, share)}%, ${b})`
const ramp = share => mix("var(--high)", share, "var(--low)"), visible = text => text.replaceAll("\n", "↵\n")
const short = v => Math.abs(v) >= 1000 ? Math.round(v) : +(+v).toPrecision(3)
const last = Math.max(1, ...runs.flatMap(r => Object.values(r.curves).map(c => c.at(-1)[0])))
const label = (x, y, anchor, text) => svg("text", { x, y, "text-anchor": anchor }, text)
const line = (points, x, y, attrs) => svg("polyline", { fill: "none", "stroke-width": 2, ...attrs,
  points: points.map(p => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join(" ") })

document.title = runs.map(r => r.name).join(" and ")
runs.forEach((r, i) => main.append(h("h1", { style: `color: ${colours[i]}` }, r.name),
  ...r.warnings.map(text => h("div", { class: "warning" }, text)), h("div", { class: "cards" },
    ...Object.entries(r.facts).map(([k, v]) => h("article", {}, h("small", {}, k), h("b", {}, v)))),
  h("p", {}, "Knobs that differ from their defaults: ", Object.entries(r.changed)
    .map(([k, [v, d]]) => `${k} = ${v} (${JSON.stringify(d)})`).join(", ") || "none")))

for (const r of runs) {  // success by hint length
  const n = k => +k.slice(12), keys = Object.keys(r.curves).filter(k => k.startsWith("solved/hint_"))
  const W = Math.min(1030, innerWidth - 30), row = Math.max(26, 140 / keys.length), H = row * keys.length
  const x = step => 60 + (W - 80) * step / last
  const cell = (step, v, i) => svg("rect", { x: x(Math.max(0, step - r.window)), y: i * row, height: row - 1,
    width: x(r.window) - x(0) + 0.3, style: `fill: ${ramp(v)}` }, svg("title", {}, `step ${step}: ${short(v)}`))
  const curve = (key, attrs) => [{ stroke: "Canvas", "stroke-width": 5 }, attrs].map(a =>
    line(r.curves[key] || [], x, v => H - v * H, a))
  if (keys.length) section(`${r.name}: success by hint length`, "The stronger the blue, the more rollouts are "
    + "right; blank: no such hint. Success begins where most is shown (top) and should come down to the row "
    + "without hints, as in the test. Orange: mean reward. Dashed: share of the solution shown. The reward of "
    + "a healthy run falls while hints shrink, since problems get harder.",
    svg("svg", { viewBox: `0 0 ${W} ${H + 18}` }, ...keys.sort((a, b) => n(b) - n(a)).flatMap((k, i) => [
      label(56, (i + 0.6) * row, "end", n(k) ? n(k) + " shown" : "no hint"),
      ...r.curves[k].map(([step, v]) => cell(step, v, i))]),
      ...curve("hint/share", { stroke: "CanvasText", "stroke-dasharray": "6 4" }),
      ...curve("critic/rewards/mean", { stroke: "var(--hot)" }), label(W - 16, 12, "start", 1),
      label(W - 16, H, "start", 0), label(60, H + 15, "start", "step 0"), label(W - 20, H + 15, "end", last)))
}

const TITLES = { "val/accuracy": "test accuracy (95 %)", "val/other_start": "from another first step",
  "val/loss": "test nll", "critic/rewards/mean": "mean reward", solved: "share solved", loss: "training loss",
  dead_groups: "share of dead groups", "response_length/mean": "completion tokens", nll: "training nll",
  "response_length/clip_ratio": "share of completions cut", "actor/entropy": "entropy, nats",
  "actor/hint_nll": "nll of a given token", "actor/kl_loss": "KL to the reference", grad_norm: "gradient norm",
  "actor/grad_norm": "gradient norm" }
function chart([key, title]) {
  const at = k => runs.map(r => r.curves[k] || []), lines = at(key), test = key == "val/accuracy"
  const bands = test ? at("val/low").map((l, i) => [...l, ...at("val/high")[i].toReversed()]) : []
  const values = [lines, bands].flat(2).map(p => p[1]), high = Math.max(...values), least = Math.min(...values)
  const low = least > high / 2 ? least : Math.min(0, least), ends = lines.map(l => short(l.at(-1)?.[1]))
  const x = step => 40 + 252 * step / last, y = v => 110 - 96 * (v - low) / (high - low || 1)
  return values.length ? h("article", {}, h("small", {}, `${title}: ${ends.join(" and ")}`), svg("svg",
    { viewBox: "0 0 300 128" }, label(36, 18, "end", short(high)), label(36, 112, "end", short(low)),
    line([[0, high], [0, low], [last, low]], x, y, { stroke: "var(--dim)", opacity: 0.4 }),
    ...bands.map((b, i) => line(b, x, y, { style: `fill: ${mix(colours[i], 0.2)}` })),
    ...lines.map((l, i) => line(l, x, y, { stroke: colours[i] })), label(292, 125, "end", last))) : ""
}
section("Curves", "With their last values.", h("div", { class: "cards" }, ...Object.entries(TITLES).map(chart)))

function strip(items, colour, show) {  // buttons in the order of steps, and what the chosen one shows
  const view = h("div", {}), open = item => {
    buttons.forEach((b, i) => b.className = items[i] == item ? "open" : "")
    view.replaceChildren(...show(item, open))
  }
  const buttons = items.map(item => h("button", { title: `step ${item.step}`, onclick: () => open(item),
    style: `background: ${colour(item)}` }))
  if (items.length) open(items.findLast(item => !item.dead) || items.at(-1))
  return h("div", { class: "strip" }, ...buttons, view)
}
function filtered(filters, items, draw) {  // a menu of filters, and what is left
  const view = h("div", {}), menu = h("select", {
    onchange: () => view.replaceChildren(draw(items.filter(filters[menu.value]))) },
    ...Object.keys(filters).map(k => h("option", { value: k }, `${k} (${items.filter(filters[k]).length})`)))
  menu.onchange()
  return [menu, view]
}
const right = a => a.reward == 1, solved = g => g.trajectories.filter(right).length
const verdict = a => h("b", { class: right(a) ? "good" : "bad" }, a.verdict + (a.cut ? ", cut" : ""))

for (const r of runs.filter(r => r.groups.length)) {
  const seen = {}, size = g => Math.max(...g.trajectories.map(t => t.tokens.length))
  for (const g of r.groups) [g.was, seen[g.problem]] = [seen[g.problem], solved(g)]
  const long = r.groups.map(size).sort((a, b) => b - a)[9] || 0
  const token = (t, i, a = t.advantage[i] ?? t.advantage) => h("span", {
    class: i < t.n_given ? "given" : "sampled", title: `log-prob ${t.logprobs[i]}, advantage ${a}`,
    style: `--unlikely: ${mix("var(--hot)", -t.logprobs[i] / 4)}; --advantage: `
      + mix(a > 0 ? "var(--good)" : "var(--bad)", Math.abs(a) / 2) }, visible(t.tokens[i]))
  const card = t => h("article", {}, verdict(t), h("small", {}, `reward ${t.reward}, advantage ${
    t.advantage.at?.(-1) ?? t.advantage}, ${t.n_given} of ${t.tokens.length} tokens given`),
    h("pre", {}, ...t.tokens.map((_, i) => token(t, i))))
  const show = (g, open) => [h("p", {}, `Step ${g.step}, problem ${g.problem}${g.dead ? ", dead" : ""} `,
    ...r.groups.filter(o => o != g && o.problem == g.problem).map(o => h("button", {
      onclick: () => open(o) }, `at step ${o.step}: ${solved(o)} right`))),
    h("pre", {}, g.prompt), h("div", { class: "cards" }, ...g.trajectories.map(card))]
  const colour = h("select", { onchange: () => main.className = colour.value },
    ...["unlikely", "advantage"].map(value => h("option", { value }, `colour: ${value}`)))
  section(`${r.name}: groups`, "A button is a problem at a step: the stronger the blue, the more completions "
    + "are right. Text on blue was given as a hint; the model wrote the rest.", colour, ...filtered({
      "all groups": g => true, dead: g => g.dead, "newly solved": g => solved(g) && g.was === 0,
      "newly lost": g => !solved(g) && g.was > 0, longest: g => size(g) >= long }, r.groups,
    groups => strip(groups, g => ramp(solved(g) / g.trajectories.length), show)))
}
for (const r of runs.filter(r => r.rows.length)) {
  const cell = ([text, own, nll, weight]) => h("span", { class: "cell",
    style: `background: ${mix("var(--hot)", weight / 4)}` }, visible(text), ...own == null ? [] : [
      h("b", { class: own == text ? "good" : "bad" }, visible(own)), h("small", {}, `${nll} ${weight}`)])
  section(`${r.name}: rows`, "Below a target: the model's own prediction, the nll, and the weight in the loss "
    + "(the colour).", strip(r.rows, () => "var(--high)", row => [h("p", {}, `Step ${row.step}`),
    ...row.tokens.map(cell)]))
}
for (const r of runs.filter(r => r.answers.length)) {
  const end = r.answers.at(-1).step, other = runs.find(o => o != r), was = new Map((other || r).answers
    .filter(a => other || a.step < end).map(a => [a.prompt, a])), before = a => was.get(a.prompt)
  const card = a => h("article", {}, verdict(a), h("pre", {}, a.prompt), h("pre", {}, a.response), h("small", {},
    before(a) ? `${other ? other.name : "step " + before(a).step}: ${before(a).verdict}` : ""))
  section(`${r.name}: test answers at step ${end}`, `Newly: against ${other?.name || "the first validation, of "
    + "which a few answers are kept"}.`, ...filtered({ "all answers": a => true, right, wrong: a => !right(a),
    "newly solved": a => right(a) && before(a) && !right(before(a)), cut: a => a.cut,
    "newly lost": a => !right(a) && before(a) && right(before(a)) }, r.answers.filter(a => a.step == end),
    list => h("div", { class: "cards scroll" }, ...list.map(card))))
}
</script>
"""


if __name__ == "__main__":
    folders = [Path(arg) for arg in sys.argv[1:]]
    if len(folders) not in (1, 2) or not all((f / "metrics.jsonl").exists() for f in folders):
        print(f"{__doc__}\nerror: name the folders, with a metrics.jsonl, of one or two runs", file=sys.stderr)
        sys.exit(2)
    print(f"report in {make_report(folders)}")
