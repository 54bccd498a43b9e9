"""From a data set to token ids: what a task is, where its files come from, how its rows are read,
checked and split into train, validation and test, how a prompt turns a row into text, and how texts
become padded batches of ids.

Read in this order: task, known_tasks (with tasks.json), download, prompts, rows, splits, examples,
batches.
"""
