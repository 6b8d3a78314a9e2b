"""The paper's study as a list of trainings, run, resumed and reported by ``tools/reproduce_paper.py``."""
