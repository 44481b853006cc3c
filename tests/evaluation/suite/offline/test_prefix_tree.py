"""The tree holds every sequence, and puts each question where its answer is predicted."""

import numpy as np
import pytest

from flexolmo_hf.evaluation.suite.offline.prefix_tree import plant


def random_sequences(seed):
    chance = np.random.default_rng(seed)
    prompts = [chance.integers(0, 9, chance.integers(5, 40)) for _ in range(3)]
    questions = [np.concatenate([prompts[i % 3], chance.integers(0, 9, chance.integers(0, 20))]) for i in range(9)]
    return [np.concatenate([questions[i % 9], chance.integers(0, 3, chance.integers(1, 4))]) for i in range(60)]


def walk(nodes, before=()):
    for node in nodes:
        assert node.start == len(before)
        own = (*before, *node.tokens.tolist())
        yield node, own
        yield from walk(node.children, own)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_each_target_is_asked_where_its_sequence_predicts_it(seed, share):
    sequences = random_sequences(seed)
    targets = [(*sequence[len(sequence) - 2 :].tolist(), 8)[-min(3, len(sequence)) :] for sequence in sequences]
    asked = {index: [] for index in range(len(sequences))}
    for node, own in walk(plant(sequences, targets, share=share)):
        for offset, token, index in node.wanted:
            position = node.start + offset
            assert own[: position + 1] == tuple(sequences[index][: position + 1].tolist())
            asked[index].append((position, token))

    for index, (sequence, wanted) in enumerate(zip(sequences, targets, strict=True)):
        first = len(sequence) - len(wanted)
        assert sorted(asked[index]) == list(enumerate(wanted, start=first))


def test_sharing_reads_fewer_tokens_and_never_less_than_the_distinct_ones():
    sequences = random_sequences(0)
    targets = [(1,)] * len(sequences)
    shared = sum(len(node.tokens) for node, _ in walk(plant(sequences, targets, share=True)))
    apart = sum(len(node.tokens) for node, _ in walk(plant(sequences, targets, share=False)))
    distinct = len({tuple(sequence[: i + 1].tolist()) for sequence in sequences for i in range(len(sequence))})

    assert distinct <= shared < apart / 2


def test_equal_sequences_with_different_prompts_stay_apart():
    one, other = np.arange(9), np.arange(12)
    roots = plant([one, one, other, one], [(1,), (2,), (3,), (4, 5)], share=False, prompts=[9, 9, 12, 8])

    assert [(node.prompt, node.tokens.tolist(), node.children) for node in roots] == [
        (8, one.tolist(), []),
        (9, one.tolist(), []),
        (12, other.tolist(), []),
    ]
    assert [node.wanted for node in roots] == [[(7, 4, 3), (8, 5, 3)], [(8, 1, 0), (8, 2, 1)], [(11, 3, 2)]]


def test_no_node_is_empty_where_one_sequence_begins_another():
    long = np.arange(60)
    roots = plant([long[:30], long, long[:30]], [(1,), (2,), (3,)], share=True)
    nodes = [node for node, _ in walk(roots)]

    assert all(len(node.tokens) for node in nodes)
    assert sum(len(node.tokens) for node in nodes) == 60
