"""The border: reading files that other programs wrote, and writing files that a kill cannot leave
half done.

`read` turns whatever goes wrong while a foreign file is read into a ValueError of one line,
`tensors` lists the tensors of a weight file without reading them, `write` replaces a file or a
whole folder at once, and `lock` lets only one process at a time write to a folder. This folder
imports nothing else of minia3, so everything else may use it.
"""
