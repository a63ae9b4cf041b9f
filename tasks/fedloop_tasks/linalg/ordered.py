"""Sums in a fixed order, and matrix products through exact sums of integers (Ozaki et al. 2012, "Error-free transformations of
matrix multiplication by using fast routines of matrix multiplication and its applications")."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

_BITS: Final = 22
_DEPTH: Final = 512
"""So many products of two integers of `_BITS` bits add up to 2^53 at most: to a whole number that float64 holds."""
_UNIT: Final = 2.0**-_BITS


def total(values: Matrix) -> Matrix:
    """The sum over the first axis, halves onto halves. `values` is used up."""
    count = len(values)
    while count > 1:
        half = (count + 1) // 2
        head = values[: count - half]
        np.add(head, values[half:count], out=head)
        count = half
    result: Matrix = values[0] if len(values) else np.zeros(values.shape[1:])
    return result


def dot(left: Matrix, right: Matrix) -> float:
    """Of two vectors."""
    return float(total(left * right))


def product(left: Matrix, right: Matrix) -> Matrix:
    """`left` [m, k] times `right` [k, n]. The error of an element is at most k 2^-43 times the largest elements of its row and
    its column."""
    result = np.zeros((left.shape[0], right.shape[1]))
    for begin, end in _chunks(left.shape[1]):
        x, x_low, x_scale = _split(left[:, begin:end])
        y, y_low, y_scale = _split(right[begin:end].T)
        part = x @ y_low.T
        part += x_low @ y.T
        part *= _UNIT
        part += x @ y.T
        part *= x_scale
        part *= y_scale.T
        result += part
    return result


def gram(rows: Matrix) -> Matrix:
    """`rows` [n, k] times their transpose, symmetric bit by bit; the error is that of `product`."""
    result = np.zeros((len(rows), len(rows)))
    for begin, end in _chunks(rows.shape[1]):
        x, low, scale = _split(rows[:, begin:end])
        mixed = x @ low.T
        part = (mixed + mixed.T) * _UNIT
        part += x @ x.T
        part *= scale * scale.T
        result += part
    return result


def _chunks(depth: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + _DEPTH, depth)) for begin in range(0, depth, _DEPTH))


def _split(rows: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Integers h and l, and a power of two a row, such that `rows` is (h + l 2^-22) times it to 45 bits of the row's largest."""
    _, exponent = np.frexp(np.abs(rows).max(axis=1, keepdims=True, initial=0.0))
    scaled = rows * np.ldexp(1.0, _BITS - exponent)
    high = np.rint(scaled)
    scaled -= high
    scaled *= 2.0**_BITS
    return high, np.rint(scaled, out=scaled), np.ldexp(1.0, exponent - _BITS)
