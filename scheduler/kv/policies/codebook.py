"""Vector quantisation of keys, such that what queries score is kept (A²ATS, arXiv 2502.12665)."""

from __future__ import annotations

import numpy as np

from .policy import FloatArray, IntArray


def fit_codebook(
    keys: FloatArray, codewords: int, *, queries: FloatArray | None = None, rounds: int = 10, seed: int = 0
) -> FloatArray:
    """Codewords of one head that make Σ (k − c) H (k − c)ᵀ small, H = E[qᵀq]: an error that no query asks for is none.

    Lloyd's rounds in the space where H is the identity: with H = L Lᵀ the error is |(k − c) L|².

    Args:
        keys: [tokens, dim], at least as many as codewords.
        codewords: How many.
        queries: [queries, dim], typical ones; None where all directions count alike.
        rounds: Of assigning and averaging.
        seed: Of the first codewords, which are keys.

    Returns:
        [codewords, dim].
    """
    assert len(keys) >= codewords > 0, (len(keys), codewords)
    root = _root(queries, keys.shape[1])
    turned = keys @ root
    draw = np.random.default_rng(seed)
    centres = turned[draw.choice(len(keys), codewords, replace=False)].copy()
    for _ in range(rounds):
        nearest = _nearest(turned, centres)
        for number in np.unique(nearest).tolist():
            centres[number] = turned[nearest == number].mean(axis=0)
    found: FloatArray = np.linalg.solve(root.T.astype(np.float64), centres.T.astype(np.float64)).T.astype(np.float32)
    return found


def assign(keys: FloatArray, codebook: FloatArray, *, queries: FloatArray | None = None) -> IntArray:
    """The codeword that stands for each key: [tokens]."""
    root = _root(queries, keys.shape[1])
    return _nearest(keys @ root, codebook @ root)


def _root(queries: FloatArray | None, dim: int) -> FloatArray:
    """L of H = L Lᵀ, of which no direction is quite without weight."""
    if queries is None:
        return np.eye(dim, dtype=np.float32)
    second = queries.astype(np.float64).T @ queries / len(queries)
    second += np.eye(dim) * (1e-3 * np.trace(second) / dim)
    root: FloatArray = np.linalg.cholesky(second).astype(np.float32)
    return root


def _nearest(rows: FloatArray, centres: FloatArray) -> IntArray:
    distance = (centres**2).sum(axis=1) - 2 * rows @ centres.T
    nearest: IntArray = distance.argmin(axis=1)
    return nearest
