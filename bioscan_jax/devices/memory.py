"""The memory that a compiled program needs on each device."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True, kw_only=True)
class NeededMemory:
    """The compiler's report, in bytes per device."""

    arguments: int
    outputs: int
    aliased: int
    """Outputs stored in the memory of donated arguments."""
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """Memory that the program needs at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def needed_memory(compiled: jax.stages.Compiled) -> NeededMemory | None:
    """Returns what the compiler says of a program's memory; None where the platform does not say.

    Example:
        >>> import jax.numpy as jnp
        >>> memory = needed_memory(jax.jit(jnp.sin).lower(jnp.ones(256)).compile())
        >>> memory is not None and memory.arguments
        1024
    """
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    return NeededMemory(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
    )
