"""Is a pretrained masked language model better than a fresh one, and by how much at each mask rate?

The model of human antibody heavy chains that sapiens 1.0.5 carries (RoBERTa, 0.57 million parameters; a token is an
amino acid; trained with label smoothing, so that it is never quite sure) against the same network as initialised, on
eight heavy chains joined here from germline V, D and J segments and two of approved drugs. The area under the masked
curve is a lower bound on a log-density of the whole chain; a fresh network is flat near minus the log of its
vocabulary. Writes masked_curve_language_model.png.

    python examples/masked_curve_language_model.py [--output DIR]
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from bayes_mpt.language import MaskedLanguageModel, compare_language_models
from bayes_mpt.masks import PermutationChain
from bayes_mpt.plots import MaskedCurveDisplay

V = {
    "1-2": "QVQLVQSGAEVKKPGASVKVSCKASGYTFTGYYMHWVRQAPGQGLEWMGWINPNSGGTNYAQKFQGRVTMTRDTSISTAYMELSRLRSDDTAVYYCAR",
    "1-69": "QVQLVQSGAEVKKPGSSVKVSCKASGGTFSSYAISWVRQAPGQGLEWMGGIIPIFGTANYAQKFQGRVTITADESTSTAYMELSSLRSEDTAVYYCAR",
    "3-7": "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYWMSWVRQAPGKGLEWVANIKQDGSEKYYVDSVKGRFTISRDNAKNSLYLQMNSLRAEDTAVYYCAR",
    "3-23": "EVQLLESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAK",
    "3-30": "QVQLVESGGGVVQPGRSLRLSCAASGFTFSSYGMHWVRQAPGKGLEWVAVISYDGSNKYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAK",
    "4-34": "QVQLQQWGAGLLKPSETLSLTCAVYGGSFSGYYWSWIRQPPGKGLEWIGEINHSGSTNYNPSLKSRVTISVDTSKNQFSLKLSSVTAADTAVYYCAR",
    "4-59": "QVQLQESGPGLVKPSETLSLTCTVSGGSISSYYWSWIRQPPGKGLEWIGYIYYSGSTNYNPSLKSRVTISVDTSKNQFSLKLSSVTAADTAVYYCAR",
    "5-51": "EVQLVQSGAEVKKPGESLKISCKGSGYSFTSYWIGWVRQMPGKGLEWMGIIYPGDSDTRYSPSFQGQVTISADKSISTAYLQWSSLKASDTAMYYCAR",
}
D = ("GYSSGWY", "DYGDY", "GIAAAG", "YYDSSGYYY")
J = ("YFDYWGQGTLVTVSS", "AFDIWGQGTMVTVSS", "NWFDPWGQGTLVTVSS", "YYGMDVWGQGTTVTVSS")
DRUGS = {
    "trastuzumab": "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYC"
    "SRWGGDGFYAMDYWGQGTLVTVSS",
    "adalimumab": "EVQLVESGGGLVQPGRSLRLSCAASGFTFDDYAMHWVRQAPGKGLEWVSAITWNSGHIDYADSVEGRFTISRDNAKNSLYLQMNSLRAEDTAVYYC"
    "AKVSYLSTASSLDYWGQGTLVTVSS",
}
CHAINS = {name: v + D[i % 4] + J[(i + i // 4) % 4] for i, (name, v) in enumerate(V.items())} | DRUGS

LAYERS, HEADS = 4, 8
RENAMED = {  # fairseq's names
    "embed_tokens": "embeddings.word_embeddings",
    "embed_positions": "embeddings.position_embeddings",
    "emb_layer_norm": "embeddings.LayerNorm",
    "layers": "encoder.layer",
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}


def checkpoint(chain: str = "vh") -> Path | None:
    """Weights for heavy ("vh") or light ("vl") chains, where the package is installed; it is never imported."""
    found = find_spec("sapiens")
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(found.submodule_search_locations[0]) / "models" / "v1" / f"checkpoint_{chain}.pt"
    return path if path.exists() else None


def tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<pad>", "</s>", "<unk>", *"ACDEFGHIKLMNPQRSTVWY", "<mask>"]
    found = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    found.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {
        f"{k}_token": f"<{v}>" for k, v in {"pad": "pad", "unk": "unk", "mask": "mask", "cls": "s"}.items()
    }
    return PreTrainedTokenizerFast(tokenizer_object=found, sep_token="</s>", **names)


def network(weights: Path | None = None) -> Any:
    """As initialised, or with the weights of a checkpoint."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=25,
        hidden_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=256,
        max_position_embeddings=146,
        layer_norm_eps=1e-5,
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    model = RobertaForMaskedLM(config).eval()
    if weights is None:
        return model
    with torch.serialization.safe_globals([argparse.Namespace]):
        theirs = torch.load(weights, weights_only=True, map_location="cpu")["model"]
    ours = {}
    for name, value in theirs.items():
        name = name.removeprefix("decoder.")
        if name.startswith("sentence_encoder."):
            name = "roberta." + name.removeprefix("sentence_encoder.")
            for old, new in RENAMED.items():
                name = name.replace(f".{old}.", f".{new}.")
        elif name in ("lm_head.weight", "lm_head.bias"):
            name = name.replace("lm_head", "lm_head.decoder")
        ours[name] = value
    ours["lm_head.bias"] = ours["lm_head.decoder.bias"]
    missing, unexpected = model.load_state_dict(ours, strict=False)
    # token types: fairseq has none, and what they add must be nothing
    assert not unexpected and all("token_type" in name or "position_ids" in name for name in missing), (
        missing,
        unexpected,
    )
    torch.nn.init.zeros_(model.roberta.embeddings.token_type_embeddings.weight)
    return model


def main(output: Path) -> None:
    weights = checkpoint()
    if weights is None or find_spec("transformers") is None:
        print(
            'The model comes with sapiens: pip install transformers, and pip install --no-deps "sapiens==1.0.5"'
        )
        return
    cut, texts = tokenizer(), list(CHAINS.values())
    models = {
        "pretrained": MaskedLanguageModel(network(weights), cut),
        "fresh": MaskedLanguageModel(network(), cut),
    }
    n = sum(map(len, texts))
    print(f"{len(texts)} heavy chains, {n} residues; log of the vocabulary {np.log(25):.3f}\n")
    table = compare_language_models(models, texts)
    print(table[["lml", "lml_diff", "mc_dse", "se"]].round(1).to_string())
    print("\n            nats a residue: area   one hidden   nats a chain between orders (sd)")
    for name, model in models.items():
        # on one chain: a run for every residue of every order
        orders = model.estimate(texts[:1], masks=PermutationChain(), n_replicates=4).diagnostics["order_sd"]
        one = model.pseudo_log_likelihood(texts).sum() / n
        print(f"{name:12}{table.lml[name] / n:22.3f}{one:13.3f}{orders:20.1f}")

    _, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, model in models.items():
        curve = model.masked_curve(texts, n_replicates=4)
        MaskedCurveDisplay(curve).plot(ax, label=f"{name}: {curve.area:.2f} nats a residue")
    ax.axhline(-np.log(25), color="0.5", ls=":", lw=1, label="uniform over the vocabulary")
    ax.set(title="Area under the masked curve of ten antibody heavy chains", xlim=(0, 1))
    ax.legend(loc="center left", bbox_to_anchor=(0.0, 0.4))
    ax.figure.savefig(output / "masked_curve_language_model.png", dpi=110)
    print(f"\nwrote {output / 'masked_curve_language_model.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path())
    main(parser.parse_args().output)
