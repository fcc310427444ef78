import numpy as np

from rac3.evaluation.recall import pair_recall_at, recall_at


def test_recall_counts_queries_with_their_entity_among_the_first_k() -> None:
    neighbors = np.array([[0, 1, 2], [2, 0, -1], [-1, -1, -1], [1, 2, 0]])
    memory = ["fox", "owl", "elk"]
    queries = ["fox", "fox", "fox", "fox"]
    assert recall_at(1, neighbors, queries, memory) == 1 / 4
    assert recall_at(2, neighbors, queries, memory) == 2 / 4
    assert recall_at(3, neighbors, queries, memory) == 3 / 4  # -1 is no document, not the last one


def test_pair_recall_agrees_with_a_sort() -> None:
    rng = np.random.default_rng(0)
    queries, answers = rng.normal(size=(2, 40, 8)).astype(np.float32)
    order = np.argsort(-(queries @ answers.T), axis=1)
    for k in (1, 5, 40):
        expected = np.mean([row in order[row, :k] for row in range(40)])
        assert pair_recall_at(k, queries, answers) == expected
