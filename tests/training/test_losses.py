"""The three losses equal values worked out by hand, and T-Few's own formulation.

They are blind to padding and to choices that a row does not have, and the losses of the parts of a
batch add up to the loss of the batch.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minia3.inference.scoring import choice_scores
from minia3.tasks.batches import collate
from minia3.tasks.examples import Example
from minia3.training.losses import LOSSES, count_terms, total_loss, unlikelihood_loss

INF = float("inf")


# By hand: two rows, two choices, up to three tokens, as probabilities; 0.99 is padding.

LOGP = torch.tensor(
    [
        [[0.5, 0.25, 0.5], [0.2, 0.99, 0.99]],  # right: the first choice
        [[0.1, 0.4, 0.99], [0.8, 0.99, 0.99]],  # right: the second
    ]
).log()
MASK = torch.tensor([[[1, 1, 1], [1, 0, 0]], [[1, 1, 0], [1, 0, 0]]]).bool()
LABEL = torch.tensor([0, 1])
N_RIGHT = 4
N_WRONG = 3
N_ROWS = 2

L_LM = -math.log(0.5 * 0.25 * 0.5 * 0.8) / N_RIGHT
L_UL = -math.log(0.81 * 0.91 * 0.61) / N_WRONG  # 1 - p + 0.01 for p = 0.2, 0.1, 0.4
# The mean of log 0.5, log 0.25 and log 0.5 is the log of the cube root of 1/16. The mean of log 0.1
# and log 0.4 is log 0.2.
L_LN = (
    -(math.log(0.0625 ** (1 / 3) / (0.0625 ** (1 / 3) + 0.2)) + math.log(0.8 / (0.2 + 0.8)))
    / N_ROWS
)


def test_each_loss_is_the_number_worked_out_by_hand():
    assert count_terms(MASK, LABEL) == {"lm": N_RIGHT, "ul": N_WRONG, "ln": N_ROWS}
    for name, expected in {"lm": L_LM, "ul": L_UL, "ln": L_LN}.items():
        assert total_loss(LOGP, MASK, LABEL, (name,)).item() == pytest.approx(expected, rel=1e-6)
    assert total_loss(LOGP, MASK, LABEL).item() == pytest.approx(L_LM + L_UL + L_LN, rel=1e-6)


@pytest.mark.parametrize("names", ["lm", (), None, ("lm", "nll")])
def test_names_that_are_no_losses_are_refused(names):
    with pytest.raises(ValueError, match=r"^names is .*, expected a list of some of lm, ul, ln$"):
        total_loss(LOGP, MASK, LABEL, names)


def test_a_choice_scores_the_mean_or_the_sum_of_its_log_probabilities():
    mean = torch.tensor([[0.0625 ** (1 / 3), 0.2], [0.2, 0.8]]).log()
    total = torch.tensor([[0.0625, 0.2], [0.04, 0.8]]).log()
    torch.testing.assert_close(choice_scores(LOGP, MASK), mean)
    torch.testing.assert_close(choice_scores(LOGP, MASK, length_norm=False), total)


# T-Few's own formulation (src/models/EncoderDecoder.py of r-three/t-few), from logits, in our words


class Logits(NamedTuple):
    logits_BCLV: torch.Tensor
    target_BCL: torch.Tensor
    mask_BCL: torch.Tensor
    label_B: torch.Tensor

    @property
    def logp_BCL(self):
        return self.logits_BCLV.log_softmax(-1).gather(-1, self.target_BCL[..., None]).squeeze(-1)


def random_case(seed, n_rows, n_choices, length, n_ids=7):
    """Every row has all choices, of random lengths from 1 to `length`, as T-Few's code needs."""
    g = torch.Generator().manual_seed(seed)
    shape = (n_rows, n_choices, length)
    logits = 2 * torch.randn(*shape, n_ids, generator=g, dtype=torch.float64)
    target = torch.randint(n_ids, shape, generator=g)
    lengths = torch.randint(1, length + 1, (n_rows, n_choices, 1), generator=g)
    label = torch.randint(n_choices, (n_rows,), generator=g)
    return Logits(logits.requires_grad_(), target, torch.arange(length) < lengths, label)


def t_few(case):
    """T-Few's three losses, and how many positions enter its unlikelihood's sum as log p = -100."""
    target = case.target_BCL.masked_fill(~case.mask_BCL, -100)
    rows = torch.arange(len(target))
    nll = F.cross_entropy(case.logits_BCLV.flatten(0, 2), target.flatten(), reduction="none").view(
        target.shape
    )
    lm = F.cross_entropy(
        case.logits_BCLV[rows, case.label_B].flatten(0, 1), target[rows, case.label_B].flatten()
    )
    mc = F.cross_entropy(-nll.sum(-1) / case.mask_BCL.sum(-1), case.label_B)
    logp = torch.where(case.mask_BCL, -nll, -100.0)
    logp[rows, case.label_B] = -100.0
    unlikely = -torch.log(1 - logp.exp() + 0.01).sum() / (logp != -100).sum()
    return {"lm": lm, "ul": unlikely, "ln": mc}, int((logp == -100).sum())


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(2, 4), st.integers(1, 5))
def test_losses_and_gradients_equal_t_fews_except_for_a_constant(seed, n_rows, n_choices, length):
    case = random_case(seed, n_rows, n_choices, length)
    theirs, n_constant = t_few(case)
    n = count_terms(case.mask_BCL, case.label_B)
    # Their loss is smaller by log 1.01 for each position that is counted as log p = -100.
    theirs["ul"] = theirs["ul"] + n_constant * math.log(1.01) / n["ul"]
    for name, expected in theirs.items():
        ours = total_loss(case.logp_BCL, case.mask_BCL, case.label_B, (name,))
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
        gradients = [
            torch.autograd.grad(x, case.logits_BCLV, retain_graph=True)[0] for x in (ours, expected)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


# Padding, missing choices, parts


def ragged(seed, n_rows, n_choices, length):
    """Return a batch whose rows have 1 to `n_choices` choices. Padding has any value."""
    case = random_case(seed, n_rows, n_choices, length)
    g = torch.Generator().manual_seed(seed)
    n_of_row = torch.randint(1, n_choices + 1, (n_rows, 1, 1), generator=g)
    mask = case.mask_BCL & (torch.arange(n_choices)[:, None] < n_of_row)
    label = case.label_B % n_of_row.flatten()
    logp = case.logp_BCL.detach().masked_fill(~mask, [-INF, -100.0, 0.0][seed % 3])
    return logp.requires_grad_(), mask, label


def losses_of(logp_BCL, mask_BCL, label_B):
    return torch.stack([total_loss(logp_BCL, mask_BCL, label_B, (name,)) for name in LOSSES])


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_padding_and_missing_choices_change_no_loss(seed, n_rows, n_choices, length, extra):
    logp, mask, label = ragged(seed, n_rows, n_choices, length)
    expected = torch.zeros(3, dtype=torch.float64)
    n = count_terms(mask, label)
    for row in range(n_rows):
        texts = []
        for choice, is_real in zip(logp[row], mask[row], strict=True):
            if is_real.any():
                texts.append(choice[is_real].tolist())
        means = torch.tensor([sum(text) / len(text) for text in texts], dtype=torch.float64)
        wrong = []
        for i, text in enumerate(texts):
            if i != label[row]:
                wrong += text
        expected[0] -= sum(texts[label[row]]) / n["lm"]
        expected[1] -= sum(math.log(1 - math.exp(x) + 0.01) for x in wrong) / max(n["ul"], 1)
        expected[2] -= means.log_softmax(0)[label[row]] / n["ln"]
    found = losses_of(logp, mask, label)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert logp.grad.isfinite().all()
    assert not logp.grad[~mask].any()
    more = (0, extra, 0, extra)  # columns and choices that hold nothing
    torch.testing.assert_close(
        losses_of(F.pad(logp, more, value=-INF), F.pad(mask, more), label), found
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.sets(st.integers(1, 5)))
def test_the_losses_of_parts_add_up_to_the_loss_of_the_whole(seed, n_rows, cuts):
    logp, mask, label = ragged(seed, n_rows, 3, 4)
    n = count_terms(mask, label)
    total_loss(logp, mask, label).backward()
    whole = logp.grad
    logp.grad = None
    edges = [0, *sorted(cut for cut in cuts if cut < n_rows), n_rows]
    parts = [slice(first, last) for first, last in pairwise(edges)]
    losses = [total_loss(logp[part], mask[part], label[part], n_terms=n) for part in parts]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(sum(losses), total_loss(logp, mask, label))
    torch.testing.assert_close(logp.grad, whole)


def test_a_row_with_one_choice_has_only_its_likelihood_loss():
    logp = torch.tensor([[[-0.5, -2.0]], [[-1.0, -9.0]]], requires_grad=True)
    mask = torch.tensor([[[True, True]], [[True, False]]])
    label = torch.zeros(2, dtype=torch.long)
    assert losses_of(logp, mask, label).tolist() == pytest.approx([3.5 / 3, 0.0, 0.0])
    total_loss(logp, mask, label).backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[[-1.0, -1.0]], [[-1.0, 0.0]]]) / 3)


def test_a_wrong_choice_of_probability_0_adds_nothing_to_the_softmax():
    logp = LOGP.clone()
    logp[1, 0, 0] = -INF  # one token of probability 0
    logp.requires_grad_()
    found = losses_of(logp, MASK, LABEL)
    found.sum().backward()
    assert found[0].item() == pytest.approx(L_LM)
    assert found[1].item() == pytest.approx(-math.log(0.81 * 1.01 * 0.61) / 3)
    assert found[2].item() == pytest.approx(
        -math.log(0.0625 ** (1 / 3) / (0.0625 ** (1 / 3) + 0.2)) / 2
    )
    assert logp.grad.isfinite().all()


def test_a_choice_that_is_certain_has_a_finite_unlikelihood():
    logp = torch.zeros(1, 2, 1, requires_grad=True)  # p = 1: without T-Few's 0.01 this is infinite
    loss = unlikelihood_loss(logp, torch.ones(1, 2, 1).bool(), torch.tensor([0]))
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(0.01))
    assert logp.grad.flatten().tolist() == pytest.approx([0.0, 100.0], rel=1e-5)


def test_the_loss_of_a_conversation_is_the_mean_over_the_tokens_of_the_assistant():
    """Parts of a batch add up to it, although the turns have different lengths."""
    torch.manual_seed(0)
    examples = [
        Example([1], [[2, 3, 4, 5, 6]], 0, [True, False, False, True, True]),
        Example([1], [[2, 3]], 0, [False, True]),
        Example([1], [[2, 3, 4]], 0),
    ]
    batch = collate(examples)
    logp_BCL = -torch.rand(batch.target_BCL.shape, dtype=torch.float64)
    mask_BCL = batch.target_mask_BCL
    assert int(mask_BCL.sum()) == 3 + 1 + 3
    whole = total_loss(logp_BCL, mask_BCL, batch.label_B)
    torch.testing.assert_close(whole, -logp_BCL[mask_BCL].mean())
    n_terms = count_terms(mask_BCL, batch.label_B)
    parts = 0
    for b in range(3):
        rows = slice(b, b + 1)
        parts += total_loss(logp_BCL[rows], mask_BCL[rows], batch.label_B[rows], n_terms=n_terms)
    torch.testing.assert_close(parts, whole)
