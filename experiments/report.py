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
    return records, [f"{path.name}: lines that cannot be read: {broken}."] if broken else []


def changed_knobs(config: dict) -> dict[str, list]:
    """Knob -> [value, default] where they differ. The defaults are read from the trainer's source."""
    names, defaults = [config["algo"]] if "algo" in config else config.get("loss", []), {}
    files = [Path(name) if name.endswith(".py") else ROOT / "variants" / f"{name}.py" for name in names]
    trainer = ROOT / ("train_uft.py" if "algo" in config else "train_ift.py")
    for path in (ROOT / "infra" / "training.py", trainer, *filter(Path.is_file, files)):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        classes = [c for c in tree.body if isinstance(c, ast.ClassDef) and c.name.endswith("Config")]
        for field in (f for c in classes for f in c.body if isinstance(f, ast.AnnAssign)):
            with suppress(ValueError):  # not a literal
                defaults[field.target.id] = json.loads(json.dumps(ast.literal_eval(field.value)))
    settled = {key for key in config if "dtype" in key and defaults.get(key) == "auto"} | {"out_dir"}
    pairs = {key: [value, defaults.get(key, value)] for key, value in config.items() if key not in settled}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


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
    tests = [r for r in records if "val/accuracy" in r]
    found, device = {}, config.get("device", "auto")
    for r in (*tests[-1:], *tests[:1]):
        interval = f"{r.get('val/low', 0):.1%} to {r.get('val/high', 1):.1%}"
        found[f"test accuracy, step {r['step']:,} (95 % interval)"] = f"{r['val/accuracy']:.1%} ({interval})"
    found["test nll"] = f"{last['val/loss']:.4f} nats a token" if "val/loss" in last else ""
    found["training"] = f"{last.get('step', 0):,} steps, {last.get('train_s', 0):,.0f} s"
    trained = sum(r.get("tokens_per_s", 0) * r.get("timing_s/step", 0) for r in records)
    sampled = f"{last.get('sampled_tokens', 0):,} sampled"
    found["tokens"] = f"about {trained:,.0f} trained on" if trained else sampled
    found["device"] = "CPU" if device == "auto" and "mfu" not in last else device.replace("auto", "cuda")
    found["method"] = config.get("algo") or ", ".join(config.get("loss", []))
    found["task"] = config.get("task") or config.get("data_path", "")
    found["model"] = config.get("model") or "the task's tiny base"
    with suppress(OSError):  # there is no git
        command = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude=*"]
        found["commit of this page"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {name: text for name, text in found.items() if text}


def warnings(records: list[dict]) -> list[str]:
    """Signs of trouble, each with its reason and what to try."""
    rollouts, found = [r for r in records if "dead_groups" in r], []
    hinted = [r for r in rollouts if r.get("actor/hint_nll")]
    n, recent = len(hinted) // 5, rollouts[-LONG:] if len(rollouts) >= LONG else [{"actor/entropy": 1}]

    def mean(key: str, rs: list[dict]) -> float:
        return sum(r.get(key) or 0 for r in rs) / max(1, len(rs))

    dead = max(map(len, "".join(" x"[r["dead_groups"] == 1] for r in rollouts).split()), default=0)
    if dead >= LONG:
        found.append(f"All groups were dead in {dead} steps in a row: equal rewards have no advantage and teach "
                     "nothing. Show hints for longer, or raise rollouts or temperature.")
    nll, late_nll = (mean("actor/hint_nll", rs) for rs in (hinted[:n], hinted[-n:]))
    length, late_length = (mean("response_length/mean", rs) for rs in (hinted[:n], hinted[-n:]))
    if n >= 4 and late_nll > 1.2 * nll and late_length < 0.8 * length:
        found.append(f"hint_nll rose from {nll:.2f} to {late_nll:.2f} while completions shortened from "
                     f"{length:.0f} to {late_length:.0f} tokens: solutions are forgotten. Raise hint_coef.")
    if mean("response_length/clip_ratio", recent) > 0.95:
        found.append(f"Nearly all completions of the last {LONG} steps were cut, so few reach an answer. Raise "
                     "max_new_tokens, or see whether the model ever writes its end token.")
    if mean("actor/entropy", recent) < 0.01:
        found.append(f"The entropy of the last {LONG} steps is {mean('actor/entropy', recent):.4f} nats: a "
                     "problem's completions are all the same. Raise entropy_coef, or lower lr.")
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


PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>A run</title>
<meta name="viewport" content="width=device-width"><meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"><style>
:root { color-scheme: light dark; --dim: light-dark(#5d6772, #9aa4b0); --card: light-dark(#f3f5f8, #1f2328);
  --a: light-dark(#1667b7, #6cb2ff); --b: light-dark(#b8480f, #ff9a62); --hot: light-dark(#e8590c, #ffa94d);
  --low: light-dark(#e3ebf4, #212c39); --high: light-dark(#08519c, #63b3ff); --hint: light-dark(#c9e3ff, #1d4a77);
  --good: light-dark(#1a7f37, #4cc26a); --bad: light-dark(#cf222e, #ff7b72) }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1060px; margin: auto; padding: 12px }
h1 { font-size: 22px } h2 { font-size: 17px; margin: 32px 0 0 } p, dt, figcaption, text { color: var(--dim) }
dl, .cards { display: grid; gap: 8px; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)) }
dl div, article, figure, .warning { background: var(--card); border-radius: 6px; padding: 8px; margin: 0 }
dt, figcaption, text { font-size: 12px; fill: var(--dim) } dd { margin: 0; font-weight: 600 } p { margin: 4px 0 }
pre, .cell { font: 13px/1.6 monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0 }
.warning { border-left: 4px solid var(--hot); margin: 8px 0 } .scroll { max-height: 80vh; overflow: auto }
.good { color: var(--good) } .bad { color: var(--bad) } .given { background: var(--hint) !important }
.token { background: var(--logp) } .advantage .token { background: var(--adv) }
.strip button { width: 20px; height: 22px; margin: 1px; border: 0 } .strip .open { outline: 3px solid var(--hot) }
.cell { display: inline-block; text-align: center; margin: 1px; padding: 0 4px } .cell * { display: block }
</style><main></main><script type="application/json" id="data">DATA</script><script>
const runs = JSON.parse(document.getElementById("data").textContent), colours = ["var(--a)", "var(--b)"]
const maker = space => (tag, attrs, ...kids) => {  // of elements; a string among the kids becomes text
  const e = document.createElementNS("http://www.w3.org/" + space, tag)
  for (const k in attrs) typeof attrs[k] == "function" ? e[k] = attrs[k] : e.setAttribute(k, attrs[k])
  e.append(...kids)
  return e
}
const h = maker("1999/xhtml"), svg = maker("2000/svg"), main = document.querySelector("main")
const section = (title, about, ...kids) => main.append(h("h2", {}, title), h("p", {}, about), ...kids)
const mix = (a, share, b) => `color-mix(in srgb, ${a} ${Math.round(100 * Math.min(1, share))}%, ${b})`
const ramp = share => mix("var(--high)", share, "var(--low)")
const short = v => Math.abs(v) >= 1000 ? Math.round(v) : +(+v).toPrecision(3)
const last = Math.max(1, ...runs.flatMap(r => Object.values(r.curves).map(c => c.at(-1)[0])))
const line = (points, x, y, attrs) => svg("polyline", { fill: "none", "stroke-width": 2,
  points: points.map(p => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join(" "), ...attrs })
const label = (x, y, anchor, text) => svg("text", { x, y, "text-anchor": anchor }, text)

// The head.
document.title = runs.map(r => r.name).join(" and ")
runs.forEach((r, i) => main.append(h("h1", { style: `color: ${colours[i]}` }, r.name),
  ...r.warnings.map(text => h("div", { class: "warning" }, text)),
  h("dl", {}, ...Object.entries(r.facts).map(([k, v]) => h("div", {}, h("dt", {}, k), h("dd", {}, v)))),
  h("p", {}, "Knobs that differ from their defaults: ", Object.entries(r.changed)
    .map(([k, [v, d]]) => `${k} = ${v} (${JSON.stringify(d)})`).join(", ") || "none")))

// Success by hint length.
for (const r of runs) {
  const keys = Object.keys(r.curves).filter(k => k.startsWith("solved/hint_")), n = k => +k.slice(12)
  keys.sort((a, b) => n(b) - n(a))
  const W = Math.min(1030, innerWidth - 30), row = Math.max(26, 140 / keys.length), H = row * keys.length
  const x = step => 60 + (W - 80) * step / last, y = v => H - v * H
  const cell = (step, v, i) => svg("rect", { x: x(Math.max(0, step - r.window)), y: i * row, height: row - 1,
    width: x(r.window) - x(0) + 0.3, style: `fill: ${ramp(v)}` }, svg("title", {}, `step ${step}: ${short(v)}`))
  const curve = (key, attrs) => [{ stroke: "Canvas", "stroke-width": 5 }, attrs].map(a =>
    line(r.curves[key], x, y, a))
  if (keys.length) section(`${r.name}: success by hint length`, "The stronger the blue, the more rollouts are "
    + "right; blank: none had such a hint. Success begins where most is shown (top) and should come down to "
    + "the row without hints, as in the test. Orange: mean reward. Dashed: share of the solution shown. The "
    + "reward of a healthy run falls while hints shrink: problems get harder.",
    svg("svg", { viewBox: `0 0 ${W} ${H + 18}` }, ...keys.flatMap((k, i) => [
      label(56, (i + 0.6) * row, "end", n(k) ? n(k) + " shown" : "no hint"),
      ...r.curves[k].map(([step, v]) => cell(step, v, i))]),
      ...curve("hint/share", { stroke: "CanvasText", "stroke-dasharray": "6 4" }),
      ...curve("critic/rewards/mean", { stroke: "var(--hot)" }), label(W - 16, 12, "start", 1),
      label(W - 16, H, "start", 0), label(60, H + 15, "start", "step 0"), label(W - 20, H + 15, "end", last)))
}

// Curves.
const TITLES = { "val/accuracy": "test accuracy with its 95 % interval", "val/loss": "test nll, nats a token",
  "val/other_start": "test accuracy from another first step", "critic/rewards/mean": "mean reward",
  solved: "share solved", dead_groups: "share of dead groups", "response_length/mean": "completion tokens",
  "response_length/clip_ratio": "share of completions cut", "actor/entropy": "entropy, nats",
  "actor/hint_nll": "nll of a given token", "actor/kl_loss": "KL to the reference", loss: "training loss",
  nll: "training nll", grad_norm: "gradient norm", "actor/grad_norm": "gradient norm" }
function chart([key, title]) {
  const at = k => runs.map(r => r.curves[k] || []), lines = at(key), isTest = key == "val/accuracy"
  const lows = isTest ? at("val/low") : [], highs = isTest ? at("val/high") : []
  const values = [lines, lows, highs].flat(2).map(p => p[1]), high = Math.max(...values)
  const low = Math.min(...values) > high / 2 ? Math.min(...values) : Math.min(0, ...values)
  const x = step => 40 + 252 * step / last, y = v => 110 - 96 * (v - low) / (high - low || 1)
  const ends = lines.filter(l => l.length).map(l => short(l.at(-1)[1])).join(" and ")
  return values.length ? h("figure", {}, h("figcaption", {}, `${title}: ${ends}`), svg("svg",
    { viewBox: "0 0 300 128" }, line([[0, high], [0, low], [last, low]], x, y, { stroke: "var(--dim)", opacity: 0.4 }),
    label(36, 18, "end", short(high)), label(36, 112, "end", short(low)), label(292, 125, "end", last),
    ...lows.map((l, i) => line([...l, ...highs[i].toReversed()], x, y, { style: `fill: ${mix(colours[i], 0.2, "transparent")}` })),
    ...lines.map((l, i) => line(l, x, y, { stroke: colours[i] })))) : ""
}
section("Curves", "", h("div", { class: "cards" }, ...Object.entries(TITLES).map(chart)))
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
