"""Order of images: permutations without a list, and the shares of the ranks."""

import inspect
import itertools
from collections import Counter

import numpy as np
import pytest

from dinov2_custom.data.samplers import (
    EpochSampler,
    InfiniteSampler,
    ShardedInfiniteSampler,
    permuted_index,
)
from dinov2_custom.data.samples import TrainBatches


def take(sampler, number: int) -> list[int]:
    return list(itertools.islice(sampler, number))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_every_pass_has_every_image_once(size):
    passes = [[permuted_index(p * size + i, size, seed=5) for i in range(size)] for p in range(3)]
    assert all(sorted(one) == list(range(size)) for one in passes)
    if size > 6:
        assert passes[0] != passes[1] != passes[2] != list(range(size))
        assert passes[0] != [permuted_index(i, size, seed=6) for i in range(size)]


def test_permutations_of_few_images_are_all_about_as_frequent():
    counts = Counter(tuple(permuted_index(3 * p + i, 3, seed=1) for i in range(3)) for p in range(3000))
    assert len(counts) == 6 and min(counts.values()) > 400 and max(counts.values()) < 600


def test_positions_are_uniform_and_neighbours_uncorrelated():
    size, number = 100, 300
    orders = np.array([[permuted_index(p * size + i, size, seed=2) for i in range(size)] for p in range(number)])
    expected = np.sqrt((size**2 - 1) / 12 / number)
    assert 0.7 < orders.mean(0).std() / expected < 1.3
    neighbours = np.corrcoef(orders[:, :-1].ravel(), orders[:, 1:].ravel())[0, 1]
    assert abs(neighbours + 1 / (size - 1)) < 0.03


def test_huge_datasets_need_no_list():
    size = 3_000_000_000
    drawn = [permuted_index(n, size, seed=0) for n in range(500)]
    assert len(set(drawn)) == 500 and max(drawn) < size and abs(np.mean(drawn) / size - 0.5) < 0.06


def draws_of_rank(number: int, *, batch: int, rank: int, world_size: int, start: int = 0) -> list[int]:
    """Return the draws of one rank of a training run, from iteration ``start`` on."""
    batches = TrainBatches(None, None, batch_size=batch, rank=rank, world_size=world_size)
    return [draw for iteration in range(start, start + number // batch) for draw in batches.draws(iteration)]


@pytest.mark.parametrize("world_size, batch", [(1, 3), (2, 2), (4, 5)])
def test_draws_of_all_ranks_are_the_global_batches(world_size, batch):
    ranks = [draws_of_rank(4 * batch, batch=batch, rank=r, world_size=world_size) for r in range(world_size)]
    for iteration in range(4):
        drawn = [draw for rank in ranks for draw in rank[iteration * batch : (iteration + 1) * batch]]
        assert drawn == list(range(iteration * batch * world_size, (iteration + 1) * batch * world_size))


@pytest.mark.parametrize("shuffle", [False, True])
def test_epoch_sampler_shares_an_epoch(shuffle):
    def ranks(epoch: int) -> list[list[int]]:
        samplers = [EpochSampler(size=25, sample_count=10, shuffle=shuffle, seed=3, start=r, step=4) for r in range(4)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
            assert len(sampler) == len(list(sampler))
        return [list(sampler) for sampler in samplers]

    seen = Counter(itertools.chain.from_iterable(ranks(0)))
    assert sum(seen.values()) == 25 and len(seen) == 10 and set(seen.values()) == {2, 3}
    assert (ranks(0) != ranks(1)) == shuffle and ranks(1) == ranks(1)
    if not shuffle:
        assert ranks(0)[1] == [1, 5, 9, 3, 7, 1]


@pytest.mark.parametrize("shuffle", [False, True])
def test_infinite_sampler_ranks_see_everything_together(shuffle):
    ranks = [take(InfiniteSampler(sample_count=7, shuffle=shuffle, seed=1, start=r, step=3), 7) for r in range(3)]
    assert Counter(itertools.chain.from_iterable(ranks)) == {i: 3 for i in range(7)}
    advanced = InfiniteSampler(sample_count=7, shuffle=shuffle, seed=1, start=2, step=3, advance=4)
    assert take(advanced, 3) == ranks[2][4:]


@pytest.mark.parametrize("shuffle", [False, True])
def test_sharded_sampler_keeps_to_its_share(shuffle):
    def rank(r: int, advance: int = 0) -> ShardedInfiniteSampler:
        return ShardedInfiniteSampler(sample_count=23, shuffle=shuffle, seed=1, start=r, step=4, advance=advance)

    shares = []
    for r in range(4):
        drawn = take(rank(r), 15)
        assert set(drawn[:5]) == set(drawn[5:10]) == set(drawn[10:]) and len(set(drawn)) == 5
        assert (drawn[:5] != drawn[5:10] or drawn[5:10] != drawn[10:]) == shuffle
        assert take(rank(r, advance=7), 8) == drawn[7:]
        shares.append(set(drawn))
    assert sum(map(len, shares)) == 20 == len(set.union(*shares))


def test_fewer_images_than_ranks_does_not_hang():
    drawn = take(ShardedInfiniteSampler(sample_count=2, shuffle=True, start=5, step=8), 10)
    assert set(drawn) == {0, 1}


@pytest.mark.parametrize("size", [1, 3, 10, 101])
def test_global_sequence_is_the_same_for_any_number_of_ranks(size):
    """Iteration i of W ranks with batch b has draws [i*b*W, (i+1)*b*W): only their assignment to ranks changes."""

    def sequence(world_size: int, batch: int, first_draw: int = 0, number: int = 240) -> list[int]:
        start = first_draw // (world_size * batch)
        steps = number // (world_size * batch)
        where = dict(batch=batch, world_size=world_size, start=start)
        drawn = [draws_of_rank(steps * batch, rank=r, **where) for r in range(world_size)]
        draws = [draw for i in range(steps) for rank in drawn for draw in rank[i * batch : (i + 1) * batch]]
        return [permuted_index(draw, size, seed=9) for draw in draws]

    one = sequence(1, 12)
    assert sequence(2, 6) == sequence(12, 1) == sequence(4, 3) == one
    assert one[:120] + sequence(3, 4, 120, 120) == one  # a job that went on with other ranks after 120 draws
    for start in range(0, 240 - size + 1, size):  # no image is dropped at the end of a pass
        assert sorted(one[start : start + size]) == list(range(size))


def test_fewer_images_than_ranks_all_draw():
    ranks = [draws_of_rank(4, batch=2, rank=r, world_size=8) for r in range(8)]
    drawn = [permuted_index(draw, 3, seed=0) for rank in ranks for draw in rank]
    assert len(drawn) == 32 and set(drawn) == {0, 1, 2}


def test_defaults_are_one_rank():
    assert take(InfiniteSampler(sample_count=3), 5) == [0, 1, 2, 0, 1]
    assert list(EpochSampler(size=3, sample_count=3)) == [0, 1, 2]


@pytest.mark.parametrize("name", ["EpochSampler", "InfiniteSampler", "ShardedInfiniteSampler"])
def test_signatures_are_upstreams(upstream_source, name):
    ours = list(inspect.signature(globals()[name].__init__).parameters)
    assert ours == upstream_source("samplers", name)
