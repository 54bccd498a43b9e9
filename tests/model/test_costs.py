"""Guards the rule for operations: it gives the numbers that the paper publishes."""

from minia3.model.costs import flops


def rounded(value):
    return f"{value:.1e}"


def test_flops_equal_those_that_the_paper_publishes():
    """From the round counts of parameters in its text: T0 has 11.135e9, which gives 2.8e16."""
    assert rounded(flops(11e9, 103, decoder_only=False)) == "1.1e+12"
    n_tokens = 103 * 8 * 1000
    assert rounded(flops(11e9, n_tokens, decoder_only=False, training=True)) == "2.7e+16"
    # 41 shots of 98 tokens, with the right choice only, and then 103 tokens with all choices, which
    # is how T-Few counts an example.
    assert rounded(flops(175e9, 41 * 98 + 103, decoder_only=True)) == "1.4e+15"


def test_training_takes_three_times_as_much_and_a_decoder_only_model_twice_as_much():
    assert flops(7, 5, decoder_only=False) == 35
    assert flops(7, 5, decoder_only=False, training=True) == 105
    assert flops(7, 5, decoder_only=True) == 70
    assert flops(7, 5, decoder_only=True, training=True) == 210
