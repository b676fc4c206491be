"""curves.png of a run folder."""

from __future__ import annotations

import io

from amod.training.callbacks import RunRecorder


def plot_curves(recorder: RunRecorder) -> bytes:
    """Loss and accuracy by epoch, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, (loss, accuracy) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, keys in ((loss, ("train/loss", "val/loss")), (accuracy, ("val/top1", "val/top5"))):
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
    accuracy.set_ylabel("accuracy (%)")
    best = recorder.best
    if "val/top1" in best:
        accuracy.set_title(f"best: {best['val/top1']:.2f} % after epoch {best['epoch'] + 1:.0f}")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    return picture.getvalue()
