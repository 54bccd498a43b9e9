"""The campaign: what strangers, full disks and kills do to files, in numbers that grow on demand.

`python -m tests.hostile --cases N --kills K --faults --numbers M --seed S` prints one table. A case
follows from (seed, name, number) alone, and `--only NAME --number N` repeats it. (Not always in
"old bin": torch writes addresses of its memory into such a file. And a kill at a random moment
comes a little sooner or later.)

    damage   mutations.py says what happens to a file, damage_targets.py and program_targets.py
             what reading it must give then, and campaign.py runs the cases
    kills    deeds.py has the commands, and kills.py kills them and runs them again
    faults   faults.py: full disks, no descriptors, no memory, servers that misbehave ...
    numbers  numbers.py: random models of every family, compared with transformers and peft

Cases run in processes that are forked from one that has imported torch (processes.py).
The slow tests in this folder run a part of it, and .ci/run more, with another seed.
"""

import sys
from pathlib import Path

# What the tests share stands beside them, and `python -m tests.hostile` must find it, too.
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "tasks"), str(TESTS / "checkpoints")]
