"""The campaign: what strangers, full disks and kills do to files, in numbers that grow on demand.

`python -m tests.hostile --cases N --seed S` damages files of every format that minia3 reads, and
prints one table. A case follows from (seed, target, number) alone, and `--only TARGET --number N`
repeats it. (Not always in "old bin": torch writes addresses of its memory into such a file.)
mutations.py says what happens to a file, damage_targets.py what reading it must give
then, and campaign.py runs the cases in processes of their own. test_damaged_files.py runs some
thousands of cases with the slow tests.
"""
