"""Attention and log-probabilities: the two operations whose cost decides the cost of RPT.

Each file holds one operation. What is here is plain PyTorch: the reference that runs on every device.
"""
