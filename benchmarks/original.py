"""The original recipe's training step in plain PyTorch, for comparisons.

Written from the paper's equations (PPlug, arXiv 2409.11901, section 3) on Hugging Face's models:
every array is padded to its maximum, every history item goes through the whole projector, and a
decoder-only LLM makes logits at every place. A `lean` recipe does none of these: it is PyTorch with
what in our step is algorithm, so that what remains between the two is the compiler's. Where our
plug leaves the input encoder as it is, so does the lean one, and is given the inputs' vectors.
"""

from collections.abc import Sequence
from typing import NamedTuple

import ml_collections
import numpy as np
import torch
import transformers
from torch.nn import functional as F

from pplug_jax.feed.batches import Assemble
from pplug_jax.plugs.persona import Projector, UserEmbedder

SOFT = 2  # the instruction embedding and the persona
PROMPT, TARGET, QUERY, HISTORY = 266, 128, 256, 512  # the maxima; soft tokens are in the prompt
Planned = tuple[int, int, np.ndarray]  # step, bucket and the examples' indices: `batches.Plan`'s
IGNORED = -100  # transformers' label where nothing is predicted


class Plug(torch.nn.Module):
    """[I ; P] with the weights of `ours`.

    encoder: of the inputs, trained; None: these come as vectors. lean: project the weighted sum,
    not every item.
    """

    def __init__(self, encoder: transformers.BertModel | None, ours: UserEmbedder, lean: bool):
        super().__init__()
        self.encoder, self.scale, self.lean = encoder, float(ours.scale[...]), lean
        self.projector = copied(ours.projector)
        self.instruction_projector = copied(ours.instruction_projector)
        self.instruction = torch.nn.Parameter(torch.tensor(np.asarray(ours.instruction[...])))

    def forward(
        self,
        query: torch.Tensor,
        query_mask: torch.Tensor,
        history: torch.Tensor,
        history_mask: torch.Tensor,
    ) -> torch.Tensor:
        """(B, Q) twice, (B, H, E) and (B, H), no history empty -> (B, 2, D)."""
        vectors = query if self.encoder is None else self._encoded(query, query_mask)
        scores = torch.einsum("be,bhe->bh", F.normalize(vectors, dim=-1), history)
        weights = scores.masked_fill(~history_mask, -torch.inf).softmax(dim=1)
        first, gelu, second = self.projector
        units = gelu(first(history))
        if self.lean:
            persona = second(torch.einsum("bh,bhu->bu", weights, units))
        else:
            persona = torch.einsum("bh,bhd->bd", weights, second(units))
        instruction = self.instruction_projector(self.instruction).expand_as(persona)
        return self.scale * torch.stack([instruction, persona], dim=1)

    def _encoded(self, query: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.encoder(query, mask).last_hidden_state[:, 0]


def copied(ours: Projector) -> torch.nn.Sequential:
    """Linear - GELU - Linear with our weights."""
    layers = []
    for kernel, bias in ((ours.up, ours.up_bias), (ours.down, ours.down_bias)):
        layer = torch.nn.Linear(*kernel.shape)
        state = {"weight": np.asarray(kernel[...]).T, "bias": np.asarray(bias[...])}
        layer.load_state_dict({name: torch.tensor(x) for name, x in state.items()})
        layers.append(layer)
    return torch.nn.Sequential(layers[0], torch.nn.GELU(), layers[1])


class Inputs(NamedTuple):
    """B rows. tokens, mask: (B, L), the LLM's without the soft tokens.

    labels: (B, T) of an encoder-decoder, or (B, 2 + L). query, query_mask: (B, Q). history,
    history_mask: (B, H, E) and (B, H).
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    query: torch.Tensor
    query_mask: torch.Tensor
    history: torch.Tensor
    history_mask: torch.Tensor


def padded(rows: Sequence[np.ndarray], width: int, fill: int = 0) -> torch.Tensor:
    """Rows (n, ...) of different n, padded on the right to (B, width, ...)."""
    first = torch.from_numpy(rows[0])
    made = torch.full((len(rows), width, *first.shape[1:]), fill, dtype=first.dtype)
    for i, row in enumerate(rows):
        made[i, : len(row)] = torch.from_numpy(row)
    return made


class Recipe:
    """Trains `plug`, whose soft tokens stand behind the first `prefix_length` tokens of the LLM's.

    data: whose examples and history store are read. Dropout is off, as in ours.
    """

    def __init__(
        self,
        data: Assemble,
        llm: transformers.PreTrainedModel,
        plug: Plug,
        prefix_length: int,
        settings: ml_collections.ConfigDict,
    ):
        self.data, self.llm, self.plug = data, llm.eval().requires_grad_(False), plug.eval()
        self.causal = not llm.config.is_encoder_decoder
        self.prefix_length, self.clip_norm = prefix_length, settings.clip_norm
        self.optimizer = torch.optim.AdamW(
            plug.parameters(),
            settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def inputs(self, indices: np.ndarray) -> Inputs:
        """The examples' batch."""
        examples = [self.data.tokenized[i] for i in indices]

        def width(rows: Sequence[np.ndarray], most: int) -> int:
            return max(map(len, rows)) if self.plug.lean else most

        def pad(rows: Sequence[np.ndarray], most: int) -> tuple[torch.Tensor, torch.Tensor]:
            there = [np.ones(len(row), bool) for row in rows]
            return padded(rows, width(rows, most)), padded(there, width(rows, most))

        targets = [example.target.astype(np.int64) for example in examples]
        if self.causal:  # the answer stands right behind the prompt
            texts = [np.concatenate([x.prompt, x.target]) for x in examples]
            tokens, mask = pad(texts, PROMPT - SOFT + TARGET)
            hidden = [np.full(SOFT + len(x.prompt), IGNORED) for x in examples]
            targets = [np.concatenate(parts) for parts in zip(hidden, targets, strict=True)]
            labels = padded(targets, SOFT + tokens.shape[1], IGNORED)
        else:
            tokens, mask = pad([x.prompt for x in examples], PROMPT - SOFT)
            labels = padded(targets, width(targets, TARGET), IGNORED)
        if self.plug.encoder is None:
            vectors = [self.data.queries.vectors(x.asked) for x in examples]
            query = torch.tensor(np.concatenate(vectors)), torch.zeros(len(examples), 0)
        else:
            query = pad([x.query for x in examples], QUERY)
        history = pad([self.data.store.vectors(x.history) for x in examples], HISTORY)
        device = self.plug.instruction.device
        return Inputs(*(x.to(device) for x in (tokens, mask, labels, *query, *history)))

    def loss(self, inputs: Inputs) -> torch.Tensor:
        """The mean over the target tokens."""
        embeds = self.llm.get_input_embeddings()(inputs.tokens)
        soft = self.plug(*inputs[3:]).to(embeds.dtype)
        before, behind = embeds[:, : self.prefix_length], embeds[:, self.prefix_length :]
        shown = {
            "inputs_embeds": torch.cat([before, soft, behind], dim=1),
            "attention_mask": F.pad(inputs.mask, (SOFT, 0), value=True),
            "use_cache": False,
        }
        if not (self.causal and self.plug.lean):
            return self.llm(**shown, labels=inputs.labels).loss
        hidden, labels = self.llm.model(**shown).last_hidden_state[:, :-1], inputs.labels[:, 1:]
        there = labels != IGNORED
        return F.cross_entropy(self.llm.lm_head(hidden[there]).float(), labels[there])

    def step(self, planned: Planned) -> float:
        """One update; returns the loss before it."""
        return self.update(self.inputs(planned[2])).item()

    def update(self, inputs: Inputs) -> torch.Tensor:
        """The same of inputs that are there already; it may still be running."""
        loss = self.loss(inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.plug.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def places(self, planned: Planned) -> np.ndarray:
        """A batch's places of LLM, query and history, padding included; (3,)."""
        inputs = self.inputs(planned[2])
        answers = 0 if self.causal else inputs.labels.numel()
        text = SOFT * len(inputs.tokens) + inputs.tokens.numel() + answers
        return np.array([text, inputs.query_mask.numel(), inputs.history_mask.numel()])
