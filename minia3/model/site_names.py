"""The places in a block that a vector can scale: names alone, so that importing needs no torch."""

# Site of a vector (l_<site>) -> the linear layer that it scales. It scales the output of the layer,
# except that ff scales the input of `down`. The layer `gate` has two sites, because T5 v1.0, which
# is not gated, calls it wi, and so do the files of its adapters.
SITES = {
    "k": "k",
    "v": "v",
    "ff": "down",
    "q": "q",
    "o": "o",
    "up": "up",
    "gate": "gate",
    "wi": "gate",
}
SITE_NAMES = ("k", "v", "ff", "q", "o", "up", "gate")  # as users write them; `gate` covers wi, too
LINEARS = ("k", "v", "down", "q", "o", "up", "gate")
