"""Guards minia3/model/costs.py: the rule yields the numbers that the paper publishes."""

from minia3.model.costs import flops


def rounded(value):
    return f"{value:.1e}"


def test_flops_equal_the_numbers_in_the_paper():
    """The paper rounds the parameters: T0 has 11.135e9 of them, which would make 2.8e16."""
    assert rounded(flops(11e9, 103, decoder_only=False)) == "1.1e+12"
    n_tokens = 103 * 8 * 1000
    assert rounded(flops(11e9, n_tokens, decoder_only=False, training=True)) == "2.7e+16"
    # T-Few counts 41 shots of 98 tokens, each with only the right choice, and then an example of
    # 103 tokens with all choices.
    assert rounded(flops(175e9, 41 * 98 + 103, decoder_only=True)) == "1.4e+15"


def test_training_costs_three_times_as_much_and_a_decoder_only_model_twice_as_much():
    assert flops(7, 5, decoder_only=False) == 35
    assert flops(7, 5, decoder_only=False, training=True) == 105
    assert flops(7, 5, decoder_only=True) == 70
    assert flops(7, 5, decoder_only=True, training=True) == 210
