"""Masked language models scored as densities of texts: any model and tokenizer with the calls of `transformers`.

A sub-word is a token here. Those that the tokenizer adds (begin, end, padding) are always visible and never scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bayes_mpt.diagnostics import disagreement, replicate_error
from bayes_mpt.estimators.candidates import Candidate
from bayes_mpt.estimators.table import comparison_table
from bayes_mpt.language.texts import Copies, Text, copies_of, list_of, token_ids
from bayes_mpt.masks import (
    FixedRate,
    LeaveOneOut,
    Policy,
    RandomState,
    UniformSize,
    require_lml,
    torch_generator,
)
from bayes_mpt.runtime.serial import methods_take_turns, takes_turns
from bayes_mpt.score import RateCurve

__all__ = ["MaskedLanguageModel", "TextScores", "compare_language_models"]

MASKS = UniformSize(16)
RATES = tuple(r / 20 for r in range(1, 20))
CLOSE = 64  # roundings of logits
N_TRIALS = 8  # tokens in the middle of three, which show what a model looks at
MAX_PADDING = 0.01  # of the vocabulary: rows that an embedding has beyond it to be of a round size
MAX_LENGTH = 10**9  # a tokenizer that knows no limit says 1e30


@dataclass(frozen=True)
class TextScores:
    """Area under the masked curve of each text, with its error."""

    score: NDArray[np.float64]
    """(N,) nats."""
    score_se: NDArray[np.float64]
    """(N,) standard errors over masks; NaN where there is one replicate."""
    se: float
    """Standard error over masks of ``total``."""
    n_tokens: NDArray[np.int64]
    """(N,) tokens scored."""
    diagnostics: dict[str, Any] = field(default_factory=dict)
    """``totals`` (R,) nats of all texts by replicate. Along chains each order is a replicate, and there are besides
    ``order_sd``, the standard deviation between orders, root mean square over texts, and ``log_mean_exp``, total nats
    of the texts under the mixture of their random orders, a normalised density."""

    @property
    def total(self) -> float:
        """Sum over texts, nats."""
        return float(self.score.sum())


@methods_take_turns()
class MaskedLanguageModel:
    """What a masked language model says of whole texts, which are never shown to it in full.

    Its conditionals need not fit together to one joint density: along an order o of a text's T tokens

        log p_o(x) = sum_t log p(x_o(t) | x_o(<t))

    is the log of a normalised density for every o (of token sequences of that length, where the model puts nothing on
    its special tokens; a little below one otherwise), and differs between orders. The score is the mean over orders,
    the area under the masked curve; it is at most the log-density of the mixture over orders.

    Texts are strings, or tensors or lists of token ids with the special tokens as the model wants them (padding is
    taken out). A mask token in a text is missing: never visible and never scored. An unknown token is scored as
    such. In the run the model is in evaluation mode.

    Parameters
    ----------
    model : torch.nn.Module
        Any ``...ForMaskedLM`` of `transformers`, or what is called as ``model(input_ids=, attention_mask=).logits``.
    tokenizer : PreTrainedTokenizerBase
        Its own: their vocabularies must agree.
    batch_tokens : int, default=2048
        Tokens in one run of the model, padding included. Masked copies of texts of about the same length run side by
        side, as many as fit, and at least one. This bounds memory, of which the logits of scored tokens take most: at
        most ``batch_tokens`` times the vocabulary, twice.

    Examples
    --------
    >>> import numpy as np, pytest
    >>> transformers = pytest.importorskip("transformers")
    >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "sat"]
    >>> tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    >>> config = transformers.BertConfig(
    ...     vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    ... )
    >>> found = MaskedLanguageModel(transformers.BertForMaskedLM(config), tokenizer).estimate(
    ...     ["a cat sat", "a cat"]
    ... )
    >>> found.n_tokens
    array([3, 2])
    >>> (abs(found.score / found.n_tokens + np.log(8)) < 0.3).tolist()  # it knows nothing
    [True, True]
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_tokens: int = 2048):
        self.model = model
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens

    def estimate(
        self,
        texts: Sequence[Any],
        *,
        masks: Policy | None = None,
        n_replicates: int = 8,
        random_state: RandomState = 0,
    ) -> TextScores:
        """Estimate the area under the masked curve of every text.

        Parameters
        ----------
        texts : list of str or of token ids
            At least one token each, and no more than the model has places for.
        masks : Policy, optional
            With ``is_lml``; by default 16 masks of `UniformSize`. Along a `PermutationChain` a text takes as many
            runs as it has tokens, and it is found how far orders disagree.
        n_replicates : int, default=8
            R, independent draws of masks for every text; standard errors need two.
        random_state : int, torch.Generator or None
            For the draws. Models that see the same tokens see the same masks.

        Returns
        -------
        TextScores

        Raises
        ------
        ValueError
            If the policy's expectation is not the area, or a text cannot be scored.
        """
        masks = MASKS if masks is None else masks
        require_lml(masks, "a score of texts")
        return self._estimate(self._read(texts), masks, n_replicates, random_state)

    def score_samples(
        self,
        texts: Sequence[Any],
        *,
        masks: Policy | None = None,
        n_replicates: int = 8,
        random_state: RandomState = 0,
    ) -> NDArray[np.float64]:
        """The score of every text (N,), nats; `estimate` gives it with its error."""
        return self.estimate(texts, masks=masks, n_replicates=n_replicates, random_state=random_state).score

    def pseudo_log_likelihood(self, texts: Sequence[Any]) -> NDArray[np.float64]:
        """Each token given all others, added up: (N,) nats. Not a density, and above the score of most texts."""
        return self._scores(self._read(texts), LeaveOneOut(), 1, None)[0]

    def masked_curve(
        self,
        texts: Sequence[Any],
        rates: ArrayLike = RATES,
        *,
        n_replicates: int = 8,
        random_state: RandomState = 0,
    ) -> RateCurve:
        """Nats a hidden token against the share of hidden tokens, m = round(rate T) and at least 1.

        A text weighs as much as it has tokens, so that the area is the score of all texts over their tokens.

        Parameters
        ----------
        texts : list of str or of token ids
            As in `estimate`.
        rates : array-like
            Rising, in (0, 1].
        n_replicates : int, default=8
            Masks of each text at each rate.
        random_state : int, torch.Generator or None
            For the masks.

        Returns
        -------
        RateCurve
        """
        read, generator = self._read(texts), torch_generator(random_state)
        rate = np.asarray(rates, dtype=float)
        if rate.ndim != 1 or not len(rate) or not (np.diff(rate, prepend=0) > 0).all() or rate[-1] > 1:
            raise ValueError(f"rates must rise within (0, 1], got {rates!r}")
        n_tokens = sum(t.n_tokens for t in read)
        by_rate = np.stack(
            [self._scores(read, FixedRate(float(r)), n_replicates, generator).sum(1) / n_tokens for r in rate]
        )  # (rates, R)
        return RateCurve(rate, by_rate.mean(1), np.array([replicate_error(v) for v in by_rate]))

    # ------------------------------------------------------------------------------------------------------- inside

    def _estimate(
        self, texts: list[Text], masks: Policy, n_replicates: int, random_state: RandomState
    ) -> TextScores:
        scores = self._scores(texts, masks, n_replicates, random_state)  # (R, N)
        found: dict[str, Any] = {"totals": scores.sum(1)}
        if masks.chains:
            found = disagreement(torch.from_numpy(scores))
        found |= {"masks": repr(masks), "n_replicates": n_replicates}
        return TextScores(
            scores.mean(0),
            np.array([replicate_error(s) for s in scores.T]),
            replicate_error(found["totals"]),
            np.array([t.n_tokens for t in texts]),
            found,
        )

    def _read(self, texts: Sequence[Any]) -> list[Text]:
        """Token ids, and which of them are a text's own."""
        tokenizer = self.tokenizer
        if tokenizer.mask_token_id is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no mask token: it does not belong to a masked model"
            )
        n_tokens, n_rows = len(tokenizer), self.model.get_input_embeddings().weight.shape[0]
        if not n_tokens <= n_rows <= (1 + MAX_PADDING) * n_tokens:
            raise ValueError(
                f"the tokenizer has {n_tokens} tokens and the model's embedding {n_rows} rows: they do not belong "
                "together"
            )
        texts = list_of(texts)
        # An unknown word is a word.
        named = {
            getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "bos", "eos", "pad", "mask")
        }
        special = set(tokenizer.all_special_ids) - ({tokenizer.unk_token_id} - named)
        limit = self._limit()
        read = []
        for i, text in enumerate(texts):
            if isinstance(text, str):
                text = tokenizer(text, truncation=False, verbose=False)["input_ids"]
            ids = token_ids(text, i)
            ids = ids[ids != tokenizer.pad_token_id] if tokenizer.pad_token_id is not None else ids
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < n_rows:
                raise ValueError(f"token ids must be in 0..{n_rows - 1}: text {i} has others")
            own = (~torch.isin(ids, torch.tensor(sorted(special)))).nonzero()[:, 0]
            if not len(own):
                raise ValueError(f"text {i} has no token to score: {texts[i]!r}")
            if len(ids) > limit:
                raise ValueError(
                    f"text {i} has {len(ids)} tokens with the special ones, and the limit of "
                    f"{type(self.model).__name__} is {limit}: split it, or leave it out"
                )
            read.append(Text(ids, own))
        return read

    def _limit(self) -> int:
        """Tokens of the longest text."""
        network = self.model
        places = getattr(getattr(network, "config", None), "max_position_embeddings", MAX_LENGTH)
        limit = int(min(self.tokenizer.model_max_length, places, MAX_LENGTH))
        for name, module in self.model.named_modules():
            if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
                # RoBERTa and its kin number places from behind that of padding
                first = 0 if module.padding_idx is None else module.padding_idx + 1
                limit = min(limit, module.num_embeddings - first)
        return limit

    @torch.no_grad()
    def _scores(
        self, texts: list[Text], policy: Policy, n_replicates: int, random_state: RandomState
    ) -> NDArray[np.float64]:
        """Weighted sums of the log predictives of hidden tokens (R, N), nats; each chain is a replicate of its own."""
        if n_replicates < 1:
            raise ValueError(f"n_replicates must be at least 1, got {n_replicates}")
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {self.batch_tokens}")
        generator = torch_generator(random_state)
        total: dict[tuple[int, int], float] = {}  # by replicate and text
        with _evaluating(self.model):
            self._refuse_other_kinds(texts[0])
            self._examine(texts)
            for batch in self._batches(texts, policy, n_replicates, generator):
                by_copy = self._run(texts, batch)
                for piece, found in zip(batch, by_copy.split([len(p.hidden) for p in batch]), strict=True):
                    at = piece.replicate, piece.text
                    total[at] = total.get(at, 0.0) + float(found.sum())
        rows = max(r for r, _ in total) + 1
        return np.array([[total[r, i] for i in range(len(texts))] for r in range(rows)])

    def _refuse_other_kinds(self, text: Text) -> None:
        """Refuse a model without logits of each token, and a causal one, by what three tokens change at both sides."""
        if _is_known_masked(self.model):
            return
        name, n_rows = type(self.model).__name__, self.model.get_input_embeddings().weight.shape[0]
        others = torch.arange(min(N_TRIALS, n_rows))
        ids = torch.full((1 + len(others), min(3, self._limit())), int(text.ids[text.own[0]]))
        ids[1:, ids.shape[1] // 2] = others
        device = self.model.get_input_embeddings().weight.device
        out = self.model(input_ids=ids.to(device), attention_mask=torch.ones_like(ids).to(device))
        logits = getattr(out, "logits", None)
        if logits is None or logits.shape[:2] != ids.shape or logits.shape[2] < len(self.tokenizer):
            got = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
            raise ValueError(
                f"{name} is no masked language model: of {ids.shape[1]} tokens in {len(ids)} texts it gives {got}, in "
                f"place of {(*ids.shape, len(self.tokenizer))}. Load it by AutoModelForMaskedLM"
            )
        if ids.shape[1] < 3:
            return
        before, _, after = (logits[1:] - logits[0]).abs().amax((0, 2)).tolist()
        rounding = CLOSE * torch.finfo(logits.dtype).eps * float(logits.abs().max())
        if before == 0 < after or before <= rounding < after:
            raise ValueError(
                f"{name} is a causal language model: what it says at a token looks at the tokens before it only, and "
                "is of the next token. Masked scores need a model that looks at both sides, such as BERT"
            )

    def _examine(self, texts: list[Text]) -> None:
        """Refuse a model that looks at padding in spite of the attention mask, where texts are padded."""
        by_length = {
            len(text.ids): i for i, text in enumerate(texts) if 2 * len(text.ids) <= self.batch_tokens
        }
        if len(by_length) < 2:
            return  # none is padded
        pair = []
        for i in (by_length[min(by_length)], by_length[max(by_length)]):
            all_hidden = torch.ones(1, texts[i].n_tokens, dtype=torch.bool)
            pair.append(Copies(i, 0, all_hidden, all_hidden.double()))
        alone, beside = self._run(texts, pair[:1])[0], self._run(texts, pair)[0]
        eps = torch.finfo(self.model.get_input_embeddings().weight.dtype).eps
        if abs(alone - beside) > eps**0.5 * (1 + abs(alone)):
            raise ValueError(
                f"{type(self.model).__name__} looks at padding in spite of the attention mask: set batch_tokens=1, "
                "so that texts are run one by one"
            )

    def _batches(
        self, texts: list[Text], policy: Policy, n_replicates: int, generator: torch.Generator
    ) -> Iterator[list[Copies]]:
        """Masked copies, as many as a run takes; the longest texts first, and none padded to more than its batch's."""
        batch: list[Copies] = []
        room = 0
        for i in sorted(range(len(texts)), key=lambda i: -len(texts[i].ids)):
            for draw in range(n_replicates):
                for copies in copies_of(i, draw, policy.draw(texts[i].n_tokens, generator)):
                    start = 0
                    while start < len(copies.hidden):
                        if not batch:
                            room = max(1, self.batch_tokens // len(texts[i].ids))
                        part = slice(start, start + room)
                        batch.append(copies._replace(hidden=copies.hidden[part], weight=copies.weight[part]))
                        room -= len(batch[-1].hidden)
                        start += len(batch[-1].hidden)
                        if not room:
                            yield batch
                            batch = []
        if batch:
            yield batch

    def _run(self, texts: list[Text], batch: list[Copies]) -> Tensor:
        """sum_i weight_i log p(x_i | x_visible) of every copy (B,)."""
        n_copies = sum(len(p.hidden) for p in batch)
        longest = max(len(texts[p.text].ids) for p in batch)
        pad = self.tokenizer.pad_token_id
        truth = torch.full((n_copies, longest), self.tokenizer.mask_token_id if pad is None else pad)
        attention = torch.zeros_like(truth)
        hidden = torch.zeros_like(truth, dtype=torch.bool)
        weight = torch.zeros_like(truth, dtype=torch.float64)
        start = 0
        for piece in batch:
            rows, text = slice(start, start + len(piece.hidden)), texts[piece.text]
            truth[rows, : len(text.ids)] = text.ids
            attention[rows, : len(text.ids)] = 1
            hidden[rows, text.own] = piece.hidden
            weight[rows, text.own] = piece.weight
            start = rows.stop
        device = self.model.get_input_embeddings().weight.device
        shown = truth.masked_fill(hidden, self.tokenizer.mask_token_id)
        row, place = weight.nonzero(as_tuple=True)  # the hidden tokens that are scored
        with _head_at(self.model, row.to(device), place.to(device)):
            logits = self.model(input_ids=shown.to(device), attention_mask=attention.to(device)).logits
        if logits.ndim == 3:  # (B, L, V): a head that is not reached so
            logits = logits[row.to(device), place.to(device)]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_prob = -torch.nn.functional.cross_entropy(logits, truth[row, place].to(device), reduction="none")
        return weight.new_zeros(n_copies).index_add_(0, row, weight[row, place] * log_prob.double().cpu())


@takes_turns
def compare_language_models(
    models: Mapping[str, MaskedLanguageModel],
    texts: Sequence[Any],
    *,
    masks: Policy | None = None,
    n_replicates: int = 8,
    random_state: RandomState = 0,
) -> pd.DataFrame:
    """Rank masked language models by their score of the same texts, which none of them should have been trained on.

    Models see the same masks, so that differences are far less noisy than scores.

    Parameters
    ----------
    models : dict of name to MaskedLanguageModel
        Their tokenizers must cut the texts into the same tokens.
    texts : list of str or of token ids
        As in `MaskedLanguageModel.estimate`, as all that follows.
    masks : Policy, optional
        With ``is_lml``.
    n_replicates : int, default=8
        Draws of masks.
    random_state : int, torch.Generator or None, default=0
        For the draws; the same for all models.

    Returns
    -------
    DataFrame
        Best first, columns as in `bayes_mpt.MarginalLikelihoodSearch`: ``lml`` the total score, ``lml_diff`` to the
        best, with ``mc_dse`` its standard error over masks and ``dse`` over texts, both of paired differences.

    Raises
    ------
    ValueError
        If the models do not score the same tokens.
    """
    if not isinstance(models, Mapping):
        raise TypeError(f"models must be a dict of names and models, got {type(models).__name__}")
    if not models:
        raise ValueError("nothing to compare: got an empty dict")
    masks = MASKS if masks is None else masks
    require_lml(masks, "a ranking of language models")
    read = {name: model._read(texts) for name, model in models.items()}
    tokens = [
        [m.tokenizer.convert_ids_to_tokens(t.ids[t.own].tolist()) for t in read[n]] for n, m in models.items()
    ]
    others = [name for name, found in zip(models, tokens, strict=True) if found != tokens[0]]
    if others:
        raise ValueError(
            f"not comparable: the tokenizers of {', '.join(map(repr, others))} split the texts into other tokens than "
            f"the tokenizer of {next(iter(models))!r}"
        )
    seed = torch_generator(random_state).initial_seed()
    found = []
    for name, model in models.items():
        scores = model._estimate(read[name], masks, n_replicates, seed)
        totals = scores.diagnostics["totals"]
        note = "area under the masked curve"
        found.append(Candidate(None, scores.total, scores.score, totals, scores.se, note=note))
    return comparison_table(list(models), found, "heldout")


def _is_known_masked(model: Any) -> bool:
    """Whether `transformers` lists the class as a masked language model and nothing else."""
    if not type(model).__module__.startswith("transformers."):
        return False
    from transformers.models.auto import modeling_auto as auto

    masked, causal = (
        set(getattr(auto, f"MODEL_FOR_{kind}_LM_MAPPING_NAMES").values()) for kind in ("MASKED", "CAUSAL")
    )
    name, config = type(model).__name__, model.config
    return name in masked - causal and not getattr(config, "is_decoder", False)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """No dropout meanwhile; then every module as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _head_at(model: Any, row: Tensor, place: Tensor) -> Iterator[None]:
    """Project on the vocabulary at these places alone, which is most of the work of a small model."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    # (B, L, d) to (n, d)
    handle = head.register_forward_pre_hook(lambda _, args: (args[0][row, place], *args[1:]))
    try:
        yield
    finally:
        handle.remove()
