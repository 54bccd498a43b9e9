"""What a model is used for once it is loaded: scoring given texts, and writing new ones.

`scoring` comes first, because training needs it too: how likely a model finds a target. `decoding`
writes texts as `options` say, with the help of `sampling`, `beam_search` and `pieces`, and `turns`
ends the answers of a chat. `evaluation` and `metrics` say how good the answers are, and
`prediction` answers the rows of a file.

This folder imports `model`, `files` and `tasks`. It works for both architectures, and asks only
once which one it has: `scoring` reads a prompt and its only target in one pass if the model is a
LLaMA.
"""
