"""What only a GPU can show: `python -m tests.gpu`. It has not been run on one yet.

place      where the checks run, and random models there
numbers    bfloat16 beside float32, attention's kernels, compiled steps, waiting, copies
runs       train.py in processes: kills, memory that runs out, all cards together
measures   tokens per second, memory, the largest model that trains
"""
