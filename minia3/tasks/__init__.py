"""From a data set to token ids.

`task` says what a task is, `known_tasks` reads the table of published tasks (tasks.json), and
`download` fetches their files. `prompts` turns a row into text, `row_files` reads the rows of a
file, `rows` checks them, and `splits` divides them into train, validation and test. `examples`
turns texts into token ids, and `batches` pads the ids to tensors. Read them in this order.

`user_rows` reads a user's rows. `split_files` and `library_data` find the files of a folder or of a
data set on the hub, and `row_files` leaves their formats to `csv_rows`, `json_rows` and
`table_rows`. `understanding` finds out which columns are the input and the answer, by their names
(`columns`) and by what the user says (`column_flags`), with `labels` for what the labels stand for.
`task_file` writes down what it takes to use an adapter.
"""
