"""What every trainer needs and nobody reads first: ranks, checkpoints, packing, logs, flags."""
import os

# Read by GNU OpenMP when torch is loaded, so commands import plumbing before torch: how often a
# thread looks whether the others are done before it sleeps. By itself it looks for milliseconds
# after each small operation, and where another program needs a core, two of our threads then wait
# for each other on one: a step of the demo took 10 to 60 times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
