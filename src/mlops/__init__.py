"""Take a trained model to a verified, versioned BentoML package, and serve it fast on MLX.

Importing this package imports nothing heavy: every library is loaded by the module that uses it.
"""

__version__ = "0.1.0"
