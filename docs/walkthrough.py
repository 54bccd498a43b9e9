# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # (IA)^3, step by step
#
# This walkthrough explains (IA)^3 (Liu et al. 2022, [arXiv
# 2205.05638](https://arxiv.org/abs/2205.05638)) to a reader who knows Python and linear algebra,
# but has never seen a transformer. (IA)^3 adapts a large frozen network to a new task by
# learning a few vectors that rescale some of its activations. The vectors of one task are an
# *adapter*. At the end you will have trained an adapter, looked at it, folded it into the weights,
# served eight adapters in one batch, and seen where the method falls behind.
#
# Every experiment follows the same pattern. The text predicts a number, the next cell prints it,
# and an assertion compares the two. If a prediction surprises you, stop there: that is the place
# to learn something.
#
# The notebook needs minia3 and matplotlib (`pip install -e '.[plot]'`), no GPU, no network, and
# about a minute. To run it, `pip install jupyterlab`, then `jupyter lab docs/walkthrough.ipynb`.
# Its source is `docs/walkthrough.py`; `python docs/build_notebook.py` executes it and writes the
# notebook, outputs included.

# %% [markdown]
# Names of tensors end in their shape: `x_LD` has L rows and D columns. The letters are B (rows
# of a batch), L (tokens that read), M (tokens that are read), D (width of the model, or of what is
# scaled), F (width inside a feed-forward), H (heads), K (width of a head), P (pairs of its
# entries), V (vocabulary), N (examples), C (choices) and A (adapters).

# %%
import copy
import math
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import minia3

ACCENT = "#d9480f"  # everything that belongs to (IA)^3
GREY = "#868e96"
LOG_2 = math.log(2)
torch.manual_seed(0)
torch.set_printoptions(precision=3, sci_mode=False)
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}


def gap(a, b):
    """Return the largest difference between two tensors."""
    return (a - b).abs().max().item()


# %% [markdown]
# ## 1. Attention on four tokens
#
# A transformer turns a text into *tokens*, and each token into a vector, its *embedding*. Take four
# tokens from two little facts, "green ball" and "white key". A real model learns a table with the
# embedding of each token of its vocabulary. Ours have four entries that we can read: is it a
# colour, is it a thing, is it in fact 1, is it in fact 2.
#
# *Attention* lets tokens read each other. Each token makes three vectors, by three matrices: a
# **query** (what am I looking for?), a **key** (what can I be found by?) and a **value** (what do
# I hand over?). The *score* of a reader and a token is the dot product of query and key. A softmax
# turns the scores of one reader into *attention weights* that sum to one, and the reader receives
# the mean of the values, weighted by them.
#
# Our query matrix says: a colour looks for things, a thing looks for colours (both with strength
# 3), and every token looks for its own fact (with strength 2). Keys and values are the vectors
# themselves.

# %%
tokens = ["green", "ball", "white", "key"]
#        colour thing fact1 fact2
x_LD = torch.tensor(
    [
        [1.0, 0.0, 1.0, 0.0],  # green
        [0.0, 1.0, 1.0, 0.0],  # ball
        [1.0, 0.0, 0.0, 1.0],  # white
        [0.0, 1.0, 0.0, 1.0],  # key
    ]
)
W_q = torch.tensor(
    [
        [0.0, 3.0, 0.0, 0.0],  # look for colours, if I am a thing
        [3.0, 0.0, 0.0, 0.0],  # look for things, if I am a colour
        [0.0, 0.0, 2.0, 0.0],  # look for fact 1, if I am in it
        [0.0, 0.0, 0.0, 2.0],
    ]
)

# %% [markdown]
# **Predict.** "ball" is a thing in fact 1, so its query is (3, 0, 2, 0). Its scores are 3 + 2 = 5
# for "green", 2 for itself, 3 for "white" and 0 for "key". After the softmax, "green" gets
#
# $$\frac{e^5}{e^5 + e^2 + e^3 + e^0} = \frac{1}{1 + e^{-3} + e^{-2} + e^{-5}} \approx 0.839.$$
#
# So the ball mostly reads that it is green. The function below also has the two vectors of
# chapter 3, `l_k` and `l_v`. For now they are 1.


# %%
def attention(x_LD, l_k=1.0, l_v=1.0):
    """Return the attention weights (L, M) and the output (L, D) of one head of attention."""
    q_LK = x_LD @ W_q.T
    k_MK = l_k * x_LD
    v_MK = l_v * x_LD
    scores_LM = q_LK @ k_MK.T
    weights_LM = scores_LM.softmax(dim=-1)
    return weights_LM, weights_LM @ v_MK


weights_LM, out_LD = attention(x_LD)
green_of_ball = weights_LM[1, 0]
print("weight of 'green' for 'ball':", green_of_ball)
assert abs(green_of_ball - 0.839) < 0.001

# %% [markdown]
# Here are all sixteen attention weights as a picture. Each row is a reader. **Predict:** each row
# sums to 1, because it went through a softmax. Every word has found its partner.


# %%
def draw_weights(ax, weights_LM, title):
    ax.imshow(weights_LM.tolist(), cmap="Greys", vmin=0, vmax=2)
    for row in range(4):
        for column in range(4):
            weight = weights_LM[row, column]
            ax.text(column, row, f"{weight:.2f}", ha="center", va="center")
    ax.set_xticks(range(4), tokens)
    ax.set_yticks(range(4), tokens)
    ax.set_title(title, fontsize=11)
    ax.tick_params(length=0)


figure, ax = plt.subplots(figsize=(3.4, 3.4))
draw_weights(ax, weights_LM, "who reads (row) whom (column)")
plt.show()
sums_L = weights_LM.sum(dim=-1)
print("sums of the rows:", sums_L)
assert gap(sums_L, torch.ones(4)) < 1e-6

# %% [markdown]
# ## 2. A T5 block and a LLaMA block
#
# T5 has two parts: its *encoder* reads a source text, and its *decoder* writes the target, token
# by token. LLaMA has one part, which reads a prompt and continues it. Each part is a stack of
# blocks. (A block is also called a layer.)
#
# Real attention has several *heads*. Queries, keys and values are cut into slices of width
# K, each slice attends separately, and a fourth matrix $W_o$ mixes what the heads have read.
#
# minia3 has one class `Attention` for both architectures. It works in two calls: `kv` makes keys
# and values of a memory, and `forward` queries them. In self-attention, the memory is the same
# input that also makes the queries. In *cross-attention*, by which T5's decoder reads the source,
# it is the encoder's output. A `Context` carries what all blocks share: masks, positions, and the
# adapter of each row.
#
# **Predict.** If we give the class our matrices, one head, and 1 as the scale of the scores (T5's
# choice; LLaMA divides by $\sqrt{K}$), it computes what we computed by hand: the difference is 0,
# up to rounding (below 1e-6).

# %%
from minia3.model.blocks import Attention, Block, FeedForward, rotate
from minia3.model.sequence_state import Cache, Context

one_head = Attention(4, n_heads=1, n_kv_heads=1, d_head=4, scale=1.0, dropout=0.0, n_adapters=1)
one_head.requires_grad_(False)
one_head.q.weight.copy_(W_q)
for linear in (one_head.k, one_head.v, one_head.o):
    linear.weight.copy_(torch.eye(4))

no_order = Context(adapter_B=torch.tensor([0]))
x_BLD = x_LD.unsqueeze(0)
module_out_BLD = one_head(x_BLD, one_head.kv(x_BLD, no_order), no_order)

difference = gap(module_out_BLD[0], out_LD)
print(f"module against hand: {difference:.0e}")
assert difference < 1e-6

# %% [markdown]
# Nothing so far knows the *order* of the tokens. **Predict:** if the tokens are reversed, the
# output is the same four rows, reversed. Attention alone treats a text as a bag of words.

# %%
reversed_BLD = x_BLD.flip(1)
reversed_out_BLD = one_head(reversed_BLD, one_head.kv(reversed_BLD, no_order), no_order)

difference = gap(reversed_out_BLD.flip(1), module_out_BLD)
print(f"reversed in, reversed out: {difference:.0e}")
assert difference < 1e-6

# %% [markdown]
# T5 and LLaMA repair this in different ways. **T5 adds a bias** to each score, a learned number
# that depends on the distance between the two tokens (one number per head, and in the encoder one
# for each direction). **Predict:** a bias of $\log 2$ on the left neighbor doubles its odds. For
# "ball" this neighbor is "green", whose $e^5$ becomes $2e^5$. The first entry of the output adds
# the attention weights of both colours: $(2e^5 + e^3) / (2e^5 + e^2 + e^3 + 1) \approx 0.974$.

# %%
bias_LM = torch.diag(torch.full((3,), LOG_2), -1)  # from each token to the one before it
with_bias = Context(adapter_B=torch.tensor([0]), bias_BHLM=bias_LM.view(1, 1, 4, 4))
biased_out_BLD = one_head(x_BLD, one_head.kv(x_BLD, with_bias), with_bias)
colour_of_ball = biased_out_BLD[0, 1, 0]
print("'ball' reads colours:", colour_of_ball)
assert abs(colour_of_ball - 0.974) < 0.001

# %% [markdown]
# **LLaMA rotates** queries and keys. It takes their entries in pairs, as points of a plane, and
# turns each pair by an angle that is proportional to the position. (The factor is the *frequency*
# of the pair. It is 1 for the first pair, and falls from pair to pair.)
#
# **Predict.** A rotation of both points by the same angle does not change their dot product. So
# the score depends only on the *distance* of the two positions: a query at position 7 and a key
# at 3 score exactly as at 107 and 103 (up to the rounding of angles near 100, about 1e-5). At 8
# and 3 the distance is another one, and so is the score.


# %%
def turn(vector_K, position):
    """Rotate one vector (K,) as LLaMA does at `position`."""
    n_pairs = len(vector_K) // 2
    frequency_P = 10000.0 ** -(torch.arange(n_pairs) / n_pairs)
    cos_P = (position * frequency_P).cos()
    sin_P = (position * frequency_P).sin()
    # A point (x, y) turns into (x cos - y sin, y cos + x sin).
    rotation = (torch.cat((cos_P, cos_P)), torch.cat((-sin_P, sin_P)))
    return rotate(vector_K.view(1, 1, 1, -1), rotation).flatten()


q_K = torch.randn(16)
k_K = torch.randn(16)
score = turn(q_K, 7) @ turn(k_K, 3)
shifted_score = turn(q_K, 107) @ turn(k_K, 103)
other_score = turn(q_K, 8) @ turn(k_K, 3)
print("positions   7 and   3:", score)
print("positions 107 and 103:", shifted_score)
print("positions   8 and   3:", other_score)
assert abs(score - shifted_score) < 1e-3
assert abs(score - other_score) > 1e-2

# %% [markdown]
# A block of LLaMA, or of T5's encoder, is attention followed by a *feed-forward*, a small network
# that treats each token alone. Both add to a running sum, and both read it through a *norm*, which
# divides a vector by its root mean square, so that its entries are about 1, and multiplies each
# entry by a learned factor, which starts at 1:
#
# $$x \leftarrow x + \mathrm{attention}(\mathrm{norm}(x)), \qquad
#   x \leftarrow x + \mathrm{feedforward}(\mathrm{norm}(x)).$$
#
# (A block of T5's decoder has cross-attention between the two.)
#
# | | T5 (version 1.0) | LLaMA |
# |---|---|---|
# | order | bias on the scores | rotation of queries and keys |
# | feed-forward | $W_{down}\,\sigma(W_{gate}x)$ | $W_{down}\,(\sigma(W_{gate}x) * W_{up}x)$ |
# | $\sigma$ | ReLU: $\max(0, x)$ | SiLU: $x / (1 + e^{-x})$ |
# | key/value heads | one per query head | one per query head, or one for several |
#
# In LLaMA, $W_{gate}$ decides how much of each entry of $W_{up}x$ passes. In this T5 it gates
# nothing, but has the same name. Later versions of T5 are gated, too.
#
# **Predict.** Without vectors and norms, a block of T5's encoder has four square matrices, and two
# of the feed-forward: $4 D^2 + 2 D F$. With D = 64 and F = 192 that is 16,384 + 24,576 = 40,960.
# If LLaMA has half as many key/value heads, two of its square matrices halve, and its feed-forward
# has a third matrix: $3 D^2 + 3 D F$ = 12,288 + 36,864 = 49,152.

# %%
# `Attention` takes D, heads, key/value heads, K and the scale of the scores.
# `FeedForward` takes D, F and sigma. `Block` gets None in place of a cross-attention.
t5_attention = Attention(64, 4, 4, 16, 1.0, dropout=0.0, n_adapters=1)
t5_feed_forward = FeedForward(64, 192, "relu", gated=False, dropout=0.0, n_adapters=1)
t5_block = Block(t5_attention, None, t5_feed_forward, d_model=64, eps=1e-6, dropout=0.0)

llama_attention = Attention(64, 4, 2, 16, 16**-0.5, dropout=0.0, n_adapters=1)
llama_feed_forward = FeedForward(64, 192, "silu", gated=True, dropout=0.0, n_adapters=1)
llama_block = Block(llama_attention, None, llama_feed_forward, d_model=64, eps=1e-6, dropout=0.0)


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


def count_matrices(block):
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    return count(linear.weight for linear in linears)


n_t5 = count_matrices(t5_block)
n_llama = count_matrices(llama_block)
print("T5:", n_t5, "  LLaMA:", n_llama)
assert n_t5 == 40_960
assert n_llama == 49_152

# %% [markdown]
# A model that *writes* must not read ahead, so a decoder hides later tokens from earlier ones
# (a *causal* mask). **Predict:** if we change the last of five tokens, the outputs of the first
# four do not change at all, and the fifth does. The equation of the block, written out, gives
# what the block returns. (`Cache()` is where a block keeps the keys and values of the tokens so
# far, for those to come. It starts empty.)

# %%
causal = Context(adapter_B=torch.tensor([0]), is_causal=True)  # and no rotation
text_BLD = torch.randn(1, 5, 64)
changed_BLD = text_BLD.clone()
changed_BLD[:, -1] += 1.0

with torch.no_grad():
    out_BLD = llama_block(text_BLD, causal, Cache())
    changed_out_BLD = llama_block(changed_BLD, causal, Cache())

    h_BLD = llama_block.attn_norm(text_BLD)
    kv = llama_attention.kv(h_BLD, causal)
    sum_BLD = text_BLD + llama_attention(h_BLD, kv, causal)
    h_BLD = llama_block.ffn_norm(sum_BLD)
    written_out_BLD = sum_BLD + llama_feed_forward(h_BLD, causal.adapter_B)

change_L = (changed_out_BLD - out_BLD).abs().amax(dim=(0, 2))
print("change of each token:", change_L)
assert change_L[:4].max() < 1e-6
assert change_L[4] > 0.1
assert gap(out_BLD, written_out_BLD) < 1e-5

# %% [markdown]
# ## 3. Where (IA)^3 enters
#
# (IA)^3 freezes all matrices, and learns vectors of three kinds. In each attention, `l_k`
# multiplies the keys entry by entry, and `l_v` the values. In each feed-forward, `l_ff` multiplies
# the inner activations:
#
# $$\mathrm{softmax}\big(Q\,(l_k * K)^T\big)\,(l_v * V), \qquad
#   W_{down}\,(l_{ff} * \sigma(W_{gate}x)).$$
#
# (In the paper, the scores are also divided by the square root of the width of a head. T5 leaves
# this out.)
#
# ![A T5 block and a LLaMA block with the three vectors in their places](pictures/blocks.svg)
#
# Look again at "ball", whose scores were 5, 2, 3 and 0. **Predict.** `l_k` = (1, 1, 2, 2) doubles
# the influence of fact 1 and fact 2: the scores become 7, 4, 3 and 0, and "green" gets
# $1 / (1 + e^{-3} + e^{-4} + e^{-7}) \approx 0.935$. With `l_k` = (0, 1, 1, 1) no token can be
# found by its colour any more: the scores are 2, 2, 0 and 0, and "green" gets
# $1 / (2 + 2e^{-2}) \approx 0.440$. No matrix of the network was touched.

# %%
l_k_facts = torch.tensor([1.0, 1.0, 2.0, 2.0])
l_k_colourless = torch.tensor([0.0, 1.0, 1.0, 1.0])
facts_LM, _ = attention(x_LD, l_k_facts)
colourless_LM, _ = attention(x_LD, l_k_colourless)

figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
draw_weights(axes[0], weights_LM, "$l_k$ = (1, 1, 1, 1)")
draw_weights(axes[1], facts_LM, "$l_k$ = (1, 1, 2, 2)")
draw_weights(axes[2], colourless_LM, "$l_k$ = (0, 1, 1, 1)")
plt.show()

print("'green' for 'ball', facts doubled:", facts_LM[1, 0])
print("'green' for 'ball', no colours:   ", colourless_LM[1, 0])
assert abs(facts_LM[1, 0] - 0.935) < 0.001
assert abs(colourless_LM[1, 0] - 0.440) < 0.001

# %% [markdown]
# `l_v` is simpler still. It can be taken out of the sum:
# $\sum_m w_m\,(l_v * v_m) = l_v * \sum_m w_m v_m$. **Predict:** with `l_v` = (2, 1, 1, 1) the
# attention weights stay, and the first entry of every output doubles. So `l_k` changes *who is
# read*, and `l_v` changes *what is passed on*.

# %%
l_v = torch.tensor([2.0, 1.0, 1.0, 1.0])
same_weights_LM, scaled_LD = attention(x_LD, l_v=l_v)
print("ball receives  ", out_LD[1])
print("with l_v = 2111", scaled_LD[1])
assert torch.equal(same_weights_LM, weights_LM)
assert gap(scaled_LD, l_v * out_LD) < 1e-6

# %% [markdown]
# In minia3 a vector is a module, `IA3`, and exactly three lines of `blocks.py` apply the paper's
# vectors. A vector starts at one. **Predict:** a vector of ones changes nothing, and not only
# approximately. In floating point $1 \cdot x$ is $x$ *bit for bit*, so training starts from an
# exact copy of the pre-trained model. We check it on the *embedded model*, a T5 of 218,112
# parameters that comes with minia3: with its vectors of ones, and with all vectors taken out, it
# gives the same bits.
#
# (`source` is any text. `start` reads it, and `step` returns the *logits*: for each of the 320 rows
# of the vocabulary (314 of them are tokens), a number that says how likely it comes next. One last
# matrix, the *head* of the model, makes them from the output of the last block.)


# %%
@torch.no_grad()
def first_logits(model, source):
    """Return the logits (B, 1, V) of what comes first in the target."""
    state = model.start(source)
    return model.step(state.start, state)


# %% [markdown]
# The next cell finds all vectors by their type, and takes them out. (`Unscaled`, which takes their
# places, returns what it is given. We keep `base`, the model without vectors, for later.)

# %%
from minia3.model.blocks import Unscaled
from minia3.model.ia3 import IA3

base = minia3.load_model("tiny-t5")
source = torch.randint(2, 300, (4, 12))
logits = first_logits(base, source)

names = [name for name, module in base.named_modules() if isinstance(module, IA3)]
for name in names:
    base.set_submodule(name, Unscaled())
is_same = torch.equal(first_logits(base, source), logits)
print(len(names), "vectors taken out; the same bits:", is_same)
assert is_same

# %% [markdown]
# How many parameters is that? A block of the encoder has one attention, so it has `l_k`, `l_v` and
# `l_ff`. A block of the decoder has two, self-attention and cross-attention, so it has five
# vectors. With attention width $a$ = heads $\times$ head width,
#
# $$n_{enc}(2a + F) + n_{dec}(4a + F).$$
#
# **Predict.** The embedded model has 2 + 2 blocks, $a$ = 64 and F = 192:
# $2 \cdot 320 + 2 \cdot 448$ = **1,536**, or 0.7% of its parameters. t5-base has 12 + 12 blocks,
# $a$ = 768 and F = 3,072: $12 \cdot 4{,}608 + 12 \cdot 6{,}144$ = **129,024**, or 0.06%.
# `build_model` builds a model that has shapes but no weights, so nothing is downloaded.

# %%
from minia3.checkpoints.load import build_model
from minia3.model.t5 import T5Config

t5_base = T5Config(
    d_model=768,
    d_head=64,
    d_ff=3072,
    n_layers=12,
    n_decoder_layers=12,
    n_heads=12,
    vocab_size=32128,
)

model = minia3.load_model("tiny-t5")
counts = []
for network in (model, build_model(t5_base)):
    n_vectors = count(minia3.vectors(network).values())
    n_base = count(network.parameters()) - n_vectors
    counts.append(n_vectors)
    share = n_vectors / n_base
    print(f"{n_vectors:,} of {n_base:,}: {share:.2%}")
assert counts == [1_536, 129_024]

# %% [markdown]
# LLaMA has no encoder and no cross-attention, so the formula is $n(2g + F)$ with $g$ = key/value
# heads $\times$ head width. **Predict.** Llama-2-7B: $32\,(2 \cdot 4096 + 11008)$ = 614,400.
# Llama-3-8B is larger, but has 8 key/value heads in place of 32:
# $32\,(2 \cdot 1024 + 14336)$ = 524,288, which is *fewer*.

# %%
from minia3.model.llama import LlamaConfig

llama_2 = LlamaConfig(
    d_model=4096, d_head=128, d_ff=11008, n_layers=32, n_heads=32, n_kv_heads=32, vocab_size=32000
)
llama_3 = LlamaConfig(
    d_model=4096, d_head=128, d_ff=14336, n_layers=32, n_heads=32, n_kv_heads=8, vocab_size=128256
)
counts = []
for config in (llama_2, llama_3):
    llama_vectors = minia3.vectors(build_model(config))
    counts.append(count(llama_vectors.values()))
print("Llama-2-7B and Llama-3-8B:", counts)
assert counts == [614_400, 524_288]

# %% [markdown]
# ## 4. Training the vectors
#
# The embedded model was trained on pairs of facts *followed by a question*: "same colour ?",
# "different place ?", "compare ." and so on. The task `same-colour` gives it two facts and **no
# question**, and expects "yes" if the colours agree. The model has never seen such an input, and
# nothing in it says that colour is meant.

# %%
tokenizer = minia3.load_tokenizer("tiny-t5")
task = minia3.load_task("same-colour")
for row in task.train[:3]:
    answer = row["choices"][row["label"]]
    print(row["input"], "->", answer)
print(len(task.train), "rows to train on,", len(task.test), "to test")

# %% [markdown]
# To answer, the model says how likely "no" and "yes" are, and the likelier one is its answer.
# `model.start` reads the source, `repeat(2)` continues each source twice, and `minia3.logprobs`
# returns $\log p(\text{token} \mid \text{source, earlier tokens})$ for each token of the two
# answers (the word and the end token). The log-probability of an answer is the sum over its tokens.
# Sources have different lengths, so shorter ones are padded, and the mask says which tokens are
# real.


# %%
answers = torch.tensor([tokenizer.encode("no"), tokenizer.encode("yes")])


def answer_logprobs(model, rows, adapter=None):
    """Return (B, 2): the log-probability of "no" and of "yes" for each row."""
    pad_id = tokenizer.pad_id
    sources = [torch.tensor(tokenizer.encode(row["input"])) for row in rows]
    source_BM = nn.utils.rnn.pad_sequence(sources, batch_first=True, padding_value=pad_id)
    mask_BM = source_BM != pad_id
    state = model.start(source_BM, mask_BM, adapter).repeat(2)
    target = answers.repeat(len(rows), 1)
    return minia3.logprobs(model, state, target).sum(dim=1).view(-1, 2)


def labels(rows):
    return torch.tensor([row["label"] for row in rows])


@torch.no_grad()
def accuracy(model, rows):
    is_right = answer_logprobs(model, rows).argmax(dim=1) == labels(rows)
    return is_right.float().mean().item()


# %% [markdown]
# **Predict.** Unasked, the model can only guess. Half of the labels are "yes", so guessing is
# right in 50% of 1,024 rows, with a standard deviation of $\sqrt{0.25 / 1024}$ = 1.6 points: we
# expect 45 to 55%. But if we *do* ask, by adding the words "same colour ?", it answers nearly
# everything right, because it was trained on that. **The knowledge is there. What is missing is
# the question**, and this is what (IA)^3 will have to supply.

# %%
asked_rows = []
for row in task.test:
    asked_rows.append(row | {"input": row["input"] + " same colour ?"})
unasked = accuracy(model, task.test)
asked = accuracy(model, asked_rows)
print(f"unasked {unasked:.1%}, asked {asked:.1%}")
assert 0.45 < unasked < 0.55
assert asked > 0.95

# %% [markdown]
# The loss is the *cross-entropy* of the right answer: a softmax over the two log-probabilities says
# how likely each answer is if there are no others, and the loss is minus the logarithm of what the
# right one gets. Where does it start? A model that knows how little it knows would give both
# answers 1/2, and have a loss of $\log 2 \approx 0.69$. Ours is not so modest: it is *sure*, and
# wrong half of the time.
#
# **Predict.** Let $d$ be the log-probability of "yes" minus that of "no". The loss of a row is
# $\log(1 + e^{-d})$ if the label is "yes", and $\log(1 + e^{d})$ if it is "no". If $d$ says nothing
# about the label, each label comes with each $d$ equally often. So the mean of both losses predicts
# the start *without looking at a single label*.

# %%
with torch.no_grad():
    logp_NC = answer_logprobs(model, task.train)
d_N = logp_NC[:, 1] - logp_NC[:, 0]
loss_if_yes_N = F.softplus(-d_N)  # log(1 + exp(-d))
loss_if_no_N = F.softplus(d_N)
predicted_start = (loss_if_yes_N + loss_if_no_N).mean().item() / 2
start = F.cross_entropy(logp_NC, labels(task.train)).item()
print(f"predicted {predicted_start:.2f}, with the labels {start:.2f}")
assert 0.75 < start / predicted_start < 1.25
assert start > 2 * LOG_2

# %% [markdown]
# It starts a little below the prediction, because the guesses are a little better than chance.
# Now the training loop. It is the usual one: draw rows, compute the loss, get gradients, take a
# step, and let the learning rate fall to 0. `minia3.freeze` leaves only the vectors trainable. The
# optimizer is Adafactor, as in the paper: its step is *relative*, so at a rate of 0.01 a step moves
# a vector by at most 1% of its size (in the root mean square, RMS).

# %%
from minia3.training.optimizer import Adafactor


def train(model, optimizer, n_steps=300, batch_size=16):
    """Train on the rows of `task`, and return the loss of each step."""
    peak_rate = optimizer.param_groups[0]["lr"]
    random = torch.Generator().manual_seed(0)
    losses = []
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = peak_rate * (1 - step / n_steps)
        index_B = torch.randint(len(task.train), (batch_size,), generator=random)
        rows = [task.train[index] for index in index_B]
        loss = F.cross_entropy(answer_logprobs(model, rows), labels(rows))
        model.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


minia3.freeze(model)
trainable = list(minia3.vectors(model).values())
losses = train(model, Adafactor(trainable, 0.01))

# %% [markdown]
# **Predict.** 300 steps of 16 rows are about nine passes over 512 rows. If scaling is enough to
# ask the question, accuracy on the *test* rows rises from 50% to nearly what the model reached
# when it was asked: above 95%. The loss ends far below $\log 2$, lower than any guess can get.


# %%
def mean(values):
    return sum(values) / len(values)


trained = accuracy(model, task.test)
loss_at_start = mean(losses[:5])
loss_at_end = mean(losses[-50:])
print(f"loss {loss_at_start:.2f} at the start, {loss_at_end:.3f} at the end")
print(f"accuracy {unasked:.1%} before, {trained:.1%} after")
assert trained > 0.95
assert loss_at_end < LOG_2 / 5

# %% [markdown]
# The figure shows the loss of each step. The horizontal lines are the two losses that we predicted:
# that of the start, and that of an honest guess.

# %%
figure, ax = plt.subplots(figsize=(6.5, 3))
ax.axhline(predicted_start, color=GREY, linestyle=":", label="predicted start")
ax.axhline(LOG_2, color=GREY, linestyle="--", label="log 2: an honest guess")
ax.plot(losses, color=ACCENT, linewidth=1, label="(IA)^3, rate 0.01")
ax.set(xlabel="step", ylabel="loss", ylim=(0, None))
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# 1,536 factors were enough. The model could compare colours before, and the factors make it do so
# unasked. T-Few, the recipe of the paper, takes the mean over the tokens of a choice in this loss,
# and adds two others. `minia3.training.losses` has them, and `python train.py` uses them. As a
# check: on an *untrained* base, which has nothing to redirect, `train.py` ends at 48 to 50%
# (`data/README.md`).

# %% [markdown]
# ## 5. What the vectors became
#
# The figure shows each of the sixteen vectors: extremes (thin), the middle half of its entries
# (thick) and the median (point). All entries started at 1, the dashed line. Values (`l_v`) and
# feed-forwards (`l_ff`) moved most, some entries to half or to one and a half, and the medians
# stayed near 1: the vectors *choose among* entries; they do not turn up the volume of everything.
#
# **Predict.** How far can a vector have moved? A step at rate $r$ moves it by at most $r$ times its
# RMS. As long as the RMS stays about 1, all steps together move it by at most
# $0.01 \cdot 301 / 2 \approx 1.5$. Gradients of different batches partly cancel, so it will be far
# less: at most half of that.

# %%
figure, ax = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
names = list(minia3.vectors(model))
quantiles = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
changes = []
for place, vector in enumerate(minia3.vectors(model).values()):
    l_D = vector.detach()[0]
    low, quarter, median, three_quarters, high = l_D.quantile(quantiles).tolist()
    ax.hlines(place, low, high, color=GREY, linewidth=1)
    ax.hlines(place, quarter, three_quarters, color=ACCENT, linewidth=5, alpha=0.6)
    ax.plot(median, place, "o", color=ACCENT, markersize=5)
    mean_square = (l_D - 1).square().mean()
    changes.append(mean_square.sqrt().item())
ax.axvline(1, color=GREY, linestyle="--", linewidth=1)
ax.set_yticks(range(len(names)), names, fontsize=8)
ax.invert_yaxis()
ax.set_xlabel("factor")
plt.show()
largest = max(changes)
print(f"largest RMS change: {largest:.2f}")
assert largest < 0.75

# %% [markdown]
# Which vectors does the task need? We reset some of them to 1, and look at the accuracy.
# **Predict:** if we reset the cross-attention's `l_v`, by which the decoder reads the facts, the
# accuracy falls. If we reset all vectors, it is that of the base.


# %%
@torch.no_grad()
def reset(part):
    """Return a copy of the model in which all vectors named `part` are ones."""
    reset_model = copy.deepcopy(model)
    for name, vector in minia3.vectors(reset_model).items():
        if part in name:
            vector.fill_(1.0)
    return reset_model


parts = ["attn.l_k", "attn.l_v", "cross.l_k", "cross.l_v", "l_ff", "encoder", "decoder", "blocks"]
accuracies = {}
for part in parts:
    accuracies[part] = accuracy(reset(part), task.test)
    print(f"without {part:<9} {accuracies[part]:.1%}")
assert accuracies["cross.l_v"] < trained
assert accuracies["blocks"] == unasked

# %% [markdown]
# The last line is without any vector, and is the base again. The lines before it say that in this
# run values and feed-forwards carry the task, and keys hardly matter.
#
# In the figure, two of the sixteen vectors moved least: `l_k` of the decoder's *self*-attention,
# one for each of its blocks. **Predict:** they do nothing at all for the first word of the answer.
# When the decoder writes it, it has one token to read, its own start token, and the softmax of a
# single score is 1 *whatever the score is*. So if we reset the 64 entries of one of them to 1,
# $\log p(\text{word})$ stays the same, up to rounding (below 1e-4). They moved because of the end
# token that follows the word. It is nearly certain, so its gradients are tiny, but Adafactor
# divides a gradient by its own size.

# %%
source = torch.tensor([tokenizer.encode(task.test[0]["input"])])
trained_logp = first_logits(model, source).log_softmax(dim=-1)
differences = []
for block in (0, 1):
    reset_model = reset(f"decoder.blocks.{block}.attn.l_k")
    logp = first_logits(reset_model, source).log_softmax(dim=-1)
    differences.append(gap(logp, trained_logp))
print(f"log p(first word) moves by {max(differences):.0e}")
assert max(differences) < 1e-4

# %% [markdown]
# ## 6. Merging
#
# A vector multiplies the output of a matrix, entry by entry, so it can be multiplied into the
# rows of the matrix once and for all. `l_ff` multiplies the *input* of the down projection, so it
# goes into the columns:
#
# $$l_k * (W_k x) = (\mathrm{diag}(l_k)\,W_k)\,x, \qquad
#   W_{down}\,(l_{ff} * h) = (W_{down}\,\mathrm{diag}(l_{ff}))\,h.$$
#
# `minia3.merge` returns a new model with ordinary weights and vectors of ones, which computes
# what the adapted model computes, at the cost of the base. **Predict.** On paper both are equal.
# In a computer, rounding happens at different places. A float64 has 53 significant bits, so one
# rounding costs about $2^{-53} \approx$ 1e-16 of a number. The log-probabilities go down to about
# -10, and about 100 roundings follow each other: we expect 1e-14 to 1e-13, and certainly less than
# 1e-12. On the way we save the adapter and load it again: 1,536 parameters of 4 bytes are 6,144
# bytes, and the file also has a header with their names, in the format of PEFT, Hugging Face's
# library of adapters.

# %%
with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary) / "adapter"
    minia3.save_adapter(model, folder)
    n_bytes = (folder / "adapter_model.safetensors").stat().st_size
    precise = minia3.load_model("tiny-t5", dtype=torch.float64)
    minia3.load_adapter(precise, folder)
merged = minia3.merge(precise)

with torch.no_grad():
    applied_NC = answer_logprobs(precise, task.test)
    merged_NC = answer_logprobs(merged, task.test)
difference = gap(applied_NC, merged_NC)
print(f"{n_bytes:,} bytes on disk; merged against applied: {difference:.0e}")
assert 6_144 < n_bytes < 10_000
assert difference < 1e-12
for vector in minia3.vectors(merged).values():
    assert torch.all(vector == 1)

# %% [markdown]
# LLaMA has a trap here. Its keys are rotated *after* the matrix, and merging puts `l_k` *before*
# the rotation, into $W_k$. So the adapted model must scale before the rotation, too, and minia3
# does. **Predict.** Scaling before and scaling after are different functions, because a rotation
# mixes the two entries of a pair. They agree only if both entries of each pair have the same
# factor: then the pair is scaled as a whole, which commutes with turning it.

# %%
k_K = torch.randn(16, dtype=torch.float64)
l_k = 1 + 0.3 * torch.randn(16, dtype=torch.float64)
l_of_pairs = l_k[:8].repeat(2)  # entries i and i + 8 are a pair

turned_K = turn(k_K, position=5)
difference = gap(turn(l_k * k_K, position=5), l_k * turned_K)
difference_of_pairs = gap(turn(l_of_pairs * k_K, position=5), l_of_pairs * turned_K)
print(f"any factors: {difference:.2f}")
print(f"equal in each pair: {difference_of_pairs:.0e}")
assert difference > 0.01
assert difference_of_pairs < 1e-12

# %% [markdown]
# ## 7. Eight tasks in one batch
#
# Merging is for one task. For many tasks, keep one frozen model, and give each vector one *row*
# per task. A batch says which row each example wants, and one lookup and one multiplication serve
# them all. Eight copies of the embedded model would be $8 \cdot 218{,}112$ parameters; eight rows
# are $8 \cdot 1{,}536$.
#
# As a stand-in for eight tasks, we make eight adapters on the way from the base to our trained
# one: row $a$ is $1 + \frac{a}{7}(l - 1)$. Then we put *one* text eight times into *one* batch, a
# text that the base gets wrong. **Predict:** row 0 gives the wrong answer, row 7 the right one, and
# somewhere between them the sign of right minus wrong changes.

# %%
eight = minia3.load_model("tiny-t5", n_adapters=8)
share_A1 = torch.arange(8).unsqueeze(1) / 7
with torch.no_grad():
    for name, vector in minia3.vectors(eight).items():
        trained_D = minia3.vectors(model)[name][0]
        vector.copy_(1 + share_A1 * (trained_D - 1))

for row in task.test:
    if accuracy(base, [row]) == 0:
        break
answer = row["choices"][row["label"]]
with torch.no_grad():
    logp_AC = answer_logprobs(eight, [row] * 8, adapter=torch.arange(8))
right = row["label"]
right_minus_wrong_A = logp_AC[:, right] - logp_AC[:, 1 - right]
print(row["input"], "->", answer)
print("right minus wrong, rows 0 to 7:")
print(right_minus_wrong_A)
assert right_minus_wrong_A[0] < 0
assert right_minus_wrong_A[7] > 0

# %% [markdown]
# Does a mixed batch give what separate batches give? On paper, yes: no row reads another row's
# text or vectors. **Predict.** Matrix products of other sizes may add in a different order. A
# float32 has 24 significant bits: one rounding of a log-probability of -10 costs
# $10 \cdot 2^{-24} \approx$ 6e-7, and 100 of them perhaps ten times as much: about 1e-5, and less
# than 1e-4. In float64 it shrinks by $2^{29}$: below 1e-12. (If all products happen to add in the
# same order, the difference is exactly 0. This depends on the processor.)

# %%
mixed_rows = task.test[:32]
adapter_B = torch.arange(32) % 8


@torch.no_grad()
def mixed_against_separate(model):
    mixed_BC = answer_logprobs(model, mixed_rows, adapter_B)
    separate_BC = torch.zeros_like(mixed_BC)
    for adapter in range(8):
        rows = mixed_rows[adapter::8]
        separate_BC[adapter::8] = answer_logprobs(model, rows, adapter)
    return gap(mixed_BC, separate_BC)


difference_32 = mixed_against_separate(eight)
difference_64 = mixed_against_separate(copy.deepcopy(eight).double())
print(f"float32: {difference_32:.0e}   float64: {difference_64:.0e}")
assert difference_32 < 1e-4
assert difference_64 < 1e-12

# %% [markdown]
# The library does all of this in one call, too. `rank` says which of some texts is the likeliest,
# `generate` writes one, and both take an adapter per text. **Predict:** the base (row 0) and the
# trained adapter (row 7) answer the same text differently.

# %%
prompts = [row["input"], row["input"]]
rows_of_vectors = torch.tensor([0, 7])
replies = minia3.generate(eight, tokenizer, prompts, adapter=rows_of_vectors, max_new_tokens=4)
print("row 0 writes:", replies[0])
print("row 7 writes:", replies[1])
assert replies[0] != answer
assert replies[1] == answer

# %% [markdown]
# ## 8. LoRA, and where (IA)^3 falls behind
#
# LoRA (Hu et al. 2021, [arXiv 2106.09685](https://arxiv.org/abs/2106.09685)) also freezes the
# model. It adds a low-rank matrix to a weight, $W + \frac{\alpha}{r} B A$, where $A$ has $r$ rows
# and $B$ has $r$ columns. It merges as (IA)^3 does. But it has more parameters, and in a mixed
# batch each example needs two matrix products of its own in place of one multiplication.
#
# What does this buy? Rows scaled by $\mathrm{diag}(l)$ keep their direction, and low-rank matrices
# add *new* directions. **Predict.** Let $W$ have orthonormal rows, and let the task be to exchange
# two of them. If nothing is done, the squared error is $|w_1 - w_2|^2 + |w_2 - w_1|^2 = 4$. The
# best scaling of a row towards an orthogonal one is 0, which leaves $|w_2|^2 + |w_1|^2 = 2$: half
# of the error. Rank 1 suffices to do it exactly, because the change is $(e_1 - e_2)(w_2 - w_1)^T$.

# %%
W = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64)).Q
goal = W.clone()
goal[[0, 1]] = W[[1, 0]]

# Least squares, row by row. The rows of W have length 1.
best_l = (W * goal).sum(dim=1)
u, s, v = torch.linalg.svd(goal - W)
rank_1 = s[0] * torch.outer(u[:, 0], v[0])

error = (goal - W).square().sum()
error_ia3 = (goal - best_l.unsqueeze(1) * W).square().sum()
error_lora = (goal - (W + rank_1)).square().sum()
print("no adapter:", error)
print("(IA)^3:    ", error_ia3)
print("LoRA:      ", error_lora)
assert abs(error - 4) < 1e-9
assert abs(error_ia3 - 2) < 1e-9
assert error_lora < 1e-9

# %% [markdown]
# This is a limit of one matrix. A network has many, with nonlinear functions between them, so it
# says where scaling needs a detour. It does not prove that there is a task that a network cannot
# learn.
#
# The weakness that you will meet first is speed. T-Few's learning rate is 0.003, and T-Few trains
# models of billions of parameters for 1,000 steps. We train (IA)^3 at this rate, and LoRA beside
# it, each for 300 steps. (LoRA gets AdamW, because Adafactor's steps are relative and LoRA's $B$
# starts at 0.)
#
# **Predict.** LoRA of rank 8 on the query and value matrices has
# $8 \cdot (64 + 64)$ parameters per matrix, times 2 matrices, times 6 attentions = 12,288.
# For (IA)^3, what counts is the sum of the rates. At 0.003 it is $0.003 \cdot 150 = 0.45$ over the
# whole run. The run of chapter 4 had covered as much after $t$ steps, with
# $0.01\,(t - t^2/600) = 0.45$: $t \approx 49$. So the slow run should *end* about where the first
# run was at step 49.

# %%
from minia3.adapters.lora import add_lora

slow = minia3.load_model("tiny-t5")
minia3.freeze(slow)
optimizer = Adafactor(list(minia3.vectors(slow).values()), 0.003)
slow_losses = train(slow, optimizer)

lora = minia3.load_model("tiny-t5")
add_lora(lora, rank=8)
trainable = [parameter for parameter in lora.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trainable, lr=0.003, weight_decay=0.0)
lora_losses = train(lora, optimizer)
print("parameters of LoRA:", count(trainable))
assert count(trainable) == 12_288


# %% [markdown]
# Single batches are noisy, so we compare means over 20 steps: the slow run's last 20, and the
# first run's around step 49.

# %%
loss_of_slow_run = mean(slow_losses[-20:])
loss_at_step_49 = mean(losses[39:59])
print(f"loss: slow run {loss_of_slow_run:.2f}, first run at step 49 {loss_at_step_49:.2f}")
assert 1 / 4 < loss_of_slow_run / loss_at_step_49 < 4

slow_accuracy = accuracy(slow, task.test)
lora_accuracy = accuracy(lora, task.test)
print(f"(IA)^3, rate 0.01:  {trained:.1%}")
print(f"(IA)^3, rate 0.003: {slow_accuracy:.1%}")
print(f"LoRA, rate 0.003:   {lora_accuracy:.1%}")
assert slow_accuracy < trained - 0.05
assert lora_accuracy > 0.95

# %% [markdown]
# As predicted, the slow run ends about where the first run was at step 49. LoRA has learned the
# task in the same 300 steps. For (IA)^3 this is a matter of the rate, not a limit of the method on
# this task. (In the figure, the dashed line is again $\log 2$.)

# %%
figure, ax = plt.subplots(figsize=(6.5, 3))
for series, color, name in (
    (slow_losses, "#f4a582", "(IA)^3, rate 0.003"),
    (losses, ACCENT, "(IA)^3, rate 0.01"),
    (lora_losses, "#343a40", "LoRA, rate 0.003"),
):
    smooth = torch.tensor(series).unfold(0, 10, 1).mean(dim=1).tolist()
    ax.plot(range(10, 301), smooth, color=color, label=name)
ax.axhline(LOG_2, color=GREY, linestyle="--", linewidth=1)
ax.set(xlabel="step", ylabel="loss (mean of 10)", ylim=(0, None))
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ## What to take away
#
# - (IA)^3 multiplies keys, values and inner activations by learned factors. It starts as an exact
#   copy, it has one parameter for hundreds or thousands of the model's, it merges exactly, and
#   it serves many tasks in one batch.
# - It rescales what the matrices compute, and adds no direction to any of them. Here this was
#   enough, because the base knew how to compare colours.
# - Choose the learning rate first. At the paper's 0.003, 300 steps were too few here. The 1,000 of
#   `python train.py` are enough for this task, but not for a harder one, as the
#   [studies](studies.md) of the embedded model show: "same colour or same place, but not both"
#   stays at 50% at 0.003 and reaches 97% at 0.03. LoRA's median over five seeds is 91%.
# - All of this is one tiny model and one language of 56 words. It shows how the method works. It
#   does not show how well the method works on your task.
#
# Read on in `minia3/model/ia3.py` and `minia3/model/blocks.py`, which you can now read from top
# to bottom. The [README](../README.md#where-things-are) says what comes after them. To train on
# real models: `python train.py --model t5-base --task rte`.
