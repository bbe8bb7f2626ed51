"""infra/log.py: metrics.jsonl, the live counter, floating-point operations."""

import json

import torch

from infra import log
from infra.log import Counter, Log, brief, flops_per_token
from model import ModelConfig, Transformer


def test_a_new_log_is_empty_and_a_resumed_one_keeps_the_steps_done(tmp_path):
    def steps():
        return [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    (tmp_path / "metrics.jsonl").write_text('{"step": 99}\n')
    log = Log(tmp_path, 0)
    assert steps() == []
    for s in (1, 2, 3):
        log.write("metrics", s, {"text": "é\n\u2028"})
        log.write("samples", s, {})
    Log(tmp_path, 3)
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert list(map(json.loads, lines)) == [{"step": s, "text": "é\n\u2028"} for s in (1, 2, 3)]
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 3, "cut in the mid')
    Log(tmp_path, 2).write("metrics", 3, {"text": ""})
    lines = (tmp_path / "metrics.jsonl").read_text().split("\n")[:-1]
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert (tmp_path / "samples.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_lines_that_an_editor_or_a_crash_left_do_not_stop_a_run(tmp_path):
    path, records = tmp_path / "metrics.jsonl", [b'{"step": %d}' % s for s in (1, 2, 3)]
    for junk in (b"", b"  ", b"\r", b'{"step": 1, "lo', b"null", b"[1]", b"\xff", b'{"step": null}', b"{}"):
        path.write_bytes(b"\n".join([junk, records[0], junk, records[1], junk, records[2], junk, b""]))
        Log(tmp_path, 2).write("metrics", 3, {"again": 1})
        lines = path.read_bytes().split(b"\n")
        assert lines == [junk, records[0], junk, records[1], junk, b'{"step": 3, "again": 1}', b""], junk
    path.write_bytes(b"\n".join(records))  # without its last newline: the record is whole
    Log(tmp_path, 3).write("metrics", 4, {})
    assert path.read_bytes() == b"\n".join([*records, b'{"step": 4}', b""])


def test_a_counter_writes_on_a_terminal_only(capsys, monkeypatch):
    Counter(3)(1, 10)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    now = iter([0.0, 2.0, 2.1, 4.0, 4.05])
    monkeypatch.setattr(log.time, "perf_counter", lambda: next(now))
    counter = Counter(4)
    for finished, tokens in ((0, 10), (1, 11), (1, 20), (4, 40)):
        counter(finished, tokens)
    shown = capsys.readouterr().out.split("\r")[1:]
    assert [s.strip() for s in shown] == ["0/4 answers, 5 tok/s", "1/4 answers, 5 tok/s, 12 s left", "", ""]


def test_brief_shows_both_ends_of_a_long_text():
    assert brief(" a\n b ") == repr("a\n b")
    assert brief("x" * 200) == repr("x" * 200)
    assert brief("a" * 150 + "b" * 150) == repr("a" * 100 + " [...] " + "b" * 100)


def test_flops_of_a_token_by_hand():
    """Qwen2.5-0.5B: 357,898,112 parameters in blocks with biases and norms, 136,134,656 in the head."""
    sizes = 151936, 896, 4864, 24, 14, 2
    with torch.device("meta"):
        model, untied = (
            Transformer(ModelConfig(*sizes, model_type="qwen2", tie_word_embeddings=tied))
            for tied in (True, False)
        )
    assert sum(p.numel() for p in model.parameters()) == 494_032_768
    flops = 6 * 494_032_768 + 6 * 24 * 14 * 64 * 4096
    assert (
        flops_per_token(model, 4096) == flops_per_token(untied, 4096) == flops
    )  # a table multiplies nothing
