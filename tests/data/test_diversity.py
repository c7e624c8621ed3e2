"""A diverse subset: every cluster is there, evenly, its centre first."""

import numpy as np
import pytest

from retain.data.diversity import diverse, tfidf


def blobs(sizes, spread=0.1, seed=0):
    """Points around corners far from one another; (points, which corner)."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return 10 * np.eye(len(sizes))[labels] + spread * random.standard_normal((len(labels), len(sizes))), labels


@pytest.mark.parametrize("number", [5, 8, 20])
def test_every_cluster_is_covered_and_no_one_takes_more_than_its_turn(number):
    points, corner = blobs([100, 40, 3, 2, 1])
    found = diverse(points, number, 5, seed=0)
    counts = np.bincount(corner[found.places], minlength=5)
    assert len(set(found.places)) == len(found.places) == number
    assert (found.covered, found.clusters) == (5, 5)
    assert counts.min() >= 1
    full = np.bincount(corner)
    for one in range(5):
        assert counts[one] >= min(counts.max() - 1, full[one]), "only an empty cluster gives fewer"


def test_the_rows_nearest_to_their_centre_come_first():
    points, corner = blobs([30, 30, 30], spread=0.5)
    found = diverse(points, 9, 3, seed=0)
    for one in range(3):
        mine = points[corner == one]
        distance = np.linalg.norm(mine - mine.mean(0), axis=1)
        nearest = {tuple(row) for row in mine[np.argsort(distance)[:3]]}
        assert {tuple(points[i]) for i in found.places if corner[i] == one} == nearest


def test_it_is_more_diverse_than_the_first_rows():
    points, corner = blobs([200, 5, 5, 5])
    assert len(set(corner[:12])) == 1
    assert len(set(corner[diverse(points, 12, 4, 0).places])) == 4


def test_fewer_rows_or_different_rows_than_clusters():
    points, _ = blobs([2, 2])
    assert sorted(diverse(points, 9, 20, 0).places) == [0, 1, 2, 3]
    same = np.ones((6, 3))
    found = diverse(same, 4, 3, 0)
    assert (len(found.places), found.covered, found.clusters) == (4, 1, 1)
    assert diverse(points, 1, 20, 0).covered == 1


def test_texts_about_the_same_come_together():
    texts = [f"how do I cook {x} in the kitchen" for x in ("rice", "beans", "eggs", "soup")]
    texts += [f"which planet has {x} moons and rings" for x in ("two", "seven", "no", "many")]
    texts += ["?", "7"]
    found = diverse(tfidf(texts), 4, 4, seed=1)
    assert len({found.labels[i] for i in range(4)} & {found.labels[i] for i in range(4, 8)}) == 0
    assert found.covered == found.clusters == 4


def test_the_seed_is_all_that_chance_has():
    points, _ = blobs([20] * 5, spread=3.0)
    assert diverse(points, 10, 5, 3).places.tolist() == diverse(points, 10, 5, 3).places.tolist()
