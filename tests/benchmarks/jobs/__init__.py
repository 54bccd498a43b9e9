"""Whole jobs, as processes from start to end, beside what people run with transformers and PEFT.

inputs.py makes what both sides read, processes.py starts and times them. training.py, labelling.py
and answering.py are the jobs, and sides/ has the scripts. command.py is the command line.
"""
