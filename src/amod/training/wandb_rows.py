"""What reaches W&B: each epoch once, whatever was killed in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class WandbRows(WandbLogger):
    """One row per epoch, numbered by its optimiser step. W&B ignores a row that is not newer than its last one."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """An epoch's validation waits for its training loss, which completes the row."""
        self.experiment.log({**metrics, "trainer/global_step": step}, step=step, commit="train/loss" in metrics)

    def send_again(self, rows: Sequence[Mapping[str, float]]) -> None:
        """The rows of a resumed run: W&B's client sends every 15 seconds, and what was waiting died with the process.

        Offline there is nobody to ask what is known already.
        """
        if not self.experiment.offline:
            for row in rows:
                self.log_metrics({key: row[key] for key in row if key != "step"}, int(row["step"]) - 1)
