"""Projections against their definitions in float64, and choices of entries against sorting."""

import math

import numpy as np
import pytest
import torch

from retain.functional import projection


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis(n, k, seed=0):
    return torch.linalg.qr(random(n, k, seed=seed))[0]


# -- conflicts of gradients --------------------------------------------------------------------------------
def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


@pytest.mark.parametrize("seed", range(6))
def test_no_step_raises_the_reference_loss(seed):
    g = [random(3, 4, seed=seed), random(5, seed=seed + 50)]
    r = [random(3, 4, seed=seed + 100), random(5, seed=seed + 150)]
    before, reference = flat(g), flat(r)
    inner = float(before @ reference)
    cosine = projection.without_conflict(g, r)
    assert cosine == pytest.approx(inner / float(before.norm() * reference.norm()))
    wanted = before - min(inner, 0.0) / float(reference @ reference) * reference
    torch.testing.assert_close(flat(g), wanted)
    assert float(flat(g) @ reference) >= -1e-12
    assert (inner >= 0) == torch.equal(flat(g), before)
    again = [t.clone() for t in g]
    projection.without_conflict(again, r)
    torch.testing.assert_close(flat(again), flat(g))


def test_conflicts_are_found_over_all_tensors_together():
    """Two tensors that clash alone but agree as a whole stay as they are, and the other way round."""
    g, r = [torch.tensor([1.0, 0.0]), torch.tensor([-1.0])], [torch.tensor([3.0, 0.0]), torch.tensor([2.0])]
    kept = [t.clone() for t in g]
    assert projection.without_conflict(g, r) > 0
    assert all(torch.equal(a, b) for a, b in zip(g, kept))
    r[1] *= 10
    assert projection.without_conflict(g, r) < 0
    assert abs(float(flat(g) @ flat(r))) < 1e-5


def test_opposite_gradients_leave_nothing_and_a_zero_reference_everything():
    r = [random(4, 4), random(3)]
    g = [-t for t in r]
    assert projection.without_conflict(g, r) == pytest.approx(-1)
    assert max(float(t.abs().max()) for t in g) < 1e-12
    g = [random(4, 4, seed=1), random(3, seed=2)]
    kept = [t.clone() for t in g]
    assert projection.without_conflict(g, [torch.zeros_like(t) for t in g]) == 0
    assert all(torch.equal(a, b) for a, b in zip(g, kept))


def test_strength_is_the_share_of_the_conflict_that_is_taken_out():
    r, g = [random(9)], [-random(9) + 0.1 * random(9, seed=1)]
    inner = projection.dot(g, r)
    projection.without_conflict(g, r, strength=0.25)
    assert projection.dot(g, r) == pytest.approx(0.75 * inner)


def test_dots_of_half_precision_are_summed_in_full():
    ones = torch.ones(5000, dtype=torch.bfloat16)
    assert projection.dot([ones, ones], [ones, ones]) == 10_000


# -- subspaces ---------------------------------------------------------------------------------------------
def test_off_subspace_is_the_dense_projector():
    left, right, matrix = basis(7, 3), basis(5, 2, seed=1), random(7, 5, seed=2)
    found = projection.off_subspace(matrix, left, right)
    dense = (torch.eye(7) - left @ left.T) @ matrix @ (torch.eye(5) - right @ right.T)
    torch.testing.assert_close(found, dense)
    assert float((left.T @ found).abs().max()) < 1e-14
    assert float((found @ right).abs().max()) < 1e-14
    torch.testing.assert_close(projection.off_subspace(found, left, right), found)
    assert projection.off_subspace(matrix) is matrix
    torch.testing.assert_close(projection.off_subspace(matrix, right=right), matrix - matrix @ right @ right.T)


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)])
def test_large_directions_belong_to_the_largest_singular_values(shape):
    weight = random(*shape)
    count = round(0.5 * min(shape))
    u, v = projection.large_directions(weight.float(), 0.5)
    values = torch.linalg.svdvals(weight.float().double())
    torch.testing.assert_close(u.T @ weight.float().double() @ v, torch.diag(values[:count]))
    torch.testing.assert_close(u.T @ u, torch.eye(count, dtype=torch.float64))
    # what may still move does not touch the large singular values
    moved = weight.float().double() + 1e-3 * projection.off_subspace(random(*shape, seed=3), u, v)
    assert all((torch.linalg.svdvals(moved) - value).abs().min() < 1e-10 for value in values[:count])


def test_all_directions_leave_nothing_to_move():
    for shape in ((8, 5), (5, 8)):
        u, v = projection.large_directions(random(*shape), 1.0)
        assert float(projection.off_subspace(random(*shape, seed=1), u, v).abs().max()) < 1e-14
        assert projection.large_directions(random(*shape), 0.0)[0].shape == (shape[0], 0)


def energy_of(inputs, found):
    return float((inputs @ found).square().sum() / inputs.square().sum())


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_input_directions_are_the_fewest_that_hold_the_energy(energy):
    inputs = random(40, 8) * torch.tensor([5.0, 3, 2, 1, 1, 0.5, 0.1, 0.1], dtype=torch.float64)
    found = projection.input_directions(inputs.T @ inputs, energy)
    count = found.shape[1]
    torch.testing.assert_close(found.T @ found, torch.eye(count, dtype=torch.float64))
    values = torch.linalg.svdvals(inputs).square()
    shares = (values.cumsum(0) / values.sum()).tolist()
    assert count == 1 + sum(share < energy for share in shares)
    assert energy_of(inputs, found) >= energy


def test_the_same_inputs_add_no_direction_and_others_do():
    inputs, other = random(30, 6) @ random(6, 12, seed=1), random(30, 3, seed=2) @ random(3, 12, seed=3)
    first = projection.input_directions(inputs.T @ inputs, 0.95)
    assert torch.equal(projection.input_directions(inputs.T @ inputs, 0.95, first), first)
    both = projection.input_directions(other.T @ other, 0.95, first)
    assert first.shape[1] < both.shape[1] <= first.shape[1] + 3
    assert torch.equal(both[:, : first.shape[1]], first)
    assert energy_of(other, both) >= 0.95
    torch.testing.assert_close(both.T @ both, torch.eye(both.shape[1], dtype=torch.float64))


def test_directions_end_where_the_inputs_end():
    inputs = random(50, 3) @ random(3, 10, seed=1)
    assert projection.input_directions(inputs.T @ inputs, 1.0).shape == (10, 3)
    assert projection.input_directions(inputs.T @ inputs, 0.0).shape == (10, 0)
    assert projection.input_directions(torch.zeros(10, 10), 0.99).shape == (10, 0)
    full = random(50, 10)
    assert projection.input_directions(full.T @ full, 1.0).shape == (10, 10)


def test_joined_bases_span_both_and_nothing_else():
    first, second = basis(9, 3), basis(9, 4, seed=1)
    both = projection.joined(first, second)
    assert both.shape == (9, 7)
    assert float(projection.off_subspace(torch.cat([first, second], 1), left=both).abs().max()) < 1e-13
    inside = first @ random(3, 2, seed=5) + 1e-12 * random(9, 2)
    assert projection.joined(first, inside).shape == (9, 3)


# -- directions of whole gradients -----------------------------------------------------------------------------
SHAPES = ((3, 4), (5,), (2, 2, 2))


def pieces(vector):
    """A vector of 25 numbers as tensors of several shapes."""
    parts = vector.split([math.prod(shape) for shape in SHAPES])
    return [part.view(shape).clone() for part, shape in zip(parts, SHAPES)]


def no_directions(dtype=torch.float64):
    return [torch.zeros(0, *shape, dtype=dtype) for shape in SHAPES]


def columns(directions):
    return torch.cat([part.flatten(1).T for part in directions])


@pytest.mark.parametrize("count", [1, 6, 24])
def test_what_is_left_is_the_residual_of_least_squares(count):
    vectors, target = random(25, count), random(25, seed=9)
    found = projection.more_directions(no_directions(), [pieces(v) for v in vectors.T], count)
    left = pieces(target)
    inside = projection.take_out(left, found)
    answer = np.linalg.lstsq(vectors.numpy(), target.numpy(), rcond=None)[0]
    np.testing.assert_allclose(flat(left).numpy(), target.numpy() - vectors.numpy() @ answer, atol=1e-12)
    assert float(inside.square().sum() + flat(left).square().sum()) == pytest.approx(float(target.square().sum()))
    assert float(projection.take_out(left, found).abs().max()) < 1e-13


def test_no_direction_changes_no_bit_and_all_of_them_leave_nothing():
    left = pieces(random(25))
    assert projection.take_out(left, no_directions()).shape == (0,)
    assert torch.equal(flat(left), random(25))
    found = projection.more_directions(no_directions(), [pieces(v) for v in random(40, 25, seed=1)], 40)
    assert len(found[0]) == 25
    projection.take_out(left, found)
    assert float(flat(left).abs().max()) < 1e-12


def test_what_is_in_the_span_adds_nothing_and_known_directions_stay():
    vectors = random(25, 5)
    first = projection.more_directions(no_directions(), [pieces(v) for v in vectors.T], 5)
    again = [pieces(1e3 * vectors @ random(5, seed=s)) for s in range(3)] + [pieces(torch.zeros(25).double())]
    both = projection.more_directions(first, [*again, pieces(random(25, seed=8))], 5)
    assert len(both[0]) == 6
    assert all(torch.equal(part[:5], known) for part, known in zip(both, first))
    torch.testing.assert_close(columns(both).T @ columns(both), torch.eye(6, dtype=torch.float64))


def test_gradients_that_nearly_coincide_are_orthonormal_in_single_precision():
    """One pass of Gram–Schmidt would leave a hundredth of each in the others."""
    close = [(random(25) + 1e-4 * random(25, seed=s)).bfloat16().float() for s in range(1, 4)]
    close += [random(25).float() + 1e-5 * random(25, seed=s).float() for s in range(4, 8)]
    found = projection.more_directions(no_directions(torch.float32), [pieces(v) for v in close], len(close))
    product = columns(found).double().T @ columns(found).double()
    assert len(product) >= 5
    torch.testing.assert_close(product, torch.eye(len(product), dtype=torch.float64), atol=1e-6, rtol=0)


# -- choices -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("size", "share"), [(7, 0.3), (1000, 0.15), (300_000, 0.15), (300_000, 0.9), (200_001, 1e-5)])
def test_top_share_is_what_sorting_finds(size, share):
    sizes = random(size).abs()
    mask = projection.top_share(sizes, share)
    count = max(1, math.floor(share * size))
    assert int(mask.sum()) == count
    assert set(mask.nonzero()[:, 0].tolist()) == set(sizes.argsort(descending=True)[:count].tolist())


@pytest.mark.parametrize("share", [0.15, 0.5])
def test_top_share_where_the_sample_misleads(share):
    """Columns of different size, and a tensor that is sorted in part: the value sought is not in the sample's range."""
    columns = random(600, 512).abs() * torch.logspace(-4, 4, 512)
    jump = torch.cat([torch.linspace(0, 1, 2**17), torch.full((2**17,), 2.0) + random(2**17).float()])
    for sizes in (columns, jump.abs()):
        mask = projection.top_share(sizes, share)
        assert int(mask.sum()) == math.floor(share * sizes.numel())
        assert float(sizes[mask].min()) >= float(sizes[~mask].max())


@pytest.mark.parametrize("shape", [(30, 7), (700, 450), (300, 512, 3)])
@pytest.mark.parametrize("ties", [False, True])
def test_keeping_the_top_share_is_choosing_by_its_mask(shape, ties):
    values, before, sizes = (random(*shape, seed=s) for s in range(3))
    if ties:
        sizes = sizes.round()
    expected = torch.where(projection.top_share(sizes.abs(), 0.3), values, before)
    projection.keep_top_share(values, before, sizes, 0.3)
    assert torch.equal(values, expected)


def test_keeping_the_top_share_of_what_is_not_in_one_piece():
    values, before, sizes = (random(30, 70, seed=s).T for s in range(3))
    expected = torch.where(sizes.abs() >= sizes.abs().flatten().sort().values[-630], values, before)
    projection.keep_top_share(values, before, sizes, 0.3)
    assert torch.equal(values, expected)


@pytest.mark.parametrize("size", [12, 100_000])
def test_ties_are_broken_by_place_and_the_count_is_exact(size):
    sizes = torch.zeros(size // 4, 4)
    sizes[-1] = 3.0
    mask = projection.top_share(sizes, 0.5)
    assert int(mask.sum()) == size // 2
    assert bool(mask[-1].all())
    assert mask.reshape(-1).nonzero()[:, 0].tolist() == [*range(size // 2 - 4), *range(size - 4, size)]
    assert torch.equal(projection.top_share(sizes, 1.0), torch.ones_like(sizes, dtype=torch.bool))
    assert int(projection.top_share(torch.ones(3), 0.1).sum()) == 1


def test_column_scores_are_wanda_scores_summed_over_rows():
    weight, inputs = random(6, 4), random(11, 4, seed=1)
    inputs[:, 2] = 0
    found = projection.column_scores(weight, inputs.square().sum(0))
    slow = [sum(abs(float(weight[i, j])) * float(inputs[:, j].norm()) for i in range(6)) for j in range(4)]
    torch.testing.assert_close(found, torch.tensor(slow, dtype=torch.float64))
    assert float(found[2]) == 0
