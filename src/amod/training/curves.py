"""curves.png of a run folder."""

from __future__ import annotations

import io

from amod.training.callbacks import RunRecorder


def plot_curves(recorder: RunRecorder) -> bytes:
    """The loss and the task's other numbers by epoch, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    task = recorder.task
    others = [f"val/{name}" for name in task.shown if name != "loss"]
    figure, (loss, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, keys in ((loss, ("train/loss", "val/loss")), (right, others)):
        for key in keys:
            points = [(row["epoch"] + 1, row[key]) for row in recorder.rows if key in row]
            if key in recorder.untrained:
                points.insert(0, (0, recorder.untrained[key]))
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=key)
        axis.set_xlabel("epoch (0: before training)" if recorder.untrained else "epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    loss.set_ylabel("loss")
    words, unit = task.shown[task.best]
    right.set_ylabel("accuracy (%)" if task.best == "top1" else ", ".join(task.shown[key[4:]][0] for key in others))
    best = recorder.best
    if (key := f"val/{task.best}") in best:
        side = loss if task.best == "loss" else right
        side.set_title(f"best{'' if unit else f' {words}'}: {best[key]:.2f}{unit} after epoch {best['epoch'] + 1:.0f}")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    return picture.getvalue()
