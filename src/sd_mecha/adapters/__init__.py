"""Adapters as a result: extracted from two models, added up, brought to another rank, and measured.

The rank of each module may depend on values, so these are functions of their own rather than steps of a recipe. They
read weights layer by layer and hold nothing but the factors, which are small.
"""
