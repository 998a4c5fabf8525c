"""DNA barcodes to vectors with the Nucleotide Transformer, in JAX.

The public names are listed in `__init__.pyi`. Each is imported when it is first used (PEP 562), so that
`import bioscan_jax` is quick and starts no JAX backend.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
