"""Alpha from normals: objects of any colour, soft edges, faulty input."""

import numpy as np
import pytest
from PIL import Image

from one2345pp import InputError
from one2345pp.pipelines.picture.key_by_normals import key_by_normals


def ball(color: tuple[int, int, int], softness: float = 0.0) -> tuple[Image.Image, Image.Image, np.ndarray]:
    """A ball on grey, its normals, and its true cover `[H, W]`, which falls over `softness` of the picture's half width."""
    y, x = np.mgrid[-1:1:96j, -1:1:96j]
    radius = np.hypot(x, y)
    cover = np.clip((0.6 - radius) / softness + 0.5, 0, 1) if softness else (radius < 0.6).astype(float)
    normal = np.stack([x, -y, np.sqrt(np.clip(0.36 - x**2 - y**2, 0, 1))], -1)
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-6)
    normals = np.round((normal * cover[..., None] + 1) * 127.5).astype(np.uint8)
    view = np.round(cover[..., None] * np.float32(color) + (1 - cover[..., None]) * 127).astype(np.uint8)
    return Image.fromarray(view), Image.fromarray(normals), cover


@pytest.mark.parametrize("color", [(255, 255, 255), (127, 127, 127), (0, 0, 0), (200, 60, 40)])
def test_object_of_any_colour_is_kept(color):
    """Oracle: the ball's own silhouette, also where it has exactly the background's grey; its colour stays."""
    view, normals, cover = ball(color)
    cut = np.asarray(key_by_normals(view, normals)).astype(int)
    assert np.array_equal(cut[..., 3] > 127, cover > 0.5)
    assert np.abs(cut[cover > 0.5][:, :3] - color).max() <= 2


def test_edges_are_soft_and_free_of_grey():
    """Oracle: a white ball whose cover falls over six pixels; half covered is half opaque, and white, not a mix with grey."""
    view, normals, cover = ball((255, 255, 255), softness=0.13)
    cut = np.asarray(key_by_normals(view, normals)).astype(int)
    half = np.abs(cover - 0.4) < 0.03
    assert half.any() and np.abs(cut[half][:, 3] - 127).max() < 40
    assert (cut[cover < 0.05][:, 3] == 0).all() and (cut[cover > 0.8][:, 3] == 255).all()
    assert cut[half][:, :3].min() > 210


def test_other_size_is_refused():
    with pytest.raises(InputError, match="same"):
        key_by_normals(Image.new("RGB", (8, 8)), Image.new("RGB", (8, 12)))
