"""Low-rank algebra against LAPACK in float64, and its bytes against those of other threads and other CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from fedloop_tasks.linalg.eigen import leading, orthonormal
from fedloop_tasks.linalg.lowrank import Products
from fedloop_tasks.linalg.ordered import Matrix, dot, gram, product, total
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

SIZES = st.integers(1, 9)


def random(seed: int, *shape: int) -> Matrix:
    return np.random.default_rng(seed).normal(size=shape)


def spread(seed: int, *shape: int) -> Matrix:
    """Values of very different sizes."""
    return random(seed, *shape) * 10.0 ** np.random.default_rng(seed + 1).integers(-6, 6, shape)


def with_eigenvalues(values: NDArray[Any]) -> Matrix:
    basis, _ = np.linalg.qr(random(0, len(values), len(values)))
    matrix = (basis * values) @ basis.T
    result: Matrix = (matrix + matrix.T) / 2
    return result


# --- sums and products ---------------------------------------------------------------------------------------------------


@given(st.integers(0, 20), SIZES)
def test_a_sum_is_that_of_halves_onto_halves(count: int, width: int) -> None:
    values = random(count, count, width)
    np.testing.assert_allclose(total(values.copy()), values.sum(axis=0), rtol=0, atol=1e-13)
    assert dot(values[:, 0], values[:, 0]) == pytest.approx(float(values[:, 0] @ values[:, 0]))


@settings(max_examples=40)
@given(SIZES, st.integers(1, 40), SIZES, st.integers(0, 99))
def test_a_product_is_within_its_bound_of_the_exact_one(rows: int, depth: int, columns: int, seed: int) -> None:
    left, right = spread(seed, rows, depth), spread(seed + 7, depth, columns)
    made = product(left, right)
    for i in range(rows):
        for j in range(columns):
            exact = sum(Fraction(x) * Fraction(y) for x, y in zip(left[i].tolist(), right[:, j].tolist(), strict=True))
            bound = depth * 2.0**-43 * np.abs(left[i]).max() * np.abs(right[:, j]).max()
            assert abs(Fraction(float(made[i, j])) - exact) <= bound


def test_a_product_deeper_than_one_exact_sum_is_right() -> None:
    left, right = random(1, 5, 1300), random(2, 1300, 4)
    np.testing.assert_allclose(product(left, right), left @ right, rtol=0, atol=1e-9)
    np.testing.assert_allclose(gram(left), left @ left.T, rtol=0, atol=1e-9)
    assert (gram(left) == gram(left).T).all()


def test_every_partial_sum_of_a_product_is_a_whole_number_that_float64_holds() -> None:
    """The largest there can be: any order of summation gives the same, which is what makes the bytes those of any BLAS."""
    ones = np.full((1, 512), 1 - 2.0**-53)
    assert product(ones, ones.T)[0, 0] == 512
    assert product(ones[:, ::-1] * 3, ones.T)[0, 0] == 1536


# --- eigenvectors --------------------------------------------------------------------------------------------------------

WILKINSON = np.diag(np.abs(np.arange(-10.0, 11))) + np.diag(np.ones(20), 1) + np.diag(np.ones(20), -1)
MATRICES = {
    "one": np.array([[-2.0]]),
    "random": gram(random(1, 60, 70)),
    "indefinite": with_eigenvalues(random(2, 40)),
    "identity": np.eye(30),
    "zero": np.zeros((7, 7)),
    "ones": np.ones((40, 40)),
    "diagonal": np.diag([3.0, 3, 0, 1, 1, 0, 3]),
    "multiple": with_eigenvalues(np.repeat([5.0, 3, 1, 0], 12)),
    "nearly multiple": with_eigenvalues(1 + 1e-13 * np.arange(40.0)),
    "graded": with_eigenvalues(10.0 ** -np.arange(40.0)),
    "pairs that nearly meet": WILKINSON,
    "the same in blocks": np.kron(np.eye(4), WILKINSON),
    "tiny": 1e-150 * WILKINSON,
    "huge": 1e150 * WILKINSON,
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("part", [0.0, 0.3, 1.0])
def test_the_leading_eigenvectors_are_orthonormal_and_those_of_the_largest_eigenvalues(name: str, part: float) -> None:
    matrix = MATRICES[name]
    count = max(1, round(part * len(matrix)))
    rows = leading(matrix.copy(), count)
    wanted = np.linalg.eigvalsh(matrix)[::-1][:count]
    scale = np.abs(matrix).max() * len(matrix)
    np.testing.assert_allclose(rows @ rows.T, np.eye(count), rtol=0, atol=1e-12)
    np.testing.assert_allclose(matrix @ rows.T, rows.T * wanted, rtol=0, atol=1e-12 * scale)


def test_rows_that_depend_on_others_become_zeros() -> None:
    rows = np.vstack([random(1, 2, 9), np.zeros((1, 9)), random(2, 1, 9)])
    made = orthonormal(np.vstack([rows, rows[:1] + rows[1:2]]), 1e-10)
    np.testing.assert_allclose(made @ made.T, np.diag([1.0, 1, 0, 1, 0]), rtol=0, atol=1e-14)


# --- the best factors ----------------------------------------------------------------------------------------------------


def added(shape: tuple[int, int], pairs: list[tuple[Matrix, Matrix]]) -> tuple[Products, Matrix, float]:
    """With the dense sum, and the sum of |B| |A|."""
    products, dense, size = Products(*shape), np.zeros(shape), 0.0
    for left, right in pairs:
        products.add(left, right)
        dense += left @ right
        size += float(np.linalg.norm(left) * np.linalg.norm(right))
    return products, dense, size


def check(shape: tuple[int, int], pairs: list[tuple[Matrix, Matrix]], rank: int) -> tuple[Matrix, Matrix]:
    """Against the dense sum's singular value decomposition in float64."""
    products, dense, size = added(shape, pairs)
    left, right = products.best(rank)
    assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
    values = np.linalg.svd(dense, compute_uv=False)
    best = float(np.sqrt((values[rank:] ** 2).sum()))
    assert np.linalg.norm(dense - left @ right) <= best + 1e-6 * size
    empty = ~right.any(axis=1)
    np.testing.assert_allclose(right @ right.T, np.diag(1.0 - empty), rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        np.linalg.norm(left, axis=0), np.pad(values, (0, rank))[:rank], rtol=0, atol=1e-6 * size
    )  # the singular values, in order
    assert not left[:, empty].any()
    assert (np.take_along_axis(right, np.abs(right).argmax(axis=1)[:, None], axis=1) >= 0).all()
    return left, right


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    ranks=st.lists(st.integers(1, 5), max_size=6),
    rank=st.integers(1, 6),
    sizes=st.integers(-12, 12),
    seed=st.integers(0, 99),
)
def test_the_factors_are_the_best_of_the_dense_sum(
    shape: tuple[int, int], ranks: list[int], rank: int, sizes: int, seed: int
) -> None:
    rows, columns = shape
    pairs = [
        (random(seed + n, rows, each) * 10.0 ** (sizes * (n % 2)), random(seed - n + 99, each, columns))
        for n, each in enumerate(ranks)
    ]
    check(shape, pairs, rank)


def test_a_gap_makes_the_product_that_of_the_dense_decomposition() -> None:
    pairs = [(random(n, 50, 8), random(n + 50, 8, 40)) for n in range(4)]
    _, dense, size = added((50, 40), pairs)
    left, right = check((50, 40), pairs, 8)
    u, s, v = np.linalg.svd(dense)
    np.testing.assert_allclose(left @ right, (u[:, :8] * s[:8]) @ v[:8], rtol=0, atol=1e-10 * size)


def test_updates_that_are_zero_the_same_opposite_or_of_equal_singular_values_are_merged() -> None:
    left, right = random(1, 20, 4), random(2, 4, 30)
    zero = (np.zeros_like(left), right)
    for pairs in ([zero], [zero, zero], [], [zero, (left, right)], [(left, right)] * 3, [(left, right), (-left, right)]):
        made = check((20, 30), pairs, 6)
        if not any(pair[0].any() for pair in pairs):
            assert not made[0].any()
            assert not made[1].any()
    equal, _ = np.linalg.qr(random(3, 20, 6))
    other, _ = np.linalg.qr(random(4, 30, 6))
    check((20, 30), [(equal, other.T)], 4)


def test_components_that_are_zero_cost_nothing_and_change_no_byte() -> None:
    left, right = random(1, 20, 3), random(2, 3, 30)
    padded = np.pad(left, ((0, 0), (0, 5))), np.pad(right, ((0, 5), (0, 0)))
    one, two = Products(20, 30), Products(20, 30)
    one.add(left, right)
    two.add(*padded)
    assert [each.tobytes() for each in one.best(8)] == [each.tobytes() for each in two.best(8)]


_SCRIPT = """
import sys
import numpy as np
from fedloop_tasks.linalg.lowrank import Products
random = np.random.default_rng(3)
for shape, rank, count in (((300, 1100), 12, 9), ((200, 130), 8, 40)):
    products = Products(*shape)
    for _ in range(count):
        products.add(random.normal(size=(shape[0], rank)), random.normal(size=(rank, shape[1])))
    for each in products.best(rank):
        sys.stdout.buffer.write(each.tobytes())
"""


def test_the_bytes_do_not_depend_on_threads_vector_width_or_the_cpu() -> None:
    """OpenBLAS has other kernels for every kind of CPU, which add up in another order."""
    environments = [
        {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"},
        {"OPENBLAS_CORETYPE": "Prescott"},
        {"NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3", "OPENBLAS_CORETYPE": "Sandybridge"},
    ]
    runs = [
        subprocess.run([sys.executable, "-c", _SCRIPT], env=os.environ | each, capture_output=True, check=True).stdout
        for each in environments
    ]
    assert len(set(runs)) == 1
    assert len(runs[0]) == 8 * (12 * 1400 + 8 * 330)
