"""The guide, as pages of Markdown: `pdoc bioscan_jax.guide` shows them.

.. include:: embedding.md
.. include:: naming.md
.. include:: training.md
.. include:: tables.md
.. include:: planning.md
.. include:: fleet.md
.. include:: cloud.md
.. include:: troubleshooting.md
.. include:: measured.md
.. include:: internals.md
.. include:: changelog.md
"""
