"""Proof and speed: the tolerance rule, the timing protocol, the measured limits, the rows and tables."""
