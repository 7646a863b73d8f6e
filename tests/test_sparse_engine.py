"""The sparse engine against dense torch convolutions, and what it promises beside the numbers: repeatable, cached, clear errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from one2345pp.errors import InputError
from one2345pp.models.sparse import (
    SparseConv3d,
    SparseGrid,
    SparseGroupNorm,
    functional,
    grid,
    set_sparse_backend,
    spconv_backend,
)


TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=[8, 7], ids=["even", "odd"])
def voxels(request, rng):
    """Three samples of unequal density, the middle one empty, rows in random order."""
    density = torch.tensor([0.4, 0.0, 0.1])[:, None, None, None]
    coords = (torch.rand(3, *[request.param] * 3, generator=rng) < density).nonzero()
    return SparseGrid(coords[torch.randperm(len(coords), generator=rng)], request.param, 3)


def randn(*shape, rng, dtype=torch.float32):
    return torch.randn(shape, generator=rng).to(dtype).requires_grad_()


def read(volume, voxels):
    """Rows of `volume [B, C, X, X, X]` at the voxels."""
    sample, x, y, z = voxels.coords.unbind(1)
    return volume[sample, :, x, y, z]


def scattered(features, voxels):
    """The volume `[B, C, X, X, X]` that has these features at the voxels and zeros elsewhere; `read` undoes it."""
    volume = features.new_zeros(voxels.batch_size, *[voxels.resolution] * 3, features.shape[1])
    volume[voxels.coords.unbind(1)] = features
    return volume.movedim(-1, 1)


def assert_same_values_and_gradients(sparse, dense, parameters, rng, tolerance=1e-4):
    """Values, and gradients of the same random projection of each."""
    torch.testing.assert_close(sparse.float(), dense.float(), atol=tolerance, rtol=tolerance)
    projection = torch.randn(sparse.shape, generator=rng).to(sparse.dtype)
    ours = torch.autograd.grad((sparse * projection).sum(), parameters)
    theirs = torch.autograd.grad((dense * projection).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=tolerance * float(b.abs().max() + 1), rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("chunk_rows", [1024, 7], ids=["one chunk", "many chunks"])
def test_submanifold_conv_equals_dense_conv_on_active_sites(voxels, rng, dtype, chunk_rows, monkeypatch):
    """Oracle: dense conv3d of the scattered input, read at the active sites. The kernel is asymmetric, so an axis or flip error
    cannot cancel; the rows are shuffled, so no order is assumed; gradients of input, weight and bias are dense autograd's."""
    monkeypatch.setattr(functional, "CHUNK_ROWS", chunk_rows)
    features = randn(len(voxels), 5, rng=rng, dtype=dtype)
    weight, bias = randn(3, 5, 3, 3, 3, rng=rng, dtype=dtype), randn(3, rng=rng, dtype=dtype)
    sparse = functional.submanifold_conv3d(features, weight, bias, voxels)
    expected = F.conv3d(scattered(features, voxels).float(), weight.float(), bias.float(), padding=1)
    assert sparse.dtype == dtype
    assert_same_values_and_gradients(
        sparse, read(expected, voxels).to(dtype), (features, weight, bias), rng, TOLERANCE[dtype]
    )


def test_impulse_reads_the_kernel_mirrored(rng):
    """Proves the axis order by hand: cross-correlation puts kernel cell (i, j, k) of an impulse at p into output p - (i, j, k) + 1."""
    coords = F.pad(torch.cartesian_prod(*[torch.arange(3)] * 3), (1, 0))
    impulse = torch.zeros(27, 1)
    impulse[13] = 1  # the centre voxel (1, 1, 1)
    weight = torch.arange(27.0).view(1, 1, 3, 3, 3)
    out = functional.submanifold_conv3d(impulse, weight, None, SparseGrid(coords, 3))
    x, y, z = 0, 1, 2
    row = (x * 3 + y) * 3 + z
    assert out[row, 0] == weight[0, 0, 2 - x, 2 - y, 2 - z]


def test_kernel_does_not_reach_over_the_border(rng):
    """Proves that neighbours across the cube's faces, rows of the key, and samples are never taken for neighbours."""
    coords = torch.tensor([[0, 0, 0, 3], [0, 0, 1, 0], [0, 3, 3, 3], [1, 0, 0, 0]])
    out = functional.submanifold_conv3d(torch.ones(4, 1), torch.ones(1, 1, 3, 3, 3), None, SparseGrid(coords, 4, 2))
    assert out.flatten().tolist() == [1, 1, 1, 1]


def test_down_conv_equals_strided_dense_conv(voxels, rng):
    """Oracle: dense conv3d, kernel 2, stride 2, read at the parents; an odd edge is padded by empty voxels."""
    features, weight, bias = randn(len(voxels), 5, rng=rng), randn(3, 5, 2, 2, 2, rng=rng), randn(3, rng=rng)
    sparse = functional.down_conv3d(features, weight, bias, voxels)
    odd = voxels.resolution % 2
    expected = F.conv3d(F.pad(scattered(features, voxels), (0, odd) * 3), weight, bias, stride=2)
    assert_same_values_and_gradients(sparse, read(expected, voxels.coarser), (features, weight, bias), rng)
    occupancy = F.max_pool3d(scattered(torch.ones(len(voxels), 1), voxels), 2, ceil_mode=True)
    assert torch.equal(voxels.coarser.coords, occupancy[:, 0].nonzero())


def test_up_conv_equals_transposed_dense_conv(voxels, rng):
    """Oracle: dense conv_transpose3d, kernel 2, stride 2, read at the known fine voxels."""
    features, weight = randn(len(voxels.coarser), 5, rng=rng), randn(5, 3, 2, 2, 2, rng=rng)
    bias = randn(3, rng=rng)
    sparse = functional.up_conv3d(features, weight, bias, voxels)
    expected = F.conv_transpose3d(scattered(features, voxels.coarser), weight, bias, stride=2)
    assert_same_values_and_gradients(sparse, read(expected, voxels), (features, weight, bias), rng)


def test_group_norm_equals_torch_group_norm_of_each_sample(voxels, rng):
    """Oracle: torch's group norm on each sample's active voxels alone; the offset of 50 would expose a cancelling variance."""
    features, weight, bias = randn(len(voxels), 6, rng=rng), randn(6, rng=rng), randn(6, rng=rng)
    sparse = functional.group_norm(features + 50, 3, weight, bias, voxels)
    dense = torch.zeros_like(sparse)
    for sample in (0, 2):  # sample 1 has no voxels
        rows = voxels.sample_index == sample
        dense = dense.index_put(
            (rows.nonzero()[:, 0],), F.group_norm((features[rows] + 50).T[None], 3, weight, bias)[0].T
        )
    assert_same_values_and_gradients(sparse, dense, (features, weight, bias), rng, 1e-3)


def test_group_norm_takes_a_scale_and_shift_of_each_sample(voxels, rng):
    """Oracle: the plain norm, scaled and shifted afterwards row by row."""
    features, scale, shift = randn(len(voxels), 6, rng=rng), randn(3, 6, rng=rng), randn(3, 6, rng=rng)
    plain = functional.group_norm(features, 3, None, None, voxels)
    expected = plain * scale[voxels.sample_index] + shift[voxels.sample_index]
    torch.testing.assert_close(functional.group_norm(features, 3, scale, shift, voxels), expected, atol=1e-5, rtol=1e-5)


def test_search_and_lookup_table_give_the_same_neighbors(voxels, monkeypatch):
    """Proves that the search in sorted keys, taken for huge grids, is a twin of the dense lookup table."""
    monkeypatch.setattr(grid, "TABLE_CELLS", 0)
    searched = SparseGrid(voxels.coords, voxels.resolution, voxels.batch_size)
    assert torch.equal(searched.neighbors, voxels.neighbors)
    assert searched.neighbors.dtype == torch.int32


def test_neighbors_are_built_once(voxels):
    """Proves that layers and steps share the maps, also those of coarser levels."""
    assert voxels.neighbors is voxels.neighbors
    assert voxels.levels(3)[2].neighbors is voxels.levels(3)[2].neighbors
    assert voxels.to("cpu") is voxels


def test_a_batch_equals_its_samples_alone(rng):
    """Proves that samples do not touch: convolution and norm of a batch are those of each sample."""
    grids = [(torch.rand(6, 6, 6, generator=rng) < density).nonzero() for density in (0.5, 0.1)]
    batch = SparseGrid.cat(grids, 6)
    conv, norm = SparseConv3d(4, 4), SparseGroupNorm(2, 4)
    features = randn(len(batch), 4, rng=rng)
    together = norm(conv(features, batch), batch)
    parts = features.split([len(g) for g in grids])
    alone = [norm(conv(f, grid), grid) for f, grid in zip(parts, (SparseGrid.cat([g], 6) for g in grids), strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_same_inputs_give_the_same_bytes(voxels, rng):
    """Proves that no sum depends on timing: values and gradients repeat bit for bit."""
    features, weight = randn(len(voxels), 8, rng=rng), randn(8, 8, 3, 3, 3, rng=rng)

    def run():
        grid = SparseGrid(voxels.coords, voxels.resolution, voxels.batch_size)
        out = functional.group_norm(functional.submanifold_conv3d(features, weight, None, grid), 4, None, None, grid)
        return out, *torch.autograd.grad(out.square().sum(), (features, weight))

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_autocast_computes_in_its_dtype_but_keeps_statistics(voxels, rng):
    """Proves that mixed precision reaches the custom function, and that group norm's statistics stay float32."""
    features = randn(len(voxels), 8, rng=rng)
    conv = SparseConv3d(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = conv(features, voxels)
        norm = functional.group_norm(features, 4, None, None, voxels)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), conv(features, voxels), atol=0.05, rtol=0.05)
    torch.testing.assert_close(norm, functional.group_norm(features, 4, None, None, voxels))
    mixed.float().sum().backward()
    assert conv.weight.grad.dtype == torch.float32


def test_no_voxels_at_all():
    """Proves that an empty batch passes through every layer, forward and backward."""
    grid = SparseGrid(torch.zeros(0, 4, dtype=torch.long), 8, 2)
    features = torch.zeros(0, 4, requires_grad=True)
    hidden = functional.submanifold_conv3d(features, torch.ones(4, 4, 3, 3, 3, requires_grad=True), None, grid)
    hidden = functional.group_norm(hidden, 2, None, None, grid)
    hidden = functional.down_conv3d(hidden, torch.ones(4, 4, 2, 2, 2), torch.ones(4), grid)
    hidden = functional.up_conv3d(hidden, torch.ones(4, 3, 2, 2, 2), torch.ones(3), grid)
    hidden.sum().backward()
    assert hidden.shape == (0, 3) and features.grad.shape == (0, 4)


@pytest.mark.parametrize(
    ("coords", "match"),
    [
        (torch.zeros(3, 3, dtype=torch.long), "columns sample, x, y, z"),
        (torch.zeros(1, 4), "integers"),
        (torch.tensor([[0, 0, 0, 8]]), "outside"),
        (torch.tensor([[0, -1, 0, 0]]), "outside"),
        (torch.tensor([[2, 0, 0, 0]]), "outside"),
        (torch.tensor([[0, 1, 2, 3]] * 2), "twice"),
    ],
)
def test_unusable_coordinates_are_named(coords, match):
    with pytest.raises(InputError, match=match):
        SparseGrid(coords, 8, 2)


def test_subdivided_voxels_are_the_children(voxels):
    """Oracle: nearest interpolation of the dense occupancy; coarsening gives the parents back."""
    fine = voxels.subdivided()
    expected = F.interpolate(scattered(torch.ones(len(voxels), 1), voxels), scale_factor=2, mode="nearest")
    assert torch.equal(scattered(torch.ones(len(fine), 1), fine), expected)
    assert set(map(tuple, fine.coarser.coords.tolist())) == set(map(tuple, voxels.coords.tolist()))
    kept = voxels.coords[:, 1] > 2
    assert torch.equal(voxels.where(kept).coords, voxels.coords[kept])


def test_spconv_is_refused_on_a_cpu_and_unknown_backends_are_named():
    conv = SparseConv3d(4, 4)
    with pytest.raises(InputError, match="spconv: runs on CUDA here, got tensors on cpu"):
        set_sparse_backend(conv, "spconv")
    with pytest.raises(InputError, match="torch, spconv"):
        set_sparse_backend(conv, "minkowski")
    assert conv.backend == "torch"


def test_spconv_on_one_thread_equals_the_torch_twin(voxels, rng):
    """Proves that weights, coordinates and batches are handed over right: spconv's own sums are right on one thread."""
    pytest.importorskip("spconv.pytorch", reason="spconv is optional")
    features, weight, bias = randn(len(voxels), 5, rng=rng), randn(3, 5, 3, 3, 3, rng=rng), randn(3, rng=rng)
    with torch.no_grad():
        theirs = spconv_backend.run_spconv(features, weight, bias, voxels)
        torch.testing.assert_close(
            theirs, functional.submanifold_conv3d(features, weight, bias, voxels), atol=1e-4, rtol=1e-4
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["torch", "spconv"])
def test_cuda_backends_equal_the_cpu(backend, voxels, rng):
    """Oracle: the CPU's values and gradients."""
    if backend == "spconv":
        pytest.importorskip("spconv.pytorch", reason="spconv is optional")
    conv = SparseConv3d(8, 16)
    features = randn(len(voxels), 8, rng=rng)
    expected = conv(features, voxels)
    gradients = torch.autograd.grad(expected.square().sum(), [features, conv.weight])
    conv.cuda()
    set_sparse_backend(conv, backend)
    moved = features.detach().cuda().requires_grad_()
    found = conv(moved, voxels.to("cuda"))
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)
    for a, b in zip(torch.autograd.grad(found.square().sum(), [moved, conv.weight]), gradients, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-2, rtol=1e-2)
