"""What the benchmarks of `engine` and `serving` generate with: a random Llama of 29M parameters.

    python -m benchmarks.models FOLDER NUM_ADAPTERS

writes `FOLDER/base` (float32), `FOLDER/base-4bit` (mlx-lm's quantization) and `FOLDER/adapters/aN`
(LoRA of rank 8 on all linears, as mlx-lm's trainer writes them), with nothing trained. It is a
process of its own, so that the one that plays the clients never imports MLX.

Text is words of four letters, one token each. The rows of the embedding that belong to other tokens
are zero, and it is tied: such a token's logit is 0, far from the largest. So every answer is as
long as it may be, on either side, and every token is text at once.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

NUM_LAYERS = 8
HIDDEN = 512
INTERMEDIATE = 1536
VOCABULARY = 8192
RANK = 8
SPECIAL_TOKENS = ("<|pad|>", "<|start|>", "<|end|>")
BYTES = 256
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "num_hidden_layers": NUM_LAYERS,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": VOCABULARY - 1,
}

Prompt = tuple[int, ...]
"""Token ids; each is a word of `words()`."""


def write_models(folder: Path, num_adapters: int) -> None:
    """Write the models and adapters in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.models", str(folder), str(num_adapters)]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True)


def adapter_folders(folder: Path, num_adapters: int) -> dict[str, Path]:
    """The adapters of `write_models`, by name."""
    return {f"a{number}": folder / "adapters" / f"a{number}" for number in range(num_adapters)}


@cache
def words() -> tuple[str, ...]:
    """The words, each with the space before it; a word's token id is its place here."""
    num_words = VOCABULARY - len(SPECIAL_TOKENS) - BYTES - 2 * len(_syllables())
    pairs = itertools.product(_syllables(), repeat=2)
    return tuple(f" {a}{b}" for a, b in itertools.islice(pairs, num_words))


def make_prompts(seed: str, count: int, shortest: int = 32, longest: int = 64) -> list[Prompt]:
    """Prompts of random words, `shortest` to `longest` tokens; no two begin alike."""
    source = random.Random(seed)  # noqa: S311 - the same prompts for both sides
    first_words = source.sample(range(len(words())), count)
    return [
        (first, *source.choices(range(len(words())), k=source.randint(shortest, longest) - 1))
        for first in first_words
    ]


def to_text(prompt: Prompt) -> str:
    """The text that the tokenizer turns into exactly this prompt."""
    return "".join(words()[token] for token in prompt)


@cache
def _syllables() -> tuple[str, ...]:
    return tuple(map("".join, itertools.product("bcdfghjklmnpqrstvwxz", "aeiou")))


def _write_base(folder: Path) -> Any:
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs

    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(CONFIG))
    embedding = model.model.embed_tokens
    is_word = mx.arange(VOCABULARY) < len(words())
    embedding.weight = mx.where(is_word[:, None], embedding.weight, 0)
    write_checkpoint(folder, dict(tree_flatten(model.parameters())), CONFIG)
    return model


def _write_quantized(folder: Path, model: Any) -> None:
    from mlx.utils import tree_flatten
    from mlx_lm.utils import quantize_model

    model, config = quantize_model(model, dict(CONFIG), group_size=64, bits=4)
    write_checkpoint(folder, dict(tree_flatten(model.parameters())), config)


def write_checkpoint(folder: Path, weights: dict[str, Any], config: dict[str, Any]) -> None:
    import mlx.core as mx

    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    _write_json(folder / "config.json", config)
    _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    """A byte-level BPE whose merges make syllables, then syllables after a space, then words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    space = "Ġ"  # as byte-level BPE writes it
    spelled = [word.replace(" ", space) for word in words()]
    merges = [(syllable[0], syllable[1]) for syllable in _syllables()]
    merges += [(space, syllable) for syllable in _syllables()]
    merges += [(word[:3], word[3:]) for word in spelled]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*spelled, *letters, *_syllables(), *(space + one for one in _syllables())]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise SystemExit(f"the tokenizer has {tokenizer.get_vocab_size()} tokens")
    (sample,) = make_prompts("tokenizer", 1)
    if tuple(tokenizer.encode(to_text(sample)).ids) != sample:
        raise SystemExit("the tokenizer does not read its words as one token each")
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": SPECIAL_TOKENS[0],
            "eos_token": SPECIAL_TOKENS[-1],
            "model_max_length": CONFIG["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        },
    )


def _write_adapter(folder: Path, base: Path, seed: int) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    source = np.random.default_rng(seed)
    keys_and_values = HIDDEN // 2
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN, keys_and_values),
        "self_attn.v_proj": (HIDDEN, keys_and_values),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
        "mlp.up_proj": (HIDDEN, INTERMEDIATE),
        "mlp.down_proj": (INTERMEDIATE, HIDDEN),
    }
    weights = {}
    for layer, (module, (num_in, num_out)) in itertools.product(range(NUM_LAYERS), shapes.items()):
        name = f"model.layers.{layer}.{module}"
        a = source.standard_normal((num_in, RANK), np.float32)
        weights[f"{name}.lora_a"] = a / np.sqrt(np.float32(num_in))
        b = source.standard_normal((RANK, num_out), np.float32)
        weights[f"{name}.lora_b"] = b * np.float32(0.1)
    save_file(weights, folder / "adapters.safetensors")
    _write_json(
        folder / "adapter_config.json",
        {
            "fine_tune_type": "lora",
            "num_layers": NUM_LAYERS,
            "lora_parameters": {"rank": RANK, "scale": 2.0, "dropout": 0.0},
            "model": str(base),
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1))


def _main(folder: Path, num_adapters: int) -> None:
    from mlops.hardware import ensure_blas

    ensure_blas()
    model = _write_base(folder / "base")
    for number, path in enumerate(adapter_folders(folder, num_adapters).values()):
        _write_adapter(path, folder / "base", seed=number)
    _write_quantized(folder / "base-4bit", model)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
