"""Weights of few bits, shown as the floats that they stand for."""
