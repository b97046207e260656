"""Figures of restored maps: slices and projections beside each other, FSC curves, what a shell owes to the data."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_modules.cryo.fourier import Resolution, resolution

Volume = Float[Tensor, "n n n"]
STYLES = {
    "truth": {"color": "black"},
    "observed": {"color": "gray"},
    "wiener": {"color": "C1", "linestyle": ":"},
    "soft_mask": {"color": "C1"},
    "positivity": {"color": "C2"},
    "restored": {"color": "C0", "linewidth": 2},
}


def beside(maps: Mapping[str, Volume], title: str = "") -> Figure:
    """A column for each map; the middle slices across z and y, and the projections along z and y.

    The third row looks along the sample plane, where a missing wedge shows. All of a row have one grey scale, except a
    standard deviation (`deviation`), which has its own.
    """
    views = {
        "slice z": lambda v: v[v.shape[0] // 2],
        "projection z": lambda v: v.sum(0),
        "slice y": lambda v: v[:, v.shape[1] // 2],
        "projection y": lambda v: v.sum(1),
    }
    figure, axes = plt.subplots(
        len(views),
        len(maps),
        figsize=(1.7 * len(maps) + 0.5, 1.7 * len(views) + 0.4),
        squeeze=False,
        layout="constrained",
    )
    for row, (view, look) in zip(axes, views.items()):
        pictures = {name: look(volume) for name, volume in maps.items()}
        low, high = _grey_scale(pictures)
        for axis, (name, picture) in zip(row, pictures.items()):
            ends = (0.0, float(picture.max())) if name == "deviation" else (low, high)
            axis.imshow(picture, cmap="gray_r", vmin=ends[0], vmax=ends[1], origin="lower", interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if axis.get_subplotspec().is_first_row():
                axis.set_title(name.replace("_", " "), fontsize=9)
        row[0].set_ylabel(view, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def _grey_scale(pictures: Mapping[str, Float[Tensor, "n m"]]) -> tuple[float, float]:
    """White and black: of the truth, else the wider of filtered and restored. Noise must not set them."""
    shown = ["truth"] if "truth" in pictures else [name for name in ("filtered", "restored") if name in pictures]
    leading = [pictures[name] for name in shown or list(pictures)[:1]]
    lows, highs = zip(*((float(picture.quantile(0.01)), float(picture.quantile(0.999))) for picture in leading))
    return min(0.0, *lows), max(highs)


def fsc_curves(curves: Mapping[str, Float[Tensor, "*map shells"]], side: int, voxel_size: float, title: str) -> Figure:
    """FSC with the truth against spatial frequency: the mean over maps, and the range of most of them as a band."""
    figure, axis = plt.subplots(figsize=(5.2, 3.8), layout="constrained")
    for name, found in curves.items():
        rows = found.reshape(-1, found.shape[-1])[:, 1:]
        frequency = _frequencies(rows.shape[-1], side, voxel_size)
        mean = rows.nanmean(0)
        style = STYLES.get(name, {})
        (line,) = axis.plot(frequency, mean, label=f"{name.replace('_', ' ')}, AUC {mean.mean():.3f}", **style)
        if len(rows) > 1 and name in ("observed", "restored"):
            low, high = rows.nanquantile(torch.tensor([0.1, 0.9], dtype=rows.dtype), dim=0)
            axis.fill_between(frequency, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.axhline(0.5, color="lightgray", linewidth=0.8, zorder=0)
    axis.set(ylabel="FSC with the truth", ylim=(min(-0.05, axis.get_ylim()[0]), 1.03), title=title)
    _angstroms(axis)
    axis.legend(fontsize=8)
    return figure


def half_map_report(
    correlation: Float[Tensor, " shells"],
    data_weight: Float[Tensor, " shells"],
    side: int,
    voxel_size: float,
    finest_voxel: float = 0.0,
) -> Figure:
    """FSC between half maps with its resolution, and the part of every shell of their mean that comes from the data.

    Shells finer than two voxels of `finest_voxel` angstrom, which a prior does not reach, are hatched.
    """
    figure, axis = plt.subplots(figsize=(5.2, 3.8), layout="constrained")
    frequency = _frequencies(len(correlation) - 1, side, voxel_size)
    found = resolution(correlation, side, voxel_size)
    axis.plot(frequency, correlation[1:], color="C0", label=f"FSC of the half maps: {written(found)} at 0.143")
    axis.fill_between(frequency, data_weight[1:], color="C1", alpha=0.25, label="weight of the data", linewidth=0)
    axis.fill_between(frequency, data_weight[1:], 1, color="C0", alpha=0.12, label="weight of the prior", linewidth=0)
    if finest_voxel > voxel_size:
        label = "finer than the prior: filtered only"
        axis.axvspan(0.5 / finest_voxel, frequency[-1], fill=False, hatch="//", color="gray", alpha=0.5, label=label)
    axis.axhline(0.143, color="gray", linewidth=0.8, linestyle=":", zorder=0)
    axis.set(ylim=(-0.05, 1.03), ylabel="FSC, weight", title="what the half maps say")
    _angstroms(axis)
    axis.set_xlim(right=float(frequency[-1]))
    axis.legend(fontsize=7)
    return figure


def written(found: Resolution) -> str:
    """A resolution in words."""
    return f"{found.angstroms:.2f} A" + (f" ({found.outside})" if found.outside else "")


def _frequencies(shells: int, side: int, voxel_size: float) -> Tensor:
    return torch.arange(1, shells + 1) / (side * voxel_size)


def _angstroms(axis: Axes) -> None:
    """The frequency axis, labelled by resolution."""
    axis.set_xlabel("resolution, angstrom")
    axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter(lambda value, _: f"{1 / value:.3g}" if value > 0 else "")
