"""What surrounds the training loop of train.py.

The loop works on a few plain objects, and each answers one question. `run`: where is the run
written, and how is it stopped? `group`: which model do these cells share? `cell`: how far is one
adapter? `batch`: whose example is this? `log`: what goes into the next line of metrics.jsonl?
Around these objects stand the decisions of a run (`flags` and `rules`, `grid`, `assignment`,
`drawing`, `methods`, `device`, `prepare`), the equations (`losses`, `optimizer`), what is written
while it trains (`run_folder`, `checkpoint`), and what is said at its beginning and its end
(`announce`, `results`, `report`, `model_card`).
"""
