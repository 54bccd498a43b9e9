"""The command line of the package: `python -m minia3 {info,generate,predict,merge,...}`.

`main` has the parser and the exit codes. Every command is a module with a TITLE, an EXAMPLE,
`add_arguments(parser)` and `run(args)` (`train` has `main(words)` instead). Importing a command
does not import torch, because --help has to be quick: a command imports what it needs when it runs.
`results` reads the folders of runs for `table` and `plot`.
"""
