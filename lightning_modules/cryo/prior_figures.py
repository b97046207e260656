"""Figures of a prior over densities: losses, samples beside data, spectra."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

NAMES = {
    "loss": ("mean of the weights", {"marker": "o", "color": "C0"}),
    "raw_loss": ("last weights", {"marker": ".", "color": "C0", "linestyle": ":"}),
    "shell": ("linear, by shell (Wiener)", {"marker": "s", "color": "C1"}),
    "voxel": ("linear, by voxel", {"color": "gray", "linestyle": "--"}),
    "zero": ("no prediction", {"color": "lightgray", "linestyle": "--"}),
}
LOSSES = (0.1, 0.2, 0.5, 1.0, 2.0)


def loss_by_time(times: Sequence[float], curves: dict[str, list[float]]) -> Figure:
    """Held-out loss against the time, with what is reached without learning."""
    figure, axis = plt.subplots(figsize=(5, 4.2), layout="constrained")
    for name, (label, style) in NAMES.items():
        axis.plot(times, curves[name], label=label, **style)
    axis.set(xlabel="t (0 is data, 1 is noise)", ylabel="loss of the velocity", yscale="log", xticks=times)
    axis.set_yticks(LOSSES, [f"{loss:g}" for loss in LOSSES])
    axis.minorticks_off()
    axis.set_title("held-out density")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def side_by_side(rows: dict[str, Float[Tensor, "maps n n n"]]) -> Figure:
    """The middle slice and the projection along z of some maps, a row of each for every kind of map."""
    count = max(len(maps) for maps in rows.values())
    figure, axes = plt.subplots(
        2 * len(rows), count, figsize=(1.7 * count + 0.6, 3.4 * len(rows)), squeeze=False, layout="constrained"
    )
    pictures = [(name, view, maps) for name, maps in rows.items() for view in ("slice", "projection")]
    tops = {
        view: max(float(picture_of(maps, view).quantile(0.999)) for maps in rows.values())
        for view in ("slice", "projection")
    }
    for line, (name, view, maps) in zip(axes, pictures):
        for axis, picture in zip(line, picture_of(maps, view)):
            axis.imshow(picture, cmap="gray_r", vmin=0, vmax=tops[view], origin="lower")
        for axis in line:
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(f"{name}\n{view}", fontsize=8)
    return figure


def picture_of(maps: Float[Tensor, "maps n n n"], view: str) -> Float[Tensor, "maps n n"]:
    """The slice through the middle, or the sum along z."""
    return maps[:, maps.shape[1] // 2] if view == "slice" else maps.sum(1)


def spectra(powers: dict[str, Float[Tensor, "maps radii"]], side: int, voxel_size: float) -> Figure:
    """Radial power up to Nyquist: the mean over maps, and the range of most of them as a band."""
    figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
    shells = torch.arange(1, side // 2 + 1)
    frequency = shells / (side * voxel_size)
    for name, power in powers.items():
        found = power[:, shells].double()
        low, high = torch.quantile(found, torch.tensor([0.1, 0.9], dtype=torch.float64), dim=0)
        (line,) = axis.plot(frequency, found.mean(0), marker=".", label=f"{name} (mean of {len(found)})")
        axis.fill_between(frequency, low, high, color=line.get_color(), alpha=0.2)
    axis.set(yscale="log", xlabel="spatial frequency, 1/angstrom", ylabel="power over that of unit white noise")
    axis.set_title("radial power; band: 10 to 90 % of maps")
    axis.legend(fontsize=8)
    return figure
