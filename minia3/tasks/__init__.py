"""From a data set to token ids.

`task` says what a task is, `known_tasks` reads the table of published tasks (tasks.json), and
`download` fetches their files. `prompts` turns a row into text, `row_files` reads the rows of a
file, `rows` checks them, and `splits` divides them into train, validation and test. `examples`
turns texts into token ids, and `batches` pads the ids to tensors. Read them in this order.

`columns` understands which columns of a user's file are the input and the answer, with `labels` for
what its labels stand for, and `task_file` writes down what it takes to use an adapter.

`row_files` leaves the formats to `text_lines`, `json_rows` and `table_rows`. `split_files` and
`library_data` find the files of a folder or of a data set on the hub.
"""
