"""The newcomer's page is run as it stands."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "add-a-method.md").read_text()


def test_the_example_of_the_docs_runs_as_it_is_written(tmp_path):
    for part in ("conf", "datamodules", "lightning_modules", "tessera"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", tmp_path)
    files = re.findall(r"^`(\S+)`:\n\n```\w+\n(.*?)^```", PAGE, re.M | re.S)
    assert [Path(name).suffix for name, _ in files] == [".py", ".yaml"]
    for name, text in files:
        assert not (tmp_path / name).exists()
        (tmp_path / name).write_text(text)
    program, *words = shlex.split(re.search(r"```bash\n(.*?)\n```", PAGE, re.S).group(1))
    assert program == "python"
    environment = {name: value for name, value in os.environ.items() if name != "TESSERA_DATA"}
    environment |= {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "SFT (start)" in done.stdout
    assert "RWR" in done.stdout
    results = json.loads(next((tmp_path / "outputs" / "rwr").glob("*/*/results.json")).read_text())
    assert results["data"]["standin"]
    assert 0 <= results["metrics"]["test-standin/greedy"] <= 1
