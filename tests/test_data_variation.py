"""Varied training objects: what stays when an object is stretched and recoloured. Oracles: greys, boxes, the frames' own pictures."""

import numpy as np
import pytest
import torch
import trimesh

from one2345pp.data.dataset import PreparedDataset
from one2345pp.data.prepare import RIGS, prepare
from one2345pp.data.variation import STRETCH, recolor_randomly, stretch_randomly
from one2345pp.errors import InputError
from one2345pp.geometry.cameras import CameraRig, project
from one2345pp.geometry.volume import cell_centers


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A box, prepared plainly and varied."""
    folder = tmp_path_factory.mktemp("varied")
    box = trimesh.creation.box((1, 2, 3))
    box.visual.face_colors = [200, 40, 60, 255]
    box.export(folder / "box.ply")
    for vary in (False, True):
        prepare(
            [folder / "box.ply"],
            folder / str(vary),
            frames=2,
            view_size=32,
            resolution=32,
            workers=1,
            vary=vary,
            seed=1,
        )
    return [PreparedDataset(folder / str(vary)) for vary in (False, True)]


def test_greys_and_masks_stay():
    """Oracle: a hue turned about the grey axis leaves grey where it is; a gamma keeps its order."""
    ramp = np.repeat(np.arange(0, 256, dtype=np.uint8)[:, None], 4, 1)
    colors = np.random.default_rng(0).integers(0, 256, (50, 3), dtype=np.uint8)
    sample = {"views": ramp[None, None], "colors": colors, "inputs": np.c_[colors, colors[:, :1]], "sdf": colors}
    varied = recolor_randomly(sample, np.random.default_rng(3))
    greys = varied["views"][0, 0].astype(int)
    assert np.ptp(greys[:, :3], axis=1).max() <= 1 and (np.diff(greys[:, 0]) >= 0).all() and greys[255, 0] == 255
    assert np.array_equal(greys[:, 3], ramp[:, 3]) and np.array_equal(varied["inputs"][:, 3], colors[:, 0])
    assert np.array_equal(varied["colors"], varied["inputs"][:, :3]), "one change for all"
    assert np.abs(varied["colors"].astype(int) - colors).max() > 30 and varied["sdf"] is colors


def test_a_stretched_box_is_another_box():
    box = trimesh.creation.box((1, 2, 3))
    shapes = [stretch_randomly(box, np.random.default_rng(seed)) for seed in range(20)]
    factors = np.array([np.ptp(shape.bounds, axis=0) / (1, 2, 3) for shape in shapes])
    ratios = factors.max(1) / factors.min(1)
    assert ratios.max() <= STRETCH**2 and ratios.min() >= 1 and np.median(ratios) > 1.1
    assert np.allclose([np.linalg.norm(shape.vertices, axis=1).max() for shape in shapes], 0.5)


def test_the_first_frame_is_of_the_object_itself(folders):
    plain, varied = folders
    assert all(torch.equal(plain[0][key], varied[0][key]) for key in ("views", "inputs", "sdf", "colors"))
    assert not torch.equal(plain[1]["views"], varied[1]["views"])


def test_nothing_to_vary_is_refused(tmp_path):
    with pytest.raises(InputError, match="Ask for more frames"):
        prepare([tmp_path / "box.ply"], tmp_path / "data", frames=1, vary=True)
    assert not (tmp_path / "data").exists()


def test_pictures_and_volume_are_of_the_same_varied_object(folders):
    """Oracle: projection; the middle of the solid lies in every silhouette, and the volume has the colours of the pictures."""
    item = folders[1][1]
    inside = torch.nonzero(item["sdf"] < -40)
    rig = CameraRig.cat([CameraRig.named(name) for name in RIGS])
    uv, _ = project(cell_centers(inside, 32), rig)  # [12, N, 2]
    pixels = ((uv + 1) * 16).long().clamp(0, 31)
    alpha = item["views"][..., 3]
    covered = torch.stack([alpha[v, pixels[v, :, 1], pixels[v, :, 0]] > 127 for v in range(len(alpha))])
    assert len(inside) > 100 and covered.float().mean() > 0.99
    seen = item["views"][alpha == 255][:, :3].float()
    hue = seen / seen.sum(1, keepdim=True)
    own = item["colors"].float().mean(0)
    assert (hue.mean(0) - own / own.sum()).abs().max() < 0.03
