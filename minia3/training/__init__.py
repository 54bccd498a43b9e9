"""Everything that the training loop of train.py needs besides a model and a task.

The loop works on a few plain objects, and each answers one question. `run`: where does the run
write, and how is it stopped and continued? `group`: which cells share a model? `cell`: how far is
one adapter? `batch`: which cell does an example belong to? `log`: what goes into the next line of
metrics.jsonl? The other modules read the flags (`flags`, `rules`), set up what the flags ask for
(`grid`, `assignment`, `drawing`, `methods`, `device`, `prepare`), hold the equations (`losses`,
`optimizer`), keep the files of a run (`run_folder`, `checkpoint`), handle signals (`signals`), and
print what the user sees (`announce`, `results`, `report`, `command_lines`, `model_card`).
`memory_plan` computes how much memory a model takes to serve and to train.
"""
