"""Sweeps of a program that takes milliseconds, carried out by real processes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

ROOT = Path(__file__).parents[2]
PATIENCE = 300  # seconds

# leaves what train.py leaves: the run folder's path, metrics.csv, results.json
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path

def ended(*_):
    note("ended")
    os._exit(143)

def note(what):
    with open("notes.jsonl", "a") as file:
        file.write(json.dumps({"what": what, "pid": os.getpid(), **words}) + "\\n")

words = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:])
signal.signal(signal.SIGTERM, ended)
note("started")
record = Path(os.environ["TESSERA_RECORD"])
run = Path("runs", record.stem)
run.mkdir(parents=True, exist_ok=True)
record.write_text(str(run.resolve()))
x = float(words["x"])
if x in json.loads(words.get("crash", "[]")):
    sys.exit(f"x={x} is too much")
loss = (x - 0.3) ** 2
for step in range(int(words.get("steps", 2))):
    time.sleep(float(words.get("pause", 0)) * (10 if x in json.loads(words.get("slow", "[]")) else 1))
    with open(run / "metrics.csv", "w") as file:
        file.write("step,loss\\n" + "".join(f"{n},{loss + 1 / (n + 1)}\\n" for n in range(step + 1)))
results = {"metrics": {"test/loss": loss}}
(run / "results.json").write_text(json.dumps(results))
"""


@dataclass
class Place:
    """A folder with a program and a sweep file."""

    path: Path
    started: list[subprocess.Popen] = field(default_factory=list)

    def write(self, **content: Any) -> Path:
        """The sweep file: keys replace those of the smallest sweep, None leaves one out."""
        small = {
            "program": "program.py",
            "method": "random",
            "metric": {"name": "loss", "goal": "minimize"},
            "parameters": {"x": {"min": 0.0, "max": 1.0}},
        }
        content = {key: value for key, value in {**small, **content}.items() if value is not None}
        (self.path / "program.py").write_text(PROGRAM)
        (self.path / "sweep.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return self.path / "sweep.yaml"

    def start(self, *words: str) -> subprocess.Popen:
        """`python -m tools.sweep sweep.yaml ...` in the folder, in a session of its own."""
        process = subprocess.Popen(
            [sys.executable, "-m", "tools.sweep", "sweep.yaml", "--folder", "study", *words],
            cwd=self.path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        self.started.append(process)
        return process

    def sweep(self, *words: str) -> tuple[int, str, str]:
        """The same to its end: exit status, stdout, stderr."""
        process = self.start(*words)
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, out, err

    def refused(self, **content: Any) -> str:
        """The one sentence with which a sweep file is refused by the command."""
        self.write(**content)
        status, out, err = self.sweep("--trials", "2")
        assert (status, out) == (1, ""), err
        (line,) = err.splitlines()
        assert line.startswith("error: sweep.yaml: ")
        return line.removeprefix("error: sweep.yaml: ")

    @property
    def trials(self) -> list[optuna.trial.FrozenTrial]:
        journal = JournalStorage(JournalFileBackend(str(self.path / "study" / "journal.log")))
        return optuna.load_study(study_name="sweep", storage=journal).trials

    def states(self) -> list[str]:
        return [trial.state.name for trial in self.trials]

    def notes(self, what: str) -> list[dict[str, Any]]:
        """What the program's processes said about themselves."""
        path = self.path / "notes.jsonl"
        said = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [note for note in said if note["what"] == what]

    def agents(self) -> list[int]:
        """The processes of all agents that ever joined."""
        return [int(path.read_text().split()[0]) for path in (self.path / "study" / "agents").glob("*.lock")]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Iterator[Place]:
    """A place of the test's own, with nothing left at work in it afterwards."""
    monkeypatch.chdir(tmp_path)
    place = Place(tmp_path)
    yield place
    for process in place.started:
        if process.poll() is None:
            process.terminate()
            process.wait()
