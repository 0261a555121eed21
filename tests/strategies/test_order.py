"""Samplers alone: laws of the orders, ranks, epochs, passes."""

from __future__ import annotations

import collections
import itertools
import math

import pytest
import torch

from lightning_dynamics.strategies.order import ORDERS, ContinuedBatches, OrderSampler, drawn

PERMUTATIONS = ("random_reshuffling", "single_shuffle", "incremental")


def sampler(order, population=20, seed=3, **options):
    return OrderSampler(range(population), order, seed, **options)


def epochs(sampler, count=3):
    passes = []
    for epoch in range(count):
        sampler.set_epoch(epoch)
        passes.append(list(sampler))
    return passes


def in_blocks(indices, size):
    return [indices[start : start + size] for start in range(0, len(indices), size)]


@pytest.mark.parametrize("order", PERMUTATIONS)
def test_a_permutation_has_every_sample_once_in_each_epoch(order):
    assert all(sorted(one) == list(range(20)) for one in epochs(sampler(order)))


@pytest.mark.parametrize(
    ("order", "distinct"),
    [
        ("random_reshuffling", 3),
        ("single_shuffle", 1),
        ("incremental", 1),
        ("with_replacement", 3),
        ("independent_batches", 3),
    ],
)
def test_epochs_differ_where_they_are_drawn_anew(order, distinct):
    assert len({tuple(one) for one in epochs(sampler(order, batch_size=5))}) == distinct


def test_the_incremental_order_is_that_of_the_members():
    assert list(OrderSampler([5, 2, 9], "incremental", 0)) == [5, 2, 9]


def test_a_single_shuffle_is_none_of_the_data_set_order():
    assert list(sampler("single_shuffle")) != list(range(20))


def test_draws_with_replacement_are_uniform_and_independent():
    population, count = 6, 3000
    drawing = sampler("with_replacement", population)
    pairs = collections.Counter()
    for epoch in range(count):
        drawing.set_epoch(epoch)
        one = list(drawing)
        pairs.update(itertools.pairwise(one))  # repeats included
    expected = count * (population - 1) / population**2
    chi_squared = sum((pairs[i, j] - expected) ** 2 / expected for i in range(population) for j in range(population))
    assert chi_squared < 35 + 4 * math.sqrt(70)


def test_draws_with_replacement_bring_the_share_of_samples_that_they_should():
    share = [len(set(one)) / 2000 for one in epochs(sampler("with_replacement", 2000), 20)]
    assert abs(sum(share) / 20 - (1 - (1 - 1 / 2000) ** 2000)) < 0.005


@pytest.mark.parametrize("size", [2, 5])  # by rejection, and by a permutation
def test_independent_batches_are_uniform_subsets_drawn_independently(size):
    population, count = 7, 2000
    drawing = sampler("independent_batches", population, batch_size=size)
    singles, pairs, across = collections.Counter(), collections.Counter(), 0
    for epoch in range(count):
        drawing.set_epoch(epoch)
        first, second = in_blocks(list(drawing), size)[:2]
        assert len(set(first)) == size
        singles.update(first)
        pairs.update((i, j) for i in first for j in first if i != j)
        across += len(set(first) & set(second))
    expected = count * size / population
    assert all(abs(n - expected) < 5 * math.sqrt(expected) for n in singles.values())
    expected = count * size * (size - 1) / (population * (population - 1))
    assert all(abs(n - expected) < 5 * math.sqrt(expected) for n in pairs.values())
    if size == 2:  # the second batch of five is cut short
        assert abs(across / count - size * size / population) < 5 * size / math.sqrt(count)


def test_independent_batches_repeat_samples_across_batches_only():
    one = in_blocks(list(sampler("independent_batches", 20, batch_size=8)), 8)
    assert [len(set(batch)) for batch in one] == [8, 8, 4]
    assert len({i for batch in one for i in batch}) < 20


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_draw_the_blocks_of_one_process(order, world_size):
    whole = list(sampler(order, 24, batch_size=4 * world_size))
    ranks = [list(sampler(order, 24, rank=r, world_size=world_size, batch_size=4)) for r in range(world_size)]
    assert {len(one) for one in ranks} == {24 // world_size}
    assert [i for together in zip(*ranks, strict=True) for i in together] == whole
    # a step's batches of all ranks are the block of one process's larger batch
    steps = [sorted(itertools.chain(*one)) for one in zip(*(in_blocks(one, 4) for one in ranks), strict=True)]
    assert steps == [sorted(block) for block in in_blocks(whole, 4 * world_size)]


@pytest.mark.parametrize("order", ORDERS)
def test_ranks_have_equally_many_samples_where_they_do_not_divide(order):
    whole = list(sampler(order, 10, batch_size=8))
    ranks = [list(sampler(order, 10, rank=rank, world_size=4, batch_size=2)) for rank in range(4)]
    together = [i for step in zip(*ranks, strict=True) for i in step]
    assert len(together) == 12
    if order == "independent_batches":  # the last batch is larger by what is lacking
        assert together[:8] == whole[:8]
        assert len(set(together[8:])) == 4
    else:
        assert together[:10] == whole
    if order in PERMUTATIONS:
        assert together[10:] == whole[:2]


@pytest.mark.parametrize("order", PERMUTATIONS)
def test_more_ranks_than_samples_all_get_one(order):
    ranks = [list(sampler(order, 3, rank=rank, world_size=8)) for rank in range(8)]
    assert [len(one) for one in ranks] == [1] * 8
    assert collections.Counter(itertools.chain(*ranks)).most_common()[-1][1] == 2


@pytest.mark.parametrize("order", ["random_reshuffling", "single_shuffle", "with_replacement", "independent_batches"])
def test_seeds_and_loaders_draw_for_themselves(order):
    first, other_seed, other_loader = (sampler(order, seed=s, batch_size=5) for s in (3, 4, 3))
    other_loader.begin(1, 0, 0, 0)
    assert len({tuple(one) for one in (first, other_seed, other_loader)}) == 3


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rank", [0, 1])
def test_what_was_used_is_left_out_once(order, rank):
    options = {"rank": rank, "world_size": 2, "batch_size": 3}
    whole, resumed = sampler(order, **options), sampler(order, **options)
    whole.set_epoch(4)
    expected = list(whole)
    resumed.begin(0, 4, 0, 2)
    resumed.set_epoch(4)
    assert len(resumed) == len(expected)
    assert list(resumed) == list(resumed) == expected[6:]  # opened twice before the first batch
    for one in (whole, resumed):
        one.go_on()
    assert list(resumed) == list(whole)
    for one in (whole, resumed):
        one.set_epoch(5)
    assert list(resumed) == list(whole)


@pytest.mark.parametrize(("order", "distinct"), [*zip(ORDERS, (3, 1, 1, 3, 3), strict=True)])
def test_each_pass_of_an_epoch_is_drawn_anew_and_known_after_a_resume(order, distinct):
    drawing = sampler(order, batch_size=5)
    first = list(drawing)
    drawing.go_on()
    passes = [first, list(drawing), list(drawing)]
    assert len({tuple(one) for one in passes}) == distinct
    drawing.begin(0, 0, 1, 0)
    assert list(drawing) == passes[1]
    drawing.go_on()
    assert list(drawing) == passes[2]


@pytest.mark.parametrize("order", ORDERS)
def test_drawing_leaves_the_global_generator_alone(order):
    before = torch.get_rng_state()
    list(sampler(order, batch_size=5))
    assert torch.equal(before, torch.get_rng_state())


def test_draws_do_not_depend_on_their_number():
    for order in ORDERS:
        short, long = (list(drawn(order, 10, size, 5, (1, 2, 3))) for size in (10, 25))
        assert long[:10] == short


def test_only_the_samples_that_come_are_within_the_first_draws():
    assert sampler("incremental").within(6) == list(range(6))
    shuffled = sampler("single_shuffle", rank=1, world_size=2)
    assert shuffled.within(6) == list(sampler("single_shuffle"))[:6]
    assert sampler("random_reshuffling").within(6) == list(range(20))
    assert sampler("with_replacement").replacement
    assert not sampler("independent_batches").replacement


class Sorted(torch.utils.data.BatchSampler):
    """Looks six samples ahead."""

    tag = "kept"

    def __iter__(self):
        ahead = in_blocks(list(self.sampler), 6)
        return (batch for block in ahead for batch in in_blocks(sorted(block), self.batch_size))


def test_batches_of_ones_own_go_on_where_they_stopped():
    drawing = sampler("random_reshuffling", batch_size=2, skips=False)
    batches = Sorted(drawing, 2, drop_last=False)
    whole = list(batches)
    drawing.begin(0, 0, 0, 4)
    continued = ContinuedBatches(batches, drawing)
    assert list(continued) == whole[4:]
    assert len(continued) == len(whole)
    assert (continued.tag, continued.sampler) == ("kept", drawing)
    drawing.set_epoch(1)
    assert len(list(continued)) == len(whole)
