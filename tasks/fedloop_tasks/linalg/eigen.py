"""The leading eigenvectors of a symmetric matrix: Householder tridiagonalisation, bisection, inverse iteration
(Golub and Van Loan, Matrix Computations, sections 8.3 and 8.4; Parlett, The Symmetric Eigenvalue Problem, chapters 3 and 4)."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedloop_tasks.linalg.ordered import Matrix, dot, total

_SECTIONS: Final = 16
"""Each pass narrows every eigenvalue's interval by so much."""
_PASSES: Final = 14
"""To 2^-56 of the matrix's norm, and the rounding of float64 comes before."""
_SOLVES: Final = 3
_EPSILON: Final = 2.0**-52


def leading(matrix: Matrix, count: int) -> Matrix:
    """`count` orthonormal rows [count, n]: eigenvectors of the largest eigenvalues of `matrix` [n, n], largest first.

    Each leaves a residual of some 2^-45 of the matrix's norm at most. Of an eigenvalue that comes several times, or nearly so,
    any orthonormal vectors of its space. Time: n^3, on one core. `matrix` must be symmetric bit by bit.
    """
    scale = np.abs(matrix).max(initial=0.0)
    if not scale:
        return np.eye(count, len(matrix))
    form = _tridiagonal(matrix * np.ldexp(1.0, -int(np.frexp(scale)[1])))
    values = _largest(form, count)
    factors = _factorised(form, values)
    rows = np.random.Generator(np.random.PCG64(0)).random((count, len(matrix))) - 0.5
    for _ in range(_SOLVES):
        rows = orthonormal(_solved(factors, rows.T).T)
    return _transformed(form, rows.T).T


def orthonormal(rows: Matrix, least: float = 0.0) -> Matrix:
    """`rows` [n, d] made orthonormal, each against those before it, by classical Gram-Schmidt, twice (Giraud et al. 2005).

    A row of which no more than `least` of the longest is left becomes zeros.
    """
    rows = rows.copy()
    bound = least * np.sqrt(np.max(_squares(rows), initial=0.0))
    for number, row in enumerate(rows):
        for earlier in (rows[:number],) * 2 if number else ():
            row -= total(earlier * total((earlier * row).T)[:, None])
        norm = np.sqrt(dot(row, row))
        row *= 0.0 if norm <= bound else 1.0 / norm
    return rows


class _Form(NamedTuple):
    """A tridiagonal matrix, diagonal [n] and beside it [n - 1], and the reflections I - beta v v^T that led to it."""

    diagonal: Matrix
    beside: Matrix
    reflections: list[tuple[float, Matrix]]

    @property
    def norm(self) -> float:
        """A bound on the size of its eigenvalues."""
        wide = np.abs(self.diagonal)
        wide[1:] += np.abs(self.beside)
        wide[:-1] += np.abs(self.beside)
        return float(wide.max())


def _tridiagonal(matrix: Matrix) -> _Form:
    """`matrix` is used up."""
    size = len(matrix)
    diagonal, beside = np.empty(size), np.empty(max(size - 1, 0))
    reflections: list[tuple[float, Matrix]] = []
    first, second = np.empty(size * size), np.empty(size * size)
    for at in range(size - 1):
        diagonal[at] = matrix[at, at]
        v = matrix[at + 1 :, at].copy()
        beta, beside[at] = _reflection(v)
        reflections.append((beta, v))
        if beta:
            rest = matrix[at + 1 :, at + 1 :]
            room = rest.size
            one, two = first[:room].reshape(rest.shape), second[:room].reshape(rest.shape)
            w = total(np.multiply(rest, v[:, None], out=one)) * beta
            w -= v * (beta / 2 * dot(w, v))
            np.multiply(v[:, None], w, out=one)
            np.multiply(w[:, None], v, out=two)
            one += two
            rest -= one
    diagonal[-1] = matrix[-1, -1]
    return _Form(diagonal, beside, reflections)


def _reflection(x: Matrix) -> tuple[float, float]:
    """Make `x` the v of the reflection that maps it onto its first axis: beta, and what stands there then."""
    first = float(x[0])
    if not dot(x[1:], x[1:]):
        return 0.0, first
    norm = float(np.sqrt(dot(x, x)))
    mapped = -norm if first > 0 else norm
    x[0] -= mapped
    return 2.0 / dot(x, x), mapped


def _transformed(form: _Form, columns: Matrix) -> Matrix:
    """Eigenvectors of the matrix from those of its tridiagonal form, as columns."""
    columns = np.ascontiguousarray(columns)
    for at in range(len(form.reflections) - 1, -1, -1):
        beta, v = form.reflections[at]
        if beta:
            below = columns[at + 1 :]
            below -= v[:, None] * (total(below * v[:, None]) * beta)
    return columns


def _largest(form: _Form, count: int) -> Matrix:
    """The `count` largest eigenvalues, largest first, by sections of intervals that hold one each."""
    size, bound = len(form.diagonal), form.norm * (1 + 4 * _EPSILON)
    wanted = size - np.arange(count)  # the k-th smallest has as many eigenvalues at or below it
    low, width = np.full(count, -bound), 2 * bound
    for _ in range(_PASSES):
        width /= _SECTIONS
        points = low[:, None] + np.arange(1, _SECTIONS) * width
        low = low + (_below(form, points.reshape(-1)).reshape(points.shape) < wanted[:, None]).sum(axis=1) * width
    return low + width / 2


def _below(form: _Form, points: Matrix) -> NDArray[np.int64]:
    """How many eigenvalues are smaller than each point (Sylvester's law of inertia)."""
    squared, least = form.beside * form.beside, _EPSILON * _EPSILON * form.norm
    pivot = form.diagonal[0] - points
    count: NDArray[np.int64] = (pivot < 0).astype(np.int64)
    for at in range(1, len(form.diagonal)):
        np.copyto(pivot, -least, where=np.abs(pivot) < least)
        np.divide(squared[at - 1], pivot, out=pivot)
        np.subtract(form.diagonal[at] - points, pivot, out=pivot)
        count += pivot < 0
    return count


class _Factors(NamedTuple):
    """PLU of the tridiagonal matrix less each of `k` values: rows [n, k]."""

    pivot: Matrix
    above: Matrix
    above_that: Matrix
    multiplier: Matrix
    swapped: NDArray[np.bool_]


def _factorised(form: _Form, values: Matrix) -> _Factors:
    """Gaussian elimination with partial pivoting; a pivot that is nearly zero, as one must be, is replaced by a tiny one."""
    size, least = len(form.diagonal), _EPSILON * form.norm
    shape = (size, len(values))
    above, above_that, multiplier = np.zeros((3, *shape))
    made = _Factors(form.diagonal[:, None] - values, above, above_that, multiplier, np.zeros(shape, bool))
    made.above[:-1] = form.beside[:, None]
    for at in range(size - 1):
        under, here = form.beside[at], made.pivot[at].copy()
        swap = np.less(np.abs(here), abs(under), out=made.swapped[at])
        pivot = np.where(swap, under, here)
        pivot[np.abs(pivot) < least] = least
        factor = made.multiplier[at] = np.where(swap, here, under) / pivot
        over, right = made.above[at].copy(), made.pivot[at + 1].copy()
        made.pivot[at] = pivot
        made.above[at] = np.where(swap, right, over)
        made.pivot[at + 1] = np.where(swap, over, right) - factor * made.above[at]
        made.above_that[at] = np.where(swap, made.above[at + 1], 0.0)
        made.above[at + 1] = np.where(swap, -factor * made.above[at + 1], made.above[at + 1])
    last = made.pivot[-1]
    last[np.abs(last) < least] = least
    return made


def _solved(factors: _Factors, columns: Matrix) -> Matrix:
    x = np.ascontiguousarray(columns)
    for at in range(len(x) - 1):
        swap, here, under = factors.swapped[at], x[at].copy(), x[at + 1].copy()
        x[at] = np.where(swap, under, here)
        x[at + 1] = np.where(swap, here, under) - factors.multiplier[at] * x[at]
    x[-1] /= factors.pivot[-1]
    for at in range(len(x) - 2, -1, -1):
        x[at] -= factors.above[at] * x[at + 1]
        if at + 2 < len(x):
            x[at] -= factors.above_that[at] * x[at + 2]
        x[at] /= factors.pivot[at]
    return x


def _squares(rows: Matrix) -> Matrix:
    """The squared length of each row."""
    return total((rows * rows).T)
