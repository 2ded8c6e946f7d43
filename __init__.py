"""tokenfab: what one GPU kernel contributes to the price of a token.

Three rooms, imports pointing one way: ``costing`` -> ``bench`` -> ``kernels``.
"""

__version__ = "0.1.0"
