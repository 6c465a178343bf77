"""Matrix-vector products over weight tables equal plain matrix products."""

import itertools
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from minigpt.generation.fast.matvec import MatvecTable, has_matvec_kernels, split_into_blocks

pytestmark = pytest.mark.skipif(
    not has_matvec_kernels(torch.device("cpu")), reason="needs fast embedding_bag kernels"
)

SHAPES = [(61, 10), (1, 3), (384, 32), (1000, 7), (257, 64)]


def matrix(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return (40 * weight).round().clamp(-127, 127).to(dtype)


def factors(n_rows: int, n_inputs: int) -> Tensor:
    return torch.randn(n_rows, n_inputs, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_table_returns_the_matrix_and_rows_that_it_was_built_from(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = matrix(shape, dtype)
    weight[0, 0] = -127
    table = MatvecTable(weight)
    assert torch.equal(table.weight(), weight)
    half = shape[0] // 2
    assert torch.equal(table.weight(half // 2, half + 1), weight[half // 2 : half + 1])
    outputs = torch.tensor([[shape[0] - 1, 0], [half, half]])
    assert torch.equal(table.rows(outputs), weight[outputs])


@pytest.mark.parametrize("n_rows", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_table_product_equals_the_matmul(shape: tuple[int, int], n_rows: int) -> None:
    x = factors(n_rows, shape[1])
    weight = matrix(shape, torch.int8)
    for _ in range(2):  # the second call reuses the buffers
        product = MatvecTable(weight).product(x)
        assert product.dtype == torch.float32
        expected = (x.double() @ weight.double().T).float()
        torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-3)
    rounded = MatvecTable(weight.bfloat16()).product(x.bfloat16())
    expected = x.bfloat16().float() @ weight.float().T
    # Exact inputs, float32 sums, one rounding to bfloat16 at the end.
    torch.testing.assert_close(rounded, expected.bfloat16(), rtol=2**-7, atol=1e-3)


def test_products_in_two_threads_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = matrix((61, 10), torch.bfloat16).float(), factors(1, 10)
    table = MatvecTable(weight)
    table.product(x)
    bag, others = torch.embedding_bag, [threading.Thread(target=lambda: table.product(-x))]

    def interrupted(*args: Any) -> Any:
        while others:  # the other thread multiplies while this one is about to
            other = others.pop()
            other.start()
            other.join()
        return bag(*args)

    monkeypatch.setattr(torch, "embedding_bag", interrupted)
    torch.testing.assert_close(table.product(x), x @ weight.T, rtol=1e-5, atol=1e-3)
    assert not others


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_a_table_used_in_inference_mode_can_be_used_outside(dtype: torch.dtype) -> None:
    table, x = MatvecTable(matrix((61, 10), dtype)), factors(1, 10)
    with torch.inference_mode():
        expected = table.product(x)
    assert torch.equal(table.product(x), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_matmul_restricted_to_some_outputs_equals_those_of_the_full_matmul(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = matrix(shape, dtype)
    x = factors(9, shape[1])
    start, end = shape[0] // 3, shape[0]
    expected = x @ weight[start:end].float().T
    torch.testing.assert_close(
        MatvecTable(weight).matmul(x, start, end), expected, rtol=1e-5, atol=1e-3
    )


def test_a_table_product_is_bitwise_independent_of_threads_rows_and_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, x = matrix((1000, 96), torch.int8), factors(4, 96)
    n_threads = torch.get_num_threads()
    try:
        products = []
        for n, has_avx512 in itertools.product((1, 2, 3), (True, False)):
            torch.set_num_threads(n)
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": has_avx512})  # noqa: B023
            table = MatvecTable(weight)
            products += [table.product(x), torch.cat([table.product(row[None]) for row in x])]
    finally:
        torch.set_num_threads(n_threads)
    assert all(torch.equal(product, products[0]) for product in products)


@pytest.mark.parametrize(("has_avx512", "widest"), [(True, 256), (False, 112)])
@pytest.mark.parametrize("n_threads", [1, 2, 6, 16])
@pytest.mark.parametrize("n_outputs", [1, 32, 257, 384, 2304, 50257])
def test_table_blocks_cover_all_outputs_with_little_padding(
    n_outputs: int,
    n_threads: int,
    has_avx512: bool,
    widest: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": has_avx512})
    n_blocks, width = split_into_blocks(n_outputs, n_threads)
    assert n_outputs <= n_blocks * width <= n_outputs + 16 * n_blocks
    assert width <= widest
    if n_outputs >= 256 * n_threads:
        assert n_blocks % n_threads == 0
