"""A whole model by the reference: the Hugging Face model with its attention replaced.

Norms, projections and rotary embeddings stay Hugging Face's own. A layer runs once for each
position that its queries take, with the model's own cosines and sines of those positions.
Needs transformers, and nothing of vLLM.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vllm_dca.reference.attention import (
    key_positions,
    query_positions,
    temperature,
    turned_attention,
    weigh,
)

_NAME = "dca_reference"


def prompt_logprobs(
    model_dir: str | Path,
    tokens: list[int],
    *,
    chunk_size: int | None = None,
    local_size: int | None = None,
    original_max_position_embeddings: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Log-probability of every token but the first, given those before it.

    Args:
        model_dir: a Hugging Face checkpoint of a decoder.
        tokens: the sequence.
        chunk_size: c; without it, ordinary attention.
        local_size: w.
        original_max_position_embeddings: switches the temperature on.
        dtype: of the whole forward pass.

    Returns:
        [len(tokens) - 1] in `dtype`.
    """
    logits, _ = forward(
        model_dir,
        tokens,
        chunk_size=chunk_size,
        local_size=local_size,
        original_max_position_embeddings=original_max_position_embeddings,
        dtype=dtype,
    )
    predicted = torch.tensor(tokens[1:])[:, None]
    return logits[:-1].log_softmax(-1).gather(1, predicted)[:, 0]


def forward(
    model_dir: str | Path,
    tokens: list[int],
    *,
    chunk_size: int | None = None,
    local_size: int | None = None,
    original_max_position_embeddings: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's forward pass; arguments as of `prompt_logprobs`.

    Returns:
        logits [len(tokens), vocab_size] and last hidden states [len(tokens), hidden_size],
        both in `dtype`.
    """
    layers = _Layers(chunk_size, local_size, original_max_position_embeddings)
    model = load(model_dir, layers.attention, dtype)
    with torch.inference_mode(), _rotary_calls(model, layers):
        # Which modules attend shows when they do.
        layers.ordinary = True
        model(torch.tensor([tokens[:1]]), use_cache=False)
        layers.ordinary = chunk_size is None
        for module in layers.attending:
            module.forward = layers.chunked(module.forward)
        output = model(torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
    return output.logits[0], output.hidden_states[-1][0]


def load(model_dir: str | Path, attention: Callable[..., Any], dtype: torch.dtype) -> Any:
    """A Hugging Face decoder with another attention, a function by transformers' interface.

    Its mask is None where that would be causal, and nothing else.
    """
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_NAME, attention)
    # Gives no mask where the mask is causal, and nothing else.
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    config = AutoConfig.from_pretrained(model_dir)
    has_tower = "vision_config" in type(config).sub_configs
    auto = AutoModelForImageTextToText if has_tower else AutoModelForCausalLM
    return auto.from_pretrained(
        model_dir,
        dtype=dtype,
        attn_implementation=_NAME,
        experts_implementation="eager",  # the default has no fp64
    ).eval()


class _Layers:
    """What all layers of a forward pass share.

    Attributes:
        attending: the modules that called for attention.
        ordinary: whether they get ordinary attention.
        region: 0, 1, 2 for a layer that runs with its queries' positions for keys of their own
            chunk, of the one before it, of earlier ones; None with its own positions.
        made_by: the calls of rotary modules, by the id of what they returned.
    """

    def __init__(
        self,
        chunk_size: int | None,
        local_size: int | None,
        original_max_position_embeddings: int | None,
    ) -> None:
        self.chunk_size, self.local_size = chunk_size or 0, local_size or 0
        self.original_max_position_embeddings = original_max_position_embeddings
        self.attending: list[torch.nn.Module] = []
        self.ordinary = True
        self.region: int | None = None
        self.is_masked = False
        self.turned: dict[int, torch.Tensor] = {}
        self.made_by: dict[int, tuple[Any, Callable[[], Any]]] = {}

    def attention(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """In place of transformers' own: [1, heads, tokens, head size] in, tokens first out."""
        if module not in self.attending:
            self.attending.append(module)
        query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        self.is_masked = attention_mask is not None
        if self.region is None and (self.ordinary or self.is_masked):
            hidden = None if attention_mask is None else ~attention_mask[0, 0]
            return ordinary(query, key, value, scale, hidden, softcap, s_aux)[None], None
        if self.region is None:
            self.turned = {}
        else:
            self.turned[self.region] = query
        if self.region != 0:
            return query.new_zeros(*query.shape[:-1], value.shape[-1])[None], None
        i = torch.arange(len(query))
        output = turned_attention(
            [self.turned[back] for back in (0, 1, 2)],
            key,
            value,
            chunk_len=self.chunk_size - self.local_size,
            factor=scale * temperature(i, self.original_max_position_embeddings),
            soft_cap=softcap,
            sinks=s_aux,
        )
        return output[None], None

    def chunked(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a layer that is DCA's where it sees all that came before."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.region = None
            output = run(*args, **kwargs)
            if self.ordinary or self.is_masked:
                return output
            # Last as its keys stand, which is where the queries stand in their own chunk.
            for self.region in (2, 1, 0):
                output = run(*self._moved(args), **self._moved(kwargs))
            self.region = None
            return output

        return forward

    def positions(self, own: torch.Tensor) -> torch.Tensor:
        """Where queries stand that are at these positions of the sequence."""
        if self.region is None:
            return own
        if self.region == 0:
            return key_positions(own, self.chunk_size, self.local_size)
        chunk_len = self.chunk_size - self.local_size
        key = own - own % chunk_len - self.region * chunk_len
        return query_positions(own, key, self.chunk_size, self.local_size)

    def _moved(self, arguments: Any) -> Any:
        """With the cosines and sines of the region's positions in place of the own ones."""
        if isinstance(arguments, dict):
            return {name: self._moved(value) for name, value in arguments.items()}
        if isinstance(arguments, list | tuple):
            return type(arguments)(self._moved(value) for value in arguments)
        if id(arguments) in self.made_by:
            return self.made_by[id(arguments)][1]()
        return arguments


@contextmanager
def _rotary_calls(model: torch.nn.Module, layers: _Layers) -> Iterator[None]:
    """Rotary modules take the positions of the layer's region, and can be asked again."""
    for module in model.modules():
        if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)):
            _remember(module, layers)
    yield
    layers.made_by.clear()


def _remember(rotary: Any, layers: _Layers) -> None:
    forward = rotary.forward
    signature = inspect.signature(forward)

    def at_positions(*args: Any, **kwargs: Any) -> Any:
        if layers.region is None:
            return forward(*args, **kwargs)
        call = signature.bind(*args, **kwargs)
        positions = layers.positions(call.arguments["position_ids"])
        kinds = rotary.rope_type
        kind = kinds[call.arguments["layer_type"]] if isinstance(kinds, dict) else kinds
        if kind == "dynamic":
            # Its own frequencies, however long the sequence: no distance is.
            rotary.max_seq_len_cached = float("inf")
            call.arguments["position_ids"] = torch.zeros_like(positions)
            forward(*call.args, **call.kwargs)
            rotary.max_seq_len_cached = float("inf")
        if kind == "longrope":
            # A position past the original window has it take the long factors.
            far = positions.new_full((*positions.shape[:-1], 1), 2**24)
            call.arguments["position_ids"] = torch.cat([positions, far], dim=-1)
            rows = forward(*call.args, **call.kwargs)
            return tuple(each[..., :-1, :] for each in rows)
        call.arguments["position_ids"] = positions
        return forward(*call.args, **call.kwargs)

    def remembered(*args: Any, **kwargs: Any) -> Any:
        made = at_positions(*args, **kwargs)
        several = made if isinstance(made, tuple) else (made,)
        for index, each in enumerate(several):

            def again(index: int = index) -> torch.Tensor:
                moved = at_positions(*args, **kwargs)
                return moved[index] if isinstance(moved, tuple) else moved

            # What was made is kept, or another tensor would get its id.
            layers.made_by[id(each)] = each, again
        return made

    rotary.forward = remembered


def ordinary(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    hidden: torch.Tensor | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Ordinary attention, of a layer with a window for instance.

    Args:
        query: [num_tokens, num_heads, head_size], rotated; key and value likewise.
        scale: factor on the dot products.
        hidden: [num_tokens, num_tokens] bool, the keys that a query does not see; without it,
            those after it.
        soft_cap: as of `turned_attention`; sinks likewise.
    """
    i = torch.arange(len(query))
    hidden = i > i[:, None] if hidden is None else hidden
    output = query.new_empty(*query.shape[:-1], value.shape[-1], dtype=value.dtype)
    for head in range(query.shape[1]):
        kv_head = head * key.shape[1] // query.shape[1]
        scores = (query[:, head] @ key[:, kv_head].T) * scale
        if soft_cap is not None:
            scores = soft_cap * (scores / soft_cap).tanh()
        sink = None if sinks is None else sinks[head]
        scores = scores.masked_fill(hidden, -torch.inf)
        output[:, head] = weigh(scores, value[:, kv_head], sink)
    return output
