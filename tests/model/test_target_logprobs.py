"""Log-probabilities of targets and their gradients equal those of the plain lines, and no logit is
kept for the backward pass. (In whole models: tests/inference/test_scoring.py.)"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from minia3.model import target_logprobs as module
from minia3.model.target_logprobs import target_logprobs
from tests.benchmarks.measure import kept_for_backward

D, V = 6, 11


def inputs(n_tokens, dtype=torch.float64, seed=0):
    """Return x_TD, which needs a gradient, a frozen head_VD, target_T, and weights of a loss."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(n_tokens, D, generator=generator).to(dtype).requires_grad_()
    head_VD = torch.randn(V, D, generator=generator).to(dtype)
    target_T = torch.randint(0, V, (n_tokens,), generator=generator)
    weight_T = torch.randn(n_tokens, generator=generator, dtype=torch.float64)
    return x_TD, head_VD, target_T, weight_T


def plain(x_TD, head_VD, target_T):
    logp_TV = F.linear(x_TD, head_VD).log_softmax(-1)
    return logp_TV.gather(1, target_T[:, None])[:, 0]


@given(st.integers(0, 9), st.integers(1, 4), st.integers(1, 3), st.booleans())
@settings(max_examples=30, deadline=None)
def test_values_and_gradients_are_those_of_the_plain_lines_in_any_parts(
    n_tokens, part, cached, trains
):
    x_TD, head_VD, target_T, weight_T = inputs(n_tokens)
    head_VD.requires_grad_(trains)
    wanted = [x_TD, head_VD] if trains else [x_TD]
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_LOGITS_ON_CPU", part * V)
        patch.setattr(module, "CACHED_LOGITS", cached * V)
        for function in (target_logprobs, plain):
            logp_T = function(x_TD, head_VD, target_T)
            grads = torch.autograd.grad((logp_T * weight_T).sum(), wanted)
            results.append([logp_T.detach(), *grads])
    assert_close(*results)


def test_gradients_pass_gradcheck():
    x_TD, head_VD, target_T, _ = inputs(5)
    assert torch.autograd.gradcheck(lambda x: target_logprobs(x, head_VD, target_T), x_TD)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_16_bits_the_gradient_is_about_as_exact_as_that_of_the_plain_lines(dtype):
    x_TD, head_VD, target_T, weight_T = inputs(400)
    (exact,) = torch.autograd.grad((plain(x_TD, head_VD, target_T) * weight_T).sum(), x_TD)
    errors = []
    for function in (target_logprobs, module.plain_logprobs):
        x = x_TD.detach().to(dtype).requires_grad_()
        logp_T = function(x, head_VD.to(dtype), target_T)
        assert logp_T.dtype == torch.float32
        (found,) = torch.autograd.grad((logp_T * weight_T.float()).sum(), x)
        assert found.dtype == dtype
        errors.append((found.double() - exact).norm())
    ours, of_plain_lines = errors
    assert ours < 1.3 * of_plain_lines


def test_on_a_cpu_few_logits_are_float32_at_once():
    x_TD, head_VD, target_T, _ = inputs(7, torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch, LargestFloat32() as largest:
        patch.setattr(module, "CACHED_LOGITS", 2 * V)
        target_logprobs(x_TD, head_VD, target_T)
    assert largest.n == 2 * V


class LargestFloat32(TorchDispatchMode):
    """How many numbers the largest float32 tensor has that is made inside of it."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.n = max(self.n, result.numel())
        return result


def test_a_row_per_token_is_kept_for_the_backward_pass():
    x_TD, head_VD, target_T, _ = inputs(7)
    n_bytes = kept_for_backward(lambda: target_logprobs(x_TD, head_VD, target_T), nn.Module())
    assert n_bytes == x_TD.nbytes


def test_without_need_of_a_gradient_none_is_computed():
    x_TD, head_VD, target_T, _ = inputs(7)
    n_products = []
    for needs_grad, is_enabled in ((True, True), (False, True), (True, False)):
        x_TD.requires_grad_(needs_grad)
        with torch.set_grad_enabled(is_enabled), Products() as products:
            logp_T = target_logprobs(x_TD, head_VD, target_T)
        assert logp_T.requires_grad == (needs_grad and is_enabled)
        n_products.append(products.n)
    assert n_products == [2, 1, 1]


class Products(TorchDispatchMode):
    """How many matrix products run inside of it."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


def test_within_a_checkpoint_the_gradients_are_the_same():
    x_TD, head_VD, target_T, _ = inputs(7)

    def run(x_TD):
        return target_logprobs(x_TD.sin(), head_VD, target_T).square().sum()

    (expected,) = torch.autograd.grad(run(x_TD), x_TD)
    (found,) = torch.autograd.grad(checkpoint(run, x_TD, use_reentrant=False), x_TD)
    assert_close(found, expected, rtol=0, atol=0)


def test_second_derivatives_are_refused():
    x_TD, head_VD, target_T, _ = inputs(7)
    logp_T = target_logprobs(x_TD, head_VD, target_T)
    (grad_TD,) = torch.autograd.grad(logp_T.square().sum(), x_TD, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_TD.sum().backward()
