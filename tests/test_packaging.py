"""The installation: what the scripts need, and no module of ours in other people's path."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_no_module_is_installed():
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert content["tool"]["setuptools"] == {"py-modules": []}
    needed = content["project"]["dependencies"]
    names = {re.match(r"[a-z]+", requirement)[0] for requirement in needed}
    assert names == {"torch", "tiktoken", "numpy", "safetensors"}


def test_packages_of_the_same_names_do_not_matter(tmp_path):
    """Such as Hugging Face's evaluate, in front of the checkout on the path."""
    for name in ("evaluate", "data", "model", "fast", "infra", "experiments"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("def load(*args): pass\n")
    code = "import sys; sys.path.append(sys.argv[1]); import train_uft; print(train_uft.evaluate.__file__)"
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(ROOT / "evaluate.py"), done.stderr
