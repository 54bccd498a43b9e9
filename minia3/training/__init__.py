"""Everything that the training loop of train.py needs besides a model and a task.

The loop works on a few plain objects, and each answers one question. `run`: where does the run
write, and how is it stopped and continued? `group`: which cells share a model? `cell`: how far is
one adapter? `batch`: which cell does an example belong to? `log`: what goes into the next line of
metrics.jsonl? Most of the other modules have one of these jobs, and docs/design.md has a line
about each module:

    read the flags                    command_line, config, flags, rules
    set up what the flags ask for     grid, assignment, drawing, methods, device, shards, prepare
    hold the equations                losses, loss_scale, optimizer
    plan the memory                   memory_plan, memory_fit, step_memory, evaluation_memory
    add up over processes             replicas
    keep and continue a run           run_folder, metrics_file, checkpoint, extension, signals
    print what the user sees          announce, results, doubts, report, shown_commands, model_card
"""
