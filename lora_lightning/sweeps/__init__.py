"""Sweeps: many runs at once, one after the other or on one base, and what they say together.

What starts and watches runs knows neither torch nor Lightning, so that it is there at once and takes no memory of a
job's. What trains many adapters together is in :mod:`lora_lightning.sweeps.packed`.
"""
