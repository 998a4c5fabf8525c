"""The architecture of a Nucleotide Transformer as in its Hugging Face `config.json`, and the published sizes."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bioscan_jax.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Hyper-parameters of one Nucleotide Transformer, named as in `config.json`.

    Example:
        >>> PRESETS["nt-v2-50m"].hidden_size, PRESETS["nt-v2-50m"].max_tokens
        (512, 2048)
        >>> import dataclasses
        >>> dataclasses.replace(PRESETS["tiny-v1"], num_hidden_layers=3).resolve_layer(-1)
        3
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    position_embedding_type: Literal["absolute", "rotary"]
    token_dropout: bool
    add_bias_fnn: bool | None = None
    """None in v1 (GELU feed-forward with biases); in v2, whether the gated feed-forward has biases."""
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 1
    mask_token_id: int = 2
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.position_embedding_type == "rotary" and self.head_dim % 2:
            raise InputError(f"rotary positions need an even head size, not {self.head_dim}")

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def gated(self) -> bool:
        """Whether the feed-forward is SiLU-gated (v2) rather than GELU (v1)."""
        return self.add_bias_fnn is not None

    @property
    def feed_forward_bias(self) -> bool:
        """Whether the feed-forward layers have biases."""
        return self.add_bias_fnn is not False

    @property
    def max_tokens(self) -> int:
        """Maximum row length in tokens, CLS included; positions count from pad_token_id + 1, as in RoBERTa."""
        return self.max_position_embeddings - self.pad_token_id - 1

    @property
    def layer_matmul_parameters(self) -> int:
        """Parameters of one layer that are multiplied with every token."""
        up = 2 if self.gated else 1
        return 4 * self.hidden_size**2 + (up + 1) * self.hidden_size * self.intermediate_size

    def forward_flops(self, tokens: int, width: int, layers: int | None = None) -> int:
        """Returns the matrix-product FLOPs of a forward pass over `tokens` tokens in rows of `width`."""
        depth = self.num_hidden_layers if layers is None else layers
        return tokens * depth * (2 * self.layer_matmul_parameters + 4 * width * self.hidden_size)

    def resolve_layer(self, layer: int) -> int:
        """Returns the number of layers to run for hidden state `layer`, which counts from the end if negative.

        Raises:
            InputError: `layer` is out of range.
        """
        depth = self.num_hidden_layers + 1 + layer if layer < 0 else layer
        if not 0 <= depth <= self.num_hidden_layers:
            raise InputError(
                f"--embed.layer {layer} is outside the hidden states 0 to {self.num_hidden_layers} "
                f"(-1 is the last) of this model"
            )
        return depth

    def to_json(self) -> str:
        """Returns a `config.json` that `read_config` and transformers read."""
        known = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        extra = {"architectures": ["EsmForMaskedLM"], "model_type": "esm"} | _SUPPORTED_VALUES
        return json.dumps(dict(sorted((known | extra).items())), indent=2) + "\n"


# Keys with one supported value, which does not affect the forward pass; other values raise.
_SUPPORTED_VALUES: dict[str, Any] = {
    "attention_probs_dropout_prob": 0.0,
    "emb_layer_norm_before": False,
    "hidden_dropout_prob": 0.0,
    "is_folding_model": False,
    "tie_word_embeddings": False,
}
_ALSO_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "emb_layer_norm_before": (None,),
    "esmfold_config": (None,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "model_type": ("esm",),
    "rope_theta": (10000, 10000.0),
    "vocab_list": (None,),
}
# Keys that do not affect the arrays.
_IRRELEVANT = frozenset(
    {
        *("_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "id2label"),
        *("label2id", "output_attentions", "output_hidden_states", "problem_type", "return_dict", "torch_dtype"),
        *("transformers_version", "use_cache"),
    }
)


def parse_config(raw: dict[str, Any], where: str) -> TransformerConfig:
    """Parses a `config.json` dictionary strictly.

    Args:
        raw: The parsed JSON.
        where: Name of the file in error messages.

    Raises:
        InputError: A key is unknown, missing, or has a value this library does not implement.
    """
    fields = {f.name: f for f in dataclasses.fields(TransformerConfig)}
    known = {k: v for k, v in raw.items() if k in fields}
    for key, value in raw.items():
        if key in fields or key in _IRRELEVANT:
            continue
        allowed = _ALSO_SUPPORTED.get(key, ())
        if key in _SUPPORTED_VALUES:
            allowed = (_SUPPORTED_VALUES[key], *allowed)
        if not allowed:
            raise InputError(f"{where}: unknown key {key!r} = {value!r}; is this a Nucleotide Transformer?")
        if value not in allowed:
            raise InputError(f"{where}: {key} = {value!r} is not supported, only {allowed[0]!r}")
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in known]
    if missing:
        raise InputError(f"{where}: no {', '.join(missing)}; is this a Nucleotide Transformer?")
    for key, value in known.items():
        wanted = fields[key].type
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if (wanted is int and not (number and value == int(value) and value >= 0)) or (wanted is float and not number):
            raise InputError(f"{where}: {key} = {value!r} is not a number of the right kind")
    if known["position_embedding_type"] not in ("absolute", "rotary"):
        raise InputError(f"{where}: position_embedding_type = {known['position_embedding_type']!r} is not supported")
    return TransformerConfig(**known)


def read_config(directory: Path) -> TransformerConfig:
    """Reads `config.json` of a checkpoint directory strictly.

    Raises:
        InputError: The file is missing or not JSON, or as for `parse_config`.
    """
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: not found; a checkpoint directory holds config.json, vocab.txt, weights") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); download it again") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: not a JSON object; download it again")
    return parse_config(raw, str(path))


def _v1(layers: int, hidden: int, heads: int) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=4105,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=1002,
        position_embedding_type="absolute",
        token_dropout=True,
    )


def _v2(layers: int, hidden: int, heads: int) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=4107,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=2050,
        position_embedding_type="rotary",
        token_dropout=False,
        add_bias_fnn=False,
    )


PRESETS: dict[str, TransformerConfig] = {
    "nt-v1-500m": _v1(24, 1280, 20),
    "nt-v1-2.5b": _v1(32, 2560, 20),
    "nt-v2-50m": _v2(12, 512, 16),
    "nt-v2-100m": _v2(22, 512, 16),
    "nt-v2-250m": _v2(24, 768, 16),
    "nt-v2-500m": _v2(29, 1024, 16),
    "tiny-v1": _v1(2, 64, 4),
    "tiny-v2": _v2(2, 64, 4),
}
"""The six published sizes, and two tiny ones of the same families for demonstrations and tests."""
