"""Linear algebra whose bytes depend on nothing but its arguments: not on threads, BLAS, vector width or the CPU.

Only single IEEE 754 operations (each rounded once, the same everywhere), sums in an order that stands here, and matrix products
of integers so small that every partial sum is exact, in whatever order a BLAS takes them. LAPACK is not used.
"""
