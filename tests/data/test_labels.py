import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_mem.data.labels import assign_labels, classes_of
from lightning_mem.randomness import derive_seed


def random_labels(indices, k=10, seed=0, rule="random"):
    return assign_labels(rule, indices=np.asarray(indices, int), num_classes=k, true_labels=None, seed=seed)


@pytest.mark.parametrize(("rule", "k"), [("random", 7), ("binary", None)])
@given(st.lists(st.integers(0, 10**6), unique=True, min_size=1, max_size=20), st.data())
def test_the_label_of_an_image_depends_on_nothing_but_its_index_and_the_seed(rule, k, indices, data):
    subset = data.draw(st.lists(st.sampled_from(indices), unique=True))
    whole = dict(zip(indices, random_labels(indices, k, rule=rule).tolist(), strict=True))
    assert random_labels(subset, k, rule=rule).tolist() == [whole[index] for index in subset]


def test_random_labels_are_the_addressed_draw():
    assert random_labels([5, 12345], 1000, seed=3).tolist() == [derive_seed(3, "label", i) % 1000 for i in (5, 12345)]
    assert random_labels([5]).dtype == np.int64


@pytest.mark.parametrize("k", [2, 10, 1000])
def test_random_labels_are_balanced(k):
    n = 20_000
    counts = np.bincount(random_labels(range(n), k), minlength=k)
    assert len(counts) == k
    chi_square = ((counts - n / k) ** 2 / (n / k)).sum()
    assert abs(chi_square - (k - 1)) < 4 * np.sqrt(2 * (k - 1))  # mean k - 1, variance 2 (k - 1)


def test_another_seed_gives_other_labels():
    agree = (random_labels(range(10_000), 10, seed=0) == random_labels(range(10_000), 10, seed=1)).mean()
    assert abs(agree - 0.1) < 4 * np.sqrt(0.09 / 10_000)


def test_binary_is_two_classes():
    labels = random_labels(range(2000), None, rule="binary")
    assert set(labels.tolist()) == {0, 1}
    assert abs(labels.mean() - 0.5) < 4 * 0.5 / np.sqrt(2000)


def test_none_unique_and_true():
    def assign(rule):
        return assign_labels(
            rule, indices=np.array([4, 0, 2]), num_classes=None, true_labels=np.arange(10, 15, dtype=np.int32), seed=0
        )

    assert assign("none") is None
    assert assign("unique").tolist() == [0, 1, 2]
    assert assign("true").tolist() == [14, 10, 12]
    assert {assign(rule).dtype for rule in ("unique", "true", "binary")} == {np.dtype(np.int64)}


@pytest.mark.parametrize("rule", ["true", "random", "unique", "binary"])
def test_no_images_have_no_labels(rule):
    labels = assign_labels(rule, indices=np.array([]), num_classes=3, true_labels=np.arange(5), seed=0)
    assert labels.shape == (0,)
    assert labels.dtype == np.int64


@pytest.mark.parametrize(
    ("rule", "indices", "message"),
    [
        ("clever", [0], "one of none, true, random, unique, binary, got 'clever'"),
        ("true", [0], "folder:faces has none"),
        ("random", [0], "random needs num_classes, got null"),
        ("none", [[0]], r"indices must be integers \[n\], got int64 \[1, 1\]"),
        ("unique", [0.5], r"got float64 \[1\]"),
        ("unique", [3, -7], "got -7"),
    ],
)
def test_labels_that_cannot_be_given_are_refused(rule, indices, message):
    with pytest.raises(ValueError, match=message):
        assign_labels(
            rule, indices=np.array(indices), num_classes=None, true_labels=None, seed=0, source="folder:faces"
        )


def test_an_index_beyond_the_true_labels_is_refused():
    with pytest.raises(ValueError, match="digits has 3 true labels, got the index 3"):
        assign_labels(
            "true", indices=np.array([3]), num_classes=None, true_labels=np.arange(3), seed=0, source="digits"
        )


@pytest.mark.parametrize(
    ("rule", "num_classes", "expected"),
    [
        ("none", None, None),
        ("true", None, 10),
        ("true", 10, 10),
        ("true", 1000, 1000),
        ("random", 4, 4),
        ("unique", None, 32),
        ("binary", None, 2),
        ("binary", 2, 2),
    ],
)
def test_every_rule_leads_to_a_number_of_classes(rule, num_classes, expected):
    assert classes_of(rule, num_classes=num_classes, num_members=32, source_classes=10) == expected


@pytest.mark.parametrize(
    ("rule", "num_classes", "message"),
    [
        ("random", None, "random needs num_classes"),
        ("random", 0, "num_classes must be at least 1, got 0"),
        ("true", None, "needs a source with true labels"),
        ("none", 5, "none leads to no labels, but num_classes is 5"),
        ("unique", 5, "unique leads to 32 classes, but num_classes is 5"),
        ("binary", 3, "binary leads to 2 classes, but num_classes is 3"),
        ("often", None, "got 'often'"),
    ],
)
def test_a_rule_that_leads_nowhere_is_refused(rule, num_classes, message):
    with pytest.raises(ValueError, match=message):
        classes_of(rule, num_classes=num_classes, num_members=32, source_classes=None)
