"""The best factors of a sum of low-rank products, without their dense sum (but where the factors together are larger)."""

from __future__ import annotations

from typing import Final

import numpy as np

from fedloop_tasks.linalg.eigen import leading, orthonormal
from fedloop_tasks.linalg.ordered import Matrix, gram, product

_NOTHING: Final = 2.0**-23
"""A singular value that is smaller, in parts of the largest, is rounding: float32 holds no more."""
_LEAST_PIVOT: Final = 2.0**-44


class Products:
    """The sum of products B A, of B [m, r] and A [r, n] for any r. It holds the factors, or the sum where that is smaller."""

    def __init__(self, rows: int, columns: int) -> None:
        self._shape, self._rank = (rows, columns), 0
        self._left: list[Matrix] = []
        self._right: list[Matrix] = []
        self._dense: Matrix | None = None

    def add(self, left: Matrix, right: Matrix) -> None:
        """Components that are zero on either side, as of a device that trains at a smaller rank, take no room."""
        counts = left.any(axis=0) & right.any(axis=1)
        left, right = left[:, counts], right[counts]
        # Both factors of a component are made about as large as each other, by a power of two: no rounding, nor in the sums.
        _, sizes = np.frexp([np.abs(left).max(axis=0, initial=0.0), np.abs(right).max(axis=1, initial=0.0)])
        shift = (sizes[1] - sizes[0]) // 2
        self._left.append(np.ldexp(left, shift))
        self._right.append(np.ldexp(right, -shift[:, None]))
        self._rank += left.shape[1]
        if self._rank > min(self._shape):
            left, right = self._stacked()
            self._dense = product(left, right) + (0.0 if self._dense is None else self._dense)
            self._left, self._right, self._rank = [], [], 0

    def best(self, rank: int) -> tuple[Matrix, Matrix]:
        """B [m, rank] and A [rank, n], the rows of A orthonormal: their product is the sum's best approximation of that rank
        (Eckart and Young 1936), up to 1e-6 of the sum of all |B_i| |A_i|, whose norm is Frobenius's.

        Components are ordered by singular value, the largest first, and the largest element of a row of A is positive. Where the
        sum has a smaller rank, the last columns of B and rows of A are zeros. Time: the cube of the sum of the ranks, one core.
        """
        left, right = self.factors()
        factor = _square_root(gram(left.T))
        core = _symmetric(product(factor.T, product(gram(right), factor)))
        count = min(rank, len(core))
        found = product(product(leading(core, count), factor.T), right) if count else np.zeros((0, self._shape[1]))
        base = np.zeros((rank, self._shape[1]))
        base[:count] = orthonormal(found, _NOTHING)
        for row in base:
            row *= -1.0 if row[np.abs(row).argmax()] < 0 else 1.0
        return product(left, product(right, base.T)), base

    def factors(self) -> tuple[Matrix, Matrix]:
        """B [m, r] and A [r, n] whose product is the sum, r at most the matrix's smaller side."""
        left, right = self._stacked()
        if self._dense is None:
            return left, right
        dense = self._dense + product(left, right)
        rows, columns = self._shape
        return (dense, np.eye(columns)) if columns <= rows else (np.eye(rows), dense)

    def _stacked(self) -> tuple[Matrix, Matrix]:
        rows, columns = self._shape
        return np.hstack([np.zeros((rows, 0)), *self._left]), np.vstack([np.zeros((0, columns)), *self._right])


def _square_root(matrix: Matrix) -> Matrix:
    """C [n, k] with C C^T = `matrix`, which is positive semidefinite and of rank k: Cholesky with pivoting (Higham 1990)."""
    rest, order, rank = matrix.copy(), np.arange(len(matrix)), 0
    least = _LEAST_PIVOT * np.max(np.diagonal(rest), initial=0.0)
    room = np.empty(rest.size)
    while rank < len(rest):
        at = rank + int(np.diagonal(rest)[rank:].argmax())
        if not rest[at, at] > least:
            break
        swap = [rank, at], [at, rank]
        rest[swap[0]] = rest[swap[1]]
        rest[:, swap[0]] = rest[:, swap[1]]
        order[swap[0]] = order[swap[1]]
        rest[rank:, rank] /= np.sqrt(rest[rank, rank])
        column, trailing = rest[rank + 1 :, rank].copy(), rest[rank + 1 :, rank + 1 :]
        trailing -= np.multiply(column[:, None], column, out=room[: trailing.size].reshape(trailing.shape))
        rank += 1
    result = np.empty((len(rest), rank))
    result[order] = np.tril(rest)[:, :rank]
    return result


def _symmetric(matrix: Matrix) -> Matrix:
    result: Matrix = (matrix + matrix.T) / 2
    return result
