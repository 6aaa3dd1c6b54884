"""Operands in the shape that torch gives them."""

import torch

from penstock.runtime.operands import folded, unfolded


def test_the_last_position_of_one_sequence_is_folded_too() -> None:
    x = torch.randn(1, 7, 8)[:, -1:]
    assert x.is_contiguous()  # it says so, and torch would still not lay it flat: it multiplies in batches
    matrix = folded(x, None)
    assert matrix.shape == (1, 8)
    assert matrix.data_ptr() == x.data_ptr()
    assert unfolded(matrix, x, None).shape == x.shape


def test_what_torch_lays_flat_by_itself_stays() -> None:
    whole, last = torch.randn(2, 7, 8), torch.randn(1, 7, 8)[:, -1:]
    assert folded(whole, None) is whole
    assert folded(last, torch.zeros(3)) is last  # with a bias it does
    assert folded(whole[:, -1:], torch.zeros(3)).shape == (2, 8)
    assert folded(whole[0], None).shape == (7, 8)


def test_the_bias_of_a_folded_product_comes_afterwards() -> None:
    x, product, bias = torch.randn(2, 3, 4), torch.randn(6, 5), torch.randn(5)
    assert torch.equal(unfolded(product, x, bias), product.view(2, 3, 5) + bias)
    flat = torch.randn(2, 3, 5)
    assert unfolded(flat, x, bias) is flat
