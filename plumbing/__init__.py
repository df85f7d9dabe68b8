"""What every trainer needs and nobody reads first: ranks, checkpoints, packing, logs, flags."""
import os

# Read by GNU OpenMP when torch is loaded, so commands import plumbing before torch: how often a
# thread looks whether the others are done before it sleeps. By itself it looks 300,000 times, for
# milliseconds after each small operation. Where another program keeps one of two cores busy, our
# two threads then wait for each other on one core, and a step of the demo took 3 to 50 times as
# long. A tenth of a step is what it costs where all cores are free.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
