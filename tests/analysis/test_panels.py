from __future__ import annotations

import torch

from amod.analysis.panels import heat, pyplot_agg


def test_the_scale_of_a_heat_is_that_of_its_patches():
    figure, axis = pyplot_agg().subplots()
    scores = torch.tensor([9.0, -1.0, 0.1, 0.2, 0.3, 0.4])  # two tokens before the patches
    heat(axis, scores, (2, 2), (4, 4), "block 3")
    (mesh,) = axis.get_images()
    assert mesh.get_clim() == (torch.tensor(0.1).item(), torch.tensor(0.4).item())
    assert axis.get_title() == "block 3: 0.1 to 0.4"
    brightest, darkest = (mesh.cmap(mesh.norm(value)) for value in (0.4, 0.1))
    assert [square.get_facecolor() for square in axis.patches] == [brightest, darkest]  # beyond the scale, to its ends
    pyplot_agg().close(figure)
