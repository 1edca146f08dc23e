"""A fuzzer: random models with random lives, the optimised one compared with the plain one at every call.

`case.py` says what a case is, `strategies.py` makes them, `layers.py`, `mutations.py` and `recording.py` bring them to
life, `lockstep.py` runs and compares one, `campaign.py` many, `reduce.py` makes those that fail small.
"""
