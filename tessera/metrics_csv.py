"""metrics.csv: one row per logged step, complete at every moment and continued, not overwritten, by a resumed run."""

import csv
import io
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from tessera.checkpoints import write_text


class MetricsCSV(Logger):
    """Appends rows to `<folder>/metrics.csv`; rewrites the file only for a new column or a step that has a row.

    Lightning's own CSVLogger deletes the file of the run that it resumes.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.rows: list[dict[str, str]] = []
        self.columns: list[str] = ["step"]

    name = version = ""

    def rewind(self, step: int) -> None:
        """Take up what an earlier attempt logged before `step`; what came after is about to happen again."""
        if self.path.exists():
            with self.path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            self.rows = [row for row in rows if (row["step"] or "").isdigit() and int(row["step"]) < step]
            self.columns = list(rows[0]) if rows else self.columns
            self._rewrite()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": str(step)} | {name: f"{value:.9g}" for name, value in metrics.items()}
        new = [name for name in row if name not in self.columns]
        self.columns += new
        if self.rows and self.rows[-1]["step"] == row["step"]:
            self.rows[-1] |= row
            self._rewrite()
        elif new or not self.path.exists():
            self.rows.append(row)
            self._rewrite()
        else:
            self.rows.append(row)
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The composed configuration is a file of its own."""

    def _rewrite(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())
