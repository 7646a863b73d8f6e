"""Muon: what its updates look like, and that it gets somewhere. How well networks learn with it is in docs/experiments.md."""

import pytest
import torch

from one2345pp.training.optimizer import MuonAdamW, orthogonalize


@pytest.mark.parametrize("shape", [(32, 64), (96, 32)])
def test_orthogonalize_keeps_directions_and_evens_out_their_lengths(shape):
    """Oracle: the singular value decomposition. Same singular vectors, values near 1 though the input's span a factor of 30."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linspace(0.1, 3, 32)
    found = u.T @ orthogonalize(u @ torch.diag(values) @ v) @ v.T
    assert (found.diagonal() > 0.6).all() and (found.diagonal() < 1.25).all()
    assert (found - torch.diag(found.diagonal())).abs().max() < 1e-3


def test_updates_are_of_the_size_of_adamw():
    """Oracle: root mean square of one update, 0.2 of the learning rate for a matrix, the learning rate for a bias."""
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(32, 48, 3)
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer = MuonAdamW(layer.parameters(), lr=1e-2)
    layer(torch.randn(4, 32, 8, 8)).square().mean().backward()
    optimizer.step()
    weight, bias = (
        (new - old).square().mean().sqrt().item() for new, old in zip(layer.parameters(), before, strict=True)
    )
    assert weight == pytest.approx(0.2e-2, rel=0.35)
    assert bias == pytest.approx(1e-2, rel=0.01)


def test_updates_in_bfloat16_go_the_same_way():
    """Oracle: the update in float32, of weights that stay in float32; a bias is AdamW's either way."""
    updates = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        layer = torch.nn.Conv2d(32, 48, 3)
        before = [p.detach().clone() for p in layer.parameters()]
        optimizer = MuonAdamW(layer.parameters(), lr=1e-2, dtype=dtype)
        layer(torch.randn(4, 32, 8, 8)).square().mean().backward()
        optimizer.step()
        assert layer.weight.dtype == torch.float32
        updates.append([(new - old).flatten() for new, old in zip(layer.parameters(), before, strict=True)])
    (weight, bias), (rough, same) = updates
    assert torch.equal(bias, same) and not torch.equal(weight, rough)
    assert torch.cosine_similarity(weight, rough, dim=0) > 0.99


def test_it_solves_a_badly_scaled_least_squares_problem():
    """Oracle: the known solution. Inputs of very different sizes, where plain gradient steps of one size crawl."""
    torch.manual_seed(0)
    scales = torch.logspace(-0.7, 0.3, 32)
    truth, x = torch.randn(32, 32), torch.randn(512, 32) * scales
    weight = torch.nn.Parameter(torch.zeros(32, 32))
    optimizer = MuonAdamW([weight], lr=0.1)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        optimizer.zero_grad()
        (x @ weight - x @ truth).square().mean().backward()
        optimizer.step()
    assert (weight - truth).abs().max() < 0.1


def test_a_resumed_optimizer_goes_on_as_if_it_had_not_stopped():
    """Oracle: the weights after four steps, with and without a state dict in between."""

    def run(stop: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.LayerNorm(32), torch.nn.Linear(32, 16))
        optimizer = MuonAdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        for step in range(4):
            if stop and step == 2:
                state = optimizer.state_dict()
                optimizer = MuonAdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            model(torch.full((3, 16), step / 4)).square().mean().backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    for once, resumed in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(once, resumed, atol=0, rtol=0)
