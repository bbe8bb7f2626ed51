"""The model card, out_dir/model/README.md."""

import train_ift
import train_uft
from infra.card import model_card
from infra.training import ROOT

BASE = ROOT / "data/tiny/countdown"
LAST = {"val/accuracy": 0.514, "val/low": 0.47, "val/high": 0.558}


def test_a_card_says_what_the_model_is(tmp_path):
    cfg = train_uft.Config(
        algo="adaback", lr=1e-3, pack=False, sizes=(3, 4), out_dir="/home/me/secret", dtype="float32"
    )
    card = model_card(cfg, cfg.algo, BASE, {"step": 1000, "last": LAST})
    assert "# countdown, trained with adaback on countdown" in card and "for 1,000 steps" in card
    assert "Test accuracy: 51.4% (95 % interval of the problems: 47.0% to 55.8%)." in card
    assert "    python train_uft.py --algo=adaback --sizes=3,4 --lr=0.001\n" in card
    assert "license" not in card and "base_model" not in card
    card = model_card(cfg, cfg.algo, BASE, {"step": 1000, "last": LAST, "last_step": 900})
    assert "Test accuracy after step 900: 51.4%" in card
    assert "# out, trained" in model_card(cfg, cfg.algo, tmp_path / "out/model", {"step": 5})


def test_a_card_keeps_the_licence_of_the_base_and_no_path(tmp_path):
    base = tmp_path / "private/SomeModel"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\n# Some\nlicense: other\n")
    task = str(tmp_path / "private/mytask.py")
    cfg = train_uft.Config(algo=str(tmp_path / "mine.py"), task=task, hub="OWNER/SomeModel", model=str(base))
    card = model_card(cfg, cfg.algo, base, {"step": 5})
    assert card.startswith(
        "---\nbase_model: OWNER/SomeModel\nlicense: apache-2.0\n---\n# OWNER/SomeModel, trained with mine"
    )
    assert "--task=mytask.py" in card and "Not tested yet." in card and str(tmp_path) not in card


def test_a_card_of_the_base_that_is_no_text_costs_no_checkpoint(tmp_path):
    (tmp_path / "README.md").write_bytes(b"---\nlicense: mit\n---\n\xff\xfe")
    cfg = train_uft.Config()
    assert "license: mit" in model_card(cfg, cfg.algo, tmp_path, {"step": 5})
    assert "license" not in model_card(cfg, cfg.algo, tmp_path / "nowhere", {"step": 5})


def test_a_run_writes_the_card_of_its_last_validation(tmp_path, capsys):
    args = ["--loss=ift", "--task=countdown", "--sizes=5,6", "--steps=2", "--train_rows=20", "--test_rows=4", "--batch=4"]
    train_ift.main([*args, f"--out_dir={tmp_path}"])
    card = (tmp_path / "model/README.md").read_text()
    assert "trained with ift on countdown" in card and "for 2 steps" in card and "Test accuracy: " in card
    out = capsys.readouterr().out
    assert f"model in {tmp_path}/model, report in {tmp_path}/report.html\n" in out
    command = f"next: python evaluate.py --model={tmp_path}/model --task=countdown --style=short --sizes=5,6, or --chat\n"
    assert command in out
