import collections

import pytest
import torch
from helpers.modules import NoisySamples, NoisyStream
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_dynamics.callbacks.probe import Probe, read_probe


def labelled(counts):
    y = torch.cat([torch.full((n,), label) for label, n in enumerate(counts)])
    return TensorDataset(torch.arange(len(y)).float()[:, None], y)


def read(
    probe, dataset_or_loaders, *, rank=0, world_size=1, num_batches=float("inf"), kept=None, said=None, **arguments
):
    loaders = dataset_or_loaders
    if not isinstance(loaders, list):
        loaders = [DataLoader(loaders, **{"batch_size": 8, "shuffle": True, **arguments})]
    notes = [] if said is None else said
    data = read_probe(probe, loaders, num_batches, rank, world_size, notes.append, kept)
    if said is None:
        assert notes == []
    return data


def samples(data):
    return [int(v) for item in data.items if item.weight for v in item.batch[0].flatten()]


def test_a_subset_is_random_seeded_and_of_whole_batches():
    dataset = labelled([100])
    data = read(Probe(size=20), dataset)
    assert len(samples(data)) == 24
    assert len(set(samples(data))) == 24
    assert samples(data) != sorted(samples(data))
    assert samples(read(Probe(size=20), dataset)) == samples(data)
    assert samples(read(Probe(size=20, seed=1), dataset)) != samples(data)
    assert (data.size, data.population, data.fraction) == (24, 100, 0.24)
    assert [item.weight for item in data.items] == [8.0, 8.0, 8.0]


def test_a_subset_has_the_classes_in_their_shares():
    data = read(Probe(size=40), labelled([50, 30, 20]))
    labels = torch.cat([item.batch[1] for item in data.items]).tolist()
    assert collections.Counter(labels) == {0: 20, 1: 12, 2: 8}
    assert labels != sorted(labels)


@pytest.mark.parametrize("where", ["targets", "labels", "subset"])
def test_plain_labels_are_found_without_reading_samples(where):
    class Labelled(Dataset):
        reads = 0

        def __init__(self):
            if where != "subset":
                setattr(self, where, [0] * 30 + [1] * 10)

        def __len__(self):
            return 40

        def __getitem__(self, i):
            return torch.tensor([float(i)]), 0 if i < 30 else 1

    dataset = Labelled()
    if where == "subset":
        dataset = Subset(labelled([30, 10]), list(range(40)))
    data = read(Probe(size=16), dataset)
    assert sum(int(label) for item in data.items for label in item.batch[1]) == 4


def test_the_whole_set_is_in_its_order_with_a_short_last_batch():
    data = read(Probe(whole=True), labelled([12, 8]))
    assert samples(data) == list(range(20))
    assert [item.weight for item in data.items] == [8.0, 8.0, 4.0]
    assert data.kind == "the whole training set"
    assert data.fraction == 1.0


def test_a_probe_larger_than_the_set_is_the_set():
    assert sorted(samples(read(Probe(size=512), labelled([20])))) == list(range(20))


def test_the_data_set_is_not_touched():
    dataset = NoisySamples()
    before = dataset.generator.get_state()
    state = torch.get_rng_state()
    data = read(Probe(size=24), dataset)
    assert len(data.items) == 3
    assert dataset.reads == 0
    assert torch.equal(dataset.generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_depends_on_the_sample_and_not_on_who_reads_it():
    class Augmented(Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, i):
            return torch.tensor([float(i)]), torch.rand(1)

    one = read(Probe(size=16), Augmented(), batch_size=16)
    noise = dict(zip(samples(one), torch.cat([i.batch[1] for i in one.items]).flatten().tolist(), strict=True))
    for rank in (0, 1):
        part = read(Probe(size=16), Augmented(), batch_size=4, rank=rank, world_size=2)
        for sample, value in zip(
            samples(part), torch.cat([i.batch[1] for i in part.items]).flatten().tolist(), strict=True
        ):
            assert noise[sample] == value
    assert len(set(noise.values())) == 16


def test_ranks_share_the_samples_and_have_equally_many_batches():
    dataset = labelled([100])
    whole = read(Probe(size=40), dataset)
    parts = [read(Probe(size=40), dataset, rank=rank, world_size=3) for rank in range(3)]
    assert [len(part.items) for part in parts] == [2, 2, 2]
    assert sum(item.weight for part in parts for item in part.items) == 40
    gathered = sorted((item.index, item) for part in parts for item in part.items if item.weight)
    assert [v for _, item in gathered for v in item.batch[0].flatten()] == samples(whole)
    assert {part.size for part in parts} == {40}


def test_only_what_the_sampler_draws_belongs_to_the_training_set():
    dataset = labelled([100])
    data = read(Probe(whole=True), dataset, sampler=SubsetRandomSampler(range(30, 50)), shuffle=False)
    assert sorted(samples(data)) == list(range(30, 50))
    data = read(Probe(whole=True), dataset, shuffle=False, num_batches=2)
    assert samples(data) == list(range(16))
    data = read(Probe(whole=True), dataset, sampler=DistributedSampler(dataset, 2, 0), shuffle=False, num_batches=2)
    assert data.population == 100


@pytest.mark.parametrize(
    ("loaders", "reason"),
    [
        ([DataLoader(NoisyStream(), 8)], "NoisyStream is not map-style"),
        ([[torch.zeros(2)]], "the training data is a list, not a DataLoader"),
        ([DataLoader(labelled([9]), 3), DataLoader(labelled([9]), 3)], "there are 2 training loaders"),
        (
            [DataLoader(labelled([9]), 3, sampler=WeightedRandomSampler([1.0] * 9, 9))],
            "the loader's sampler is a WeightedRandomSampler",
        ),
        ([DataLoader(labelled([9]), batch_size=None)], "the loader's batch sampler is a NoneType"),
    ],
)
def test_where_there_is_no_uniform_subset_the_first_batches_are_taken_and_it_is_said(loaders, reason):
    said = []
    data = read(Probe(size=24), loaders, said=said)
    assert data.wanted > 0
    assert not data.is_complete
    assert reason in said[0]
    with pytest.raises(MisconfigurationException, match=r"`whole=True` needs a map-style training set"):
        read(Probe(whole=True), loaders)


def test_a_data_set_that_cannot_be_read_elsewhere_falls_back_and_says_why():
    class HomeOnly(Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, i):
            if torch.utils.data.get_worker_info() is not None:
                raise RuntimeError("not in a worker")
            return torch.zeros(1)

    said = []
    data = read(Probe(size=16), HomeOnly(), said=said)
    assert data.wanted == 2
    assert "not in a worker" in said[0]


def test_passing_batches_are_copied_until_there_are_enough():
    data = read(Probe(first_batches=2), labelled([20]))
    for number in range(3):
        if data.wanted:
            batch = [torch.full((4, 1), float(number))]
            data.copy_passing(batch, rank=1, world_size=2)
            batch[0].zero_()
    assert [item.batch[0][0, 0].item() for item in data.items] == [0.0, 1.0]
    assert [item.index for item in data.items] == [1, 3]
    assert data.is_complete


def test_a_loader_of_the_users_is_read_once():
    own = DataLoader(labelled([10]), 4)
    data = read(Probe(dataloader=own), labelled([50]))
    assert samples(data) == list(range(10))
    assert data.kind == "a loader of the user's"
    with pytest.raises(MisconfigurationException, match="`dataloader` is empty"):
        read(Probe(dataloader=[]), labelled([50]))


def test_an_empty_training_set_is_an_error():
    with pytest.raises(MisconfigurationException, match="training set is empty"):
        read(Probe(), labelled([5]), sampler=SubsetRandomSampler([]), shuffle=False)


def test_a_checkpoint_brings_the_same_samples_back():
    data = read(Probe(size=16), labelled([100]))
    again = read(Probe(size=999), labelled([100]), kept=data.to_checkpoint())
    assert samples(again) == samples(data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "`size` must be an integer of at least 1, got 0"),
        ({"batch_size": 2.0}, "`batch_size` must be an integer of at least 1 or None, got 2.0"),
        ({"first_batches": -1}, "`first_batches` must be"),
        ({"seed": -1}, "`seed` must be an integer of at least 0"),
        ({"whole": True, "first_batches": 3}, "takes its data from one place, got whole=True and first_batches=3"),
        ({"current_batch": True, "dataloader": []}, "got current_batch=True and dataloader"),
    ],
)
def test_impossible_probes_are_refused(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        Probe(**arguments)


def test_lightnings_distributed_wrapper_is_seen_through():
    from lightning.fabric.utilities.distributed import DistributedSamplerWrapper

    dataset = labelled([40])
    wrapped = DistributedSamplerWrapper(SubsetRandomSampler(range(20)), num_replicas=2, rank=0)
    data = read(Probe(whole=True), dataset, sampler=wrapped, shuffle=False)
    assert sorted(samples(data)) == list(range(20))
    weighted = DistributedSamplerWrapper(WeightedRandomSampler([1.0] * 40, 40), num_replicas=2, rank=0)
    said = []
    assert read(Probe(), dataset, sampler=weighted, shuffle=False, said=said).wanted
    assert "WeightedRandomSampler" in said[0]


def test_probes_are_the_same_data_where_they_ask_for_the_same():
    assert Probe(size=8).key == Probe(size=8).key
    assert Probe(size=8).key != Probe(size=9).key
